"""From logits to the next token: temperature, top-k, top-p, and a seed that makes it repeatable.

The order is the one of transformers: temperature first, then the k best, then the smallest set of those whose
probability reaches p. Every row draws from its own stream of random numbers, one number a token, so a reply
depends on its prompt and its seed and never on what else is in the batch.

Shapes: B batch, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seavlm.errors import SeavlmError


@dataclass(frozen=True)
class Sampling:
    """How to choose. Defaults are Gemma 3's; temperature 0 is greedy, top_k 0 and top_p 1 mean no cut."""

    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise SeavlmError(f"temperature is {self.temperature}", hint="Give 0 (greedy) or more.")
        if self.top_k < 0:
            raise SeavlmError(f"top_k is {self.top_k}", hint="Give 0 (all tokens) or more.")
        if not 0 < self.top_p <= 1:
            raise SeavlmError(f"top_p is {self.top_p}", hint="Give a number above 0 and up to 1.")

    @classmethod
    def from_config(
        cls,
        generation: Mapping[str, Any],
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Sampling:
        """What the caller gave, else what `generation_config.json` says, else Gemma 3's own defaults."""
        if temperature is None and generation.get("do_sample") is False:
            temperature = 0.0

        def pick(given: Any, key: str, default: Any) -> Any:
            return given if given is not None else default if generation.get(key) is None else generation[key]

        return cls(
            temperature=pick(temperature, "temperature", cls.temperature),
            top_k=pick(top_k, "top_k", cls.top_k),
            top_p=pick(top_p, "top_p", cls.top_p),
            seed=seed,
        )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    def streams(self, rows: int) -> list[torch.Generator]:
        """A stream of random numbers for each row: row i is seeded with seed + i, or freshly without seed."""
        streams = [torch.Generator() for _ in range(rows)]
        for row, stream in enumerate(streams):
            if self.seed is None:
                stream.seed()
            else:
                stream.manual_seed(self.seed + row)
        return streams


def choose(
    logits: Tensor,  # [B, V], any float type
    sampling: Sampling,
    streams: Sequence[torch.Generator] = (),
    *,
    limit: int | None = None,
    banned: Sequence[int] = (),
) -> Tensor:  # [B], int64, on the device of the logits
    """The next token of each row.

    limit: ids from here on are never chosen (Gemma's last rows are padding that was never trained).
    banned: single ids that are never chosen. SeavlmError when the logits are not finite.
    """
    logits = logits[:, :limit].float()
    if banned:
        logits = logits.clone()
        logits[:, list(banned)] = -torch.inf
    best = logits.max(dim=-1)
    # NaN wins every max and +inf is one, so looking at the best is looking at all that could be chosen.
    if not torch.isfinite(best.values).all():
        raise SeavlmError(
            "the model computed numbers that are not finite",
            hint="Use float32 or bfloat16; if it is float32 already, the weights are broken.",
        )
    if sampling.greedy:
        return best.indices
    kept, ids = probabilities(logits, sampling)
    draws = torch.tensor([torch.rand((), generator=stream).item() for stream in streams]).to(kept)  # [B]
    below = kept.cumsum(-1) < draws[:, None] * kept.sum(-1, keepdim=True)
    # Rounding may leave the last running sum below a draw close to 1: then the last kept token it is.
    index = below.sum(-1).clamp(max=(kept > 0).sum(-1) - 1)
    return ids.gather(-1, index[:, None])[:, 0]


def probabilities(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(probabilities, ids), both [B, K], best first; what top-p cut off has probability 0."""
    k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    values, ids = logits.topk(k, dim=-1)
    p = torch.softmax(values.float() / sampling.temperature, dim=-1)
    before = p.cumsum(-1) - p  # probability of all better ones
    p = p.masked_fill(before >= sampling.top_p, 0.0)
    return p / p.sum(-1, keepdim=True), ids
