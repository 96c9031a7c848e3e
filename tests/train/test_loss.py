"""The chunked cross-entropy equals the plain one, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seavlm.train.loss import IGNORE, summed_cross_entropy


def example(n: int = 37, d: int = 24, v: int = 211, dtype=torch.float32):
    g = torch.Generator().manual_seed(5)
    hidden = (torch.randn(n, d, generator=g) * 2).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), generator=g)
    targets[::6] = IGNORE
    return hidden, weight, targets


@pytest.mark.parametrize("rows", [1, 8, 37, 1000])
def test_equal_to_plain(rows: int) -> None:
    hidden, weight, targets = example()
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    wanted = torch.autograd.grad(plain / 7, (hidden, weight))
    loss = summed_cross_entropy(hidden, weight, targets, rows=rows)
    got = torch.autograd.grad(loss / 7, (hidden, weight))
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_huge_logits_stay_finite() -> None:
    hidden, weight, targets = example()
    hidden = (hidden.detach() * 200).requires_grad_()
    loss = summed_cross_entropy(hidden, weight, targets, rows=5)
    loss.backward()
    plain = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert torch.isfinite(hidden.grad).all()


def test_bf16_sums_in_fp32() -> None:
    """In bf16 the weight's gradient is summed over many chunks: fp32 keeps it near one matmul's."""
    hidden, weight, targets = example(n=512, dtype=torch.bfloat16)
    exact = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
    (wanted,) = torch.autograd.grad(exact, weight)
    loss = summed_cross_entropy(hidden, weight, targets, rows=4)
    (got,) = torch.autograd.grad(loss, weight)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=5e-3)
    assert ((got.double() - wanted).norm() / wanted.norm()).item() < 0.01


def test_fp32_weight_with_bf16_hidden_gets_an_fp32_gradient() -> None:
    hidden, weight, targets = example()
    low = hidden.detach().bfloat16().requires_grad_()
    summed_cross_entropy(low, weight, targets).backward()
    assert weight.grad.dtype == torch.float32 and low.grad.dtype == torch.bfloat16


def test_memory_never_holds_all_logits() -> None:
    """No tensor of n x V is made: the largest is a chunk's logits or the weight's gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.seen = max(self.seen, out.numel())
            return out

    hidden, weight, targets = example(n=400, d=4, v=5000)
    with Largest() as largest:
        summed_cross_entropy(hidden, weight, targets, rows=10).backward()
    assert largest.seen <= 10 * 5000
