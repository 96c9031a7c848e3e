"""Functions into the prompt, calls out of replies."""

from __future__ import annotations

import json

import pytest

from seavlm.text.tools import (
    Call,
    Tool,
    calls_schema,
    instructions,
    may_call,
    parse_calls,
    render_calls,
    render_result,
)

WEATHER = Tool("get_weather", "The weather", {"type": "object", "properties": {"city": {"type": "string"}}})
NAMES = ["get_weather", "add"]
HERE = Call("get_weather", '{"city": "ភ្នំពេញ"}')


@pytest.mark.parametrize(
    "text",
    [
        '[{"name": "get_weather", "arguments": {"city": "ភ្នំពេញ"}}]',
        '{"name": "get_weather", "parameters": {"city": "ភ្នំពេញ"}}',
        '{"type": "function", "function": {"name": "get_weather", "arguments": "{\\"city\\": \\"ភ្នំពេញ\\"}"}}',
        '```json\n[{"name": "get_weather", "arguments": {"city": "ភ្នំពេញ"}}]\n```',
        '```tool_code\nget_weather(city="ភ្នំពេញ")\n```',
        '[get_weather(city="ភ្នំពេញ")]',
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "ភ្នំពេញ"}}\n</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"city": "ភ្នំពេញ"}}',
        '  [{"name":"get_weather","arguments":{"city":"ភ្នំពេញ"}}]  ',
    ],
)
def test_calls_as_they_are_seen_in_the_wild(text: str) -> None:
    assert all(may_call(text[:end]) for end in range(1, len(text)))
    assert parse_calls(text, NAMES) == [HERE]


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "get_weather", "arguments": {}}\n{"name": "add", "arguments": {"a": 1}}',
        "[get_weather(), add(a=1)]",
        '<tool_call>{"name": "get_weather"}</tool_call>\n'
        '<tool_call>{"name": "add", "args": {"a": 1}}</tool_call>',
    ],
)
def test_several_calls(text: str) -> None:
    assert parse_calls(text, NAMES) == [Call("get_weather", "{}"), Call("add", '{"a": 1}')]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "It is 31 C.",
        "[1, 2, 3]",
        '{"answer": 42}',
        '[{"name": "unknown", "arguments": {}}]',
        '[{"name": "get_weather", "arguments": {}}, {"name": "unknown"}]',
        '[{"name": "get_weather", "arguments": "not json"}]',
        '[{"name": "get_weather", "arguments": [1]}]',
        "[get_weather(city=open('/etc/passwd').read())]",
        "[get_weather(__import__('os'))]",
        "[" * 5000,
        "```\nprint('hello')\n```",
        '[{"name": "get_weather", "argum',
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    assert parse_calls(text, NAMES) == []


def test_what_is_shown_is_what_is_read() -> None:
    assert parse_calls(render_calls([HERE, HERE]), NAMES) == [HERE, HERE]
    assert json.dumps(WEATHER.schema) in instructions([WEATHER])
    assert render_result("get_weather", "31 C") == "Result of get_weather:\n31 C"
    schema = calls_schema([WEATHER, Tool("add")], parallel=False)
    assert schema["maxItems"] == 1 and len(schema["items"]["anyOf"]) == 2
