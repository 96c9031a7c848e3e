"""Guessing the next tokens, so that a step reads several at once: the reply is the same and comes sooner.

Two ways to guess. `Lookup`: the last few tokens are looked for further up, and what followed them there is
the guess (prompt look-up decoding, Saxena 2023): good where a reply repeats its prompt or itself.
`DraftModel`: a smaller or more coarsely rounded model of the same words goes ahead (speculative decoding,
Leviathan et al. 2023). The engine reads the guesses along with the newest token and keeps those that it would
have chosen anyway. Both stop where they do not pay. In bf16, several tokens at once may be rounded otherwise
than one, and a near tie then fall otherwise.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

from seavlm.engine.sampler import Sampling
from seavlm.engine.sequence import Prompt, Sequence
from seavlm.errors import SeavlmError

if TYPE_CHECKING:
    from seavlm.engine.engine import Engine

LONGEST, SHORTEST = 4, 2  # how many tokens must repeat for a look-up
MOST = 8  # guesses a step
PATIENCE = 24  # guesses after which a look-up must have been right often enough
PAYS = 0.25  # of the guesses
ROW = 0.1  # of a step: what reading one more guess costs, beside making it
RETRY = 64  # tokens after which a draft model that does not pay is tried again


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

    engine: of the other model, and nobody else's. It reads each prompt once; then its prefix cache makes
    guessing cheap, as only what came since the last guess is read.
    """

    def __init__(self, engine: Engine) -> None:
        if not engine.pages.remember:
            raise SeavlmError(
                "a draft model without a prefix cache would read the whole text for each guess",
                hint="Leave prefix_cache on.",
            )
        self.engine = engine
        self._guesses = deque[float](maxlen=5)  # seconds of the last guesses, and of the steps between them
        self._steps = deque[float](maxlen=5)
        self._drafts = 0  # since the last step
        self._sharing = 1  # drafts before the last step: they came one after the other
        self._ended = 0.0  # the last of them

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        if self._drafts and sequence.last_token_at > self._ended:
            if sequence.drafted:
                self._steps.append(sequence.last_token_at - self._ended)
                self._sharing = self._drafts
            self._drafts = 0
        rate = (sequence.accepted + 4) / (sequence.accepted + sequence.missed + 5)  # hopeful at first
        length = best_length(rate, ROW + self.cost)
        if not length and len(sequence.ids) % RETRY == 0:
            length = 1
        if min(most, length) < 1:
            return []
        ids = [*sequence.prompt.ids, *sequence.ids]
        if sequence.spans:
            pictures = {at for first, end in sequence.spans for at in range(first, end)}
            ids = [token for at, token in enumerate(ids) if at not in pictures]
        began = time.perf_counter()
        try:
            guess = self.engine.add(
                Prompt(ids), Sampling(temperature=0), max_new_tokens=min(most, length), stop_ids=()
            )
        except SeavlmError:  # more than it can read
            return []
        while not guess.finished:
            self.engine.step()
        self._ended = time.perf_counter()
        self._drafts += 1
        if sequence.drafted and guess.ids:  # the first one reads the whole prompt
            self._guesses.append((self._ended - began) / len(guess.ids))
        return guess.ids

    @property
    def cost(self) -> float:
        """Of a guess, in steps of the large model, as last measured."""
        if not (self._guesses and self._steps):
            return 0.2
        return self._sharing * statistics.median(self._guesses) / statistics.median(self._steps)


def best_length(rate: float, cost: float) -> int:
    """How many guesses bring the most tokens a second: of k guesses, each right with probability `rate` where
    the ones before it were, (1 - rate^(k + 1)) / (1 - rate) tokens come of a step that takes 1 + k cost
    (Leviathan et al. 2023, theorem 3.8)."""

    def gain(k: int) -> float:
        return sum(rate**i for i in range(k + 1)) / (1 + k * cost)

    return max(range(MOST + 1), key=gain)
