"""The engine in a thread of its own, asked from an event loop.

    worker = Worker(vlm.engine, most=256)
    ticket = worker.submit(prompt, sampling, max_new_tokens=64)
    async for piece in ticket:
        ...                                  # piece.text, piece.tokens, piece.finish_reason

Only this thread touches the engine. What a step brought goes to the loop in one call for all.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from seavlm.engine.engine import Engine
from seavlm.engine.sampler import Sampling
from seavlm.engine.sequence import Prompt, Sequence, TokenChance, TokenMask
from seavlm.errors import SeavlmError

log = logging.getLogger("seavlm.serve")


class Busy(Exception):
    """More requests than the server takes at once."""


@dataclass(frozen=True)
class Piece:
    """What is new of a reply."""

    text: str
    tokens: list[TokenChance]  # of it, where they were asked for
    num_tokens: int  # of the reply so far
    finish_reason: str | None = None
    error: SeavlmError | None = None


@dataclass(eq=False)
class Ticket:
    """A request under way; iterate over it for the pieces of its reply. Leaving the loop early cancels it."""

    prompt: Prompt
    sampling: Sampling
    max_new_tokens: int
    mask: TokenMask | None
    owner: Any  # handed back to `watch`
    _worker: Worker
    _pieces: asyncio.Queue[Piece] = field(default_factory=asyncio.Queue)
    came: float = field(default_factory=time.perf_counter)
    sequence: Sequence | None = None
    told: int = 0  # tokens whose chances were handed on
    over: bool = False

    async def __aiter__(self) -> AsyncIterator[Piece]:
        try:
            while True:
                piece = await self._pieces.get()
                if piece.error is not None:
                    raise piece.error
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Give it up: its slot and its pages are free within a step."""
        if not self.over:
            self._worker._inbox.put(("cancel", self))

    @property
    def cached(self) -> int:
        """Tokens of the prompt that had been read before."""
        return 0 if self.sequence is None else self.sequence.cached


class Worker:
    """most: requests at once, waiting ones included; more are refused with `Busy`.

    watch: called in the thread with each request that ended.
    """

    def __init__(
        self, engine: Engine, *, most: int, watch: Callable[[Ticket], None] = lambda _: None
    ) -> None:
        self.engine, self.most, self._watch = engine, most, watch
        self._inbox: queue.SimpleQueue[tuple[str, Ticket | None]] = queue.SimpleQueue()
        self._tickets: dict[Sequence, Ticket] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.count = 0  # of tickets that are not over, as the loop knows

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        self._inbox.put(("stop", None))
        await asyncio.to_thread(self._thread.join, 10)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        mask: TokenMask | None = None,
        owner: Any = None,
    ) -> Ticket:
        """From the loop. `Busy` where there is no room."""
        if self.count >= self.most:
            raise Busy
        self.count += 1
        ticket = Ticket(prompt, sampling, max_new_tokens, mask, owner, self)
        self._inbox.put(("add", ticket))
        return ticket

    # --- in the thread

    def _work(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:  # a fault of ours, or a panic of a library: nobody may wait for ever
            log.critical("the engine's thread has ended", exc_info=error)
        news: list[tuple[Ticket, Piece]] = []
        for ticket in list(self._tickets.values()):
            self._fail(ticket, SeavlmError("the engine has ended"), news)
        while not self._inbox.empty():
            what, late = self._inbox.get()
            if what == "add" and late is not None:
                self._fail(late, SeavlmError("the engine has ended"), news)
        self._send(news)

    def _turn(self) -> bool:
        """Take in what has come, and a step; False when told to stop."""
        waiting: list[tuple[str, Ticket | None]] = []
        if self.engine.idle:
            waiting.append(self._inbox.get())
        while not self._inbox.empty():
            waiting.append(self._inbox.get())
        news: list[tuple[Ticket, Piece]] = []
        for what, ticket in waiting:
            if ticket is None:
                self._send(news)
                return False
            (self._add if what == "add" else self._cancel)(ticket, news)
        for sequence in self.engine.step():
            if (known := self._tickets.get(sequence)) is not None:
                news.append((known, self._piece(known, sequence)))
        self._send(news)
        return True

    def _send(self, news: list[tuple[Ticket, Piece]]) -> None:
        if news and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, news)

    def _fail(self, ticket: Ticket, error: SeavlmError, news: list[tuple[Ticket, Piece]]) -> None:
        if not ticket.over:
            ticket.over = True
            self._watch(ticket)
            news.append((ticket, Piece("", [], 0, "error", error)))

    def _add(self, ticket: Ticket, news: list[tuple[Ticket, Piece]]) -> None:
        try:
            ticket.sequence = self.engine.add(
                ticket.prompt, ticket.sampling, max_new_tokens=ticket.max_new_tokens, mask=ticket.mask
            )
            self._tickets[ticket.sequence] = ticket
        except SeavlmError as error:
            self._fail(ticket, error, news)
        except Exception as error:
            log.exception("unexpected", exc_info=error)
            self._fail(ticket, SeavlmError("the engine could not take the request"), news)

    def _cancel(self, ticket: Ticket, news: list[tuple[Ticket, Piece]]) -> None:
        sequence = ticket.sequence
        if sequence is not None and not ticket.over:
            self.engine.cancel(sequence)
            news.append((ticket, self._piece(ticket, sequence)))

    def _piece(self, ticket: Ticket, sequence: Sequence) -> Piece:
        text, tokens = sequence.take_text(), sequence.logprobs[ticket.told :]
        ticket.told += len(tokens)
        if sequence.finished:
            ticket.over = True
            del self._tickets[sequence]
            self._watch(ticket)
        return Piece(text, tokens, len(sequence.ids), sequence.finish_reason, sequence.error)

    # --- in the loop

    def _deliver(self, news: list[tuple[Ticket, Piece]]) -> None:
        for ticket, piece in news:
            if piece.finish_reason is not None:
                self.count -= 1
            ticket._pieces.put_nowait(piece)
