"""Guessing the next tokens, so that a step reads several at once: the reply is the same and comes sooner.

Two ways to guess. `Lookup`: the last few tokens are looked for further up, and what followed them there is
the guess (prompt look-up decoding, Saxena 2023): good where a reply repeats its prompt or itself.
`DraftModel`: a smaller or more coarsely rounded model of the same words goes ahead (speculative decoding,
Leviathan et al. 2023). The engine reads the guesses along with the newest token and keeps those that it would
have chosen anyway. Both stop where they do not pay.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from seavlm.engine.sampler import Sampling
from seavlm.engine.sequence import Prompt, Sequence
from seavlm.errors import SeavlmError

if TYPE_CHECKING:
    from seavlm.engine.engine import Engine

LONGEST, SHORTEST = 4, 2  # how many tokens must repeat for a look-up
MOST = 8  # guesses a step
PATIENCE = 24  # guesses after which a look-up must have been right often enough
PAYS = 0.25  # of the guesses: a row more costs about a quarter of a step
ROW = 0.1  # what reading a guess costs, in steps, beside making it


class Drafter(Protocol):
    """Guesses for `Scheduler`."""

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        """At most `most` tokens that may come next; [] where there is no guess, or guessing has not paid."""


class Lookup:
    """Guesses from the text itself."""

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        if sequence.drafted >= PATIENCE and sequence.accepted < PAYS * sequence.drafted:
            return []
        items = sequence.items
        for size in range(min(LONGEST, len(items) - 1), SHORTEST - 1, -1):
            tail = items[-size:]
            for at in range(len(items) - size - 1, -1, -1):
                if items[at] == tail[0] and items[at : at + size] == tail:
                    guess = items[at + size : at + size + min(most, MOST)]
                    return guess[: next((i for i, item in enumerate(guess) if item < 0), len(guess))]
        return []


class DraftModel:
    """Guesses of another model, which reads the text and no pictures.

    engine: of the other model, and nobody else's. Its prefix cache makes guessing cheap: only what came since
    the last guess is read.
    """

    def __init__(self, engine: Engine) -> None:
        if not engine.pages.remember:
            raise SeavlmError(
                "a draft model without a prefix cache would read the whole text for each guess",
                hint="Leave prefix_cache on.",
            )
        self.engine = engine
        self._guess = self._step = 0.0  # seconds of the last ones
        self._ended = 0.0

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        if sequence.drafted and sequence.last_token_at > self._ended:
            self._step = sequence.last_token_at - self._ended
        pictures = {at for first, end in sequence.spans for at in range(first, end)}
        ids = [*sequence.prompt.ids, *sequence.ids]
        if pictures:
            ids = [token for at, token in enumerate(ids) if at not in pictures]
        rate = (sequence.accepted + 4) / (sequence.accepted + sequence.missed + 5)  # hopeful at first
        most = min(most, best_length(rate, ROW + self.cost))
        if most < 1:
            return []
        began = time.perf_counter()
        try:
            guess = self.engine.add(Prompt(ids), Sampling(temperature=0), max_new_tokens=most, stop_ids=())
        except SeavlmError:  # more than it can read
            return []
        while not guess.finished:
            self.engine.step()
        self._ended = time.perf_counter()
        if sequence.drafted:  # the first one reads the whole prompt
            self._guess = (self._ended - began) / most
        return guess.ids  # none after an error, which costs speed and not the reply

    @property
    def cost(self) -> float:
        """Of a guess, in steps of the large model, as last measured."""
        return self._guess / self._step if self._step else 0.2


def best_length(rate: float, cost: float) -> int:
    """How many guesses bring the most tokens a second: of k guesses, each right with probability `rate` where
    the ones before it were, (1 - rate^(k + 1)) / (1 - rate) tokens come of a step that takes 1 + k cost
    (Leviathan et al. 2023, theorem 3.8)."""

    def gain(k: int) -> float:
        return sum(rate**i for i in range(k + 1)) / (1 + k * cost)

    return max(range(MOST + 1), key=gain)
