"""The server: OpenAI's HTTP interface in front of the engine.

    app = create_app(vlm, Settings(keys=Keys.one("...")))    # an ASGI application
    seavlm serve nano                                    # or with uvicorn around it

The straight way of a request: `requests.py` reads it; pictures and text become a prompt in a thread beside
the event loop; `worker.py` hands it to the engine; what comes back is written here, whole or as it comes.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from seavlm import __version__
from seavlm.engine.grammar import Constraint, Grammars
from seavlm.engine.pages import BLOCK
from seavlm.engine.sampler import Sampling
from seavlm.engine.sequence import Prompt, TokenChance
from seavlm.engine.vlm import VLM
from seavlm.errors import SeavlmError
from seavlm.image.decode import MAX_BYTES
from seavlm.image.pdf import pages
from seavlm.model.config import GLOBAL
from seavlm.serve import responses
from seavlm.serve.guard import Guards, Watch, texts_of
from seavlm.serve.limits import Key, Keys
from seavlm.serve.metrics import Metrics
from seavlm.serve.requests import ChatRequest, CompletionRequest, to_messages
from seavlm.serve.responses import ResponsesRequest
from seavlm.serve.worker import Ticket, Worker
from seavlm.text.normalize import normalize
from seavlm.text.tools import Call, calls_schema, may_call, parse_calls

log = logging.getLogger("seavlm.serve")
RETRY_AFTER = 2  # seconds
REQUEST_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
OPEN = ("/health/live", "/health/ready", "/")  # answered without a key


@dataclass(frozen=True)
class Settings:
    """keys: of those who may ask; without any, everybody may. max_queue: requests that may wait beside those
    under way. max_body: bytes of a request. max_tokens: of prompt and reply together, by default what the
    model and its cache take. allow_urls: pictures may be fetched from the web. media_root: the folder below
    which file:// pictures may lie."""

    keys: Keys = field(default_factory=Keys)
    max_queue: int = 256
    max_body: int = 64 * 2**20
    max_images: int = 16
    max_tokens: int | None = None
    allow_urls: bool = False
    media_root: Path | None = None
    guards: Guards = field(default_factory=Guards)


class Refused(Exception):
    """An answer that is an error in OpenAI's form."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, **headers: str
    ) -> None:
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(status)
        kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def answer(self) -> Response:
        return Response(json.dumps(self.body), self.status, self.headers, "application/json")


class Server:
    """What the routes share."""

    def __init__(self, vlm: VLM, settings: Settings) -> None:
        self.vlm, self.settings, self.metrics = vlm, settings, Metrics(vlm.engine)
        self.name, self.created, self.draining = vlm.name or "seavlm", int(time.time()), False
        engine = vlm.engine
        most = min(engine.context, engine.pages.num[GLOBAL] * BLOCK)
        self.max_tokens = min(most, settings.max_tokens or most)
        self.worker = Worker(
            engine, most=settings.max_queue + engine.scheduler.max_sequences, watch=self._ended
        )
        self.beside = ThreadPoolExecutor(2, "prepare")
        self.preparing = 0

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.vlm.tokenizer, self.vlm.config.eos_token_ids)

    def _ended(self, ticket: Ticket) -> None:
        sequence, owner = ticket.sequence, ticket.owner
        if sequence is not None:
            self.metrics.ended(sequence)
        if isinstance(owner, Key):
            owner.end(0 if sequence is None else sequence.num_tokens)

    # --- from a request to tickets

    async def aside(self, work: Callable[..., Any], *given: Any) -> Any:
        """Run beside the loop; `Refused` for what the caller did wrong, or where too many wait already."""
        if self.draining or not self.worker.alive:
            raise Refused(503, "The server is not at work.", Retry_After=str(RETRY_AFTER))
        if self.worker.count + self.preparing >= self.worker.most:
            raise self.busy()
        self.preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.beside, partial(work, *given))
        except SeavlmError as error:
            raise Refused(400, str(error)) from None
        except (ValueError, RecursionError, OverflowError) as error:
            log.warning("a request could not be read", exc_info=error)
            raise Refused(400, f"The request cannot be read ({type(error).__name__}).") from None
        finally:
            self.preparing -= 1

    def busy(self) -> Refused:
        self.metrics.refused.inc()
        return Refused(
            429, "The server is busy. Try again in a moment.", code="busy", Retry_After=str(RETRY_AFTER)
        )

    def chat_prompt(self, asked: ChatRequest, request_id: str) -> Prompt:
        messages = to_messages(asked.messages, asked.offered)
        self.guard(texts_of(messages), request_id)
        room = self.settings.max_images
        for message in messages:
            if isinstance(message["content"], str):
                continue
            parts: list[dict[str, Any]] = []
            for part in message["content"]:
                if part["type"] != "text" and room <= 0:
                    raise SeavlmError(
                        f"there are more than {self.settings.max_images} pictures",
                        hint="Send fewer, or fewer pages.",
                    )
                if part["type"] == "file":
                    data = base64.b64decode(part["data"].rpartition(",")[2], validate=False)
                    drawn = [
                        {"type": "image", "image": page, "detail": "high"} for page in pages(data, most=room)
                    ]
                    parts, room = parts + drawn, room - len(drawn)
                elif part["type"] == "image_url":
                    url = part["image_url"]["url"]
                    if self.settings.media_root is not None and url[:7].lower() == "file://":
                        data = from_root(self.settings.media_root, url[7:])
                        part = {"type": "image", "image": data, "detail": part["detail"]}
                    parts, room = [*parts, part], room - 1
                else:
                    parts.append(part)
            message["content"] = parts
        return self.vlm.prompt(messages, allow_urls=self.settings.allow_urls, allow_files=False)

    def guard(self, text: str, request_id: str) -> None:
        """In a thread."""
        if self.settings.guards.refusal("before", text, request_id) is not None:
            raise Refused(400, self.settings.guards.message, code="content_filter")

    def plain_prompts(self, asked: CompletionRequest, request_id: str) -> list[Prompt]:
        tokenizer = self.vlm.tokenizer
        for text in asked.prompts():
            self.guard(text if isinstance(text, str) else self.decoded(text), request_id)
        return [
            Prompt([tokenizer.bos_id, *tokenizer.encode(normalize(text))] if isinstance(text, str) else text)
            for text in asked.prompts()
        ]

    def decoded(self, ids: list[int]) -> str:
        tokenizer = self.vlm.tokenizer
        return tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])

    def constraint(self, asked: ChatRequest | CompletionRequest) -> Constraint | None:
        form = asked.response_format if isinstance(asked, ChatRequest) else None
        wanted: list[Callable[[], Constraint]] = []
        if form is not None and form.json_schema is not None and form.type == "json_schema":
            wanted.append(partial(self.grammars.json_schema, form.json_schema.schema_))
        if form is not None and form.type == "json_object":
            wanted.append(self.grammars.json_object)
        if isinstance(asked, ChatRequest) and asked.must_call:
            schema = calls_schema(asked.offered, parallel=asked.parallel)
            wanted.append(partial(self.grammars.json_schema, schema))
        elif isinstance(asked, ChatRequest) and any(tool.strict for tool in asked.offered):
            schema = calls_schema(asked.offered, parallel=asked.parallel)
            wanted.append(partial(self.grammars.json_or_text, schema))
        if asked.regex is not None:
            wanted.append(partial(self.grammars.regex, asked.regex))
        if asked.choice is not None:
            wanted.append(partial(self.grammars.choice, asked.choice))
        if len(wanted) > 1:
            raise SeavlmError(
                "response_format, regex, choice and strict or required tools exclude each other",
                hint="Give one of them.",
            )
        return wanted[0]() if wanted else None

    def prepare(
        self, asked: ChatRequest | CompletionRequest, logprobs: int | None, request_id: str
    ) -> tuple[list[Prompt], Sampling, Constraint | None]:
        """In a thread: all that takes time."""
        if isinstance(asked, ChatRequest):
            prompts = [self.chat_prompt(asked, request_id)]
        else:
            prompts = self.plain_prompts(asked, request_id)
        for prompt in prompts:
            if len(prompt.ids) >= self.max_tokens:
                raise SeavlmError(
                    f"the prompt has {len(prompt.ids):,} tokens, and {self.max_tokens - 1:,} is the most",
                    hint="Shorten the text or send fewer pictures.",
                )
        return prompts, self.vlm.sampling(**asked.sampling(logprobs)), self.constraint(asked)

    async def tickets(
        self, asked: ChatRequest | CompletionRequest, logprobs: int | None, most: int | None, request: Request
    ) -> list[Ticket]:
        """One for each choice, all or none."""
        self.check_model(asked.model)
        owner, copies = request.scope["key"], asked.n or 1
        several = 1 if isinstance(asked, ChatRequest) else len(asked.prompts())
        count = several * copies
        if owner is not None and (seconds := owner.reserve(count)):
            self.metrics.refused.inc()
            raise Refused(
                429, "The limit of this key is reached.", code="rate_limit_exceeded", Retry_After=str(seconds)
            )
        found: list[Ticket] = []
        try:
            request_id = request.scope["request_id"]
            prepared = await self.aside(self.prepare, asked, logprobs, request_id)
            if self.worker.count + count > self.worker.most:
                raise self.busy()
            return self.submit(asked, prepared, copies, most, owner, found)
        finally:
            if owner is not None:
                owner.release(count - len(found))

    def submit(
        self,
        asked: ChatRequest | CompletionRequest,
        prepared: tuple[list[Prompt], Sampling, Constraint | None],
        copies: int,
        most: int | None,
        owner: Key | None,
        found: list[Ticket],
    ) -> list[Ticket]:
        """Hand them to the engine; all that are go into `found`."""
        prompts, sampling, constraint = prepared
        if owner is not None:
            prompts = [prompt.salted(owner.salt) for prompt in prompts]
        for prompt in prompts:
            room = self.max_tokens - len(prompt.ids)
            for _ in range(copies):
                seed = None if asked.seed is None else (asked.seed + len(found)) % 2**64
                found.append(
                    self.worker.submit(
                        prompt,
                        replace(sampling, seed=seed),
                        max_new_tokens=min(most or room, room),
                        mask=None if constraint is None else constraint.copy(),
                        owner=owner,
                    )
                )
        return found

    def check_model(self, name: str | None) -> None:
        if name not in (None, "", self.name, "default"):
            raise Refused(
                404,
                f"There is no model {name!r} here, but {self.name!r}.",
                code="model_not_found",
                param="model",
            )


def from_root(root: Path, given: str) -> bytes:
    """A file below `root`, with no link on the way. SeavlmError, always the same, for anything else."""
    wrong = SeavlmError(
        "The picture is not a file that may be read", hint="Give file:///NAME below the media root."
    )
    try:
        path = root
        for name in Path(unquote(given).lstrip("/")).parts:
            path = path / name
            if name in ("..", "/") or path.is_symlink():
                raise wrong
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise wrong
        return path.read_bytes()
    except (OSError, ValueError):
        raise wrong from None


# --- replies


def usage(tickets: list[Ticket], written: list[int]) -> dict[str, Any]:
    """Prompts count once each, however many replies they get."""
    prompts = {id(ticket.prompt): ticket for ticket in tickets}.values()
    read = sum(len(ticket.prompt.ids) for ticket in prompts)
    return {
        "prompt_tokens": read,
        "completion_tokens": sum(written),
        "total_tokens": read + sum(written),
        "prompt_tokens_details": {"cached_tokens": sum(ticket.cached for ticket in prompts)},
    }


class Reply:
    """The text of a reply, as far as it may be shown: what may be a call of a function is held back."""

    def __init__(self, names: list[str]) -> None:
        self._names, self._held, self._holds = names, "", bool(names)

    def put(self, text: str) -> str:
        if not self._holds:
            return text
        self._held += text
        if may_call(self._held):
            return ""
        self._holds = False
        return self._held

    def end(self) -> tuple[str, list[Call]]:
        """What is left: text, or calls."""
        if not self._holds:
            return "", []
        calls = parse_calls(self._held, self._names)
        return ("", calls) if calls else (self._held, [])


def tool_calls(calls: list[Call]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
    ]


class Chat:
    """The form of chat completions. names: of the functions that may be called."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, server: Server, names: Iterable[str] = ()) -> None:
        self.server, self.names = server, list(names)

    def chances(self, tokens: list[TokenChance]) -> dict[str, Any]:
        def told(token: int, chance: float) -> dict[str, Any]:
            data = self.server.vlm.tokenizer.token_bytes(token)
            return {
                "token": data.decode("utf-8", "replace"),
                "logprob": max(chance, -9999.0),
                "bytes": list(data),
            }

        return {
            "content": [
                told(one.token, one.logprob) | {"top_logprobs": [told(*other) for other in one.top]}
                for one in tokens
            ],
            "refusal": None,
        }

    def whole(
        self, index: int, text: str, calls: list[Call], tokens: list[TokenChance] | None, reason: str
    ) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": tool_calls(calls)}
        return {
            "index": index,
            "message": message,
            "logprobs": None if tokens is None else self.chances(tokens),
            "finish_reason": reason,
        }

    def first(self, index: int) -> dict[str, Any] | None:
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def part(self, index: int, text: str, tokens: list[TokenChance] | None) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": text},
            "logprobs": None if tokens is None else self.chances(tokens),
            "finish_reason": None,
        }

    def calls(self, index: int, calls: list[Call]) -> list[dict[str, Any]]:
        """Each call opens with its name, and then come its arguments."""
        found = []
        for number, call in enumerate(tool_calls(calls)):
            function = call["function"]
            opening = call | {"index": number, "function": {"name": function["name"], "arguments": ""}}
            rest = {"index": number, "function": {"arguments": function["arguments"]}}
            for delta in (opening, rest):
                found.append(
                    {
                        "index": index,
                        "delta": {"tool_calls": [delta]},
                        "logprobs": None,
                        "finish_reason": None,
                    }
                )
        return found

    def last(self, index: int, reason: str) -> dict[str, Any]:
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}


class Plain(Chat):
    """The form of plain completions."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl-"

    def calls(self, index: int, calls: list[Call]) -> list[dict[str, Any]]:
        return []

    def chances(self, tokens: list[TokenChance]) -> dict[str, Any]:
        def name(token: int) -> str:
            return self.server.vlm.tokenizer.token_bytes(token).decode("utf-8", "replace")

        names = [name(one.token) for one in tokens]
        return {
            "tokens": names,
            "token_logprobs": [max(one.logprob, -9999.0) for one in tokens],
            "top_logprobs": [{name(i): max(chance, -9999.0) for i, chance in one.top} for one in tokens],
            "text_offset": [sum(map(len, names[:i])) for i in range(len(names))],
        }

    def whole(
        self, index: int, text: str, calls: list[Call], tokens: list[TokenChance] | None, reason: str
    ) -> dict[str, Any]:
        return self.part(index, text, tokens) | {"finish_reason": reason}

    def first(self, index: int) -> dict[str, Any] | None:
        return None

    def part(self, index: int, text: str, tokens: list[TokenChance] | None) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": None if tokens is None else self.chances(tokens),
            "finish_reason": None,
        }

    def last(self, index: int, reason: str) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}


class Events(StreamingResponse):
    """Server-sent events of some tickets, which end with it, however it ends."""

    def __init__(self, told: AsyncIterator[str], tickets: list[Ticket]) -> None:
        super().__init__(told, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._tickets = tickets

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for ticket in self._tickets:
                ticket.cancel()


async def answer(
    server: Server,
    form: Chat,
    request: Request,
    asked: ChatRequest | CompletionRequest,
    logprobs: int | None,
    most: int | None,
) -> Response:
    """Whole or in pieces, as was asked."""
    tickets = await server.tickets(asked, logprobs, most, request)
    watches = [Watch(server.settings.guards, request.scope["request_id"]) for _ in tickets]
    head = {
        "id": form.prefix + uuid.uuid4().hex,
        "object": form.chunk_kind if asked.stream else form.kind,
        "created": int(time.time()),
        "model": server.name,
    }
    if asked.stream:
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        told = stream(form, head, tickets, watches, logprobs is not None, with_usage)
        return Events(told, tickets)
    try:
        choices, written = await until_gone(request, gather(form, tickets, watches, logprobs is not None))
    finally:
        for ticket in tickets:
            ticket.cancel()
    return JSONResponse(head | {"choices": choices, "usage": usage(tickets, written)})


async def gather(
    form: Chat, tickets: list[Ticket], watches: list[Watch], told: bool
) -> tuple[list[dict[str, Any]], list[int]]:
    """All replies, and how many tokens each has."""

    async def one(index: int, ticket: Ticket) -> tuple[dict[str, Any], int]:
        text, tokens, written = "", list[TokenChance](), 0
        async for part in parts(ticket, Reply(form.names), watches[index]):
            text, tokens, written = text + part.text, tokens + part.tokens, part.num_tokens
        whole = form.whole(index, text, part.calls, tokens if told else None, part.reason or "")
        return whole, written

    tasks = [asyncio.ensure_future(one(index, ticket)) for index, ticket in enumerate(tickets)]
    try:
        found = await asyncio.gather(*tasks)
    except SeavlmError as error:
        raise Refused(error_status(error), str(error)) from None
    finally:
        for task in tasks:
            task.cancel()
    return [choice for choice, _ in found], [count for _, count in found]


@dataclass(frozen=True)
class Part:
    """What is to be shown of a reply; with the last one, its calls and why it ended."""

    text: str
    tokens: list[TokenChance]
    num_tokens: int
    calls: list[Call] = field(default_factory=list)
    reason: str | None = None


async def parts(ticket: Ticket, reply: Reply, watch: Watch) -> AsyncIterator[Part]:
    """A reply after the guards and with its calls read."""
    shown, tokens = False, list[TokenChance]()
    async for piece in ticket:
        text, calls, reason = await watch.put(piece.text), list[Call](), piece.finish_reason
        tokens += piece.tokens
        if reason is not None:
            text += await watch.end()
        text = reply.put(text)
        if reason is not None:
            rest, calls = reply.end()
            text += rest
        if watch.refused:
            instead = "" if shown or text else watch.message
            yield Part(text + instead, [], piece.num_tokens, reason="content_filter")
            return
        shown = shown or bool(text)
        told, tokens = ([], tokens) if watch.active and reason is None else (tokens, [])
        yield Part(text, told, piece.num_tokens, calls, "tool_calls" if calls else reason)


def error_status(error: SeavlmError) -> int:
    """Of an error of the engine: what the model did is our fault, what was asked is the caller's."""
    return 500 if "not finite" in str(error) or error.__cause__ is not None else 400


async def until_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, given up when the client leaves."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refused(499, "The client has gone.")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def stream(
    form: Chat,
    head: dict[str, Any],
    tickets: list[Ticket],
    watches: list[Watch],
    told: bool,
    with_usage: bool,
) -> AsyncIterator[str]:
    """Server-sent events. The client that leaves ends the loop, and with it the work."""
    extra = {"usage": None} if with_usage else {}

    def event(*choices: dict[str, Any], **more: Any) -> str:
        return f"data: {json.dumps(head | {'choices': choices} | extra | more, ensure_ascii=False)}\n\n"

    news: asyncio.Queue[tuple[int, Part | SeavlmError]] = asyncio.Queue()

    async def read(index: int, ticket: Ticket) -> None:
        try:
            async for part in parts(ticket, Reply(form.names), watches[index]):
                news.put_nowait((index, part))
        except SeavlmError as error:
            news.put_nowait((index, error))
        except Exception as error:
            log.exception("unexpected", exc_info=error)
            failed = SeavlmError("something went wrong in the server")
            failed.__cause__ = error
            news.put_nowait((index, failed))

    readers = [asyncio.ensure_future(read(index, ticket)) for index, ticket in enumerate(tickets)]
    written, open_choices = [0] * len(tickets), len(tickets)
    try:
        for index in range(len(tickets)):
            if (first := form.first(index)) is not None:
                yield event(first)
        while open_choices:
            index, part = await news.get()
            if isinstance(part, SeavlmError):
                body = Refused(error_status(part), str(part)).body
                yield f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
                return
            written[index] = part.num_tokens
            if part.text or (told and part.tokens):
                yield event(form.part(index, part.text, part.tokens if told else None))
            if part.reason is not None:
                open_choices -= 1
                for delta in form.calls(index, part.calls):
                    yield event(delta)
                yield event(form.last(index, part.reason))
        if with_usage:
            yield event(usage=usage(tickets, written))
        yield "data: [DONE]\n\n"
    finally:
        for reader in readers:
            reader.cancel()
        for ticket in tickets:
            ticket.cancel()


async def respond(server: Server, request: Request, asked: ResponsesRequest) -> Response:
    """As `answer`, in the form of `responses.py`."""
    try:
        chat = asked.chat()
    except ValidationError as error:
        raise invalid(error.errors()) from None
    response = responses.Response(asked, server.name)
    watch = Watch(server.settings.guards, request.scope["request_id"])
    (ticket,) = tickets = await server.tickets(chat, None, asked.max_output_tokens, request)
    names = [tool.name for tool in chat.offered]
    if asked.stream:

        async def pieces() -> AsyncIterator[tuple[str, list[Call], str | None, dict[str, Any] | None]]:
            async for part in parts(ticket, Reply(names), watch):
                yield part.text, part.calls, part.reason, usage(tickets, [part.num_tokens])

        async def told() -> AsyncIterator[str]:
            try:
                async for event in responses.events(response, pieces()):
                    yield event
            except SeavlmError as error:
                body = {"type": "error", "code": "server_error", "message": str(error), "param": None}
                yield f"event: error\ndata: {json.dumps(body, ensure_ascii=False)}\n\n"
            finally:
                ticket.cancel()

        return Events(told(), tickets)
    try:
        (choice,), written = await until_gone(request, gather(Chat(server, names), tickets, [watch], False))
    finally:
        ticket.cancel()
    message = choice["message"]
    calls = [
        Call(call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls", ())
    ]
    body = response.end(message["content"] or "", calls, choice["finish_reason"], usage(tickets, written))
    return JSONResponse(body)


def invalid(errors: Any) -> Refused:
    """Of pydantic's first complaint."""
    first = errors[0]
    at = ".".join(str(part) for part in first["loc"] if part != "body")
    message = str(first["msg"]).removeprefix("Value error, ")
    return Refused(400, f"{at}: {message}" if at else message, param=at or None)


# --- the application


def create_app(vlm: VLM, settings: Settings | None = None) -> FastAPI:
    server = Server(vlm, settings or Settings())

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        server.worker.start()
        yield
        server.draining = True
        await server.worker.stop()
        server.beside.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="seavlm",
        version=__version__,
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        responses={
            status: {"description": "error", "content": {"application/json": {}}}
            for status in (400, 401, 429)
        },
    )
    app.state.server = server

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return error.answer()

    @app.exception_handler(RequestValidationError)
    async def unfit(_: Request, error: RequestValidationError) -> Response:
        return invalid(error.errors()).answer()

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return Refused(error.status_code, str(error.detail), **dict(error.headers or {})).answer()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        log.exception("unexpected", exc_info=error)
        return Refused(500, "Something went wrong in the server.").answer()

    @app.get("/health/live", tags=["health"])
    async def live() -> dict[str, str]:
        """The process answers and its engine runs."""
        if not server.worker.alive:
            raise Refused(503, "The engine does not run.")
        return {"status": "ok"}

    @app.get("/health/ready", tags=["health"])
    async def ready() -> dict[str, str]:
        """Requests are taken."""
        if server.draining or not server.worker.alive:
            raise Refused(503, "The server is shutting down.")
        return {"status": "ok"}

    @app.get("/metrics", tags=["health"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(server.metrics.text(server.worker.count), media_type=server.metrics.media_type)

    def about() -> dict[str, Any]:
        return {
            "id": server.name,
            "object": "model",
            "created": server.created,
            "owned_by": "seavlm",
            "max_model_len": server.max_tokens,
        }

    @app.get("/v1/models", tags=["models"])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about()]}

    @app.get("/v1/models/{model:path}", tags=["models"])
    async def model(model: str) -> dict[str, Any]:
        server.check_model(model)
        return about()

    @app.post("/v1/chat/completions", tags=["completions"])
    async def chat(request: Request, asked: ChatRequest) -> Response:
        """The reply to a conversation, pictures and all."""
        told = (asked.top_logprobs or 0) if asked.logprobs else None
        most = asked.max_completion_tokens or asked.max_tokens
        names = [tool.name for tool in asked.offered]
        return await answer(server, Chat(server, names), request, asked, told, most)

    @app.post("/v1/completions", tags=["completions"])
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        """What follows a text."""
        return await answer(server, Plain(server), request, asked, asked.logprobs, asked.max_tokens)

    @app.post("/v1/responses", tags=["completions"])
    async def respond_to(request: Request, asked: ResponsesRequest) -> Response:
        """The reply to a conversation, in OpenAI's newer form; nothing is stored."""
        return await respond(server, request, asked)

    page = files("seavlm.serve").joinpath("page/index.html")
    if page.is_file():

        @app.get("/", include_in_schema=False)
        async def chat_page() -> Response:
            return HTMLResponse(page.read_text(encoding="utf-8"))

    app.add_middleware(Gate, server=server)
    return app


class Gate:
    """The door, before anything is read: request id, key, size of the body, counting and the log line."""

    def __init__(self, app: Any, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["request_id"] = request_id
        began, status, read = time.perf_counter(), 500, 0
        most = self.server.settings.max_body

        async def send_with_id(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", request_id.encode()))
            await send(message)

        async def receive_some() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise HTTPException(413, f"The request has more than {most:,} bytes.")
            return message

        try:
            length = headers.get(b"content-length", b"0")
            scope["key"] = self.server.settings.keys.find(headers.get(b"authorization", b""))
            if self.server.settings.keys.keys and scope["key"] is None and scope["path"] not in OPEN:
                refusal = Refused(401, "Give the API key: Authorization: Bearer KEY.", code="invalid_api_key")
                await refusal.answer()(scope, receive, send_with_id)
            elif not length.isdigit() or int(length) > most:
                await Refused(413, f"The request has more than {most:,} bytes.").answer()(
                    scope, receive, send_with_id
                )
            else:
                await self.app(scope, receive_some, send_with_id)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            took = time.perf_counter() - began
            self.server.metrics.answered(path, status, took)
            log.info(
                json.dumps(
                    {
                        "request_id": request_id,
                        "method": scope["method"],
                        "path": path,
                        "status": status,
                        "seconds": round(took, 4),
                    }
                )
            )
