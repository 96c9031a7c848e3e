"""Low-rank adapters (LoRA, Hu et al. 2021): train two thin matrices beside each frozen one.

    y = x W^T + b + (alpha / r) (x A^T) B^T        A [r, in], B [out, r]

B begins as zero, so the model begins as the base. The finished model is the base with (alpha / r) B A added
to each W: it is saved, merged and served like any other. Gradients and moments exist for A and B only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seavlm.errors import SeavlmError


class LoraLinear(nn.Module):
    """A frozen linear layer with its adapter. Its own parameters keep their names; `dtype` holds them."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.weight = nn.Parameter(layer.weight.detach().to(dtype or layer.weight.dtype), requires_grad=False)
        self.bias: nn.Parameter | None = layer.bias
        place = layer.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, layer.in_features, device=place))
        self.lora_b = nn.Parameter(torch.zeros(layer.out_features, rank, device=place))
        if place.type != "meta":
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(
            F.linear(x, self.lora_a), self.lora_b
        )

    def merged(self) -> Tensor:
        """fp32 [out, in]: W + (alpha / r) B A."""
        return self.weight.float() + self.scale * (
            self.lora_b.detach().float() @ self.lora_a.detach().float()
        )


def add_adapters(
    model: nn.Module,
    trained: dict[str, nn.Parameter],
    rank: int,
    alpha: float,
    dtype: torch.dtype | None = None,
) -> dict[str, nn.Parameter]:
    """Give every linear layer whose weight is in `trained` (taken out of it) an adapter, and freeze the rest;
    returns the adapters' parameters by name. dtype: to hold the frozen matrices in. SeavlmError if there is
    none."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in linear:
        if trained.pop(f"{name}.weight", None) is not None:  # nobody holds what is replaced
            parent, _, own = name.rpartition(".")
            layer = LoraLinear(model.get_submodule(name), rank, alpha, dtype)  # type: ignore[arg-type]
            setattr(model.get_submodule(parent), own, layer)
    found = dict[str, nn.Parameter]()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):
            found[name] = parameter
    if not found:
        raise SeavlmError("no linear layer is left for an adapter", hint="Shorten train.freeze.")
    return found


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return name.endswith((".lora_a", ".lora_b"))


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a model as if it never had adapters, which are added in."""
    adapted = {f"{name}.": module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    for name, parameter in model.named_parameters():
        parent, own = name[: name.rfind(".") + 1], name.rpartition(".")[2]
        if is_adapter(name):
            continue
        yield name, adapted[parent].merged() if parent in adapted and own == "weight" else parameter.detach()
