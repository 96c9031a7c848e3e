"""How parents' tensors become one: pure functions on tensors of one name.

The sums run in fp32 and are rounded once, at the end. Summed in bf16 (8 bits of mantissa) a weight of 0.1 is
already 0.1001, and each rounding is as large as a small fine-tuning's whole change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from seavlm.errors import SeavlmError


def check_weights(weights: Sequence[float], parents: int) -> None:
    """SeavlmError unless there is one finite weight for each parent and they sum to 1."""
    if len(weights) != parents or not parents:
        raise SeavlmError(
            f"{len(weights)} weights for {parents} parents", hint="Give one weight for each parent."
        )
    if not all(math.isfinite(w) for w in weights) or abs(math.fsum(weights) - 1.0) > 1e-6:
        raise SeavlmError(
            f"the merge weights {', '.join(map(str, weights))} do not sum to 1",
            hint="For two parents give beta and 1 - beta.",
        )


def linear(
    tensors: Sequence[Tensor], weights: Sequence[float], *, dtype: torch.dtype | None = None
) -> Tensor:
    """sum_i weights[i] * tensors[i], for tensors of one shape; in fp32, then rounded once to `dtype`.

    dtype None: the widest of the parents' (bf16 with fp32 gives fp32). A parent of weight 0 is not read into
    the sum, so that beta = 0 and beta = 1 give a parent back bit for bit, signed zeros included.
    """
    check_weights(weights, len(tensors))
    target = dtype or widest([t.dtype for t in tensors])
    return linear_fp32(tensors, weights).to(target)


def linear_fp32(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sum before its rounding, fp32."""
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) != 1:
        raise SeavlmError(f"tensors of different shapes: {', '.join(map(str, sorted(shapes)))}")
    total: Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        if weight == 0.0:
            continue
        # A product and a sum, each rounded to fp32: no fused multiply-add, so every machine gives the same
        # bits.
        term = tensor.float() * torch.tensor(weight, dtype=torch.float32, device=tensor.device)
        total = term if total is None else total.add_(term)
    assert total is not None  # weights sum to 1, so one of them is not 0
    return total


def widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype that holds all of `dtypes` without loss."""
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result
