"""The optimizers as one: AdamW for everything, or Muon for the layers' matrices and AdamW for the rest.

Muon (Jordan et al. 2024, torch.optim.Muon) orthogonalises the momentum of each matrix. From nothing it needs
about half the steps of AdamW; for a model that knows something already AdamW is the safe choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

Groups = list[tuple[list[nn.Parameter], float]]  # (parameters, weight decay)


class Optimizers:
    """Several optimizers, each with a peak learning rate of its own, stepped together.

    `moments` is their state by parameter, as `seavlm.train.checkpoint` reads and writes it.
    """

    def __init__(self, *parts: tuple[torch.optim.Optimizer, float]) -> None:
        self.parts = parts
        self.moments = Moments(optimizer for optimizer, _ in parts)

    def set_rate(self, share: float) -> None:
        """Every learning rate to this share of its peak."""
        for optimizer, peak in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = peak * share

    def zero_grad(self) -> None:
        for optimizer, _ in self.parts:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        for optimizer, _ in self.parts:
            optimizer.step()


class Moments:
    """What the optimizers remember of each parameter, whichever of them it belongs to."""

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self._states = {
            p: optimizer.state
            for optimizer in optimizers
            for g in optimizer.param_groups
            for p in g["params"]
        }

    def __getitem__(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        """Empty for a parameter that was not stepped yet, or is nobody's."""
        return self._states[parameter].get(parameter, {}) if parameter in self._states else {}

    def __setitem__(self, parameter: nn.Parameter, entries: dict[str, Any]) -> None:
        self._states[parameter][parameter] = entries


def adamw(groups: Groups, lr: float, betas: tuple[float, float], eps: float = 1e-8) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay, in one pass over memory."""
    described = [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]
    return torch.optim.AdamW(described, lr=lr, betas=betas, eps=eps, fused=True)


def in_layers(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon may have it: a matrix inside a layer, not an embedding, a position or a projector."""
    return parameter.ndim == 2 and ".layers." in name
