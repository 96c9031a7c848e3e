"""From a request to tickets: what the routes share."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import stat
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fastapi import Request
from PIL import Image

from seavlm.errors import SeavlmError
from seavlm.image.decode import MAX_BYTES, decode
from seavlm.image.pdf import pages
from seavlm.serve.backend import Backend, Form, Ticket
from seavlm.serve.errors import RETRY_AFTER, Refused
from seavlm.serve.guard import Guards, texts_of
from seavlm.serve.limits import Key, Keys
from seavlm.serve.metrics import Metrics
from seavlm.serve.requests import ChatRequest, CompletionRequest
from seavlm.serve.tracing import Tracing
from seavlm.text.openai import to_messages
from seavlm.text.tools import calls_schema

log = logging.getLogger("seavlm.serve")
LONGEST_TOKEN = 128  # characters; a prompt that is too long even so is not looked at any further


@dataclass(frozen=True)
class Settings:
    """keys: of those who may ask; without any, everybody may. max_body: bytes of a request. allow_urls:
    pictures may be fetched from the web. media_root: the folder below which file:// pictures may lie."""

    keys: Keys = field(default_factory=Keys)
    max_body: int = 64 * 2**20
    max_images: int = 16
    allow_urls: bool = False
    media_root: Path | None = None
    guards: Guards = field(default_factory=Guards)
    tracing: Tracing = field(default_factory=Tracing)


class Server:
    """Several models are told apart by their names; who names none gets the first."""

    def __init__(self, backends: Sequence[Backend], settings: Settings) -> None:
        self.settings, self.created, self.draining = settings, int(time.time()), False
        self.backends = {backend.name: backend for backend in backends}
        if len(self.backends) < len(backends):
            raise SeavlmError("two models have the same name", hint="Give each once.")
        self.metrics = Metrics(backends)
        for backend in backends:
            backend.ended = partial(self._ended, backend.name)
        self._beside = ThreadPoolExecutor(2, "prepare")
        self._slowly = ThreadPoolExecutor(2, "look")  # what may take long, pictures and forms: no text waits
        self._preparing = 0
        self._begun: list[Backend] = []

    async def start(self) -> None:
        """SeavlmError where a backend cannot. Nothing happens the second time."""
        for backend in self.backends.values():
            if backend not in self._begun:
                self._begun.append(backend)
                await backend.start()

    async def stop(self) -> None:
        self.draining = True
        while self._begun:
            await self._begun.pop().stop()
        for pool in (self._beside, self._slowly):
            pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.settings.tracing.stop)

    @property
    def alive(self) -> bool:
        return all(backend.alive for backend in self.backends.values())

    def backend(self, name: str | None) -> Backend:
        """`Refused` for a model that is not here."""
        if name in (None, "", "default"):
            return next(iter(self.backends.values()))
        found = self.backends.get(name or "")
        if found is None:
            known = ", ".join(map(repr, self.backends))
            raise Refused(
                404, f"There is no model {name!r} here, but {known}.", code="model_not_found", param="model"
            )
        return found

    def _ended(self, model: str, ticket: Ticket) -> None:
        self.metrics.ended(model, ticket)
        self.settings.tracing.reply(model, ticket)
        if isinstance(ticket.owner, Key):
            ticket.owner.end(ticket.prompt_tokens + ticket.num_tokens)

    def busy(self) -> Refused:
        self.metrics.refused.inc()
        return Refused(
            429, "The server is busy. Try again in a moment.", code="busy", Retry_After=str(RETRY_AFTER)
        )

    # --- from a request to tickets

    async def tickets(
        self, asked: ChatRequest | CompletionRequest, logprobs: int | None, most: int | None, request: Request
    ) -> list[Ticket]:
        """One for each choice, all or none. logprobs: alternatives a token. most: new tokens."""
        backend, copies = self.backend(asked.model), asked.n or 1
        owner: Key | None = request.scope["key"]
        several = 1 if isinstance(asked, ChatRequest) else len(asked.prompts())
        count = several * copies
        if count > backend.most:
            raise Refused(400, f"{count} replies are asked for, and {backend.most} is the most.", param="n")
        try:
            seconds = 0 if owner is None else owner.reserve(count)
        except SeavlmError as error:
            raise Refused(400, str(error), param="n") from None
        if seconds:
            self.metrics.refused.inc()
            raise Refused(
                429, "The limit of this key is reached.", code="rate_limit_exceeded", Retry_After=str(seconds)
            )
        who = owner.name if owner is not None else request.client.host if request.client else ""
        found: list[Ticket] = []
        try:
            work = partial(self.prepare, backend, asked, logprobs, request.scope["request_id"])
            prompts, sampling, form = await self.aside(
                backend, work, slowly=asked.slow or self.settings.guards.slow
            )
            if not backend.alive:  # any more: nobody would ever answer
                raise Refused.unserved("The server is not at work.")
            if backend.count + count > backend.most:
                raise self.busy()
            for prompt in prompts:
                for _ in range(copies):
                    seed = None if asked.seed is None else (asked.seed + len(found)) % 2**64
                    salt = b"" if owner is None else owner.salt
                    given = {"form": form, "seed": seed, "owner": owner, "salt": salt, "who": who}
                    found.append(backend.submit(prompt, sampling, max_new_tokens=most, **given))
            return found
        finally:
            if owner is not None:
                owner.release(count - len(found))

    async def aside(self, backend: Backend, work: Callable[[], Any], *, slowly: bool = False) -> Any:
        """Run beside the loop; `Refused` for what the caller did wrong, or where too many wait already."""
        if self.draining or not backend.alive:
            raise Refused.unserved("The server is not at work.")
        if backend.count + self._preparing >= backend.most:
            raise self.busy()
        self._preparing += 1
        try:
            pool = self._slowly if slowly else self._beside
            return await asyncio.get_running_loop().run_in_executor(pool, work)
        except SeavlmError as error:
            raise Refused(400, str(error)) from None
        except (ValueError, RecursionError, OverflowError) as error:
            log.warning("a request could not be read", exc_info=error)
            raise Refused(400, f"The request cannot be read ({type(error).__name__}).") from None
        finally:
            self._preparing -= 1

    # --- in a thread: all that takes time

    def prepare(
        self,
        backend: Backend,
        asked: ChatRequest | CompletionRequest,
        logprobs: int | None,
        request_id: str,
    ) -> tuple[list[Any], Any, Any]:
        """Prompts, how to choose tokens, and what the replies are held to."""
        if isinstance(asked, ChatRequest):
            messages = to_messages(asked.messages, asked.offered)
            text = texts_of(messages)
            self.fits(backend, text)
            self.guard(text, request_id)
            prompts = [backend.chat(self.seen(messages), allow_urls=self.settings.allow_urls)]
        else:
            for one in asked.prompts():
                self.fits(backend, one)
                self.guard(backend.words(one), request_id)
            prompts = [backend.plain(text) for text in asked.prompts()]
        form = form_of(asked)
        return (
            prompts,
            backend.sampling(asked.sampling(logprobs)),
            None if form is None else backend.form(form),
        )

    def fits(self, backend: Backend, text: str | list[int]) -> None:
        """`SeavlmError` for what is too long at first sight."""
        most = backend.max_tokens
        if len(text) > most * (LONGEST_TOKEN if isinstance(text, str) else 1):
            raise SeavlmError(f"the prompt has far more than {most:,} tokens", hint="Shorten the text.")

    def guard(self, text: str, request_id: str) -> None:
        if self.settings.guards.refusal("before", text, request_id) is not None:
            raise Refused(400, self.settings.guards.message, code="content_filter")

    def seen(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Pages of PDFs and files below the media root as pictures; no more of them than are allowed."""
        room = self.settings.max_images
        for message in messages:
            if isinstance(message["content"], str):
                continue
            parts: list[dict[str, Any]] = []
            for part in message["content"]:
                if part["type"] == "text":
                    parts.append(part)
                    continue
                if room <= 0:
                    raise SeavlmError(
                        f"there are more than {self.settings.max_images} pictures",
                        hint="Send fewer, or fewer pages.",
                    )
                found = self._pictures(part, room)
                parts, room = parts + found, room - len(found)
            message["content"] = parts
        return messages

    def _pictures(self, part: dict[str, Any], most: int) -> list[dict[str, Any]]:
        if part["type"] == "file":
            data = base64.b64decode(part["data"].rpartition(",")[2], validate=False)
            return [{"type": "image", "image": page, "detail": "high"} for page in pages(data, most=most)]
        url, root = part["image_url"]["url"], self.settings.media_root
        if root is not None and url[:7].lower() == "file://":
            return [{"type": "image", "image": picture_below(root, url[7:]), "detail": part["detail"]}]
        return [part]


def form_of(asked: ChatRequest | CompletionRequest) -> Form | None:
    """What the reply is held to. SeavlmError for two such things at once."""
    wanted: list[Form] = []
    if isinstance(asked, ChatRequest):
        form = asked.response_format
        if form is not None and form.json_schema is not None and form.type == "json_schema":
            wanted.append(Form("json_schema", form.json_schema.schema_))
        elif form is not None and form.type == "json_object":
            wanted.append(Form("json_object"))
        if asked.must_call or any(tool.strict for tool in asked.offered):
            schema = calls_schema(asked.offered, parallel=asked.parallel)
            wanted.append(Form("json_schema" if asked.must_call else "json_or_text", schema))
    if asked.regex is not None:
        wanted.append(Form("regex", asked.regex))
    if asked.choice is not None:
        wanted.append(Form("choice", asked.choice))
    if len(wanted) > 1:
        raise SeavlmError(
            "response_format, regex, choice and strict or required tools exclude each other",
            hint="Give one of them.",
        )
    return wanted[0] if wanted else None


def picture_below(root: Path, given: str) -> Image.Image:
    """The picture in a file below `root`, with no link on the way. SeavlmError, always the same, for anything
    else, so that nobody learns what else lies there."""
    names = [name for name in unquote(given[:4096]).split("/") if name not in ("", ".")]
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    opened: list[int] = []
    try:
        if not names or ".." in names:
            raise ValueError
        opened.append(os.open(root, os.O_RDONLY | os.O_DIRECTORY))
        for name in names:  # each from the folder before: what was looked at is what is read
            opened.append(os.open(name, flags, dir_fd=opened[-1]))
            os.close(opened.pop(0))
        about = os.fstat(opened[-1])
        if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_BYTES:
            raise ValueError
        with open(opened.pop(), "rb") as file:
            return decode(file.read(MAX_BYTES + 1))
    except (OSError, ValueError, SeavlmError):
        raise SeavlmError(
            "The picture is not a file that may be read", hint="Give file:///NAME below the media root."
        ) from None
    finally:
        for one in opened:
            os.close(one)
