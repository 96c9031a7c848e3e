"""The matrices of a decoder on a GPU: plain, or rounded to 8 or 4 bits.

A decode step on a GPU takes as long as reading the weights: half or a quarter of the bytes is what rounding
gains. Few rows at a time are multiplied by our own kernel, many by the library, for which rounded weights are
unpacked first.

Shapes: R rows, N outputs, K inputs, P parts of a sum.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from seavlm.engine import gpu_kernels as kernels
from seavlm.engine.gpu_kernels import GROUP, MOST_ROWS, ROWS, Planes

FUSED_ROWS = 16  # up to which gelu is part of a product with rounded weights
STARTS = (1.0, 0.88, 0.76)  # shares of a group's range that 4 bits are first laid over
FITS = 2  # times that scale and zero are fitted to what was rounded


@dataclass
class Matrix:
    """[N, K], or tiles of it with scales and zeros (`kernels.few_rounded`)."""

    weight: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None

    @classmethod
    def rounded(cls, weight: Tensor, kind: str | None) -> Matrix:
        """kind: "int8", a scale for each row; "int4", a scale and a zero for each GROUP of a row; None: as it
        is, and so is what does not divide into tiles."""
        if kind is None or weight.shape[1] % GROUP or len(weight) % GROUP:
            return cls(weight)
        if kind == "int8":
            w = weight.float()
            scales = (w.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
            return cls(tiles((w / scales[:, None]).round().to(torch.int8)), scales)
        return cls(*four_bits(weight))

    @property
    def rounds(self) -> bool:
        return self.scales is not None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.weight, self.scales, self.zeros) if part is not None)

    def times(self, x: Tensor | Planes, *, splits: bool = False, wide: bool = False) -> Tensor:
        """x [R, K] -> [P, R, N]; splits: P may be more than one; wide: in float32. Where the weights are
        rounded, few rows should be `Planes`."""
        rows = len(x)
        if self.scales is not None and rows <= MOST_ROWS:
            parts = (4 if rows <= 16 else 2) if splits else 1
            x, told = _planes(x), (self.weight, self.scales, self.zeros)
            return kernels.few_rounded(x, *told, torch.bfloat16, tile=(ROWS, parts, 4, 3))
        assert isinstance(x, Tensor)
        if self._streams(x):
            parts = 4 if splits and self._small else 1
            k, stages = (128, 5) if rows > 16 else (128, 3) if parts > 1 else (256, 5)
            return kernels.few(x, self.weight, wide=wide, tile=(64, k, parts, 4, stages))
        y = F.linear(x, self._plain(x.dtype))
        return (y.float() if wide else y)[None]

    def gated(self, x: Tensor | Planes) -> Tensor | Planes:
        """gelu_tanh(gate) * up of a matrix of gates, then as many others: x [R, K] -> [R, N/2], as `Planes`
        where few rows meet rounded weights."""
        rows = len(x)
        if self.scales is not None and rows <= FUSED_ROWS:
            x, told = _planes(x), (self.weight, self.scales, self.zeros)
            return kernels.gated_rounded(x, *told, tile=(GROUP, 1, 8 if self.zeros is None else 4, 3))
        if self.scales is not None and rows <= MOST_ROWS:
            return kernels.planes(kernels.geglu(self.times(x)[0]))
        assert isinstance(x, Tensor)
        if self._streams(x):
            return kernels.few(x, self.weight, gated=True, tile=(64, 128 if rows <= 16 else 64, 1, 4, 5))[0]
        return kernels.geglu(F.linear(x, self._plain(x.dtype)))

    def _streams(self, x: Tensor) -> bool:
        """Our kernel is for few rows; tiles were measured on an H200 at the geometry of 27B
        (`benchmarks/gpu/tune.py`)."""
        return len(x) <= MOST_ROWS and x.dtype == torch.bfloat16

    def _plain(self, dtype: torch.dtype) -> Tensor:
        if self.scales is None:
            return self.weight
        return kernels.unpack(self.weight, self.scales, self.zeros, dtype)

    @property
    def _small(self) -> bool:
        """There is not a tile of outputs for each of the GPU's processors."""
        return len(self.weight) < 60 * processors(self.weight.device)


def _planes(x: Tensor | Planes) -> Planes:
    return x if isinstance(x, Planes) else kernels.planes(x)


@functools.cache
def processors(device: torch.device) -> int:
    """How many a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def tiles(x: Tensor) -> Tensor:
    """[N, K/GROUP * b] -> [N/ROWS, K/GROUP, ROWS, b], b = GROUP int8 or GROUP/2 uint8."""
    wide = GROUP if x.dtype == torch.int8 else GROUP // 2
    return x.unflatten(0, (-1, ROWS)).unflatten(2, (-1, wide)).transpose(1, 2).contiguous()


def four_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K] -> packed uint8 [N/ROWS, K/GROUP, ROWS, GROUP/2], scales and zeros bfloat16 [K/GROUP, N]: a
    weight is about (q - zero) scale.

    Each group is laid over 16 levels from several starts; scale and zero are then fitted by least squares to
    what was rounded, and the start with the smallest squared error is kept.
    """
    n, k = weight.shape
    packed = torch.empty(n, k // 2, dtype=torch.uint8, device=weight.device)
    scales, zeros = (torch.empty(k // GROUP, n, dtype=torch.bfloat16, device=weight.device) for _ in range(2))
    rows = max(1, 2**24 // k)  # at a time
    for first in range(0, n, rows):
        w = weight[first : first + rows].float().unflatten(1, (-1, GROUP))
        best, least = None, torch.full(w.shape[:2], torch.inf, device=w.device)
        low, high = w.aminmax(dim=2)
        for share in STARTS:
            scale = ((high - low) * share / 15).clamp(min=1e-20)
            zero = -(low + high) / 2 / scale + 7.5
            for fit in range(FITS + 1):
                scale, zero = scale.bfloat16().float(), zero.bfloat16().float()
                q = (w / scale[..., None] + zero[..., None]).round_().clamp_(0, 15)
                if fit < FITS:
                    mean_q, mean_w = q.mean(2), w.mean(2)
                    away = q - mean_q[..., None]
                    spread = away.square().sum(2)
                    slope = (away * (w - mean_w[..., None])).sum(2) / spread.clamp(min=1e-20)
                    fine = (spread > 0) & (slope > 0)
                    scale = torch.where(fine, slope, scale)
                    zero = torch.where(fine, mean_q - mean_w / scale, zero)
            error = ((q - zero[..., None]) * scale[..., None] - w).square_().sum(2)
            better = error < least
            least = torch.where(better, error, least)
            if best is None:
                best = [q, scale, zero]
            else:
                best[0] = torch.where(better[..., None], q, best[0])
                best[1], best[2] = torch.where(better, scale, best[1]), torch.where(better, zero, best[2])
        assert best is not None
        q = best[0].to(torch.uint8)
        half = GROUP // 2
        packed[first : first + rows] = (q[..., :half] | q[..., half:] << 4).flatten(1)
        scales[:, first : first + rows], zeros[:, first : first + rows] = best[1].T, best[2].T
    return tiles(packed), scales, zeros
