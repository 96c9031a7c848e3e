"""The small parts of the decoder: norm, gated MLP, rotary positions.

Shapes: B batch, T tokens, H heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), all of it in fp32, cast back last (Gemma's order; eps inside the root)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).to(x.dtype)


class MLP(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x)), without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


def inverse_frequencies(head_dim: int, theta: float, factor: float) -> Tensor:
    """fp32 [D/2] on the CPU: theta ** (-2i/D) / factor (RoPE, arXiv 2104.09864, linear position scaling).

    Always made on the CPU and moved afterwards, so that every device rotates by the same angles.
    """
    exponent = torch.arange(0, head_dim, 2, device="cpu", dtype=torch.float32) / head_dim
    return 1.0 / (theta**exponent) / factor


def rope_tables(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [B, 1, T, D] in `dtype` (angles in fp32), for `rotate`."""
    angles = positions[:, None, :, None].float() * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, T, D]: dimension i turns with dimension i + D/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
