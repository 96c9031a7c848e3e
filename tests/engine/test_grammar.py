"""Replies held to a form, by a model that knows nothing of it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from seavlm.engine.engine import Engine
from seavlm.engine.grammar import Constraint, Grammars
from seavlm.engine.sampler import Sampling
from seavlm.engine.sequence import Prompt
from seavlm.engine.vlm import VLM, load
from seavlm.errors import SeavlmError


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load("nano", device="cpu")


@pytest.fixture(scope="module")
def grammars(vlm: VLM) -> Grammars:
    return Grammars(vlm.tokenizer, vlm.config.eos_token_ids)


def replies(vlm: VLM, constraint: Constraint, count: int = 6, **options: Any) -> list[str]:
    engine: Engine = vlm.engine
    asked = [
        engine.add(
            Prompt([vlm.tokenizer.bos_id]),
            Sampling(temperature=1.5, top_k=0, top_p=1.0, seed=seed),
            max_new_tokens=200,
            mask=constraint.copy(),
        )
        for seed in range(count)
    ]
    while not engine.idle:
        engine.step()
    assert not any(one.error for one in asked)
    return [one.text for one in asked if one.finish_reason == "stop"]


SCHEMA = {
    "type": "object",
    "properties": {
        "ชื่อ": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["cat", "dog"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["ชื่อ", "kind", "legs"],
    "additionalProperties": False,
}


def test_json_is_of_its_schema_compact_and_in_order(vlm: VLM, grammars: Grammars) -> None:
    found = replies(vlm, grammars.json_schema(SCHEMA))
    assert len(found) == 6
    for text in found:
        value = json.loads(text)
        assert list(value) == ["ชื่อ", "kind", "legs"] and len(value["ชื่อ"]) <= 6
        assert value["kind"] in ("cat", "dog") and 0 <= value["legs"] <= 99
        assert '":' in text and '": ' not in text


def test_objects_are_closed_unless_they_say_otherwise(vlm: VLM, grammars: Grammars) -> None:
    leg = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    schema = {
        "$defs": {"leg": leg},
        "type": "object",
        "required": ["a"],
        "properties": {"a": {"$ref": "#/$defs/leg"}},
    }
    assert set(replies(vlm, grammars.json_schema(schema), 8)) <= {'{"a":{"n":1}}', '{"a":{"n":2}}'}
    named = {"type": "object", "properties": {"properties": leg}, "required": ["properties"]}
    assert replies(vlm, grammars.json_schema(named), 2)
    both = {"allOf": [leg, {"type": "object", "properties": {"m": {"enum": [3]}}, "required": ["m"]}]}
    for text in replies(vlm, grammars.json_schema(both), 4):
        assert {"n", "m"} <= set(json.loads(text))


def test_expressions_choices_and_objects(vlm: VLM, grammars: Grammars) -> None:
    for text in replies(vlm, grammars.regex(r"[กขค]{2,4}-\d{3}")):
        assert re.fullmatch(r"[กขค]{2,4}-\d{3}", text)
    choices = ["ช้าง", 'with "quotes"', "back\\slash"]
    found = replies(vlm, grammars.choice(choices), 12)
    assert len(found) == 12 and set(found) <= set(choices)
    assert all(isinstance(json.loads(text), dict) for text in replies(vlm, grammars.json_object(), 3))


def test_json_or_else_a_text_that_is_none(vlm: VLM, grammars: Grammars) -> None:
    for text in replies(vlm, grammars.json_or_text(SCHEMA), 12):
        if text[:1] in "[{`<":
            json.loads(text)


def test_guesses_change_nothing(vlm: VLM, grammars: Grammars) -> None:
    vlm.engine = Engine(vlm.runner, vlm.tokenizer)
    plain = replies(vlm, grammars.json_schema(SCHEMA))
    vlm.engine = Engine(vlm.runner, vlm.tokenizer, speculate=True)
    assert replies(vlm, grammars.json_schema(SCHEMA)) == plain
    vlm.engine = Engine(vlm.runner, vlm.tokenizer)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"$ref": "#/nowhere"},
        {"type": "object", "unevaluatedProperties": False, "minProperties": 3},
    ],
)
def test_what_cannot_be_held_to_is_refused(grammars: Grammars, schema: dict[str, Any]) -> None:
    with pytest.raises(SeavlmError, match="cannot be held to"):
        grammars.json_schema(schema)


def test_a_broken_expression_is_refused(grammars: Grammars) -> None:
    with pytest.raises(SeavlmError, match="cannot be held to"):
        grammars.regex("[unclosed")
