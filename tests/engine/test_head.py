"""The small head: the embedding's products, turned and rounded; fitted to text, saved and read again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seavlm.engine import head, kernels
from seavlm.engine.bench import divergence
from seavlm.engine.engine import Engine
from seavlm.engine.int8 import Int8Runner
from seavlm.engine.quantize import Packed, map_weights
from seavlm.engine.vlm import load
from seavlm.manifest import read_manifest
from tests.engine.test_int8 import a_model, a_prompt, int8, read

PROMPT = a_prompt(0, 70, [])
pytestmark = pytest.mark.skipif(kernels.library() is None, reason="built without a C++ compiler")


def heads(width: int) -> tuple[Int8Runner, Int8Runner, np.ndarray, dict[str, np.ndarray]]:
    """A model with its own head and with a small one, what the head is given, and the small one's tensors.

    One channel is 60 times the others, as in the real model.
    """
    model = a_model(hidden_size=width)
    with torch.no_grad():
        model.language_model.norm.weight[3] = 60
    plain = int8(model)
    seen: list[np.ndarray] = []
    plain.observe = lambda x: seen.append(x.copy())
    read(Engine(plain, prefix_cache=False), PROMPT)
    plain.observe = None
    x = np.concatenate(seen)
    weights = plain._kept[0]
    tensors = dict(head.pack_head(Packed.stored(weights, "embedding"), x.T.astype(np.float64) @ x))
    return plain, Int8Runner(plain.config, weights | tensors), x, tensors


def rounded(x: np.ndarray) -> np.ndarray:
    groups = x.reshape(len(x), -1, 32)
    step = np.abs(groups).max(axis=-1, keepdims=True) / 127
    return (np.rint(groups / step) * step).reshape(x.shape)


@pytest.mark.parametrize("width", [96, 288])
def test_its_products_are_those_of_its_own_numbers(width: int) -> None:
    """Nearer than int8 inputs would come: what they leave over in the first columns is multiplied too."""
    plain, small, x, tensors = heads(width)
    turn = tensors["head.rotation"].astype(np.float32).transpose(1, 0, 2).reshape(width, width)
    np.testing.assert_allclose(turn.T @ turn, np.eye(width), atol=2e-3)
    names = [f"head.{i}" for i in range(3) if f"head.{i}.about" in tensors]
    parts = [Packed.stored(tensors, name).rows(np.arange(plain.embedding.n)) for name in names]
    matrix = np.concatenate(parts, axis=1)
    assert matrix.shape[1] == width and len(parts) == (2 if width == 96 else 3)
    (found,) = read(Engine(small, prefix_cache=False), PROMPT)
    (own,) = read(Engine(plain, prefix_cache=False), PROMPT)
    count = found.shape[1]
    wanted, coarse = (((y @ matrix.T)[:, :count]) for y in (x @ turn, rounded(x @ turn)))
    assert np.abs(found - wanted).mean() <= np.abs(coarse - wanted).mean() / 3
    assert np.abs(own - found).mean() <= 0.1 * own.std(), "the numbers are the embedding's, up to rounding"


def test_a_row_is_the_same_in_any_company() -> None:
    _, small, _, _ = heads(288)
    prompts = [a_prompt(1, 200, []), a_prompt(2, 7, []), a_prompt(3, 64, [])]
    alone = [read(Engine(small, prefix_cache=False), prompt)[0] for prompt in prompts]
    for rows in (100, 5):
        for found, wanted in zip(read(Engine(small, rows=rows), *prompts), alone, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_it_is_fitted_saved_and_read_again(cli: Callable, tmp_path: Path, root: Path) -> None:
    out = tmp_path / "small"
    done = cli("quantize", "nano", out, "--small-head")
    assert done.code == 0, done.err
    asked = cli("ask", root / "docs" / "elephant.png", "ນີ້ແມ່ນຫຍັງ?", "--model", out)
    assert asked.out.strip() == "ຊ້າງ", asked.err
    assert read_manifest(out)["recipe"] == {"weights": "int8", "small_head": True}
    assert "head.rotation" in map_weights(out)


@pytest.mark.slow
def test_the_real_model_loses_little(material: Any, cli: Callable, tmp_path: Path) -> None:
    """KL to the unrounded model, in nats, over the declaration in 11 languages."""
    out = tmp_path / "small"
    cli("quantize", material.gguf_270m, out, "--weights", "stored", "--small-head")
    found = divergence(load(out), load(material.gguf_270m, dtype="float32"))
    assert np.mean(list(found.values())) <= 0.024, found
