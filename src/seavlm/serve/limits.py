"""Who may ask, and how much: keys, each with its own allowance.

    keys:
      - name: mobile app
        sha256: 5e88...                     # printf %s KEY | sha256sum; the key itself is written nowhere
        requests_per_minute: 60
        tokens_per_minute: 100000           # of prompts and replies together
        parallel: 8                         # replies at once

What is not given has no limit. An allowance fills up evenly, and a minute's worth may be spent at once.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import threading
import time
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from seavlm.errors import SeavlmError
from seavlm.serve import config


class Allowance:
    """So many a minute. What is taken may go below nothing: nothing is left until that is made up for."""

    def __init__(self, per_minute: int) -> None:
        self._most, self._left, self._at = float(per_minute), float(per_minute), time.monotonic()
        self._lock = threading.Lock()

    def wait(self, least: float = 1) -> int:
        """Seconds until `least` are there, 0 if they are."""
        with self._lock:
            self._fill()
            missing = least - self._left
            return 0 if missing <= 0 else math.ceil(missing / self._most * 60 - 1e-9)

    def take(self, count: float) -> None:
        with self._lock:
            self._fill()
            self._left -= count

    def _fill(self) -> None:
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._at) * self._most / 60)
        self._at = now


class Key(BaseModel):
    """One who may ask."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=64)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    parallel: Annotated[int, Field(ge=1)] | None = None

    _requests: Allowance | None = PrivateAttr(default=None)
    _tokens: Allowance | None = PrivateAttr(default=None)
    _under_way: int = PrivateAttr(default=0)
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    @model_validator(mode="after")
    def _begin(self) -> Key:
        self._requests = Allowance(self.requests_per_minute) if self.requests_per_minute else None
        self._tokens = Allowance(self.tokens_per_minute) if self.tokens_per_minute else None
        return self

    @property
    def salt(self) -> bytes:
        """What is remembered for one key is not found by another: nobody can tell what others have asked."""
        return bytes.fromhex(self.sha256)

    def reserve(self, replies: int) -> int:
        """Seconds until so many replies may be asked for; 0: they are under way now, of one request.
        SeavlmError for more than there may ever be.
        """
        if self.parallel is not None and replies > self.parallel:
            raise SeavlmError(
                f"{replies} replies are asked for at once, and this key may have {self.parallel}",
                hint="Ask for fewer.",
            )
        with self._lock:
            if self.parallel is not None and self._under_way + replies > self.parallel:
                return 1
            for allowance in (self._requests, self._tokens):
                if allowance is not None and (seconds := allowance.wait()):
                    return seconds
            if self._requests is not None:
                self._requests.take(1)
            self._under_way += replies
        return 0

    def release(self, replies: int) -> None:
        """So many will not come after all."""
        with self._lock:
            self._under_way -= replies

    def end(self, tokens: int) -> None:
        """One has ended, and took so many tokens."""
        self.release(1)
        if self._tokens is not None:
            self._tokens.take(tokens)


class Keys(BaseModel):
    """All of them; none: anybody may ask."""

    model_config = ConfigDict(extra="forbid")

    keys: list[Key] = []

    @model_validator(mode="after")
    def _distinct(self) -> Keys:
        if len({key.sha256 for key in self.keys}) < len(self.keys):
            raise ValueError("two keys are the same")
        return self

    @classmethod
    def one(cls, key: str) -> Keys:
        """A single key without limits."""
        return cls(keys=[Key(name="default", sha256=hashlib.sha256(key.encode()).hexdigest())])

    @classmethod
    def read(cls, path: Path) -> Keys:
        """From a YAML file. SeavlmError for what is not one, or holds no key."""
        found = config.read(cls, path, "Give name and sha256, and limits if you like.")
        if not found.keys:
            raise SeavlmError(f"{path} holds no key", hint="Write one, or leave --keys out.")
        return found

    def find(self, authorization: bytes) -> Key | None:
        """Whose header this is. All keys are compared, whichever fits."""
        kind, _, given = authorization.partition(b" ")
        digest = hashlib.sha256(given.strip()).hexdigest()
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, digest) and kind.lower() == b"bearer":
                found = key
        return found
