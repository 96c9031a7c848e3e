"""What a client may send: OpenAI's fields, each within its bounds.

Fields that we do not know are passed over, as OpenAI's clients send new ones every month; what constrains a
reply (`response_format`, `tools`) is never among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from seavlm.errors import SeavlmError
from seavlm.text.tools import Call, Tool, instructions, render_calls, render_result

MAX_STOPS, MAX_CHOICES, MAX_BIASES, MAX_TOP_LOGPROBS = 4, 16, 1024, 20
MAX_MESSAGES, MAX_PARTS = 4096, 1024

NAME = r"^[a-zA-Z0-9_-]{1,64}$"

Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class ImageUrl(_Body):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ImagePart(_Body):
    type: Literal["image_url"]
    image_url: ImageUrl

    @field_validator("image_url", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value


class FileData(_Body):
    file_data: Annotated[str, Field(pattern=r"^(data:application/pdf;base64,)?[A-Za-z0-9+/=\s]+$")]
    filename: str | None = None


class FilePart(_Body):
    """A PDF; its pages are read as pictures."""

    type: Literal["file"]
    file: FileData


Part = Annotated[TextPart | ImagePart | FilePart, Field(discriminator="type")]


class FunctionCall(_Body):
    name: Annotated[str, Field(pattern=NAME)]
    arguments: str = "{}"


class ToolCall(_Body):
    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(max_length=MAX_PARTS)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _said(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing")
        return self


class Function(_Body):
    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(_Body):
    type: Literal["function"]
    function: Function


class Named(_Body):
    name: Annotated[str, Field(pattern=NAME)]


class NamedChoice(_Body):
    type: Literal["function"]
    function: Named


class JsonSchema(_Body):
    name: str = Field(default="reply", max_length=256)
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self


class StreamOptions(_Body):
    include_usage: bool = False


class _Generation(_Body):
    """What chat and plain completions have in common."""

    model: str | None = Field(default=None, max_length=1024)
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Finite, Field(ge=0.05, le=20)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[dict[int, Annotated[Finite, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=1024)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=MAX_STOPS)]
        | None
    ) = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    regex: Annotated[str, Field(min_length=1, max_length=8192)] | None = Field(
        default=None, description="Of seavlm: the reply matches this regular expression."
    )
    choice: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=8192)]], Field(min_length=1, max_length=256)
        ]
        | None
    ) = Field(default=None, description="Of seavlm: the reply is one of these.")

    @property
    def slow(self) -> bool:
        """To prepare it may take long."""
        return self.regex is not None or self.choice is not None

    def sampling(self, logprobs: int | None) -> dict[str, Any]:
        """As `VLM.sampling` takes them; None: the model's own."""
        stop = self.stop or ()
        return {
            "temperature": self.temperature,
            "top_p": None if self.top_p is None else max(self.top_p, 1e-6),
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias,
            "stop": [stop] if isinstance(stop, str) else list(stop),
            "logprobs": logprobs,
        }


class ChatRequest(_Generation):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _fits(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if isinstance(self.tool_choice, NamedChoice) and self.tool_choice.function.name not in names:
            raise ValueError(
                f"tool_choice names {self.tool_choice.function.name!r}, which is not among tools"
            )
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is required, and there are no tools")
        return self

    @property
    def offered(self) -> list[Tool]:
        """Functions that may be called."""
        if self.tool_choice == "none":
            return []
        found = [
            Tool(one.name, one.description or "", one.parameters, bool(one.strict))
            for one in (tool.function for tool in self.tools or ())
        ]
        if isinstance(self.tool_choice, NamedChoice):
            return [tool for tool in found if tool.name == self.tool_choice.function.name]
        return found

    @property
    def parallel(self) -> bool:
        """Several calls may be made; of a function that is named, one."""
        return self.parallel_tool_calls is not False and not isinstance(self.tool_choice, NamedChoice)

    @property
    def slow(self) -> bool:
        parts = (part for one in self.messages if isinstance(one.content, list) for part in one.content)
        seen = any(not isinstance(part, TextPart) for part in parts)
        return super().slow or seen or self.response_format is not None or bool(self.tools)

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedChoice)


class CompletionRequest(_Generation):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=64)]
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]],
            Field(min_length=1, max_length=64),
        ]
    )
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)


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
