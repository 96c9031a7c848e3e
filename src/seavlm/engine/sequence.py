"""One request on its way: what it asks for, how far it has been read, and what has been said.

Shapes: M soft tokens a picture, V vocabulary rows.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable
from collections.abc import Sequence as Listed
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from seavlm.engine.sampler import Sampling

if TYPE_CHECKING:
    from seavlm.engine.pages import Held
    from seavlm.errors import SeavlmError
    from seavlm.text.tokenizer import StreamDecoder

# Given the ids of the reply so far: bool [V], True for those that may follow; None for no constraint.
TokenMask = Callable[[Listed[int]], np.ndarray | None]
# Given a position and its logits, float32 [V], before penalties; they must be copied to be kept.
Inspect = Callable[[int, np.ndarray], None]


@dataclass(frozen=True)
class Picture:
    """A view of a picture, preprocessed, and the SHA-256 of what the tower will see (its pixels and size)."""

    pixels: np.ndarray  # float32 [3, S, S]
    digest: bytes


@dataclass(frozen=True)
class Prompt:
    """What the model reads: ids, with a run of M soft tokens for each picture. salt: what was read is found
    again only by prompts of the same one."""

    ids: list[int]
    pictures: tuple[Picture, ...] = ()
    salt: bytes = b""

    def salted(self, salt: bytes) -> Prompt:
        """The same, of its own: pictures too are looked at anew."""
        if not salt:
            return self
        pictures = (replace(p, digest=hashlib.sha256(salt + p.digest).digest()) for p in self.pictures)
        return replace(self, pictures=tuple(pictures), salt=salt)


@dataclass(frozen=True)
class TokenChance:
    """A token of the reply, the natural log of its probability, and of the likeliest alternatives."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Sequence:
    """A request. Made by `Engine.add`; what may be read of it: text, ids, finish_reason, error, logprobs."""

    prompt: Prompt
    sampling: Sampling
    max_new_tokens: int
    spans: list[tuple[int, int]]  # [first, end) of each picture's soft tokens
    items: list[int]  # what identifies each position to the prefix cache
    stop_ids: frozenset[int]
    mask: TokenMask | None = None
    inspect: Inspect | None = None
    inspect_from: int = 0
    decoder: StreamDecoder | None = None

    ids: list[int] = field(default_factory=list)  # of the reply, without the stop token
    text: str = ""
    logprobs: list[TokenChance] = field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length", "cancelled", "error"
    error: SeavlmError | None = None

    computed: int = 0  # positions whose keys and values are in the cache
    cached: int = 0  # of the prompt, found in the prefix cache when it was admitted
    held: Held | None = None  # its pages
    drafted: int = 0  # tokens guessed by speculation, and how many of them were right
    accepted: int = 0
    missed: int = 0  # steps in which a guess was wrong
    draft: list[int] = field(default_factory=list)  # in the step under way

    def __post_init__(self) -> None:
        self.stream = self.sampling.stream()
        self.started = 0.0  # set by the engine: when it came, when its first and its newest token were there
        self.first_token_at = self.last_token_at = 0.0
        self._shown = 0
        self._starts = [first for first, _ in self.spans]

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_tokens(self) -> int:
        """Of prompt and reply."""
        return len(self.prompt.ids) + len(self.ids)

    @property
    def reading(self) -> bool:
        """More than the newest token is still to be read."""
        return self.computed < self.num_tokens - 1

    @property
    def known_limit(self) -> int:
        """So many of its first tokens may come from the prefix cache: the logits of the others are wanted."""
        return min(self.num_tokens - 1, self.num_tokens if self.inspect is None else self.inspect_from)

    def id_at(self, position: int) -> int:
        prompt = self.prompt.ids
        return prompt[position] if position < len(prompt) else self.ids[position - len(prompt)]

    def span_at(self, position: int) -> tuple[int, int] | None:
        """The picture that has a soft token at this position."""
        number = bisect.bisect_right(self._starts, position) - 1
        if number >= 0 and position < self.spans[number][1]:
            return self.spans[number]
        return None

    def cuts_picture(self, end: int) -> tuple[int, int] | None:
        """The picture that would be split if the tokens before `end` were read without those from it on."""
        span = self.span_at(end)
        return span if span is not None and span[0] < end else None

    def put(self, token: int) -> None:
        """Take in a new token: it may end the reply, by its id, by a stop text or by the length."""
        if token in self.stop_ids:
            self.finish("stop")
            return
        self.ids.append(token)
        self.items.append(token)
        if self.decoder is not None:
            self._say(self.decoder.put(token))
        if not self.finished and len(self.ids) >= self.max_new_tokens:
            self.finish("length")

    def finish(self, reason: str) -> None:
        """Nothing more will come."""
        if self.decoder is not None and reason in ("stop", "length"):
            self._say(self.decoder.flush())
        if self.finish_reason is None:
            self.finish_reason = reason

    def _say(self, piece: str) -> None:
        """Add to the text, and end it where a stop text begins."""
        if self.finish_reason is not None or not piece:
            return
        seen = max(0, len(self.text) - max(map(len, self.sampling.stop), default=0))
        self.text += piece
        found = [at for stop in self.sampling.stop if (at := self.text.find(stop, seen)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.finish_reason = "stop"

    def take_text(self) -> str:
        """The text that is new since the last call and will stay; what may begin a stop text is held back."""
        end = len(self.text)
        if not self.finished:
            room = end - self._shown
            for stop in self.sampling.stop:
                for size in range(min(len(stop) - 1, room), 0, -1):
                    if self.text.endswith(stop[:size]):
                        end = min(end, len(self.text) - size)
                        break
        piece, self._shown = self.text[self._shown : end], end
        return piece


def picture_spans(ids: Listed[int], image_token: int, size: int) -> list[tuple[int, int]]:
    """[first, end) of each picture's soft tokens: each run of `image_token` is cut into pieces of `size`."""
    places = np.flatnonzero(np.asarray(ids) == image_token)
    return [(int(first), int(first) + size) for first in places[::size]]


def prefix_items(prompt: Prompt, spans: Listed[tuple[int, int]]) -> list[int]:
    """What identifies each position: the token's id, and in a picture a negative number of its SHA-256 and
    the place in it, so that other pixels never look equal."""
    items = list(prompt.ids)
    if prompt.salt:  # below all numbers of pictures
        items[0] -= (1 << 300) + (int.from_bytes(hashlib.sha256(prompt.salt).digest()) << 32)
    for (first, end), picture in zip(spans, prompt.pictures, strict=True):
        number = int.from_bytes(picture.digest) * (end - first)
        items[first:end] = [-1 - number - place for place in range(end - first)]
    return items
