"""Our engine behind the server, in a thread of its own. Only that thread touches it; what a step brought goes
to the event loop in one call for all.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from seavlm.engine.grammar import Constraint, Grammars
from seavlm.engine.pages import BLOCK
from seavlm.engine.sampler import Sampling
from seavlm.engine.sequence import Prompt
from seavlm.engine.sequence import Sequence as Request
from seavlm.engine.vlm import VLM
from seavlm.errors import SeavlmError
from seavlm.model.config import GLOBAL, LOCAL
from seavlm.serve.backend import Form, Piece, Ticket, Token
from seavlm.text.normalize import normalize

log = logging.getLogger("seavlm.serve")


@dataclass(eq=False, kw_only=True)
class EngineTicket(Ticket):
    sampling: Sampling
    max_new_tokens: int
    mask: Constraint | None
    who: str
    salt: bytes
    request: Request | None = None
    told: int = 0  # tokens whose chances were handed on


class EngineBackend:
    """`Backend` over `vlm`. max_queue: requests that may wait beside those under way."""

    def __init__(self, vlm: VLM, *, max_queue: int = 256, max_tokens: int | None = None) -> None:
        self.vlm, self.engine, self.name = vlm, vlm.engine, vlm.name or "seavlm"
        most = min(self.engine.context, self.engine.pages.num[GLOBAL] * BLOCK)
        self.max_tokens = min(most, max_tokens or most)
        self.most = max_queue + self.engine.scheduler.max_sequences
        self.count = 0  # of tickets that are not over, as the loop knows
        self.ended: Callable[[Ticket], None] = lambda _: None
        self._inbox: queue.SimpleQueue[tuple[str, EngineTicket | None]] = queue.SimpleQueue()
        self._tickets: dict[Request, EngineTicket] = {}
        self._waiting: dict[str, deque[EngineTicket]] = {}  # by who asks; the first is next
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name=f"engine {self.name}", daemon=True)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        self._inbox.put(("stop", None))
        await asyncio.to_thread(self._thread.join, 10)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def fatal(self) -> bool:
        return self._loop is not None and not self.alive

    @property
    def running(self) -> int:
        return len(self.engine.scheduler.running)

    def pages(self) -> Mapping[str, int]:
        return {kind: self.engine.pages.in_use(kind) for kind in (GLOBAL, LOCAL)}

    # --- in a thread beside the loop

    def chat(self, messages: Sequence[Mapping[str, Any]], *, allow_urls: bool) -> Prompt:
        return self._checked(self.vlm.prompt(messages, allow_urls=allow_urls, allow_files=False))

    def plain(self, text: str | list[int]) -> Prompt:
        if isinstance(text, str):
            tokenizer = self.vlm.tokenizer
            text = [tokenizer.bos_id, *tokenizer.encode(normalize(text))]
        return self._checked(Prompt(text))

    def words(self, text: str | list[int]) -> str:
        tokenizer = self.vlm.tokenizer
        if isinstance(text, str):
            return text
        return tokenizer.decode([i for i in text if i < tokenizer.vocab_size])

    def _checked(self, prompt: Prompt) -> Prompt:
        if len(prompt.ids) >= self.max_tokens:
            raise SeavlmError(
                f"the prompt has {len(prompt.ids):,} tokens, and {self.max_tokens - 1:,} is the most",
                hint="Shorten the text or send fewer pictures.",
            )
        return prompt

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.vlm.tokenizer, self.vlm.config.eos_token_ids)

    def form(self, form: Form) -> Constraint:
        given = () if form.kind == "json_object" else (form.value,)
        made: Constraint = getattr(self.grammars, form.kind)(*given)
        return made

    def sampling(self, given: Mapping[str, Any]) -> Sampling:
        return self.vlm.sampling(**given)

    # --- in the loop

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling,
        *,
        max_new_tokens: int | None,
        form: Constraint | None = None,
        seed: int | None = None,
        owner: Any = None,
        salt: bytes = b"",
        who: str = "",
    ) -> EngineTicket:
        self.count += 1
        room = self.max_tokens - len(prompt.ids)
        ticket = EngineTicket(
            prompt=prompt,
            salt=salt,
            owner=owner,
            give_up=lambda ticket: self._inbox.put(("cancel", ticket)),  # type: ignore[arg-type]
            prompt_tokens=len(prompt.ids),
            images=len(prompt.pictures),
            sampling=replace(sampling, seed=seed),
            max_new_tokens=min(max_new_tokens or room, room),
            mask=None if form is None else form.copy(),
            who=who,
        )
        self._inbox.put(("add", ticket))
        return ticket

    def _deliver(self, news: list[tuple[EngineTicket, Piece]]) -> None:
        for ticket, piece in news:
            if piece.finish_reason is not None:
                self.count -= 1
            ticket.put(piece)

    # --- in the engine's thread

    def _work(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:  # a fault of ours, or a panic of a library: nobody may wait for ever
            log.critical("the engine's thread has ended", exc_info=error)
        news: list[tuple[EngineTicket, Piece]] = []
        ended = _fault("the engine has ended")
        for ticket in [*self._tickets.values(), *(one for line in self._waiting.values() for one in line)]:
            self._fail(ticket, ended, news)
        while not self._inbox.empty():
            what, late = self._inbox.get()
            if what == "add" and late is not None:
                self._fail(late, ended, news)
        self._send(news)

    def _turn(self) -> bool:
        """Take in what has come, and a step; False when told to stop."""
        came: list[tuple[str, EngineTicket | None]] = []
        if self.engine.idle and not self._waiting:
            came.append(self._inbox.get())
        while not self._inbox.empty():
            came.append(self._inbox.get())
        news: list[tuple[EngineTicket, Piece]] = []
        for what, ticket in came:
            if ticket is None:
                self._send(news)
                return False
            if what == "add":
                self._waiting.setdefault(ticket.who, deque()).append(ticket)
            else:
                self._cancel(ticket, news)
        scheduler = self.engine.scheduler
        while self._waiting and len(scheduler.running) + len(scheduler.waiting) < scheduler.max_sequences:
            self._add(self._next(), news)
        for request in self.engine.step():
            if (known := self._tickets.get(request)) is not None:
                news.append((known, self._piece(known, request)))
        self._send(news)
        return True

    def _next(self) -> EngineTicket:
        """Who asks takes turns with the others who do."""
        who, line = next(iter(self._waiting.items()))
        ticket = line.popleft()
        del self._waiting[who]
        if line:
            self._waiting[who] = line  # behind all others
        return ticket

    def _send(self, news: list[tuple[EngineTicket, Piece]]) -> None:
        if news and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, news)

    def _add(self, ticket: EngineTicket, news: list[tuple[EngineTicket, Piece]]) -> None:
        try:
            ticket.request = self.engine.add(
                ticket.prompt.salted(ticket.salt),
                ticket.sampling,
                max_new_tokens=ticket.max_new_tokens,
                mask=ticket.mask,
            )
            self._tickets[ticket.request] = ticket
        except SeavlmError as error:
            self._fail(ticket, error, news)
        except Exception as error:
            log.exception("unexpected", exc_info=error)
            self._fail(ticket, _fault("the engine could not take the request"), news)

    def _cancel(self, ticket: EngineTicket, news: list[tuple[EngineTicket, Piece]]) -> None:
        if ticket.over:
            return
        if ticket.request is not None:
            self.engine.cancel(ticket.request)
            news.append((ticket, self._piece(ticket, ticket.request)))
            return
        line = self._waiting.get(ticket.who, deque())
        if ticket in line:
            line.remove(ticket)
        if not line:
            self._waiting.pop(ticket.who, None)
        ticket.finish_reason = "cancelled"
        self.ended(ticket)
        news.append((ticket, Piece("", [], 0, "cancelled")))

    def _fail(self, ticket: EngineTicket, error: SeavlmError, news: list[tuple[EngineTicket, Piece]]) -> None:
        if not ticket.over:
            ticket.finish_reason = "error"
            self.ended(ticket)
            news.append((ticket, Piece("", [], 0, "error", error)))

    def _piece(self, ticket: EngineTicket, request: Request) -> Piece:
        text, chances = request.take_text(), request.logprobs[ticket.told :]
        ticket.told += len(chances)
        ticket.cached_tokens, ticket.num_tokens = request.cached, len(request.ids)
        ticket.first_at, ticket.last_at = request.first_token_at, request.last_token_at
        if request.finished:
            ticket.finish_reason = request.finish_reason
            del self._tickets[request]
            self.ended(ticket)
        data = self.vlm.tokenizer.token_bytes
        tokens = [
            Token(data(one.token), one.logprob, [(data(other), chance) for other, chance in one.top])
            for one in chances
        ]
        return Piece(text, tokens, len(request.ids), request.finish_reason, request.error)


def _fault(message: str) -> SeavlmError:
    """An error of ours: one with a cause is not told the caller as theirs (`Refused.of`)."""
    error = SeavlmError(message)
    error.__cause__ = RuntimeError(message)
    return error
