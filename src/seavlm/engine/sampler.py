"""From logits to the next token: penalties, bias, mask, temperature, top-k, top-p, min-p, and a seed.

The order is the one of transformers: penalties, then the temperature, the k best, the smallest set of those
whose probability reaches p, and of these the ones not below min-p times the best. Every sequence draws from
its own stream of random numbers, one number a token, so a reply depends on its prompt and its seed and never
on what else is in the batch.

Shapes: V vocabulary rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from seavlm.errors import SeavlmError

MANY = 1024  # tokens that are looked at first where all may be drawn
CHUNK = 64  # rows whose maximum is looked at instead of themselves


@dataclass(frozen=True)
class Sampling:
    """How to choose. Defaults are Gemma 3's; temperature 0 is greedy, top_k 0 and top_p 1 mean no cut.

    repetition_penalty divides positive logits (and multiplies negative ones) of all tokens in prompt and
    reply; presence_penalty is taken off the logits of tokens in the reply, frequency_penalty once for each
    time. logit_bias is added. stop: texts that end the reply, themselves not part of it. logprobs: report the
    natural log of the probability of each token and of so many alternatives, before any of the above.
    """

    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()
    logprobs: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        def check(name: str, fine: bool, hint: str) -> None:
            if not fine:
                raise SeavlmError(f"{name} is {getattr(self, name)}", hint=hint)

        check("temperature", 0 <= self.temperature < math.inf, "Give 0 (greedy) or more.")
        check("top_k", self.top_k >= 0, "Give 0 (all tokens) or more.")
        check("top_p", 0 < self.top_p <= 1, "Give a number above 0 and up to 1.")
        check("min_p", 0 <= self.min_p <= 1, "Give a number from 0 to 1.")
        check("repetition_penalty", 0 < self.repetition_penalty < math.inf, "Give a number above 0.")
        check("presence_penalty", math.isfinite(self.presence_penalty), "Give a number.")
        check("frequency_penalty", math.isfinite(self.frequency_penalty), "Give a number.")
        biases = self.logit_bias.values()
        check("logit_bias", not any(map(math.isnan, biases)) and math.inf not in biases, "Give numbers.")
        check("stop", all(self.stop) and not isinstance(self.stop, str), "Give a list of texts, none empty.")
        check("logprobs", self.logprobs is None or self.logprobs >= 0, "Give 0 or more.")
        check("seed", self.seed is None or self.seed >= 0, "Give 0 or more.")

    @classmethod
    def from_config(cls, generation: Mapping[str, Any], **given: Any) -> Sampling:
        """What the caller gave (None: nothing), else what `generation_config.json` says, else Gemma 3's
        own."""
        given = {key: value for key, value in given.items() if value is not None}
        said = {
            key: generation[key]
            for key in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            if generation.get(key) is not None
        }
        if generation.get("do_sample") is False:
            said["temperature"] = 0.0
        return cls(**{**said, **given})

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    @property
    def penalizes(self) -> bool:
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    @property
    def plain(self) -> bool:
        """Only the order of the logits and the best of them matter."""
        return not (self.penalizes or self.logit_bias) and self.logprobs is None

    def stream(self) -> np.random.Generator:
        """The random numbers of one sequence: of the seed, or fresh without one."""
        return np.random.Generator(np.random.PCG64(self.seed))


def choose(logits: np.ndarray, sampling: Sampling, stream: np.random.Generator) -> int:
    """The next token from float32 [V]. SeavlmError when the logits are not finite."""
    best = int(logits.argmax())
    # NaN wins every argmax and +inf is one, so looking at the best is looking at all that could be chosen.
    if not math.isfinite(logits[best]):
        if logits[best] == -math.inf:
            raise SeavlmError("no token is left to choose from", hint="Loosen the mask or the bias.")
        raise SeavlmError(
            "the model computed numbers that are not finite",
            hint="Use float32 or bfloat16; if it is float32 already, the weights are broken.",
        )
    if sampling.greedy:
        return best
    p, ids = probabilities(logits, sampling)
    # Rounding may leave the last running sum below a draw close to 1: then the last kept token it is.
    place = min(int((p.cumsum() < stream.random() * p.sum()).sum()), len(ids) - 1)
    return int(ids[place])


def probabilities(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities, ids) of the tokens that may be drawn, best first; float64 [K] and int64 [K]."""
    few = min(sampling.top_k or MANY, len(logits))
    ids = best_first(logits, few)

    def weights(x: np.ndarray) -> np.ndarray:
        below = x.astype(np.float64) - float(logits[ids[0]])
        with np.errstate(over="ignore"):  # of a temperature next to nothing: minus infinity is right
            return np.exp(below / sampling.temperature)

    def kept(p: np.ndarray) -> int:
        count = int((p.cumsum() - p < sampling.top_p).sum())  # the probability of all better ones
        count = min(count, int(np.count_nonzero(p)))  # never what cannot be
        return min(count, int((p >= sampling.min_p * p[0]).sum())) if sampling.min_p else count

    p = weights(logits[ids])
    p /= p.sum() if sampling.top_k else weights(logits).sum()
    count = kept(p)
    if count == few < len(logits) and not sampling.top_k:  # of all tokens, more may be left
        ids = best_first(logits, len(logits))
        p = weights(logits[ids])
        p /= p.sum()
        count = kept(p)
    return p[:count] / p[:count].sum(), ids[:count]


def best_first(x: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest of float32 [V], the largest first, of equals the first first."""
    if k * CHUNK * 2 < len(x):
        # The k-th largest of the maxima of chunks is a lower bound of the k-th largest of all. A chunk is
        # rows at equal distances: much faster than rows beside each other.
        whole = len(x) // CHUNK * CHUNK
        tops = x[:whole].reshape(CHUNK, -1).max(axis=0)
        bound = np.partition(tops, len(tops) - k)[len(tops) - k]
        among = (x >= bound).nonzero()[0]
    else:
        among = np.arange(len(x))
    if len(among) < MANY:
        return among[np.argsort(-x[among], kind="stable")[:k]]
    # As integers, value before place: that sorts ten times as fast as a stable order of floats.
    bits = (x[among] + np.float32(0)).view(np.uint32)  # no negative zero
    falling = np.where(bits >> 31, bits, ~bits & 0x7FFFFFFF)
    order = np.sort(falling.astype(np.uint64) << 32 | np.arange(len(among), dtype=np.uint64))[:k]
    return among[(order & 0xFFFFFFFF).astype(np.int64)]


def adjust(
    logits: np.ndarray,
    sampling: Sampling,
    prompt_ids: Sequence[int],
    reply_ids: Sequence[int],
    allowed: np.ndarray | None = None,
) -> None:
    """Apply penalties, bias and a mask (bool [V], True: may follow) to float32 [V], in place.

    Ids that have no logit (of pictures, say) are passed over.
    """
    if sampling.penalizes:
        said, counts = np.unique(np.asarray(reply_ids, np.int64), return_counts=True)
        inside = said < len(logits)
        said, counts = said[inside], counts[inside]
    if sampling.repetition_penalty != 1:
        seen = np.concatenate([np.asarray(prompt_ids, np.int64), said])  # twice or once is the same
        seen = seen[(seen >= 0) & (seen < len(logits))]
        x = logits[seen]
        logits[seen] = np.where(x > 0, x / sampling.repetition_penalty, x * sampling.repetition_penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        logits[said] -= sampling.presence_penalty + sampling.frequency_penalty * counts.astype(np.float32)
    for token, bias in sampling.logit_bias.items():
        if 0 <= token < len(logits):
            logits[token] += bias
    if allowed is not None:
        _forbid(logits[: len(allowed)], ~allowed[: len(logits)])
        logits[len(allowed) :] = -np.inf


def _forbid(logits: np.ndarray, forbidden: np.ndarray) -> None:
    """-inf for them, in place. Where few are forbidden it is quickest to go to those; where they lie
    scattered, to do without a decision for each."""
    if np.count_nonzero(forbidden) * 50 < len(forbidden):
        np.copyto(logits, -np.inf, where=forbidden)
        return
    bits, kept = logits.view(np.int32), forbidden.astype(np.int32)
    kept -= 1  # all bits of those that stay, none of the others
    bits &= kept
    np.invert(kept, out=kept)
    kept &= np.float32(-np.inf).view(np.int32)
    bits |= kept


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Natural log of softmax over float32 [V]."""
    top = logits.max()
    return logits - (top + np.log(np.exp(logits - top).sum(dtype=np.float64)).astype(np.float32))
