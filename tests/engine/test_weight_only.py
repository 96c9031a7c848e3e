"""Rounded weights as a GPU has them, on the CPU: near the model, and the same alone and in fixed buffers.

What only a GPU can do is in test_gpu.py.
"""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch

from seavlm.engine.engine import Engine
from seavlm.engine.sampler import Sampling
from seavlm.engine.sequence import Prompt
from seavlm.engine.torch_runner import TorchRunner
from seavlm.engine.vlm import load
from seavlm.engine.weight_only import round_weights
from seavlm.errors import SeavlmError


def test_int8_stays_close_and_runs_in_fixed_buffers() -> None:
    exact, rounded = load("nano", device="cpu"), load("nano", device="cpu")
    before = exact.model.language_model.layers[0].mlp.up_proj.weight
    round_weights(rounded.model, "int8")
    weight: Any = rounded.model.language_model.layers[0].mlp.up_proj.weight
    assert weight.qdata.dtype == torch.int8
    step = before.abs().amax(1, keepdim=True) / 127
    assert ((weight.dequantize() - before).abs() <= 0.51 * step).all()
    ids = torch.tensor([[2, *range(40, 90)]])
    with torch.inference_mode():
        p, q = (vlm.model(ids).double().log_softmax(-1) for vlm in (exact, rounded))
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    assert 0 < divergence < 0.01

    replies = []
    for fixed in (False, True):
        engine = Engine(TorchRunner(rounded.model, fixed_buffers=fixed))
        asked = [
            engine.add(
                Prompt([2, *range(40, 60 + i)]), Sampling(temperature=0), max_new_tokens=12, stop_ids=()
            )
            for i in range(3)
        ]
        while not engine.idle:
            engine.step()
        replies.append([sequence.ids for sequence in asked])
    assert replies[0] == replies[1]


def test_without_torchao_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("torchao"):
            raise ImportError("No module named 'torchao'")
        return real(name, *rest)

    vlm = load("nano", device="cpu")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SeavlmError, match=r"needs torchao.*pip install 'seavlm\[gpu\]'"):
        round_weights(vlm.model, "int8")
