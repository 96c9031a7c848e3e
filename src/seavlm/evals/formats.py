"""Whether a reply keeps to the form that was asked for: checks that a question carries as data.

    {"json": {"name": "string", "count": "integer"}}   one JSON object with these keys and no others
    {"language": "th"}                                 the reply is in Thai
    {"lines": 3}  {"max_characters": 40}               so many lines; at most so many letters (graphemes)
    {"only": "digits"}                                 nothing but digits, of any script
    {"contains": ["ช้าง", "elephant"]}                  one of these texts: a check of content
    {"values": {"name": "ช้าง", "count": 3}}            so have the JSON's keys: of content
    {"each_line": "ช้าง"}                               so reads every line: of content
    {"rule": {"name": "startend:quotation"}}           a rule of SEA-IFEval, with its figures (`_rule`)
    {"calls": [{"name": "multiply", "arguments": {"a": ["12"], "b": ["7"]}}], "functions": ["multiply"]}
                                                       these functions are called, each argument with one of
                                                       the values; [] for none. `judge_calls` has the rules

A reply that fails a check of form is in the wrong format; one that fails only in content is a wrong answer.
A reply without letters is in no language; nor is a sentence of which no language knows a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from seavlm.evals.similarity import clean, graphemes
from seavlm.text.language import to_ascii_digits
from seavlm.text.tools import may_call, parse_calls

SENTENCE = 3
"""Words from which on some of a text's must be known, for it to be in a language."""
CONTENT = {"contains", "values", "each_line"}
"""Checks of what a reply says, not of its form."""
_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*?)\n?```\s*\Z", re.DOTALL)
_NUMBER = re.compile(r"[+-]?[0-9]{1,300}(\.[0-9]{1,300})?")
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
        told = in_language(text)
        unknown = any(letter.isalpha() for letter in text) and len(text.split()) < SENTENCE
        return unknown if told is None else told
    if name == "lines":
        return len([line for line in text.splitlines() if line.strip()]) == wanted
    if name == "max_characters":
        return 0 < len(graphemes(text)) <= wanted
    if name == "only":
        return bool(text) and to_ascii_digits(text).isdecimal()
    if name == "contains":
        return any(_plain(one) in _plain(text) for one in wanted)
    if name == "values":
        said = _json(text)
        return isinstance(said, dict) and all(
            key in said and _equal(one, said[key]) for key, one in wanted.items()
        )
    if name == "each_line":
        return all(_bare(line) == _bare(wanted) for line in text.splitlines() if line.strip())
    if name == "rule":
        return _rule(reply, **wanted)
    raise ValueError(f"unknown check {name!r}")


def _bare(text: str) -> str:
    return clean(text).strip(".,:;!?\"'“”‘’*-•。")


def _json(text: str) -> Any:
    """The value that a text, or the one block of code that it is, holds as JSON; None where it is none."""
    if fence := _FENCE.match(text):
        text = fence[1]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_json(keys: dict[str, str], text: str) -> bool:
    value = _json(text)
    return (
        isinstance(value, dict)
        and set(value) == set(keys)
        and all(
            isinstance(value[key], _TYPES[kind]) and (kind == "boolean" or not isinstance(value[key], bool))
            for key, kind in keys.items()
        )
    )


WORD_BOUNDED = ("en", "id", "ms", "vi")
"""Where SEA-IFEval looks for whole words, in any case; elsewhere, for the text as it is."""


def _rule(reply: str, name: str, spoken: str, **given: Any) -> bool:
    """One of the rules of SEA-IFEval (SEA-HELM, instruction_following/ifeval): name, and its figures.

    spoken: the language of the question. ValueError for a rule that is not known.
    """
    text, lower = reply.strip(), reply.strip().lower()
    kind = name.split(":")[-1]
    if kind == "number_words":
        return _relates(given, len(re.findall(r"\w+", reply)), "num_words")
    if kind == "number_sentences":  # which "***" divides
        return _relates(given, len(_pieces(text.strip("*"), "***")), "num_sentences")
    if kind == "number_paragraphs":
        return len(_pieces(text, "***")) == int(given["num_paragraphs"])
    if kind == "postscript":
        marker = (
            r"\.\s?".join(map(re.escape, given["postscript_marker"].lower().rstrip(".").split("."))) + r"\."
        )
        return re.search(marker, lower) is not None
    if kind == "number_placeholders":
        return len(re.findall(r"\[[^\]]*[^\]\[\s][^\]]*\]", reply)) >= int(given["num_placeholders"])
    if kind == "title":
        return re.search(r"<<[^\n]*[^\n<>\s][^\n]*>>", reply) is not None
    if kind == "number_bullet_lists":
        points = re.findall(r"^\s*[*-] \*{0,2}[^*\s].*$", reply, re.MULTILINE)
        return len(points) == int(given["num_bullets"])
    if kind == "multiple_sections":
        title = re.escape(given["section_title"])
        return len(re.findall(rf"\b{title}\s+[\d\w]+\b", reply)) == int(given["num_sections"])
    if kind == "number_highlighted_sections":
        marked = re.findall(r"\*[^\n*]*\*", reply) + re.findall(r"\*\*[^\n*]*\*\*", reply)
        marked = [one for one in marked if one.strip("* \t")]
        return len(marked) >= int(given["num_highlights"])
    if kind == "json_format":
        fence = re.fullmatch(r"```(?:json)?(.*?)(?:```)?", text, re.DOTALL | re.IGNORECASE)
        return _json(fence[1].strip() if fence else text) is not None
    if kind == "constrained_response":
        return any(phrase in reply for phrase in given["phrases"])
    if kind == "first_word":
        return lower.startswith(given["first_word"].lower())
    if kind == "end_checker":
        return lower.endswith(given["end_phrase"].lower())
    if kind == "quotation":
        return text[:1] == text[-1:] == '"' and bool(text.strip('"').strip())
    if kind == "existence":
        return all(_occurs(word, reply, spoken) for word in given["keywords"])
    if kind == "forbidden_words":
        return not any(_occurs(word, reply, spoken) for word in given["forbidden_words"])
    if kind == "frequency":
        return _relates(given, _occurs(given["keyword"].lower(), lower, spoken), "frequency")
    if kind == "number_frequency":
        return _relates(given, reply.count(str(given["number"])), "frequency")
    if kind == "repeat_prompt":
        prompt = given["prompt_to_repeat"].strip().lower()
        return lower.startswith(prompt) and bool(lower.removeprefix(prompt).strip())
    if kind == "two_responses":
        return len([piece for piece in _pieces(text, "******") if re.search(r"\w", piece)]) == 2
    raise ValueError(f"unknown rule {name!r}")


def _pieces(text: str, divider: str) -> list[str]:
    return [piece for piece in text.split(divider) if piece.strip()]


def _relates(given: dict[str, Any], count: int, key: str) -> bool:
    wanted, relation = int(given[key]), given["relation"]
    if relation == "exactly":
        return count == wanted
    return count >= wanted if relation == "at least" else count < wanted


def _occurs(word: str, text: str, language: str) -> int:
    if language in WORD_BOUNDED:
        return len(re.findall(rf"\b{re.escape(word)}\b", text, re.IGNORECASE))
    return text.count(word)


def wanted_calls(answer: str, functions: Sequence[str]) -> dict[str, Any]:
    """The checks of a question whose right reply is known: the calls that it is, or none."""
    called = [(call.name, json.loads(call.arguments)) for call in parse_calls(answer, functions)]
    told = [{"name": name, "arguments": {key: [given[key]] for key in given}} for name, given in called]
    return {"calls": told, "functions": list(functions)}


def judge_calls(
    checks: dict[str, Any], reply: str, texts: Sequence[str] = ()
) -> tuple[str | None, str, dict[str, float]]:
    """(what was read, verdict, figures) of a reply where functions are offered.

    checks: `calls` and `functions`; `defaults` of arguments by function, which may be left out or said.
    texts: what a reply without calls may be, where that is known. It is read as the server reads it.

    - The calls of a reply have no order. Each is one of those wanted, and none is left over.
    - Arguments are equal as JSON: numbers by value (12, 12.0, "12", "១២" where a number is on either side),
      texts but for case, spacing and the script of digits, objects without order, lists in order.
    - Wrong format: nothing; what begins as a call, or holds one where one is wanted, but cannot be read.
    - Wrong answer: other calls, a function that is not offered, plain text where a call is wanted; and where
      none is, a call, which the figure `false_call` counts apart (0 or 1), or another text.
    """
    functions, wanted = checks["functions"], checks["calls"]
    called = parse_calls(reply, functions) or (parse_calls(reply, None) if wanted else [])
    figures = {} if wanted else {"false_call": float(bool(called))}
    if called:
        read = [(call.name, json.loads(call.arguments)) for call in called]
        told = json.dumps([{"name": name, "arguments": given} for name, given in read], ensure_ascii=False)
        right = _all_matched(wanted, read, checks.get("defaults") or {})
        return told, "correct" if right else "wrong_answer", figures
    text = _plain(reply)
    if not wanted and text and text in map(_plain, texts):
        return reply.strip(), "correct", figures
    if not text or may_call(reply) or (wanted and _tries_to_call(reply, functions)):
        return None, "wrong_format", figures
    right = not wanted and not texts
    return "no call" if right or wanted else reply.strip(), "correct" if right else "wrong_answer", figures


def _tries_to_call(reply: str, functions: Sequence[str]) -> bool:
    """Whether a function is named as in a call: `name(`, "name"."""
    return any(
        re.search(rf"(?<!\w){re.escape(name)}\s*\(|[\"'`]{re.escape(name)}[\"'`]", reply)
        for name in functions
    )


def _all_matched(
    wanted: Sequence[dict[str, Any]],
    called: Sequence[tuple[str, dict[str, Any]]],
    defaults: dict[str, dict[str, Any]],
) -> bool:
    """Whether each call can be one of those wanted, and none is both (Kuhn's augmenting paths)."""
    fits = [
        [
            place
            for place, (name, given) in enumerate(called)
            if name == want["name"] and _arguments(want["arguments"], given, defaults.get(name) or {})
        ]
        for want in wanted
    ]
    taken: dict[int, int] = {}

    def place_for(want: int, tried: set[int]) -> bool:
        for place in fits[want]:
            if place not in tried:
                tried.add(place)
                if place not in taken or place_for(taken[place], tried):
                    taken[place] = want
                    return True
        return False

    return len(called) == len(wanted) and all(place_for(want, set()) for want in range(len(wanted)))


def _arguments(wanted: dict[str, Sequence[Any]], given: dict[str, Any], defaults: dict[str, Any]) -> bool:
    given = {**defaults, **given}
    wanted = {**{key: [value] for key, value in defaults.items()}, **wanted}
    return set(wanted) == set(given) and all(
        any(_equal(one, given[key]) for one in accepted) for key, accepted in wanted.items()
    )


def _equal(a: Any, b: Any) -> bool:
    """Equal as JSON, as `judge_calls` says."""
    if isinstance(a, bool) or isinstance(b, bool) or a is None or b is None:
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return set(a) == set(b) and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, str) and isinstance(b, str):
        return _plain(a) == _plain(b)
    numbers = _number(a), _number(b)
    return None not in numbers and numbers[0] == numbers[1]


def _number(value: Any) -> float | None:
    """A number, or a text that is one in the digits of any script."""
    if isinstance(value, int | float):
        return value
    text = to_ascii_digits(value).strip() if isinstance(value, str) else ""
    if not _NUMBER.fullmatch(text):
        return None
    return float(text) if "." in text else int(text)


def _plain(text: str) -> str:
    return to_ascii_digits(clean(text))
