"""linear: fp32 sums, one rounding, parents reproduced bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from seavlm.errors import SeavlmError
from seavlm.merge.methods import check_weights, combine


def parents(dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(64, 48, generator=g)
    tuned = base + 1e-3 * torch.randn(64, 48, generator=g)
    tuned[0, 0], base[0, 0] = -0.0, 0.5
    base[0, 1], tuned[0, 1] = -0.0, 0.5
    return [tuned.to(dtype), base.to(dtype)]


def linear(tensors, weights, dtype=None):
    check_weights(weights, len(tensors))
    return combine(tensors, weights).to(dtype or tensors[0].dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beta_one_and_zero_are_the_parents(dtype: torch.dtype) -> None:
    tuned, base = parents(dtype)
    assert torch.equal(bits(linear([tuned, base], [1.0, 0.0])), bits(tuned))
    assert torch.equal(bits(linear([tuned, base], [0.0, 1.0])), bits(base))


def test_equals_numpy_fp32() -> None:
    tuned, base = parents(torch.bfloat16)
    got = linear([tuned, base], [0.1, 0.9], dtype=torch.float32).numpy()
    wanted = tuned.float().numpy() * np.float32(0.1) + base.float().numpy() * np.float32(0.9)
    assert np.array_equal(got.view(np.int32), wanted.view(np.int32))


def test_one_rounding_beats_bf16_arithmetic() -> None:
    tuned, base = parents(torch.bfloat16)
    exact = 0.1 * tuned.double() + 0.9 * base.double()
    ours = (linear([tuned, base], [0.1, 0.9]).double() - exact).abs().mean()
    naive = tuned * 0.1 + base * 0.9
    assert ours < 0.8 * (naive.double() - exact).abs().mean()
    # Half a unit in the last place of bf16 (8 bits) bounds a single rounding.
    assert ((linear([tuned, base], [0.1, 0.9]).double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-12).all()


def test_three_parents_and_mixed_dtypes() -> None:
    tuned, base = parents(torch.bfloat16)
    result = combine([tuned, base.float(), base], [0.2, 0.3, 0.5])
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, 0.2 * tuned.float() + 0.8 * base.float())


@pytest.mark.parametrize("weights", [[0.5], [0.5, 0.6], [float("nan"), 1.0], [float("inf"), -float("inf")]])
def test_wrong_weights(weights: list[float]) -> None:
    with pytest.raises(SeavlmError, match="weights"):
        linear(parents(torch.float32), weights)


def test_shapes_must_match() -> None:
    with pytest.raises(SeavlmError, match="shapes"):
        linear([torch.zeros(2, 3), torch.zeros(3, 2)], [0.5, 0.5])
