"""From the pieces of a reply to what the client reads: judged by the guards, calls of functions read, whole
or as server-sent events, in the form of chat or of plain completions.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError

from seavlm.errors import SeavlmError
from seavlm.serve import responses
from seavlm.serve.backend import Ticket, Token
from seavlm.serve.errors import Refused
from seavlm.serve.guard import Watch
from seavlm.serve.requests import ChatRequest, CompletionRequest
from seavlm.serve.responses import ResponsesRequest
from seavlm.serve.server import Server
from seavlm.text.tools import Call, may_call, parse_calls

log = logging.getLogger("seavlm.serve")
encoded = json.JSONEncoder(ensure_ascii=False).encode  # `dumps` would make an encoder for each event


def usage(tickets: list[Ticket], written: list[int]) -> dict[str, Any]:
    """Prompts count once each, however many replies they get."""
    prompts = {id(ticket.prompt): ticket for ticket in tickets}.values()
    read = sum(ticket.prompt_tokens for ticket in prompts)
    return {
        "prompt_tokens": read,
        "completion_tokens": sum(written),
        "total_tokens": read + sum(written),
        "prompt_tokens_details": {"cached_tokens": sum(ticket.cached_tokens for ticket in prompts)},
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


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "replace")


class Chat:
    """The form of chat completions. names: of the functions that may be called."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = list(names)

    def chances(self, tokens: list[Token]) -> dict[str, Any]:
        def told(data: bytes, chance: float) -> dict[str, Any]:
            return {
                "token": text_of(data),
                "logprob": max(chance, -9999.0),
                "bytes": list(data),
            }

        return {
            "content": [
                told(one.data, one.logprob) | {"top_logprobs": [told(*other) for other in one.top]}
                for one in tokens
            ],
            "refusal": None,
        }

    def whole(
        self, index: int, text: str, calls: list[Call], tokens: list[Token] | None, reason: str
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

    def part(self, index: int, text: str, tokens: list[Token] | None) -> dict[str, Any]:
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

    def chances(self, tokens: list[Token]) -> dict[str, Any]:
        names = [text_of(one.data) for one in tokens]
        return {
            "tokens": names,
            "token_logprobs": [max(one.logprob, -9999.0) for one in tokens],
            "top_logprobs": [
                {text_of(data): max(chance, -9999.0) for data, chance in one.top} for one in tokens
            ],
            "text_offset": list(accumulate(map(len, names), initial=0))[: len(names)],
        }

    def whole(
        self, index: int, text: str, calls: list[Call], tokens: list[Token] | None, reason: str
    ) -> dict[str, Any]:
        return self.part(index, text, tokens) | {"finish_reason": reason}

    def first(self, index: int) -> dict[str, Any] | None:
        return None

    def part(self, index: int, text: str, tokens: list[Token] | None) -> dict[str, Any]:
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
        "model": server.backend(asked.model).name,
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
        text, tokens, written = "", list[Token](), 0
        async for part in parts(ticket, Reply(form.names), watches[index]):
            text, tokens, written = text + part.text, tokens + part.tokens, part.num_tokens
        whole = form.whole(index, text, part.calls, tokens if told else None, part.reason or "")
        return whole, written

    tasks = [asyncio.ensure_future(one(index, ticket)) for index, ticket in enumerate(tickets)]
    try:
        found = await asyncio.gather(*tasks)
    except SeavlmError as error:
        raise Refused.of(error) from None
    finally:
        for task in tasks:
            task.cancel()
    return [choice for choice, _ in found], [count for _, count in found]


@dataclass(frozen=True)
class Part:
    """What is to be shown of a reply; with the last one, its calls and why it ended."""

    text: str
    tokens: list[Token]
    num_tokens: int
    calls: list[Call] = field(default_factory=list)
    reason: str | None = None


async def parts(ticket: Ticket, reply: Reply, watch: Watch) -> AsyncIterator[Part]:
    """A reply after the guards and with its calls read."""
    shown, tokens = False, list[Token]()
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
        if watch.active and reason is not None:  # what was cut off has not been judged, nor alternatives
            tokens = [replace(one, top=[]) for one in within(tokens, watch.text)]
        told, tokens = ([], tokens) if watch.active and reason is None else (tokens, [])
        yield Part(text, told, piece.num_tokens, calls, "tool_calls" if calls else reason)


def within(tokens: list[Token], text: str) -> list[Token]:
    """Those that do not reach beyond the end of `text`."""
    decoder, at = codecs.getincrementaldecoder("utf-8")("replace"), 0
    for number, one in enumerate(tokens):
        at += len(decoder.decode(one.data))
        if at > len(text):
            return tokens[:number]
    return tokens


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
    before = f'data: {encoded(head)[:-1]}, "choices": '
    after = ', "usage": null}\n\n' if with_usage else "}\n\n"

    def event(*choices: dict[str, Any]) -> str:
        return before + encoded(choices) + after

    written = [0] * len(tickets)
    replies = [
        parts(ticket, Reply(form.names), watch) for ticket, watch in zip(tickets, watches, strict=True)
    ]
    try:
        for index in range(len(tickets)):
            if (first := form.first(index)) is not None:
                yield event(first)
        async for index, part in together(replies):
            written[index] = part.num_tokens
            if part.text or (told and part.tokens):
                yield event(form.part(index, part.text, part.tokens if told else None))
            if part.reason is not None:
                for delta in form.calls(index, part.calls):
                    yield event(delta)
                yield event(form.last(index, part.reason))
        if with_usage:
            yield f'{before}[], "usage": {encoded(usage(tickets, written))}}}\n\n'
        yield "data: [DONE]\n\n"
    except SeavlmError as error:
        yield f"data: {encoded(Refused.of(error).body)}\n\n"
    except Exception as error:
        log.exception("unexpected", exc_info=error)
        yield f"data: {encoded(Refused(500, 'Something went wrong in the server.').body)}\n\n"
    finally:
        for ticket in tickets:
            ticket.cancel()


async def together(replies: list[AsyncIterator[Part]]) -> AsyncIterator[tuple[int, Part]]:
    """The parts of all, as they come; the first error of one is that of all."""
    if len(replies) == 1:
        async for part in replies[0]:
            yield 0, part
        return
    news: asyncio.Queue[tuple[int, Part | Exception | None]] = asyncio.Queue()

    async def read(index: int) -> None:
        try:
            async for part in replies[index]:
                news.put_nowait((index, part))
            news.put_nowait((index, None))
        except Exception as error:
            news.put_nowait((index, error))

    readers = [asyncio.ensure_future(read(index)) for index in range(len(replies))]
    left = len(replies)
    try:
        while left:
            index, told = await news.get()
            if isinstance(told, Exception):
                raise told
            if told is None:
                left -= 1
            else:
                yield index, told
    finally:
        for reader in readers:
            reader.cancel()


async def respond(server: Server, request: Request, asked: ResponsesRequest) -> Response:
    """As `answer`, in the form of `responses.py`."""
    try:
        chat = asked.chat()
    except ValidationError as error:
        raise Refused.unfit(error.errors()) from None
    response = responses.Response(asked, server.backend(asked.model).name)
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
            except Exception as error:
                if not isinstance(error, SeavlmError):
                    log.exception("unexpected", exc_info=error)
                    error = SeavlmError("Something went wrong in the server")
                body = {"type": "error", "code": "server_error", "message": str(error), "param": None}
                yield f"event: error\ndata: {json.dumps(body, ensure_ascii=False)}\n\n"
            finally:
                ticket.cancel()

        return Events(told(), tickets)
    try:
        (choice,), written = await until_gone(request, gather(Chat(names), tickets, [watch], False))
    finally:
        ticket.cancel()
    message = choice["message"]
    calls = [
        Call(call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls", ())
    ]
    body = response.end(message["content"] or "", calls, choice["finish_reason"], usage(tickets, written))
    return JSONResponse(body)
