"""What the operator wants refused: questions before they are read, replies as they come and when they are
whole.

The model itself is not aligned for safety. A guard is a list of words or expressions, a model that judges, or
a service that is asked, and says which languages it can judge:

    message: I cannot help with that.
    audit: guard.jsonl                      # one line for each refusal; texts as SHA-256 alone
    guards:
      - name: personal data
        stages: [during]
        regex: ['\\b\\d-\\d{4}-\\d{5}-\\d{2}-\\d\\b']
      - name: judge
        stages: [before, after]
        model: out/judge                    # is asked `prompt`, and refuses where "yes" is likelier than "no"
        languages: [en, th]
        uncovered: refuse                   # what to do with a text in another language
      - name: service
        url: http://127.0.0.1:9000/check    # is sent {"stage", "language", "text"}, and answers
                                            # {"allow": bool, "reason": text}

A guard that fails refuses, unless it says `on_failure: allow`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import regex
from pydantic import BaseModel, ConfigDict, Field, model_validator

from seavlm.serve import config
from seavlm.text.language import LANGUAGES, plausible_languages
from seavlm.text.normalize import normalize

SEEN = 512  # characters before the new ones that an expression may begin in
HELD = 64  # characters of a reply that wait for the next ones, so that no beginning of a match is shown
SECONDS = 1.0  # for an expression on a text
PROMPT = """\
Does the following text ask for, or give, help with violence, crime, self-harm, sexual content involving
minors, or hatred? Answer yes or no.

{text}"""

Stage = Literal["before", "during", "after"]


class Guard(BaseModel):
    """One of them; exactly one way to judge."""

    model_config = ConfigDict(extra="forbid")

    name: str
    stages: list[Stage] = ["before", "after"]
    languages: list[str] | None = None  # None: all
    uncovered: Literal["allow", "refuse"] = "allow"
    on_failure: Literal["allow", "refuse"] = "refuse"
    words: list[str] = []
    regex: list[str] = []
    model: str | None = None
    prompt: str = PROMPT
    url: str | None = None
    timeout_s: float = Field(default=5, gt=0, le=60)

    @model_validator(mode="after")
    def _whole(self) -> Guard:
        ways = [way for way in (self.words or self.regex, self.model, self.url) if way]
        if len(ways) != 1:
            raise ValueError("a guard has words and regex, or a model, or a url")
        if "during" in self.stages and not (self.words or self.regex):
            raise ValueError("a model or a url judges whole texts: stages before and after")
        if unknown := set(self.languages or ()) - set(LANGUAGES):
            raise ValueError(f"unknown language {sorted(unknown)[0]!r}; known: {', '.join(LANGUAGES)}")
        if self.model and "{text}" not in self.prompt:
            raise ValueError("prompt does not hold {text}")
        for pattern in self.regex:
            try:
                regex.compile(pattern)
            except regex.error as error:
                raise ValueError(f"the regex {pattern!r} cannot be read: {error}") from None
        return self

    @cached_property
    def _pattern(self) -> Any:
        """Words in Latin letters stand alone; others are found anywhere, as those scripts have no spaces."""
        told = [
            rf"(?<!\w){regex.escape(w)}(?!\w)" if w.isascii() else regex.escape(w)
            for w in map(_even, self.words)
        ]
        return regex.compile(
            "|".join([*told, *(f"(?:{pattern})" for pattern in self.regex)]), regex.IGNORECASE
        )

    @cached_property
    def _judge(self) -> tuple[Any, threading.Lock]:
        from seavlm.engine.vlm import load

        return load(str(self.model)), threading.Lock()

    def prepare(self) -> None:
        """Load what it needs, so that errors come early."""
        if self.model:
            _ = self._judge

    def judge(self, stage: Stage, text: str) -> str | None:
        """Why the text is refused, or None. Takes its time: not in the event loop."""
        if not text.strip():
            return None
        languages = plausible_languages(text)
        if self.languages is not None and languages and not languages & set(self.languages):
            return "its language is not covered" if self.uncovered == "refuse" else None
        try:
            if self.model:
                vlm, lock = self._judge
                asked = [{"role": "user", "content": self.prompt.replace("{text}", text)}]
                with lock:
                    yes, no = vlm.rank(asked, ["yes", "no"])
                return "the judge says so" if yes > no else None
            if self.url:
                return self._ask(stage, text, languages)
            found = self._pattern.search(_even(text), timeout=SECONDS)
            return "it holds what is not allowed" if found else None
        except Exception as error:
            return f"it failed ({type(error).__name__})" if self.on_failure == "refuse" else None

    def _ask(self, stage: Stage, text: str, languages: set[str]) -> str | None:
        import urllib.request

        body = json.dumps({"stage": stage, "language": sorted(languages), "text": text}).encode()
        request = urllib.request.Request(
            str(self.url), body, {"content-type": "application/json", "user-agent": "seavlm"}
        )
        with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
            told = json.loads(answer.read(65_536))
        return None if told["allow"] is True else str(told.get("reason") or "the service says so")[:200]


class Guards(BaseModel):
    """All of them."""

    model_config = ConfigDict(extra="forbid")

    guards: list[Guard] = []
    message: str = "I cannot help with that."
    audit: Path | None = None

    @classmethod
    def read(cls, path: Path) -> Guards:
        """From a YAML file. SeavlmError for what is not one."""
        found = config.read(cls, path, "See docs/guard.yaml.")
        for guard in found.guards:
            guard.prepare()
        return found

    @property
    def slow(self) -> bool:
        """To read a question may take long: a service or a model is asked."""
        return any(guard.url or guard.model for guard in self.at("before"))

    def at(self, stage: Stage) -> list[Guard]:
        return [guard for guard in self.guards if stage in guard.stages]

    def refusal(self, stage: Stage, text: str, request_id: str = "") -> str | None:
        """The name of the first guard that refuses the text. Not in the event loop."""
        for guard in self.at(stage):
            if (why := guard.judge(stage, text)) is not None:
                self._note(guard, stage, why, text, request_id)
                return guard.name
        return None

    def _note(self, guard: Guard, stage: Stage, why: str, text: str, request_id: str) -> None:
        if self.audit is None:
            return
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": request_id,
            "guard": guard.name,
            "stage": stage,
            "reason": why,
            "languages": sorted(plausible_languages(text)),
            "sha256": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest(),
        }
        with self.audit.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


class Watch:
    """Over one reply. What may be shown comes out of `put` and `end`; once `refused`, nothing more."""

    def __init__(self, guards: Guards, request_id: str = "") -> None:
        self._guards, self._id = guards, request_id
        self._during, self._after = bool(guards.at("during")), bool(guards.at("after"))
        self.text, self._shown = "", 0
        self.message, self.refused = guards.message, False
        self.active = self._during or self._after

    async def put(self, text: str) -> str:
        """All at once at the end, where the whole reply is judged."""
        if not self.active:
            return text
        before = len(self.text)
        self.text += text
        if self._during and text:
            await self._judge("during", max(0, before - SEEN))
        return "" if self.refused or self._after else self._show(max(self._shown, len(self.text) - HELD))

    async def end(self) -> str:
        if self._after and not self.refused:
            await self._judge("after")
        return "" if self.refused else self._show(len(self.text))

    def _show(self, end: int) -> str:
        piece, self._shown = self.text[self._shown : end], end
        return piece

    async def _judge(self, stage: Stage, first: int = 0) -> None:
        """From the character `first` on: of a long reply the end is enough while it comes."""
        text = self.text[first:]
        if await asyncio.to_thread(self._guards.refusal, stage, text, self._id) is not None:
            self.refused = True


def texts_of(messages: Sequence[dict[str, Any]]) -> str:
    """All that the client has written, parts of a message joined as the model will read them."""
    found = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part["text"].strip() for part in content if part["type"] == "text")
        found.append(content)
    return "\n".join(found)


# Zero-width signs, fillers, and strokes over a letter: what hides a word from a list and from no reader.
HIDING = dict.fromkeys(
    [*map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad\u115f\u1160\u3164\uffa0"), *range(0x334, 0x339)]
)


def _even(text: str) -> str:
    """As the model will read it, composed, and without what hides a word."""
    return unicodedata.normalize("NFKC", normalize(text)).translate(HIDING)
