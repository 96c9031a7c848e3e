"""Packed matrices: each kind's products are those of its numbers; GGUF's blocks keep theirs."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from seavlm.engine import kernels
from seavlm.engine import quantize as q
from seavlm.engine.bench import log_probabilities_of
from seavlm.engine.vlm import load
from seavlm.errors import SeavlmError
from seavlm.manifest import read_manifest, sha256_file
from seavlm.weights.checkpoint import open_checkpoint
from seavlm.weights.gguf import GGUFCheckpoint

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="built without a C++ compiler")


def libraries() -> list[str]:
    """The builds that this processor can run."""
    best = kernels.library()
    return [] if best is None else list(kernels.ISAS[kernels.ISAS.index(best.seavlm_best_isa().decode()) :])


@pytest.fixture(params=libraries())
def lib(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    lib = kernels._open(kernels.path_of(request.param))
    monkeypatch.setattr(kernels, "library", lambda: lib)
    return lib


def some_codes(kind: int, n: int, k: int, seed: int = 0) -> q.Codes:
    random = np.random.default_rng(seed)
    codes = random.integers(
        kind == q.EIGHT,
        {q.FOUR: 16, q.FIVE: 32, q.SIX: 64}.get(kind, 256),
        (n, k),
        dtype=np.uint8,
    )
    scale = random.uniform(0.001, 0.1, (n, k // (16 if kind == q.SIX else 32))).astype(np.float16)
    least = (-random.uniform(0, 1, scale.shape)).astype(np.float16) if kind in (q.FOUR, q.FIVE) else None
    return codes, scale, least


def rounded(x: np.ndarray) -> np.ndarray:
    """Activations as the kernels round them."""
    groups = x.reshape(len(x), -1, 32)
    scale = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)
    steps = np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0)
    return (np.trunc(steps + 0.5 * np.sign(steps)) * scale).reshape(x.shape)


def product(lib: ctypes.CDLL, packed: q.Packed, x: np.ndarray, threads: int = 2) -> np.ndarray:
    y = np.empty((len(x), packed.n), np.float32)
    lib.seavlm_multiply(ctypes.byref(packed.matrix()), x.ctypes.data, len(x), y.ctypes.data, threads)
    return y


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 16, 32), (5, 48, 96), (6, 64, 64), (13, 80, 448)])
def test_products_are_those_of_the_numbers(lib: ctypes.CDLL, kind: int, rows: int, n: int, k: int) -> None:
    parts = some_codes(kind, n, k)
    packed = q.pack(kind, n, k, [parts])
    numbers = q._numbers(kind, *parts)
    np.testing.assert_allclose(packed.rows(np.arange(n)), numbers, rtol=1e-6, atol=1e-6)
    x = (np.random.default_rng(rows).normal(size=(rows, k)) * np.logspace(-2, 2, k)).astype(np.float32)
    x[0] = 0
    wanted = rounded(x).astype(np.float64) @ numbers.T.astype(np.float64)
    y = product(lib, packed, x)
    assert np.abs(y - wanted).max() <= 4e-6 * np.abs(wanted).max() + 1e-6
    assert (product(lib, packed, x[2:3], threads=1) == y[2:3]).all()  # whatever it is computed with
    back = q.Packed.stored(packed.tensors("w"), "w")
    assert (product(lib, back, x) == y).all() and back.nbytes == packed.nbytes


class Blocks:
    """As much of a GGUFCheckpoint as packing takes."""

    def __init__(self, kind: str, weight: np.ndarray, more: int = 0) -> None:
        self.kind, self.more = kind, more
        self.stored = quantize(weight, GGMLQuantizationType[kind]) if kind != "F32" else weight.view(np.uint8)

    def shape(self, name: str) -> tuple[int, int]:
        return len(self.stored) + self.more, self.rows(name, 0, 1).shape[1]

    def blocks(self, name: str) -> tuple[str, np.ndarray]:
        return self.kind, self.stored

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        return dequantize(self.stored[first:last], GGMLQuantizationType[self.kind])


@pytest.mark.parametrize(
    ("name", "kind"),
    [("Q8_0", q.EIGHT), ("Q4_0", q.FOUR), ("Q5_0", q.FIVE), ("Q4_1", q.EIGHT), ("F32", q.EIGHT)],
)
def test_blocks_of_gguf_keep_their_numbers(lib: ctypes.CDLL, name: str, kind: int) -> None:
    weight = np.random.default_rng(0).normal(size=(75, 256)).astype(np.float32)
    file = Blocks(name, weight, more=2)
    packed = q.pack_gguf(file, "w")  # type: ignore[arg-type]
    assert packed.kind == kind and packed.n == 80
    numbers = packed.rows(np.arange(80))
    exact = name in ("Q8_0", "Q4_0", "Q5_0")
    wanted = file.rows("w", 0, 75)
    np.testing.assert_allclose(numbers[:75], wanted, rtol=0, atol=1e-6 if exact else 0.02)
    np.testing.assert_allclose(numbers[75:77], np.tile(wanted.mean(axis=0), (2, 1)), atol=0.04)
    assert (numbers[77:] == 0).all()


@pytest.mark.parametrize(("name", "kind"), [("Q4_K", q.FOUR), ("Q5_K", q.FIVE), ("Q6_K", q.SIX)])
def test_k_blocks_keep_their_codes(lib: ctypes.CDLL, name: str, kind: int) -> None:
    """Any bytes are blocks, once their fp16 scales are numbers."""
    bytes_of = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}[name]
    raw = np.random.default_rng(0).integers(0, 256, (32, 2, bytes_of), dtype=np.uint8)
    ends = [208] if name == "Q6_K" else [0, 2]
    for at in ends:
        raw[..., at : at + 2] = np.array([0.01], np.float16).view(np.uint8)
    file = Blocks("Q8_0", np.zeros((1, 32), np.float32))
    file.kind, file.stored = name, raw.reshape(32, -1)
    packed = q.pack_gguf(file, "w")  # type: ignore[arg-type]
    wanted = file.rows("w", 0, 32)
    assert packed.kind == kind
    assert np.abs(packed.rows(np.arange(32)) - wanted).max() <= 1e-3 * np.abs(wanted).max()


def test_matrices_are_joined_and_interleaved(lib: ctypes.CDLL) -> None:
    a, b, c = (
        q.pack(kind, 32, 64, [some_codes(kind, 32, 64, seed)])
        for seed, kind in enumerate((q.FIVE, q.FIVE, q.EIGHT))
    )
    first, last = q.join([a, b, c])
    assert (first.n, first.kind, last.n, last.kind) == (64, q.FIVE, 32, q.EIGHT)
    ids = np.arange(32)
    assert (first.rows(np.arange(64)) == np.concatenate([a.rows(ids), b.rows(ids)])).all()
    for pair in ((a, b), (a, c)):
        both = q.interleave(*pair).rows(np.arange(64)).reshape(2, 2, 16, 64)
        for i, one in enumerate(pair):
            np.testing.assert_allclose(both[:, i].reshape(32, 64), one.rows(ids), atol=0.05)


def test_the_real_file_is_packed_as_it_is(material: Any, lib: ctypes.CDLL) -> None:
    file = GGUFCheckpoint(material.gguf_270m)
    names = [name for name in file.names() if ".layers.0." in name and len(file.shape(name)) == 2]
    assert len(names) == 7
    for name in names:
        packed = q.pack_gguf(file, name)
        wanted = file.rows(name, 0, 64)
        assert np.abs(packed.rows(np.arange(64)) - wanted).max() <= 1e-3 * np.abs(wanted).max()


def test_a_quantised_model_is_saved_and_mapped(cli: Callable, tmp_path: Path, root: Path) -> None:
    """nano, pictures and all: the same answers, and what is on disk is what the manifest says."""
    out = tmp_path / "small"
    done = cli("quantize", "nano", out)
    assert done.code == 0, done.err
    picture = root / "docs" / "elephant.png"
    asked = cli("ask", picture, "ນີ້ແມ່ນຫຍັງ?", "--model", out)
    assert asked.out.strip() == "ຊ້າງ", asked.err
    ids = load("nano").tokenizer.encode("seekor gajah di kebun")
    rounded, mapped = load("nano", quantize="int8"), load(out)
    one, two = (log_probabilities_of(vlm.engine, ids, vlm.engine.limit) for vlm in (rounded, mapped))
    np.testing.assert_array_equal(one, two)
    files = read_manifest(out)["files"]
    assert set(files) == {file.name for file in out.iterdir()} - {"manifest.json"}
    assert all(sha256_file(out / name) == hash for name, hash in files.items())
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "seavlm"
    with pytest.raises(SeavlmError, match="quantised with 'seavlm'"):
        open_checkpoint(out)

    shard = out / "decoder-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(SeavlmError, match=r"decoder-00001.safetensors is damaged .*cut off"):
        load(out)
    shard.unlink()
    with pytest.raises(SeavlmError, match="has no decoder-"):
        load(out)
    wrong = cli("quantize", "nano", tmp_path / "x", "--weights", "int3")
    assert wrong.code == 2 and "unknown weights 'int3'" in wrong.err


def test_a_mapped_text_model_answers_without_torch(
    tmp_path: Path, even_model_dir: Path, text_model_dir: Path
) -> None:
    """A process that never imports PyTorch: a second less of start."""
    out = tmp_path / "small"
    q.save_quantized(even_model_dir, out, "int8")
    code = (
        "import sys; from seavlm.engine.vlm import load; vlm = load(sys.argv[1]); "
        "print(len(vlm.complete('yes', max_new_tokens=3, temperature=0).token_ids), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=True)
    count, torch = done.stdout.split()
    assert int(count) <= 3 and torch == "False"
    with pytest.raises(SeavlmError, match="multiples of 32, and hidden_size is 48"):
        q.save_quantized(text_model_dir, tmp_path / "odd", "int8")
    assert not (tmp_path / "odd").exists()
