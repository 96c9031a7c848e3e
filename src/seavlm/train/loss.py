"""Cross-entropy over a large vocabulary, a chunk of rows at a time.

Gemma 3's head has 262,208 rows: the logits of 2,000 supervised tokens are 2 GB in fp32, and autograd keeps
them and their gradient alive together. Here the logits of `rows` tokens exist at a time: each chunk's loss
and its gradients are computed at once, so that nothing of size [n, V] is ever held.

Shapes: n supervised tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 1024  # whose logits live at a time
IGNORE = -100  # a target that counts for nothing (same meaning as in torch.nn.functional.cross_entropy)


class _SummedCrossEntropy(torch.autograd.Function):
    """sum_i [ logsumexp(h_i W^T) - (h_i W^T)[y_i] ]; the gradient of the logits is softmax - onehot."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        head = weight.to(hidden.dtype)  # the master weight may be fp32 while the computation is bf16
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        # The sum over chunks is long: it is kept in fp32 whatever the weight's dtype.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for start in range(0, hidden.shape[0], rows):
            h, y = hidden[start : start + rows], targets[start : start + rows]
            logits = (h @ head.T).float()  # [rows, V]
            valid = y != IGNORE
            picked = torch.where(valid, y, 0).unsqueeze(1)
            log_sum = logits.logsumexp(dim=1)
            total += torch.where(valid, log_sum - logits.gather(1, picked).squeeze(1), 0.0).sum()
            if not (wants_hidden or wants_weight):
                continue
            grad = logits.sub_(log_sum.unsqueeze(1)).exp_()  # softmax, in the logits' own memory
            grad.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=grad.dtype))
            grad.mul_(valid.unsqueeze(1))
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = grad @ head
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, h) if grad.dtype == torch.float32 else grad_weight.add_(grad.T @ h)
            del logits, grad  # before there are the next chunk's
        ctx.grads = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):
        grads, ctx.grads = ctx.grads, None  # scaled in place: the head's gradient is as large as the head
        if grads is None:
            raise RuntimeError("this loss was already differentiated; compute it again")
        scaled = [None if g is None else g.mul_(grad_total.to(g.dtype)) for g in grads]
        return (*scaled, None, None)


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, rows: int = ROWS) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target]: an fp32 scalar with gradients.

    `hidden` [n, D] in the computation's dtype (fp32 or bf16), `weight` [V, D] in its own (its gradient comes
    in that), `targets` [n] int64, where `IGNORE` counts for nothing. A sum, not a mean: the caller divides by
    the number of valid tokens of the whole optimizer step, so that neither packing nor gradient accumulation
    changes the loss. Equal to `F.cross_entropy(hidden @ weight.T, targets, reduction="sum")`; `rows` bounds
    the logits that live at a time.
    """
    with torch.autocast(hidden.device.type, enabled=False):  # the dtypes are as given
        return _SummedCrossEntropy.apply(hidden, weight, targets, rows)
