"""Adapters: the base at first, then a low-rank change of it, and a finished model without them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from seavlm.errors import SeavlmError
from seavlm.model.lora import LoraLinear, add_adapters, merged_parameters
from seavlm.train import sft
from seavlm.weights.checkpoint import open_checkpoint


def test_it_is_the_layer_with_a_low_rank_matrix_added() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(20, 12), torch.randn(5, 20)
    adapted = LoraLinear(layer, rank=3, alpha=6)
    assert torch.equal(adapted(x), layer(x)), "the base at first"
    adapted.lora_b.data.normal_()
    weight = adapted.merged().requires_grad_()
    torch.testing.assert_close(adapted(x), x @ weight.T + layer.bias)

    (x @ weight.T + layer.bias).square().sum().backward()
    adapted(x).square().sum().backward()
    assert weight.grad is not None and adapted.weight.grad is None
    torch.testing.assert_close(adapted.lora_b.grad, 2 * weight.grad @ adapted.lora_a.T)
    torch.testing.assert_close(adapted.lora_a.grad, 2 * adapted.lora_b.T @ weight.grad)


def test_names_are_the_bases_and_only_adapters_train() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 4, bias=False)), nn.LayerNorm(4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    chosen = {name: p for name, p in model.named_parameters() if not name.startswith("0.")}
    trained = add_adapters(model, chosen, rank=2, alpha=4)
    assert set(trained) == {"1.0.lora_a", "1.0.lora_b"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained)
    assert {name: p.tolist() for name, p in merged_parameters(model)} == {
        n: p.tolist() for n, p in before.items()
    }
    trained["1.0.lora_b"].data.normal_()
    after = dict(merged_parameters(model))
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["1.0.weight"]


@pytest.mark.parametrize(
    ("dtype", "saved"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
def test_a_run_learns_and_saves_a_plain_model(world, tmp_path: Path, dtype: str, saved: str) -> None:
    cfg = world.settings(steps=25, lora_rank=4, lr=2e-2, dtype=dtype, save_dtype=saved)
    metrics = sft.run(cfg, base=world.base, data=world.data, out=tmp_path, seed=0, progress=False)
    source = open_checkpoint(world.base)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]
    assert metrics["parameters"] == sum(math.prod(source.shape(name)) for name in source.names())
    full = world.settings(steps=1, dtype=dtype)
    sft.run(full, base=world.base, data=world.data, out=tmp_path / "full", seed=0, progress=False)
    (first,) = (tmp_path / "full" / "metrics.jsonl").read_text().splitlines()
    assert losses[0] == json.loads(first)["loss"], "the base at first"

    before, after = source, open_checkpoint(tmp_path / "model")
    assert set(before.names()) == set(after.names())
    kept = getattr(torch, saved)
    changed = {n for n in before.names() if not torch.equal(before.get(n).to(kept), after.get(n).to(kept))}
    assert changed == {n for n in before.names() if n.startswith("language_model.layers.") and "_proj" in n}
    for name in changed:
        singular = torch.linalg.svdvals(after.get(name).float() - before.get(name).to(kept).float())
        assert singular[4] < {"float32": 1e-5, "bfloat16": 0.1}[saved] * singular[0], "of rank 4"
    adapters = sum(4 * sum(before.shape(name)) for name in changed)
    assert metrics["parameters_trained"] == adapters


def test_somewhere_an_adapter_must_go() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    with pytest.raises(SeavlmError, match="no linear layer is left"):
        add_adapters(model, {"1.weight": model[1].weight}, rank=2, alpha=4)


def test_muon_is_not_for_adapters(world) -> None:
    with pytest.raises(ValidationError, match="lora_rank goes with adamw"):
        world.settings(lora_rank=4, optimizer="muon")
