"""What is read in the next step: a token of every sequence that writes, and pieces of the prompts of others.

Sequences that write come first, so that nobody's reply stops while a long prompt is read; what is left of the
step's rows goes to prompts in the order they came. While others write, a picture of few tokens counts as
more, for the time that looking at it takes. A piece never ends inside a picture. When pages run out, the
youngest sequence gives up its own and begins again later, from what the prefix cache still has of it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from seavlm.engine.pages import Pages
from seavlm.engine.sequence import Sequence
from seavlm.engine.speculate import Drafter

PICTURE_ROWS = 64  # a picture is worth so many rows at least: looking at it takes as long


@dataclass(frozen=True)
class Piece:
    """Positions [first, end) of a sequence; those past its tokens are guesses (`sequence.draft`)."""

    sequence: Sequence
    first: int
    end: int


class Scheduler:
    """rows: about how many tokens a step reads; more only where a picture would be cut. max_sequences: how
    many sequences hold pages at once. drafter: guesses what a sequence says next."""

    def __init__(
        self,
        pages: Pages,
        *,
        rows: int,
        max_sequences: int,
        drafter: Drafter | None = None,
    ) -> None:
        self.pages, self.rows, self.max_sequences, self.drafter = pages, rows, max_sequences, drafter
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # the oldest first

    def plan(self) -> list[Piece]:
        """The pieces of the next step, their pages reserved. Empty only when there is nothing to do."""
        pieces: list[Piece] = []
        room = self.rows
        waited = len(self.waiting)
        for sequence in list(self.running):
            if sequence.reading or sequence not in self.running:
                continue
            end = sequence.num_tokens
            if self.drafter is not None:
                most = min((room - 1) // 2, sequence.max_new_tokens - len(sequence.ids) - 1)
                sequence.draft = self.drafter.draft(sequence, most) if most > 0 else []
                end += len(sequence.draft)
            if self._reserve(sequence, end):
                pieces.append(Piece(sequence, sequence.computed, end))
                room -= end - sequence.computed
        some_write = bool(pieces)
        for sequence in list(self.running):
            if room <= 0:
                break
            if (
                sequence in self.running
                and sequence.reading
                and (taken := self._read(sequence, room, pieces))
            ):
                room -= taken + (_looks(pieces[-1]) if some_write else 0)
        if len(self.waiting) > waited:  # one had to give up its pages: no time to let others in
            room = 0
        while room > 0 and self.waiting and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            if self._soon_known(sequence):
                break
            self.pages.admit(sequence)
            self.waiting.popleft()
            self.running.append(sequence)
            taken = self._read(sequence, room, pieces, may_preempt=not pieces)
            if not taken:
                break
            room -= taken + (_looks(pieces[-1]) if some_write else 0)
        pieces = [piece for piece in pieces if piece.sequence.held is not None]
        if not pieces and self.waiting and not self.running:
            raise AssertionError("nothing runs and nothing can begin")  # the engine has checked that it fits
        return pieces

    def _read(self, sequence: Sequence, room: int, pieces: list[Piece], *, may_preempt: bool = True) -> int:
        """Add a piece of at most `room` tokens of a prompt; returns its size, 0 when it has to wait."""
        first, last = sequence.computed, sequence.num_tokens
        end = min(last, first + room)
        if end < last and (span := sequence.cuts_picture(end)):
            end = span[0] if span[0] > first else span[1]  # up to the picture; if it comes next, all of it
        if not self._reserve(sequence, end, may_preempt=may_preempt):
            return 0
        pieces.append(Piece(sequence, first, end))
        return end - first

    def _reserve(self, sequence: Sequence, end: int, *, may_preempt: bool = True) -> bool:
        """Pages up to `end`, taken from the youngest sequences if need be; False if it had to give up its
        own."""
        while not self.pages.reserve(sequence, end):
            youngest = self.running[-1]
            if youngest is sequence or not may_preempt:
                youngest = sequence
            self.running.remove(youngest)
            self.pages.release(youngest)
            youngest.draft = []
            self.waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        return True

    def _soon_known(self, sequence: Sequence) -> bool:
        """Another sequence is reading what this one begins with: waiting for it saves reading it twice."""
        if not self.pages.remember:
            return False
        known = None
        for other in self.running:
            if not other.reading:
                continue
            ahead = _common_length(other.items, sequence.items, sequence.known_limit)
            if known is None:
                known, _ = self.pages.match(sequence)
            if (span := sequence.cuts_picture(ahead)) is not None:
                ahead = span[0]
            if ahead >= known + 16:
                return True
        return False


def _looks(piece: Piece) -> int:
    """Rows that the pictures in a piece are worth beside their own."""
    spans = piece.sequence.spans
    return sum(
        max(0, PICTURE_ROWS - (end - first)) for first, end in spans if piece.first <= first < piece.end
    )


def _common_length(a: list[int], b: list[int], limit: int) -> int:
    """How many of the first items (at most `limit`) are equal."""
    low, high = 0, min(len(a), len(b), limit)
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # the first `low` are equal, the first `high` are not
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
