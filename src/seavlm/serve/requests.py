"""What a client may send: OpenAI's fields, each within its bounds.

Fields that we do not know are passed over, as OpenAI's clients send new ones every month; what constrains a
reply (`response_format`, `tools`) is never among them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from seavlm.text.openai import MAX_MESSAGES, NAME, Body, FunctionTool, Message, TextPart
from seavlm.text.tools import Tool

MAX_STOPS, MAX_CHOICES, MAX_BIASES, MAX_TOP_LOGPROBS = 4, 16, 1024, 20

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Named(Body):
    name: Annotated[str, Field(pattern=NAME)]


class NamedChoice(Body):
    type: Literal["function"]
    function: Named


class JsonSchema(Body):
    name: str = Field(default="reply", max_length=256)
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self


class StreamOptions(Body):
    include_usage: bool = False


class _Generation(Body):
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
        Annotated[str, Field(min_length=1, max_length=256)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=MAX_STOPS)]
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
            list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(min_length=1, max_length=256)
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
        found = [one.tool for one in self.tools or ()]
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
