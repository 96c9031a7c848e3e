"""Conversations with functions, in the words that the server puts them in and reads them back from.

Both kinds of sample here are written as OpenAI's clients write them and pass through
`text.openai.to_messages`, as a request to the server does:

- `Talks` makes the task "tools" from the names that ship with the package: translate a word, find an emoji or
  a flag, work out a sum. Every argument follows from the question and every result is known, so nothing is
  made up.
- `read_conversations` reads a user's own, a JSON object a line: `messages`, and `tools` where functions are
  offered.

Either way a reply that calls is read back with `parse_calls` before it becomes a sample.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from seavlm.data.pictures import Concept, Flag, Pictures
from seavlm.errors import SeavlmError
from seavlm.text.language import LANGUAGES, detect, to_native_digits
from seavlm.text.openai import Body, FunctionTool, Message, to_messages
from seavlm.text.tools import Call, Tool, parse_calls

TASK = "tools"
QUESTIONS = Path(__file__).with_name("tools.yaml")
HELD_OUT_SHARE = 4  # one name or sum in so many is never trained on; dev has a third of those, eval the rest
NATIVE_DIGITS = ("my", "km")  # as in templates.yaml
Row = dict[str, Any]
Kind = Literal["call", "result", "two", "two results", "not offered", "small talk"]
KINDS: dict[Kind, int] = {
    "call": 35, "result": 20, "two": 10, "two results": 10, "not offered": 15, "small talk": 10
}  # fmt: skip


def sample(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], **columns: Any) -> Row:
    """A row of a conversation as OpenAI has it (`messages`, `tools`); columns: id, task, language, meta.

    SeavlmError where it ends with no reply of the assistant's, calls what is not offered, or has a reply that
    the server would not read as what it is.
    """
    said = [Message.model_validate(message) for message in messages]
    offered = [FunctionTool.model_validate(tool).tool for tool in tools]
    names = [tool.name for tool in offered]
    if len(set(names)) < len(names):
        raise SeavlmError("two tools have the same name")
    turns = to_messages(said, offered)
    if turns[-1]["role"] != "assistant":
        raise SeavlmError("the last message is not the assistant's", hint="A sample ends with a reply.")
    answer = _read_back(said, turns, offered)
    images: list[Row] = []
    for turn in turns:
        parts = turn["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        turn["content"] = [_part(part, images) for part in parts]
    meta: Row = {"answer": answer, "functions": names, "chance": 0.0} | columns.pop("meta", {})
    if defaults := {tool.name: found for tool in offered if (found := _defaults(tool))}:
        meta["defaults"] = defaults
    return {**columns, "messages": turns, "images": images, "meta": json.dumps(meta, ensure_ascii=False)}


def _read_back(said: Sequence[Message], turns: Sequence[Row], offered: Sequence[Tool]) -> str:
    """What the server finds in each of the assistant's turns is what was called there. The last turn's."""
    names = [tool.name for tool in offered]
    spoken = [message for message in said if message.role not in ("system", "developer")]
    groups = [list(group) for who, group in groupby(spoken, lambda m: m.role == "assistant") if who]
    texts = [
        "".join(part["text"] for part in turn["content"]) for turn in turns if turn["role"] == "assistant"
    ]
    for group, text in zip(groups, texts, strict=True):
        if not text.strip():
            raise SeavlmError(
                "a reply of the assistant's is empty", hint="Take it out, or write what it says."
            )
        made = [call.function for message in group for call in message.tool_calls or ()]
        for call in made:
            if call.name not in names:
                raise SeavlmError(
                    f"{call.name!r} is called, which is not among tools",
                    hint=f"Offered: {', '.join(names) or 'none'}.",
                )
        wanted = [(call.name, _object(call.arguments)) for call in made]
        found = [(call.name, json.loads(call.arguments)) for call in parse_calls(text, names)]
        if found != wanted:
            raise SeavlmError(
                f"the reply {text[:80]!r} would be read as {len(found)} calls, not {len(wanted)}",
                hint="A reply that calls holds nothing else (its content is empty), and at most 16 calls.",
            )
    return texts[-1]


def _defaults(tool: Tool) -> dict[str, Any]:
    """The arguments that need not be said, and what they are then."""
    known = tool.schema.get("properties") or {}
    return {key: one["default"] for key, one in known.items() if isinstance(one, dict) and "default" in one}


def _object(arguments: str) -> Any:
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise SeavlmError(
            f"the arguments {arguments[:80]!r} are no JSON object",
            hint='As OpenAI has them: "{\\"city\\": \\"Hue\\"}".',
        )
    return value


def _part(part: dict[str, Any], images: list[Row]) -> Row:
    """A part as `SCHEMA` has it; a picture goes to `images`."""
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    head, _, data = part["image_url"]["url"].partition(",") if part["type"] == "image_url" else ("", "", "")
    if not (head.startswith("data:image/") and head.endswith(";base64")):
        raise SeavlmError(
            "a picture is no data: URI", hint="Samples hold their pictures: data:image/png;base64,..."
        )
    try:
        images.append({"bytes": base64.b64decode(data, validate=True), "path": None})
    except ValueError:
        raise SeavlmError("a picture's data: URI is not base64", hint="Write the picture again.") from None
    return {"type": "image", "text": None}


# --- a user's own


class _Line(Body):
    """As OpenAI's fine-tuning files have it; id and language may be left out."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    id: str | int | None = None
    language: str | None = None


def read_conversations(path: Path) -> Iterator[Row]:
    """The rows of a JSONL file of OpenAI's messages. SeavlmError names the line that cannot be used.

    The language is what the line says, else what the last question's script tells, else English.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield _conversation(line, f"{path.stem}-{number:07d}")
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(one) for one in first["loc"])
                told = first["msg"].removeprefix("Value error, ")
                raise SeavlmError(
                    f"{path}, line {number}: {where + ': ' if where else ''}{told}",
                    hint="A line is an object with messages and tools, as OpenAI's interface takes them.",
                ) from None
            except SeavlmError as error:
                raise SeavlmError(f"{path}, line {number}: {error.message}", hint=error.hint) from None
            except (ValueError, RecursionError) as error:
                raise SeavlmError(
                    f"{path}, line {number} is not JSON in UTF-8 ({' '.join(str(error).split())[:80]})",
                    hint="One JSON object a line, in UTF-8.",
                ) from None


def _conversation(line: bytes, name: str) -> Row:
    raw = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode())
    if isinstance(raw, dict) and "functions" in raw:
        raise SeavlmError(
            "functions is OpenAI's older form", hint='Write tools: [{"type": "function", ...}].'
        )
    given = _Line.model_validate(raw)
    language = given.language or detect(_asked(given.messages)) or "en"
    if language not in LANGUAGES:
        raise SeavlmError(f"unknown language {language!r}", hint=f"Use one of {', '.join(LANGUAGES)}.")
    json.dumps(raw, ensure_ascii=False).encode()  # no halves of characters
    return sample(
        given.messages,
        given.tools or (),
        id=str(given.id if given.id is not None else name),
        task=TASK if given.tools else "chat",
        language=language,
    )


def _asked(messages: Sequence[dict[str, Any]]) -> str:
    """The last question's text."""
    content = next((one.get("content") for one in reversed(messages) if one.get("role") == "user"), "")
    parts = content if isinstance(content, list) else [{"text": content}]
    return " ".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))


# --- from what ships with the package


@dataclass(frozen=True)
class _Function:
    """A function as several makers would have it: a sample takes one name of it and of its parameters."""

    names: tuple[str, ...]
    description: str
    parameters: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()  # of the parameters, from the last back


FUNCTIONS = {
    "translate": _Function(
        ("translate", "translate_word", "to_language"),
        "Translate a word into another language.",
        (("text", "word", "phrase"), ("language", "to", "target")),
        ("ISO 639-1 code",),
    ),
    "emoji": _Function(
        ("find_emoji", "emoji_of", "search_emoji"),
        "Find the emoji of a thing.",
        (("name", "thing", "query"),),
    ),
    "flag": _Function(
        ("find_flag", "get_flag", "flag_of"), "Find the flag of a country.", (("country", "name", "place"),)
    ),
    "calculate": _Function(
        ("calculate", "calculator", "compute"), "Work out a sum.", (("expression", "sum", "formula"),)
    ),
}
# Offered beside them, and never needed.
OTHERS = {
    "weather": _Function(("get_weather", "weather"), "Tell the weather in a city.", (("city", "place"),)),
    "alarm": _Function(("set_alarm", "wake_me"), "Set an alarm.", (("time", "at"),)),
    "page": _Function(("open_page", "read_page"), "Read a page of the web.", (("address", "url"),)),
}


@dataclass(frozen=True)
class _Ask:
    """One thing to be found out, before it is put in words."""

    function: str
    key: str  # of the concept or flag
    to: str  # translate: a language
    sum: tuple[int, str, int]
    template: int


@dataclass(frozen=True)
class _Talk:
    kind: Kind
    asks: tuple[_Ask, ...]
    offered: tuple[tuple[str, int], ...]  # function, and which of its names
    template: int


@cache
def questions(language: str) -> dict[str, Any]:
    """One language of tools.yaml."""
    entry: dict[str, Any] = yaml.safe_load(QUESTIONS.read_text(encoding="utf-8"))[language]
    return entry


def part_of(key: str) -> str:
    """ "train", "dev" or "eval": who may ask about this name or sum. Nobody else does."""
    digest = hashlib.sha256(key.encode()).digest()
    return "train" if digest[1] % HELD_OUT_SHARE else "dev" if digest[0] % 3 == 0 else "eval"


class Talks:
    """The task "tools" of one split. Concepts whose name another one bears in some language are left out."""

    def __init__(self, pictures: Pictures, chosen: Sequence[Concept], split: str) -> None:
        self.split = split
        borne = {code: Counter(concept.names[code] for concept in pictures.concepts) for code in LANGUAGES}
        self.concepts = {
            concept.key: concept
            for concept in chosen
            if all(borne[code][name] == 1 for code, name in concept.names.items())
        }
        self.targets = tuple(key for key in self.concepts if part_of(key) == split)
        self.flags: dict[str, Flag] = {f.code: f for f in pictures.flags if part_of(f.code) == split}
        if not self.targets:
            raise SeavlmError(
                f"no concept is left to call functions about in {split}", hint="Take more concepts."
            )

    def row(self, target: str, language: str, seed: str, row_id: str) -> Row:
        """What follows from (target, seed), in one language."""
        return self._told(self._talk(target, random.Random(seed)), language, row_id)

    def _talk(self, target: str, rng: random.Random) -> _Talk:
        kind = rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
        count = 0 if kind == "small talk" else 2 if kind.startswith("two") else 1
        asks = tuple(self._ask(target if n == 0 else rng.choice(self.targets), rng) for n in range(count))
        needed = list(dict.fromkeys(ask.function for ask in asks))
        spare = [name for name in (*FUNCTIONS, *OTHERS) if name not in needed]
        rng.shuffle(spare)
        if kind == "not offered":
            offered = spare[: rng.randint(1, 2)]
        else:
            offered = needed + spare[: rng.randint(0 if needed else 1, 2)]
        rng.shuffle(offered)
        return _Talk(kind, asks, tuple((name, rng.randrange(6)) for name in offered), rng.randrange(60))

    def _ask(self, target: str, rng: random.Random) -> _Ask:
        while True:
            a, sign, b = rng.randint(2, 99), rng.choice("+-*"), rng.randint(2, 99)
            a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
            if part_of(f"{a} {sign} {b}") == self.split:
                break
        function, flag = rng.choice(tuple(FUNCTIONS)), rng.choice(tuple(self.flags))
        key = flag if function == "flag" else target
        return _Ask(function, key, rng.choice(tuple(LANGUAGES)), (a, sign, b), rng.randrange(60))

    def _told(self, talk: _Talk, language: str, row_id: str) -> Row:
        words = questions(language)
        tools = {name: _tool({**FUNCTIONS, **OTHERS}[name], which) for name, which in talk.offered}
        messages: list[Row] = []
        if talk.kind == "small talk":
            question, answer = words["small_talk"][talk.template % len(words["small_talk"])]
        else:
            told = [self._worded(ask, language) for ask in talk.asks]
            question = "\n".join(text for text, _, _ in told)
            answer = "\n".join(_native(result, language) for _, _, result in told)
        messages.append({"role": "user", "content": question})
        if talk.kind not in ("small talk", "not offered"):
            calls, results = [], []
            for number, (ask, (_, values, result)) in enumerate(zip(talk.asks, told, strict=True)):
                function = tools[ask.function]["function"]
                arguments = dict(zip(function["parameters"]["properties"], values, strict=True))
                call = Call(function["name"], json.dumps(arguments, ensure_ascii=False))
                calls.append({"id": f"call_{number}", "type": "function", "function": vars(call)})
                results.append({"role": "tool", "tool_call_id": f"call_{number}", "content": result})
            messages.append({"role": "assistant", "content": None, "tool_calls": calls})
            if talk.kind in ("result", "two results"):
                messages += results
        if messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": answer})
        concept = talk.asks[0].key if talk.asks else "small talk"
        meta = {"concept": concept, "kind": talk.kind}
        return sample(messages, list(tools.values()), id=row_id, task=TASK, language=language, meta=meta)

    def _worded(self, ask: _Ask, language: str) -> tuple[str, list[str], str]:
        """The question, the arguments of its call, and the result."""
        words, codes = questions(language), tuple(LANGUAGES)
        text = words[ask.function][ask.template % len(words[ask.function])]
        if ask.function == "calculate":
            a, sign, b = ask.sum
            shown = _native(f"{a} {'×' if sign == '*' else sign} {b}", language)
            result = {"+": a + b, "-": a - b, "*": a * b}[sign]
            return text.format(sum=shown), [f"{a} {sign} {b}"], str(result)
        if ask.function == "flag":
            name = self.flags[ask.key].names[language]
            return text.format(name=name), [name], "".join(chr(0x1F1E6 + ord(c) - ord("a")) for c in ask.key)
        concept = self.concepts[ask.key]
        name = concept.names[language]
        if ask.function == "emoji":
            return text.format(name=name), [name], concept.emoji
        to = ask.to if ask.to != language else codes[codes.index(language) - 1]
        asked = text.format(name=name, language=words["languages"][codes.index(to)])
        return asked, [name, to], concept.names[to]


def _tool(function: _Function, which: int) -> Row:
    """The function under one of its names, as a client offers it."""
    names = [known[which % len(known)] for known in function.parameters]
    properties: dict[str, Row] = {name: {"type": "string"} for name in names}
    for name, note in zip(reversed(names), function.notes, strict=False):
        properties[name]["description"] = note
    return {
        "type": "function",
        "function": {
            "name": function.names[which % len(function.names)],
            "description": function.description,
            "parameters": {"type": "object", "properties": properties, "required": names},
        },
    }


def _native(text: str, language: str) -> str:
    return to_native_digits(text, language) if language in NATIVE_DIGITS else text
