"""Replies held to a form, by a model that knows nothing of it."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from seavlm.engine.engine import Engine
from seavlm.engine.grammar import Constraint, Grammars
from seavlm.engine.sampler import Sampling, adjust, choose
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


def drawn(vlm: VLM, constraint: Constraint, random: np.random.Generator) -> str | None:
    """A reply by chance, leaning to tokens that end something; None for one without an end."""
    ends = list(vlm.config.eos_token_ids)
    ending = [*ends, *(i for text in '"}],' for i in vlm.tokenizer.encode(text))]
    sampling, ids = Sampling(temperature=1.5, logit_bias=dict.fromkeys(ending, 6.0)), list[int]()
    while len(ids) < 300:
        logits = random.standard_normal(vlm.tokenizer.vocab_size).astype(np.float32)
        adjust(logits, sampling, (), ids, constraint(ids))
        if (token := choose(logits, sampling, random)) in ends:
            return vlm.tokenizer.decode(ids)
        ids.append(token)
    return None


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
    found = replies(vlm, grammars.choice(choices))
    assert len(found) == 6 and set(found) <= set(choices)
    random = np.random.default_rng(0)
    text = drawn(vlm, grammars.json_object(), random)
    assert text is not None and isinstance(json.loads(text), dict)


def test_json_or_else_a_text_that_is_none(vlm: VLM, grammars: Grammars) -> None:
    for text in replies(vlm, grammars.json_or_text(SCHEMA), 4):
        if text[:1] in "[{`<":
            json.loads(text)


def test_guesses_change_nothing(vlm: VLM, grammars: Grammars) -> None:
    vlm.engine = Engine(vlm.runner, vlm.tokenizer)
    plain = replies(vlm, grammars.json_schema(SCHEMA))
    vlm.engine = Engine(vlm.runner, vlm.tokenizer, speculate=True)
    assert replies(vlm, grammars.json_schema(SCHEMA)) == plain
    vlm.engine = Engine(vlm.runner, vlm.tokenizer)


TREE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "inner": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["name", "inner"],
    "additionalProperties": False,
}
OPTION = {
    "type": "object",
    "properties": {"kind": {"const": "a"}, "n": {"type": "integer"}},
    "required": ["kind"],
}
OTHER = {"type": "object", "properties": {"kind": {"enum": ["b", "c"]}}, "required": ["kind"]}
WHOLE = {"type": "integer", "exclusiveMinimum": 0, "maximum": 9, "multipleOf": 3}
PART = {"type": "number", "exclusiveMinimum": 3, "maximum": 3.3}
NAMED = {"type": "object", "properties": {"a": {"enum": [1]}}}


@pytest.mark.parametrize(
    "schema",
    [
        # all of OpenAI's strict subset
        {
            **TREE,
            "title": "A tree",
            "description": "of names",
            "$schema": "https://example.org/own",
            "x-own": 1,
        },
        {"type": ["string", "null"], "pattern": r"^@[a-z_]{1,8}$"},
        {"anyOf": [WHOLE, PART, {"type": "boolean"}, {"const": None}, {"enum": ["x", 1.5]}]},
        {
            "type": "array",
            "items": {"$ref": "#/$defs/w"},
            "minItems": 1,
            "maxItems": 3,
            "$defs": {"w": WHOLE},
        },
        *({"type": "string", "format": name} for name in ("date-time", "time", "date", "duration", "email")),
        *({"type": "string", "format": name} for name in ("hostname", "ipv4", "ipv6", "uuid")),
        # told apart, as pydantic writes its unions
        {
            "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
            "discriminator": {"propertyName": "kind"},
            "$defs": {"a": OPTION, "b": OTHER},
        },
        {"oneOf": [{"type": "string"}, {"type": "integer"}, {"const": None}]},
        {"oneOf": [{"const": 1}, {"const": 2}, {"type": "number", "minimum": 3, "maximum": 4}]},
        # says nothing, or has another wording
        {"type": "array", "uniqueItems": False, "maxItems": 2},
        {"type": "string", "format": "password", "default": "", "examples": ["x"], "deprecated": True},
        {"type": "string", "maxLength": 3.0},
        {**NAMED, "unevaluatedProperties": False},
        {**NAMED, "additionalProperties": True, "maxProperties": 1, "required": ["a"]},
        {**OPTION, "dependentRequired": {"n": ["kind"]}, "not": {"required": ["n"]}},
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"const": 1}},
        {"$id": "https://example.org/s", "$ref": "s#/$defs/w", "$defs": {"w": WHOLE, "unused": {"not": {}}}},
        {"type": "string", "pattern": r"^\s?.$"},
        {"type": "string", "format": "uri-reference", "maxLength": 9},
        PART,
    ],
    ids=lambda schema: json.dumps(schema)[:60],
)
def test_replies_are_valid(vlm: VLM, grammars: Grammars, schema: dict[str, Any]) -> None:
    valid = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    constraint, random = grammars.json_schema(schema), np.random.default_rng(0)
    ended = 0
    for _ in range(6):
        text = drawn(vlm, constraint.copy(), random)
        ended += text is not None
        if text is not None:
            valid.validate(json.loads(text))
    assert ended


@pytest.mark.parametrize(
    ("schema", "at"),
    [
        ({"type": "nonsense"}, "#/type"),
        ({"properties": {"a": {"$ref": "#/nowhere"}}}, "#/properties/a/$ref"),
        ({"properties": {"a/b": {"type": "array", "uniqueItems": True}}}, "#/properties/a~1b/uniqueItems"),
        ({"items": {"contains": {"const": 1}}}, "#/items/contains"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"not": {"type": "string"}}}}, "#/$defs/a/not"),
        ({"anyOf": [{}, {"if": {"type": "string"}, "then": {"minLength": 1}}]}, "#/anyOf/1/if"),
        ({"type": "object", "unevaluatedProperties": {"type": "string"}}, "#/unevaluatedProperties"),
        ({"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}}, "#/dependentSchemas"),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, "#/propertyNames"),
        ({"$dynamicRef": "#x"}, "#/$dynamicRef"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf"),
        ({"type": "object", "minProperties": 3}, "#/minProperties"),
        ({"type": "string", "format": "regex"}, "#/format"),
        ({"properties": {"a": {"type": "string", "pattern": "(?=x)"}}}, "#/properties/a/pattern"),
        ({"type": "string", "pattern": "(?i)x"}, "#/pattern"),
        ({"enum": [1, 12345678901234567]}, "#/enum/1"),
        ({"const": "\0"}, "#/const"),
        (
            {"items": {"type": "integer", "minimum": 2, "maximum": 1}, "type": "array", "minItems": 1},
            "#/items",
        ),
        ({"x-guidance": {"lenient": True}, "uniqueItems": True}, "#/uniqueItems"),
        (False, "#"),
        # nonsense
        ({"type": "number", "minimum": False, "patternProperties": 1}, "#"),
        ({"propertyNames": {"pattern": {"$ref": "#"}}}, "#/propertyNames"),
        ({"type": "string", "maxLength": 2**70}, "#/maxLength"),
        ({"allOf": 5, "format": "date"}, "#/allOf"),
    ],
)
def test_what_cannot_be_held_to_is_refused_by_its_part(grammars: Grammars, schema: Any, at: str) -> None:
    with pytest.raises(SeavlmError, match=f"cannot be held to: {re.escape(at)}[:/]") as told:
        grammars.json_schema(schema)
    assert told.value.hint
    with pytest.raises(SeavlmError, match="cannot be held to"):
        grammars.json_or_text(schema)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({**NAMED, "additionalProperties": True}, r'{"\u0061":2}'),  # another way to write "a"
        (PART, "3"),
        ({"type": "number", "exclusiveMaximum": 0, "minimum": -0.5}, "-0"),
        ({"type": "string", "format": "date"}, '"2023-02-29"'),
        ({"type": "string", "pattern": "^.$"}, '"\u2028"'),  # no character of a line, in ECMA-262
        ({"type": "object", "minProperties": 2, "required": ["a"]}, '{"a":1}'),
    ],
)
def test_what_is_not_of_the_schema_cannot_be_said(
    vlm: VLM, grammars: Grammars, schema: dict[str, Any], text: str
) -> None:
    constraint, ids = grammars.json_schema(schema), vlm.tokenizer.encode(text)
    for at, token in enumerate(ids):
        if not constraint(ids[:at])[token]:
            return
    assert not constraint(ids)[list(vlm.config.eos_token_ids)].any()


def test_a_broken_expression_is_refused(grammars: Grammars) -> None:
    with pytest.raises(SeavlmError, match="cannot be held to"):
        grammars.regex("[unclosed")
