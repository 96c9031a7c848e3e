"""Guessing the next tokens from the text itself: a reply that repeats its prompt or itself goes faster.

The last few tokens are looked for further up; what followed them there is the guess (prompt look-up decoding,
Saxena 2023). The engine reads the guesses along with the newest token and keeps those that it would have
chosen anyway, so the reply does not change.
"""

from __future__ import annotations

from seavlm.engine.sequence import Sequence

LONGEST, SHORTEST = 4, 2  # how many tokens must repeat
MOST = 8  # guesses a step
PATIENCE = 24  # guesses after which a sequence must have been right often enough
PAYS = 0.25  # of the guesses: a row more costs about a quarter of a step


class Lookup:
    """Guesses for `Scheduler`."""

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        """At most `most` tokens that may come next; [] where nothing repeats or guessing has not paid."""
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
