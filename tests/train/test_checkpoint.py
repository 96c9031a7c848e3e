"""Training checkpoints: bit for bit, whole or not there, no pickle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from seavlm.errors import SeavlmError
from seavlm.train import checkpoint
from seavlm.train.optim import Optimizers, adamw


def trained_pair(seed: int) -> tuple[dict[str, nn.Parameter], Optimizers]:
    torch.manual_seed(seed)
    parameters = {"a.weight": nn.Parameter(torch.randn(4, 3)), "b": nn.Parameter(torch.randn(5))}
    muon = torch.optim.Muon([parameters["a.weight"]], lr=0.1)
    optimizer = Optimizers((muon, 0.1), (adamw([([parameters["b"]], 0.0)], 0.1, (0.9, 0.99)), 0.1))
    return parameters, optimizer


def advance(parameters: dict[str, nn.Parameter], optimizer: Optimizers) -> None:
    optimizer.zero_grad()
    sum((p * torch.randn_like(p)).sum() for p in parameters.values()).backward()
    optimizer.step()


def store(folder: Path, step: int, parameters, optimizer, keep_last: int = 2) -> Path:
    return checkpoint.save(
        folder,
        step=step,
        parameters=parameters,
        moments=optimizer.moments,
        state={"seconds": 1.5},
        keep_last=keep_last,
    )


def test_goes_on_bit_for_bit(tmp_path: Path) -> None:
    parameters, optimizer = trained_pair(0)
    for _ in range(3):
        advance(parameters, optimizer)
    place = store(tmp_path, 3, parameters, optimizer)
    for _ in range(3):
        advance(parameters, optimizer)  # draws random numbers: their state must come back too

    others, other_optimizer = trained_pair(1)
    state = checkpoint.load(place, parameters=others, moments=other_optimizer.moments)
    assert (state["step"], state["seconds"]) == (3, 1.5)
    for _ in range(3):
        advance(others, other_optimizer)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, others[name]), name
    suffixes = {file.suffix for file in place.iterdir()}
    assert suffixes == {".safetensors", ".json"}


def test_keeps_the_last(tmp_path: Path) -> None:
    parameters, optimizer = trained_pair(0)
    for step in (1, 2, 3, 10):
        store(tmp_path, step, parameters, optimizer)
    assert checkpoint.steps(tmp_path) == [3, 10]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000010"


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, optimizer = trained_pair(0)
    store(tmp_path, 1, parameters, optimizer)

    def killed(*args) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store(tmp_path, 2, parameters, optimizer)
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000001"
    assert len(list(tmp_path.iterdir())) == 1  # and the leftover is gone


def test_broken_or_foreign_checkpoints(tmp_path: Path) -> None:
    parameters, optimizer = trained_pair(0)
    place = store(tmp_path, 1, parameters, optimizer)
    with pytest.raises(SeavlmError, match=r"other parameters .*\(b\)"):
        checkpoint.load(place, parameters={"a.weight": parameters["a.weight"]}, moments=optimizer.moments)
    wrong = {**parameters, "b": nn.Parameter(torch.zeros(6))}
    with pytest.raises(SeavlmError, match=r"\(5,\) and \(6,\)"):
        checkpoint.load(place, parameters=wrong, moments=optimizer.moments)
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(SeavlmError, match="cannot be read"):
        checkpoint.load(place, parameters=parameters, moments=optimizer.moments)
    (place / "state.json").write_text(json.dumps({"step": 1})[:-2])
    with pytest.raises(SeavlmError, match="cannot be read"):
        checkpoint.load(place, parameters=parameters, moments=optimizer.moments)
