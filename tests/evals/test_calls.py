"""Calls of functions: one set of rules, for the suites' questions and for conversations of one's own."""

from __future__ import annotations

import json
from typing import Any

import pytest

from seavlm.data.tools import sample
from seavlm.evals.formats import judge_calls
from seavlm.evals.metrics import Vocabulary, judge
from seavlm.evals.run import score
from seavlm.evals.show import diagnosis
from seavlm.evals.tasks import Question, question_of

ADD, RAIN = {"name": "add", "arguments": {"a": 12, "b": 7}}, {"name": "rain", "arguments": {"city": "Huế"}}
ONE = {"name": "add", "arguments": {"a": 1, "b": 0}}
OTHER_RAIN = {"name": "rain", "arguments": {"city": "Hà Nội"}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": name,
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }
    for name, properties, required in (
        ("add", {"a": {"type": "number"}, "b": {"type": "number"}}, ["a", "b"]),
        ("rain", {"city": {"type": "string"}, "unit": {"type": "string", "default": "mm"}}, ["city"]),
    )
]


def of_a_suite(wanted: list[dict[str, Any]], text: str = "") -> Question:
    """As offline.py makes them: each argument may have several values."""
    told = [
        {"name": one["name"], "arguments": {key: [value, "no"] for key, value in one["arguments"].items()}}
        for one in wanted
    ]
    checks = {"calls": told, "functions": ["add", "rain"], "defaults": {"rain": {"unit": "mm"}}}
    answers = (text,) if text else ()
    return Question("q", "calls", "en", "c", "?", answers, kind="calls", checks=json.dumps(checks))


def of_a_conversation(wanted: list[dict[str, Any]], text: str = "") -> Question:
    """As data/tools.py makes them: the right reply is known."""
    calls = [
        {
            "id": str(place),
            "type": "function",
            "function": {"name": one["name"], "arguments": json.dumps(one["arguments"])},
        }
        for place, one in enumerate(wanted)
    ]
    reply = {"role": "assistant", "content": text or None, **({"tool_calls": calls} if calls else {})}
    return question_of(
        sample([{"role": "user", "content": "?"}, reply], TOOLS, id="q", task="tools", language="en")
    )


def written(*calls: dict[str, Any]) -> str:
    return json.dumps(calls, ensure_ascii=False)


CASES: list[tuple[list[dict[str, Any]], str, str]] = [
    ([ADD], written(ADD), "correct"),
    ([ADD], "[add(a=12, b=7)]", "correct"),
    ([ADD], '```json\n[{"name": "add", "parameters": {"b": 7, "a": 12}}]\n```', "correct"),
    # numbers by value, in the digits of any script
    ([ADD], '[{"name": "add", "arguments": {"a": 12.0, "b": "7"}}]', "correct"),
    ([ADD], '[{"name": "add", "arguments": {"a": "១២", "b": 7}}]', "correct"),
    ([ADD], '[{"name": "add", "arguments": {"a": 12, "b": true}}]', "wrong_answer"),
    ([ADD], '[{"name": "add", "arguments": {"a": 12, "b": [7]}}]', "wrong_answer"),
    ([ONE], written(ONE), "correct"),
    ([ONE], '[{"name": "add", "arguments": {"a": true, "b": false}}]', "wrong_answer"),
    ([ONE], '[{"name": "add", "arguments": {"a": 1, "b": null}}]', "wrong_answer"),
    ([ADD], '[{"name": "add", "arguments": {"a": 7, "b": 12}}]', "wrong_answer"),
    ([RAIN], '[{"name": "rain", "arguments": {"city": " huế "}}]', "correct"),
    ([RAIN], '[{"name": "rain", "arguments": {"city": "Hue"}}]', "wrong_answer"),
    # what the schema gives where nothing is said
    ([RAIN], '[{"name": "rain", "arguments": {"city": "Huế", "unit": "mm"}}]', "correct"),
    ([RAIN], '[{"name": "rain", "arguments": {"city": "Huế", "unit": "cm"}}]', "wrong_answer"),
    ([RAIN], '[{"name": "rain", "arguments": {}}]', "wrong_answer"),
    ([RAIN], '[{"name": "rain", "arguments": {"city": "Huế", "day": 1}}]', "wrong_answer"),
    # several at once have no order, and each counts once
    ([ADD, RAIN], written(RAIN, ADD), "correct"),
    ([RAIN, OTHER_RAIN], written(OTHER_RAIN, RAIN), "correct"),
    ([RAIN, OTHER_RAIN], written(RAIN, RAIN), "wrong_answer"),
    ([RAIN, RAIN], written(RAIN), "wrong_answer"),
    ([ADD], written(ADD, RAIN), "wrong_answer"),
    # a decision, or a slip of form
    ([ADD], '[{"name": "subtract", "arguments": {"a": 12, "b": 7}}]', "wrong_answer"),
    ([ADD], "It is 19.", "wrong_answer"),
    ([ADD], f"Sure! {written(ADD)}", "wrong_format"),
    ([ADD], "add(a=12, b=7)", "wrong_format"),  # the server takes it for text
    ([ADD], "I will add them up.", "wrong_answer"),
    ([ADD], written(ADD)[:-2], "wrong_format"),
    ([ADD], "", "wrong_format"),
    ([ADD], " \n", "wrong_format"),
    ([], "Hello!", "correct"),
    ([], "  hello! ", "correct"),
    ([], written(ADD), "wrong_answer"),
    ([], '[{"name": ', "wrong_format"),
    ([], "", "wrong_format"),
]


@pytest.mark.parametrize("wanted, reply, verdict", CASES)
def test_both_kinds_of_question_are_judged_alike(wanted: list[Any], reply: str, verdict: str) -> None:
    for made in (of_a_suite, of_a_conversation):
        question = made(wanted, "" if wanted else "Hello!")
        found = judge(question, reply, Vocabulary.of([question]))
        assert found.verdict == verdict, (made.__name__, found)
        assert found.measures == ({} if wanted else {"false_call": float("add" in reply)})


def test_a_text_that_is_not_known_may_be_any() -> None:
    question = of_a_suite([])
    vocabulary = Vocabulary.of([question])
    assert judge(question, "Good day to you.", vocabulary).verdict == "correct"
    assert judge(of_a_suite([], "Hello!"), "Good day to you.", vocabulary).verdict == "wrong_answer"


def test_a_call_that_two_would_take_goes_where_it_is_needed() -> None:
    """What fits the first of those wanted is the only one that fits the second."""
    wanted = [
        {"name": "rain", "arguments": {"city": ["Huế", "Hà Nội"]}},
        {"name": "rain", "arguments": {"city": ["Huế"]}},
    ]
    checks = {"calls": wanted, "functions": ["rain"]}
    assert judge_calls(checks, written(RAIN, OTHER_RAIN))[1] == "correct"
    assert judge_calls(checks, written(OTHER_RAIN, RAIN))[1] == "correct"
    assert judge_calls(checks, written(OTHER_RAIN, OTHER_RAIN))[1] == "wrong_answer"


def test_calls_beyond_number_are_matched_at_once() -> None:
    """Fifteen that are alike and one that fits nowhere: no search through all orders."""
    question = of_a_conversation([RAIN] * 16)
    reply = written(*[RAIN] * 15, OTHER_RAIN)
    assert judge(question, reply, Vocabulary.of([question])).verdict == "wrong_answer"


def test_false_calls_are_counted_apart() -> None:
    asked = [of_a_suite([ADD]), of_a_suite([]), of_a_suite([])]
    results = score(asked, [written(RAIN), written(ADD), "Hi"], resamples=50)
    assert results.tasks["calls"].measures == {"false_call": 0.5}
    assert results.tasks["calls"].wrong_answer == pytest.approx(2 / 3)
    assert "calls: 50% of the questions that need no function are answered with a call" in diagnosis(results)
