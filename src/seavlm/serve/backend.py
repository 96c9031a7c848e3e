"""What computes replies, for the server: our engine (`engine_backend.py`) or a vLLM (`vllm_backend.py`).

prompt = backend.chat(messages, allow_urls=False)            # in a thread
ticket = backend.submit(prompt, backend.sampling({}), max_new_tokens=64)
async for piece in ticket:
    ...                                                      # piece.text, piece.finish_reason
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from seavlm.errors import SeavlmError


@dataclass(frozen=True)
class Token:
    """One of a reply, the natural log of its probability, and of the likeliest alternatives."""

    data: bytes
    logprob: float
    top: list[tuple[bytes, float]]


@dataclass(frozen=True)
class Piece:
    """What is new of a reply."""

    text: str
    tokens: list[Token]  # of it, where they were asked for
    num_tokens: int  # of the reply so far
    finish_reason: str | None = None
    error: SeavlmError | None = None


@dataclass(frozen=True)
class Form:
    """What a reply is held to: a JSON schema, any JSON object, a schema or else plain text, an expression, or
    one of some texts."""

    kind: Literal["json_schema", "json_object", "json_or_text", "regex", "choice"]
    value: Any = None


@dataclass(eq=False)
class Ticket:
    """A request under way; iterate over it for the pieces of its reply. Leaving the loop early cancels it.

    owner: handed back when it ends. The counts are of tokens, and of views of pictures.
    """

    prompt: Any
    owner: Any
    give_up: Callable[[Ticket], None]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    images: int = 0
    num_tokens: int = 0
    finish_reason: str | None = None
    came: float = field(default_factory=time.perf_counter)
    first_at: float = 0.0
    last_at: float = 0.0
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    _pieces: asyncio.Queue[Piece] = field(default_factory=asyncio.Queue)

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

    def put(self, piece: Piece) -> None:
        """From the loop."""
        self._pieces.put_nowait(piece)

    @property
    def over(self) -> bool:
        return self.finish_reason is not None

    def cancel(self) -> None:
        """Give it up: its slot is free within a step."""
        if not self.over:
            self.give_up(self)


class Backend(Protocol):
    """name: of the model. max_tokens: of prompt and reply together. most: requests at once, waiting ones
    included; count: those there are. All but `prompt`s and `form`s is called from the event loop."""

    name: str
    max_tokens: int
    most: int
    count: int
    ended: Callable[[Ticket], None]  # called, from any thread, with each ticket that is over

    async def start(self) -> None: ...
    async def stop(self) -> None: ...

    @property
    def alive(self) -> bool:
        """Requests will be answered."""
        ...

    @property
    def fatal(self) -> bool:
        """They will never again, in this process."""
        ...

    @property
    def running(self) -> int:
        """Requests that are being written, not waiting."""
        ...

    def pages(self) -> Mapping[str, int]:
        """Pages of keys and values in use, by kind of layer."""
        ...

    # In a thread beside the loop; SeavlmError for what the caller did wrong.

    def chat(self, messages: Sequence[Mapping[str, Any]], *, allow_urls: bool) -> Any:
        """A prompt: what is read."""
        ...

    def plain(self, text: str | list[int]) -> Any: ...
    def words(self, text: str | list[int]) -> str:
        """A plain prompt as text, for the guards."""
        ...

    def form(self, form: Form) -> Any:
        """It, checked and compiled."""
        ...

    def sampling(self, given: Mapping[str, Any]) -> Any:
        """How to choose tokens: fields of `Sampling`, None for the model's own."""
        ...

    def submit(
        self,
        prompt: Any,
        sampling: Any,
        *,
        max_new_tokens: int | None,
        form: Any = None,
        seed: int | None = None,
        owner: Any = None,
        salt: bytes = b"",
        who: str = "",
    ) -> Ticket:
        """Take in a request; the caller has seen to it that there is room. salt: what is remembered of it is
        found again only by those of the same one. who: asks; where many wait, they take turns."""
        ...
