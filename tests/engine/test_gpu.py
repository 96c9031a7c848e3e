"""The engine on a GPU against the plain model on the CPU. Not run where there is no CUDA device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from seavlm.engine.bench import declaration
from seavlm.engine.engine import Engine
from seavlm.engine.sampler import Sampling
from seavlm.engine.sequence import Prompt
from seavlm.engine.vlm import VLM, load
from seavlm.errors import SeavlmError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def logits(vlm: VLM, ids: list[int]) -> np.ndarray:
    found: list[np.ndarray] = []
    vlm.engine.add(Prompt(ids), max_new_tokens=0, inspect=lambda _, x: found.append(x.copy()))
    while not vlm.engine.idle:
        vlm.engine.step()
    return np.stack(found)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.05)])
def test_logits_are_those_of_float32_on_the_cpu(dtype: str, tolerance: float) -> None:
    """float32: the largest difference; bfloat16: the KL divergence in nats."""
    exact, other = load("nano", device="cpu", dtype="float32"), load("nano", device="cuda", dtype=dtype)
    for text in declaration().values():
        ids = [exact.tokenizer.bos_id, *exact.tokenizer.encode(text)][:200]
        p, q = logits(exact, ids), logits(other, ids)
        if dtype == "float32":
            assert np.abs(p - q).max() <= tolerance
        else:
            p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (p, q))
            assert float((p.exp() * (p - q)).sum(-1).mean()) <= tolerance


def test_a_model_that_does_not_divide_into_tiles_is_refused() -> None:
    with pytest.raises(SeavlmError, match="divide into tiles"):
        load("nano", device="cuda", quantize="int8")


def test_replies_are_those_of_the_cpu() -> None:
    """CUDA graphs against the plain path: over the ends of blocks and graphs, ending at different times; then
    with pages of another engine."""
    pair = [load("nano", device=device, dtype="float32") for device in ("cpu", "cuda")]
    for engines in (
        [vlm.engine for vlm in pair],
        [Engine(vlm.runner, vlm.tokenizer) for vlm in pair],
    ):
        replies = []
        for engine in engines:
            prompts = [Prompt([2, *range(40, 40 + size)]) for size in (3, 62, 119, 125, 250)]
            asked = [
                engine.add(prompt, Sampling(temperature=0), max_new_tokens=12 + 5 * i, stop_ids=())
                for i, prompt in enumerate(prompts)
            ]
            while not engine.idle:
                engine.step()
            replies.append([one.ids for one in asked])
        assert replies[0] == replies[1]


def test_a_crowd_says_what_each_says_alone() -> None:
    engine: Engine = load("nano", device="cuda", dtype="float32").engine
    prompts = [Prompt([2, *range(40 + i, 60 + 7 * i)]) for i in range(12)]
    crowd = [engine.add(prompt, Sampling(temperature=0), max_new_tokens=20) for prompt in prompts]
    while not engine.idle:
        engine.step()
    for prompt, one in zip(prompts, crowd, strict=True):
        alone = engine.add(prompt, Sampling(temperature=0), max_new_tokens=20)
        while not engine.idle:
            engine.step()
        assert alone.ids == one.ids
