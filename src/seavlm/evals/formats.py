"""Whether a reply keeps to the form that was asked for: checks that a question carries as data.

    {"json": {"name": "string", "count": "integer"}}   one JSON object with these keys and no others
    {"language": "th"}                                 the reply is in Thai
    {"lines": 3}  {"max_characters": 40}               so many lines; at most so many letters (graphemes)
    {"only": "digits"}                                 nothing but digits, of any script
    {"contains": ["ช้าง", "elephant"]}                  one of these texts: the one check of content
    {"calls": [{"name": "multiply", "arguments": {"a": ["12"], "b": ["7"]}}], "functions": ["multiply"]}
                                                       these functions are called; [] for none

A reply that fails a check of form is in the wrong format; one that fails only in content is a wrong answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from seavlm.evals.similarity import clean, graphemes
from seavlm.text.language import to_ascii_digits
from seavlm.text.tools import may_call, parse_calls

_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*?)\n?```\s*\Z", re.DOTALL)
_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}


def failed(checks: dict[str, Any], reply: str, in_language: Callable[[str], bool | None]) -> list[str]:
    """The names of the checks that a reply fails. in_language: whether it is in the one asked for."""
    return [
        name
        for name, wanted in checks.items()
        if name not in ("calls", "functions") and not _passes(name, wanted, reply, in_language)
    ]


def _passes(name: str, wanted: Any, reply: str, in_language: Callable[[str], bool | None]) -> bool:
    text = reply.strip()
    if name == "json":
        return _is_json(wanted, text)
    if name == "language":
        return bool(text) and in_language(text) is not False
    if name == "lines":
        return len([line for line in text.splitlines() if line.strip()]) == wanted
    if name == "max_characters":
        return 0 < len(graphemes(text)) <= wanted
    if name == "only":
        return bool(text) and to_ascii_digits(text).isdecimal()
    if name == "contains":
        said = to_ascii_digits(clean(text))
        return any(to_ascii_digits(clean(one)) in said for one in wanted)
    raise ValueError(f"unknown check {name!r}")


def _is_json(keys: dict[str, str], text: str) -> bool:
    if fence := _FENCE.match(text):
        text = fence[1]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(value, dict)
        and set(value) == set(keys)
        and all(
            isinstance(value[key], _TYPES[kind]) and (kind == "boolean" or not isinstance(value[key], bool))
            for key, kind in keys.items()
        )
    )


def judge_calls(checks: dict[str, Any], reply: str) -> tuple[str | None, str]:
    """(the calls as read, verdict): a call that cannot be read is in the wrong format, another one wrong."""
    calls = parse_calls(reply, checks["functions"])
    if not calls:
        if may_call(reply) and reply.strip():
            return None, "wrong_format"
        return "no call", "wrong_answer" if checks["calls"] or not reply.strip() else "correct"
    read = [(call.name, json.loads(call.arguments)) for call in calls]
    told = json.dumps([{"name": name, "arguments": given} for name, given in read], ensure_ascii=False)
    wanted = checks["calls"]
    right = len(read) == len(wanted) and all(
        name == want["name"] and _arguments(want["arguments"], given)
        for (name, given), want in zip(read, wanted, strict=True)
    )
    return told, "correct" if right else "wrong_answer"


def _arguments(wanted: dict[str, Sequence[Any]], given: dict[str, Any]) -> bool:
    return set(wanted) == set(given) and all(
        any(_same(one, given[key]) for one in accepted) for key, accepted in wanted.items()
    )


def _same(wanted: Any, given: Any) -> bool:
    texts = [to_ascii_digits(clean(str(value))) for value in (wanted, given)]
    try:
        return float(texts[0]) == float(texts[1])
    except ValueError:
        return texts[0] == texts[1]
