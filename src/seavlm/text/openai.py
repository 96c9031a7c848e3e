"""OpenAI's messages and functions: what they may hold, and what Gemma reads of them.

The server's requests and the samples of data/ pass through here alike, so that what a model is trained on is
what it is later asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from seavlm.errors import SeavlmError
from seavlm.text.tools import Call, Tool, instructions, render_calls, render_result

MAX_MESSAGES, MAX_PARTS = 4096, 1024
NAME = r"^[a-zA-Z0-9_-]{1,64}$"


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class ImageUrl(Body):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl

    @field_validator("image_url", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value


class FileData(Body):
    file_data: Annotated[str, Field(pattern=r"^(data:application/pdf;base64,)?[A-Za-z0-9+/=\s]+$")]
    filename: str | None = None


class FilePart(Body):
    """A PDF; its pages are read as pictures."""

    type: Literal["file"]
    file: FileData


Part = Annotated[TextPart | ImagePart | FilePart, Field(discriminator="type")]


class FunctionCall(Body):
    name: Annotated[str, Field(pattern=NAME)]
    arguments: str = "{}"


class ToolCall(Body):
    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(max_length=MAX_PARTS)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _said(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing")
        return self


class Function(Body):
    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Body):
    type: Literal["function"]
    function: Function

    @property
    def tool(self) -> Tool:
        one = self.function
        return Tool(one.name, one.description or "", one.parameters, bool(one.strict))


def to_messages(messages: list[Message], tools: Sequence[Tool] = ()) -> list[dict[str, Any]]:
    """As Gemma reads them: system texts in front as one, the functions among them; neighbours of one role as
    one turn, the user first; calls and results as text (`text/tools.py`).

    SeavlmError where nothing can be made of them.
    """
    system: list[str] = []
    turns: list[dict[str, Any]] = []
    called: dict[str, str] = {}
    for number, message in enumerate(messages, 1):
        role, content = message.role, message.content
        parts = [TextPart(type="text", text=content)] if isinstance(content, str) else list(content or [])
        if role != "user" and not all(isinstance(part, TextPart) for part in parts):
            raise SeavlmError(
                f"Message {number} ({role}) holds a picture or a file", hint="Only user messages may."
            )
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        if role in ("system", "developer"):
            system += texts
            continue
        told = [_told(part) for part in parts]
        if role == "tool":
            name = called.get(message.tool_call_id or "", message.tool_call_id or "the function")
            role, told = "user", [{"type": "text", "text": render_result(name, "".join(texts))}]
        if role == "assistant" and message.tool_calls:
            called |= {call.id: call.function.name for call in message.tool_calls}
            calls = [Call(call.function.name, call.function.arguments) for call in message.tool_calls]
            told = [{"type": "text", "text": "\n".join([*texts, render_calls(calls)])}]
        if turns and turns[-1]["role"] == role:
            before = turns[-1]["content"]
            if before and told and before[-1]["type"] == told[0]["type"] == "text":
                before[-1].setdefault("more", []).extend(("\n\n", told.pop(0)["text"]))
            before += told
        else:
            turns.append({"role": role, "content": told})
    for part in (part for turn in turns for part in turn["content"]):
        if more := part.pop("more", None):  # at once: one after the other takes the square of the time
            part["text"] = "".join([part["text"], *more])
    if not turns:
        raise SeavlmError("There is no user message", hint="Add a message with role 'user'.")
    if turns[0]["role"] != "user":
        raise SeavlmError("The first message is the assistant's", hint="Begin with a message of role 'user'.")
    if tools:
        system.append(instructions(tools))
    if system:
        turns.insert(0, {"role": "system", "content": "\n\n".join(system)})
    return turns


def _told(part: TextPart | ImagePart | FilePart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part, FilePart):
        return {"type": "file", "data": part.file.file_data}
    return {"type": "image_url", "image_url": {"url": part.image_url.url}, "detail": part.image_url.detail}
