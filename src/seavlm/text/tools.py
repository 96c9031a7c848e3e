"""Functions that a model may call: into the prompt, out of a reply.

Gemma 3 has no tokens for this, so it is plain text. The system text lists the functions and says how to call
them:

    [{"name": "get_weather", "arguments": {"city": "Phnom Penh"}}]

alone, one object for each call. A reply is read leniently, as models are not all trained on that: JSON with
`parameters` for `arguments`, one object or one a line, in a code fence or <tool_call> tags, and calls as
Python writes them (`[get_weather(city="Phnom Penh")]`). What calls no known function is text.

The instructions are in English in every language, as translating them was measured to help nothing:
the 270M base, shown two calls and asked 20 questions in each of the ten other languages, called the right
function for 52 % of them after English instructions and for 54 % after those in the user's language (any at
all: 89 % and 87 %; in Burmese 100 % and 55 %), which take 64 to 115 tokens where English takes 75.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_CALLS = 16  # in one reply
OPENINGS = ("[", "{", "```", "<tool_call>")  # what a reply that calls begins with

_INSTRUCTIONS = """\
You may call these functions:

{functions}

To call functions, reply with this JSON and nothing else, one object for each call:
[{{"name": "FUNCTION", "arguments": {{"ARGUMENT": VALUE}}}}]
The results will be given to you. If no function is needed, answer in plain text, in the user's language."""
_FENCE = re.compile(r"\A```[\w-]*\n(.*?)\n?```\s*\Z", re.DOTALL)
_TAGS = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Tool:
    """A function: its name, what it does, and the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        return dict(self.parameters or {"type": "object", "properties": {}, "additionalProperties": False})


@dataclass(frozen=True)
class Call:
    """arguments: JSON text."""

    name: str
    arguments: str


def instructions(tools: Iterable[Tool]) -> str:
    """What the system text says of them."""
    told = [{"name": tool.name, "description": tool.description, "parameters": tool.schema} for tool in tools]
    return _INSTRUCTIONS.format(functions="\n".join(json.dumps(one, ensure_ascii=False) for one in told))


def render_calls(calls: Iterable[Call]) -> str:
    """A reply that calls, as it is written."""
    told = []
    for call in calls:
        try:
            arguments = json.loads(call.arguments or "{}")
        except ValueError:
            arguments = call.arguments
        told.append({"name": call.name, "arguments": arguments})
    return json.dumps(told, ensure_ascii=False)


def render_result(name: str, content: str) -> str:
    """What a function gave back, as a user's text."""
    return f"Result of {name}:\n{content}"


def calls_schema(tools: Sequence[Tool], *, parallel: bool) -> dict[str, Any]:
    """The JSON schema of a reply that calls one of `tools`, or several."""
    one = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": tool.schema},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    items = one[0] if len(one) == 1 else {"anyOf": one}
    return {"type": "array", "items": items, "minItems": 1, "maxItems": MAX_CALLS if parallel else 1}


def may_call(text: str) -> bool:
    """What has come of a reply so far may be the beginning of a call."""
    text = text.lstrip()
    return any(text.startswith(opening) or opening.startswith(text) for opening in OPENINGS)


def parse_calls(text: str, names: Iterable[str] | None) -> list[Call]:
    """The calls that a whole reply is; none if it is text. names: of the functions offered; None: any."""
    known, body = None if names is None else set(names), text.strip()
    if not body or not may_call(body):
        return []
    if fence := _FENCE.match(body):
        body = fence[1].strip()
    pieces = [piece.strip() for piece in _TAGS.findall(body)] if "<tool_call>" in body else [body]
    found: list[Call] = []
    for piece in pieces:
        calls = _from_json(piece) or _from_python(piece)
        if not calls or (known is not None and any(call.name not in known for call in calls)):
            return []
        found += calls
    return found[:MAX_CALLS]


def _from_json(text: str) -> list[Call]:
    decoder, values, at = json.JSONDecoder(), [], 0
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            values += value if isinstance(value, list) else [value]
            while at < len(text) and text[at] in " \t\r\n,;":
                at += 1
    except (ValueError, RecursionError):
        return []
    found = []
    for value in values:
        if isinstance(value, dict) and isinstance(value.get("function"), dict):
            value = value["function"]
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return []
        arguments: Any = next((value[key] for key in ("arguments", "parameters", "args") if key in value), {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return []
        if not isinstance(arguments, dict):
            return []
        try:
            found.append(Call(value["name"], _written(arguments)))
        except (ValueError, RecursionError):
            return []
    return found


def _written(arguments: dict[str, Any]) -> str:
    """As JSON. ValueError for what JSON, or UTF-8, cannot hold."""
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    text.encode()
    return text


def _from_python(text: str) -> list[Call]:
    """Nothing is run: names, and literals as keyword arguments."""
    if len(text) > 65_536:
        return []
    try:
        tree = ast.parse(text.removeprefix("print").strip(), mode="eval").body
        nodes = tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree]
        found = []
        for node in nodes:
            if not isinstance(node, ast.Call) or node.args or not isinstance(node.func, ast.Name):
                return []
            arguments = {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg}
            found.append(Call(node.func.id, _written(arguments)))
        return found
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return []
