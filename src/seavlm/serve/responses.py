"""OpenAI's newer interface, `/v1/responses`, as far as it goes without a memory: text, pictures, functions, a
form for the reply, streaming. What needs stored state, or tools that run here, is refused by name.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from seavlm.serve.requests import ChatRequest, Finite
from seavlm.text.openai import NAME, Body
from seavlm.text.tools import Call

REFUSED = ("previous_response_id", "conversation", "background", "prompt")


class InputPart(Body):
    type: Literal["input_text", "output_text", "text", "input_image"]
    text: str | None = None
    image_url: str | None = None
    detail: Literal["auto", "low", "high"] = "auto"

    @model_validator(mode="after")
    def _whole(self) -> InputPart:
        if (self.image_url if self.type == "input_image" else self.text) is None:
            raise ValueError(f"a part of type {self.type} has nothing in it")
        return self


class InputItem(Body):
    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: Annotated[str, Field(pattern=NAME)] | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None


class FunctionTool(Body):
    type: Literal["function"]
    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Body):
    type: Literal["function"]
    name: Annotated[str, Field(pattern=NAME)]


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = "reply"
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    format: TextFormat | None = None


class ResponsesRequest(Body):
    model: str | None = None
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=4096)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    metadata: dict[str, str] | None = None
    previous_response_id: Any = None
    conversation: Any = None
    background: Any = None
    prompt: Any = None

    @model_validator(mode="after")
    def _stateless(self) -> ResponsesRequest:
        back = [self.instructions, self.metadata, [tool.model_dump() for tool in self.tools or ()]]
        try:
            json.dumps(back, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("instructions, metadata or tools hold half a character") from None
        for name in REFUSED:
            if getattr(self, name):
                raise ValueError(f"{name} is not served: nothing is stored here; send the whole conversation")
        return self

    def chat(self) -> ChatRequest:
        """The same as a chat completion. ValueError for what does not fit together."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        items = [InputItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        for item in items:
            if item.type == "function_call":
                call = {"name": item.name, "arguments": item.arguments or "{}"}
                messages.append(
                    {"role": "assistant", "tool_calls": [{"id": item.call_id or "", "function": call}]}
                )
            elif item.type == "function_call_output":
                messages.append(
                    {"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)}
                )
            else:
                messages.append({"role": item.role or "user", "content": _content(item.content)})
        asked: dict[str, Any] = {"model": self.model, "messages": messages, "stream": self.stream}
        asked |= {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_output_tokens}
        asked["parallel_tool_calls"] = self.parallel_tool_calls
        if self.tools:
            asked["tools"] = [
                {"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools
            ]
        choice = self.tool_choice
        if isinstance(choice, NamedTool):
            asked["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        elif choice is not None:
            asked["tool_choice"] = choice
        form = self.text.format if self.text else None
        if form is not None and form.type != "text":
            asked["response_format"] = {"type": form.type}
            if form.type == "json_schema":
                asked["response_format"]["json_schema"] = {"name": form.name, "schema": form.schema_}
        return ChatRequest.model_validate(asked)


def _content(content: str | list[InputPart] | None) -> str | list[dict[str, Any]]:
    if content is None or isinstance(content, str):
        return content or ""
    return [
        {"type": "image_url", "image_url": {"url": part.image_url, "detail": part.detail}}
        if part.type == "input_image"
        else {"type": "text", "text": part.text}
        for part in content
    ]


class Response:
    """The object that is answered, as it grows."""

    def __init__(self, asked: ResponsesRequest, model: str) -> None:
        self.body: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": model,
            "output": [],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": {
                "format": {"type": asked.text.format.type if asked.text and asked.text.format else "text"}
            },
            "tool_choice": asked.tool_choice
            if isinstance(asked.tool_choice, str)
            else asked.tool_choice.model_dump()
            if asked.tool_choice
            else "auto",
            "tools": [tool.model_dump() for tool in asked.tools or ()],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None,
            "metadata": asked.metadata or {},
        }

    def end(self, text: str, calls: list[Call], reason: str, used: dict[str, Any]) -> dict[str, Any]:
        """All of it, at the end."""
        cut = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(reason)
        if not self.body["output"]:
            self.body["output"] = [
                *([message(text)] if text or not calls else []),
                *(function_call(call) for call in calls),
            ]
        self.body |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": cut} if cut else None,
            "usage": {
                "input_tokens": used["prompt_tokens"],
                "input_tokens_details": used["prompt_tokens_details"],
                "output_tokens": used["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used["total_tokens"],
            },
        }
        return self.body


def message(text: str, status: str = "completed") -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [part] if status == "completed" else [],
    }


def function_call(call: Call) -> dict[str, Any]:
    return {
        "id": f"fc_{uuid.uuid4().hex}",
        "type": "function_call",
        "status": "completed",
        "call_id": f"call_{uuid.uuid4().hex[:24]}",
        "name": call.name,
        "arguments": call.arguments,
    }


async def events(
    response: Response, pieces: AsyncIterator[tuple[str, list[Call], str | None, dict[str, Any] | None]]
) -> AsyncIterator[str]:
    """Server-sent events. pieces: text, and at the end calls, why it ended, and what was used."""
    number = 0

    def event(kind: str, **more: Any) -> str:
        nonlocal number
        body = {"type": kind, "sequence_number": number, **more}
        number += 1
        return f"event: {kind}\ndata: {json.dumps(body, ensure_ascii=False)}\n\n"

    yield event("response.created", response=response.body)
    yield event("response.in_progress", response=response.body)
    text, item, output = "", message("", "in_progress"), response.body["output"]
    place, opened = {"item_id": item["id"], "output_index": 0, "content_index": 0}, False
    async for piece, calls, reason, used in pieces:
        if not opened and (piece or (reason is not None and not calls)):  # an empty reply is one too
            opened = True
            yield event("response.output_item.added", output_index=0, item=item)
            empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield event("response.content_part.added", **place, part=empty)
        text += piece
        if piece:
            yield event("response.output_text.delta", **place, delta=piece, logprobs=[])
        if reason is None or used is None:
            continue
        if opened:
            done = message(text) | {"id": item["id"]}
            yield event("response.output_text.done", **place, text=text, logprobs=[])
            yield event("response.content_part.done", **place, part=done["content"][0])
            yield event("response.output_item.done", output_index=0, item=done)
            output.append(done)
        for call in calls:
            at, one = len(output), function_call(call)
            begun = one | {"status": "in_progress", "arguments": ""}
            yield event("response.output_item.added", output_index=at, item=begun)
            where = {"item_id": one["id"], "output_index": at}
            yield event("response.function_call_arguments.delta", **where, delta=call.arguments)
            yield event(
                "response.function_call_arguments.done", **where, name=call.name, arguments=call.arguments
            )
            yield event("response.output_item.done", output_index=at, item=one)
            output.append(one)
        body = response.end(text, calls, reason, used)
        kind = "response.incomplete" if body["status"] == "incomplete" else "response.completed"
        yield event(kind, response=body)
