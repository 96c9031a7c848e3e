"""Conversations with functions: read back as meant, and the server's own prompts token for token."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from seavlm import recipe
from seavlm.data import run as stage
from seavlm.data.pictures import load_pictures
from seavlm.data.samples import read_samples
from seavlm.data.tasks import make_samples
from seavlm.data.tools import FUNCTIONS, KINDS, Talks, part_of, questions, read_conversations
from seavlm.errors import SeavlmError
from seavlm.evals.metrics import Vocabulary, judge
from seavlm.evals.tasks import question_of
from seavlm.serve.requests import ChatRequest
from seavlm.text.chat import encode_chat, normalize_messages
from seavlm.text.language import LANGUAGES, script_of, to_ascii_digits
from seavlm.text.normalize import normalize
from seavlm.text.openai import to_messages as server_reads
from seavlm.text.tokenizer import Tokenizer
from seavlm.text.tools import parse_calls

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "อากาศ", "parameters": CITY},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "ເມືອງ"}'}}
ASKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "ອາກາດເປັນແນວໃດ?"},
]
TALK = [
    *ASKED,
    {"role": "assistant", "content": "", "tool_calls": [CALL, {**CALL, "id": "c2"}]},
    {"role": "tool", "tool_call_id": "c1", "content": "31 °C"},
    {"role": "tool", "tool_call_id": "c2", "content": "29 °C"},
    {"role": "assistant", "content": "31 °C"},
]


def made(split: str = "train", **changes: Any) -> list[dict[str, Any]]:
    arguments: dict[str, Any] = {
        "split": split, "tasks": {"tools": 1}, "languages": list(LANGUAGES), "families": ["twemoji"],
        "concepts": None, "n": 440, "seed": 0,
    }  # fmt: skip
    return list(make_samples(load_pictures(), **(arguments | changes)))


@pytest.fixture(scope="module")
def trained() -> list[dict[str, Any]]:
    return made()


def texts(row: dict[str, Any], role: str) -> list[str]:
    return [turn["content"][0]["text"] for turn in row["messages"] if turn["role"] == role]


def as_sent(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row as a client would send it, made from its texts alone: what `to_messages` did, undone."""
    meta = json.loads(row["meta"])
    system = texts(row, "system")[0]
    told = [json.loads(line) for line in system.split("\n\n")[1].split("\n")]
    assert [one["name"] for one in told] == meta["functions"]
    messages: list[dict[str, Any]] = []
    for turn in row["messages"][1:]:
        text = turn["content"][0]["text"]
        calls = parse_calls(text, meta["functions"]) if turn["role"] == "assistant" else []
        if calls:
            sent = [{"id": str(n), "type": "function", "function": vars(c)} for n, c in enumerate(calls)]
            messages.append({"role": "assistant", "content": None, "tool_calls": sent})
        elif turn["role"] == "user" and text.startswith("Result of "):
            for n, result in enumerate(re.split(r"(?:\A|\n\n)Result of \w+:\n", text)[1:]):
                messages.append({"role": "tool", "tool_call_id": str(n), "content": result})
        else:
            messages.append({"role": turn["role"], "content": text})
    return messages


@pytest.mark.parametrize("code", LANGUAGES)
def test_questions_are_whole_and_in_their_language(code: str) -> None:
    words = questions(code)
    fields = {"translate": {"name", "language"}, "emoji": {"name"}, "flag": {"name"}, "calculate": {"sum"}}
    assert set(words) == {*fields, "languages", "small_talk"} and set(fields) == set(FUNCTIONS)
    assert len(words["languages"]) == len(set(words["languages"])) == len(LANGUAGES)
    for text in [*words["languages"], *(text for pair in words["small_talk"] for text in pair)]:
        assert script_of(text) == LANGUAGES[code].script and normalize(text) == text
    for task, wanted in fields.items():
        assert len(set(words[task])) == 2
        for text in words[task]:
            assert set(re.findall(r"{(\w+)}", text)) == wanted
            assert script_of(re.sub(r"{\w+}", "", text)) == LANGUAGES[code].script
            assert normalize(text) == text == text.strip()


def test_replies_are_read_back_as_the_calls_that_were_meant(trained: list[dict[str, Any]]) -> None:
    kinds: Counter[str] = Counter()
    for row in trained:
        meta = json.loads(row["meta"])
        kinds[meta["kind"]] += 1
        first, *rest = texts(row, "assistant")
        calls = parse_calls(first, meta["functions"])
        asked = texts(row, "user")[0].split("\n")
        if meta["kind"] in ("small talk", "not offered"):
            assert not calls and not rest
            continue
        assert [{"name": call.name, "arguments": json.loads(call.arguments)} for call in calls] == json.loads(
            first
        )
        assert len(calls) == len(asked) == (2 if meta["kind"].startswith("two") else 1)
        for call, question in zip(calls, asked, strict=True):  # what is asked for stands in the question
            wanted = next(iter(json.loads(call.arguments).values()))
            assert wanted in question or wanted in to_ascii_digits(question).replace("×", "*")
        assert len(rest) == ("result" in meta["kind"])
        if rest and row["language"] not in ("my", "km"):
            results = [m["content"] for m in as_sent(row) if m["role"] == "tool"]
            assert rest[0] == "\n".join(results) == meta["answer"]
    assert set(kinds) == set(KINDS) and min(kinds.values()) > 20
    assert {row["language"] for row in trained} == set(LANGUAGES)


def test_the_server_builds_the_same_prompt(trained: list[dict[str, Any]], material: Any) -> None:
    """Up to each reply, through a request's own validation, the real tokenizer and the chat format."""
    tokenizer = Tokenizer.from_dir(material.tokenizer_dir)
    for row in trained[:110]:
        learnt = encode_chat(tokenizer, normalize_messages(row["messages"]), add_generation_prompt=False)
        told = texts(row, "system")[0].split("\n\n")[1].split("\n")
        tools = [{"type": "function", "function": json.loads(line)} for line in told]
        sent = as_sent(row)
        starts = [
            i for i, learn in enumerate(learnt.assistant_mask) if learn and not learnt.assistant_mask[i - 1]
        ]
        replies = [i for i, message in enumerate(sent) if message["role"] == "assistant"]
        for start, reply in zip(starts, replies, strict=True):
            asked = ChatRequest(messages=sent[:reply], tools=tools)
            prompt = encode_chat(tokenizer, normalize_messages(server_reads(asked.messages, asked.offered)))
            assert prompt.input_ids == learnt.input_ids[:start]


def test_the_same_again_and_different_with_another_seed(trained: list[dict[str, Any]]) -> None:
    assert made() == trained
    assert made(n=44, seed=1) != trained[:44]
    mixed = made(n=40, tasks={"tools": 1, "name": 3})
    assert Counter(row["task"] for row in mixed) == {"tools": 10, "name": 30}


def test_what_is_asked_in_evaluation_is_never_trained_on(trained: list[dict[str, Any]]) -> None:
    rows = [row for split in ("dev", "eval") for row in made(split, n=220)]
    ids = [row["id"] for row in rows]
    assert len(set(ids)) == len(ids) == 440 and "eval-tools-00003-lo" in ids
    for split, some in (("train", trained), ("dev", rows[:220]), ("eval", rows[220:])):
        concepts = {json.loads(row["meta"])["concept"] for row in some} - {"small talk"}
        assert {part_of(key) for key in concepts} == {split}
        sums = {
            found
            for row in some
            for found in re.findall(r'"(\d+ [-+*] \d+)"', " ".join(texts(row, "assistant")))
        }
        assert {part_of(one) for one in sums} == {split}
    by_draw: dict[str, set[str]] = {}
    for row in rows:
        meta = json.loads(row["meta"])
        by_draw.setdefault(row["id"][:-3], set()).add(f"{meta['kind']} {meta['concept']} {meta['functions']}")
    assert all(len(alike) == 1 for alike in by_draw.values())  # each draw in all languages
    with pytest.raises(SeavlmError, match="no concept is left"):
        Talks(
            load_pictures(),
            load_pictures().concepts[:1],
            "eval" if part_of(load_pictures().concepts[0].key) != "eval" else "dev",
        )


def test_replies_are_judged_as_the_server_reads_them() -> None:
    pairs = [question_of(row) for row in made("eval", n=440)]
    vocabulary = Vocabulary.of(pairs)
    for question in pairs:
        answer = question.answers[0]
        assert question.functions and judge(question, answer, vocabulary).verdict == "correct"
        assert judge(question, "", vocabulary).verdict == "wrong_format"
        call = json.dumps([{"name": question.functions[0], "arguments": {"x": "y"}}])
        assert judge(question, call, vocabulary).verdict == "wrong_answer"
        if answer.startswith("["):
            fenced = "```json\n" + answer.replace('"arguments"', '"parameters"') + "\n```"
            assert judge(question, fenced, vocabulary).verdict == "correct"
            assert judge(question, "Hm.", vocabulary).verdict == "wrong_answer"
            assert judge(question, f"Sure! {answer}", vocabulary).verdict == "wrong_format"
            assert judge(question, answer[:-2], vocabulary).verdict == "wrong_format"
        else:
            assert judge(question, call, vocabulary).measures == {"false_call": 1.0}


# --- a user's own


def lines(folder: Path, *rows: Any, name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_text(
        "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows), encoding="utf-8"
    )
    return path


def test_openais_conversations_become_samples(tmp_path: Path, material: Any) -> None:
    path = lines(
        tmp_path,
        {"messages": TALK, "tools": [WEATHER], "parallel_tool_calls": True},
        "\n",
        {
            "messages": [{"role": "user", "content": "Halo"}, {"role": "assistant", "content": "Halo!"}],
            "language": "id",
        },
    )
    first, second = read_conversations(path)
    meta = json.loads(first["meta"])
    calls = parse_calls(texts(first, "assistant")[0], meta["functions"])
    assert [vars(call) for call in calls] == [CALL["function"]] * 2
    assert texts(first, "user")[1] == "Result of get_weather:\n31 °C\n\nResult of get_weather:\n29 °C"
    assert (first["task"], first["language"], first["id"]) == ("tools", "lo", "train-0000001")
    assert (second["task"], second["language"], second["id"]) == ("chat", "id", "train-0000003")

    tokenizer = Tokenizer.from_dir(material.tokenizer_dir)
    learnt = encode_chat(tokenizer, normalize_messages(first["messages"]), add_generation_prompt=False)
    for upto, start in ((2, learnt.assistant_mask.index(True)), (5, None)):
        asked = ChatRequest(messages=TALK[:upto], tools=[WEATHER])
        prompt = encode_chat(tokenizer, server_reads(asked.messages, asked.offered)).input_ids
        assert prompt == learnt.input_ids[: start or len(prompt)] and len(prompt) < len(learnt.input_ids)


def test_a_recipe_takes_them_for_its_source(tmp_path: Path) -> None:
    for name in ("train.jsonl", "eval.jsonl"):
        lines(tmp_path, {"messages": TALK, "tools": [WEATHER]}, name=name)
    cfg = recipe.Data(source=str(tmp_path))
    metrics = stage.run(cfg, out=tmp_path / "out", seed=0, progress=False)
    assert set(stage.inputs(cfg)) == {"train.jsonl", "eval.jsonl"} and metrics["train"]["tasks"] == {
        "tools": 1
    }
    assert texts(next(read_samples(tmp_path / "out" / "train.parquet")), "assistant")[-1] == "31 °C"
    lines(tmp_path, {"messages": TALK, "tools": [WEATHER]}, {"messages": TALK})
    with pytest.raises(SeavlmError, match=r"train\.jsonl, line 2: 'get_weather' is called"):
        stage.run(cfg, out=tmp_path / "out", seed=0, progress=False)


def test_pictures_go_along(tmp_path: Path) -> None:
    url = {"type": "image_url", "image_url": {"url": "data:image/webp;base64,QUJD"}}
    asked = {"role": "user", "content": [url, {"type": "text", "text": "ဒါဘာလဲ။"}]}
    (row,) = read_conversations(
        lines(tmp_path, {"messages": [asked, {"role": "assistant", "content": "ဆင်"}]})
    )
    assert row["images"] == [{"bytes": b"ABC", "path": None}] and row["language"] == "my"
    assert [part["type"] for part in row["messages"][0]["content"]] == ["image", "text"]


def called(**function: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{**CALL, "function": {**CALL["function"], **function}}]}


PICTURE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}


@pytest.mark.parametrize(
    "row, complaint",
    [
        ("{\n", "is not JSON"),
        ("\ufeff[1]\n", "object|dict"),
        ("[" * 9999 + "\n", "is not JSON"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}\n', "is not JSON in UTF-8"),
        ({"messages": [*ASKED, {"role": "assistant", "content": []}]}, "reply of the assistant's is empty"),
        ({"messages": [*ASKED, {"role": "assistant", "content": " "}]}, "reply of the assistant's is empty"),
        ({"messages": []}, "messages: List should have at least 1"),
        ({"messages": ["x"]}, "messages.0: Input should be a valid dict"),
        ({"messages": ASKED}, "the last message is not the assistant's"),
        ({"messages": TALK, "functions": [{}]}, "functions is OpenAI's older form"),
        ({"messages": TALK, "tools": [WEATHER, WEATHER]}, "two tools have the same name"),
        ({"messages": TALK, "tools": [WEATHER], "language": "lao"}, "unknown language 'lao'"),
        ({"messages": TALK, "tools": [{"type": "function"}]}, "function: Field required"),
        ({"messages": [*ASKED, called(name="get_wether")], "tools": [WEATHER]}, "'get_wether' is called"),
        ({"messages": [*ASKED, called(arguments="city")], "tools": [WEATHER]}, "'city' are no JSON object"),
        ({"messages": [*ASKED, called(arguments="[1]")], "tools": [WEATHER]}, "are no JSON object"),
        ({"messages": [*ASKED, called(arguments='{"a": NaN}')], "tools": [WEATHER]}, "read as 0 calls,"),
        ({"messages": [*ASKED, {**called(), "content": "Well."}], "tools": [WEATHER]}, "read as 0 calls"),
        (
            {"messages": [*ASKED, {"role": "assistant", "tool_calls": [CALL] * 17}], "tools": [WEATHER]},
            "read as 16 calls, not 17",
        ),
        (
            {"messages": [*ASKED, {"role": "assistant", "content": "get_weather()"}, ASKED[1]]},
            "the last message",
        ),
        (
            {"messages": [*ASKED, {"role": "assistant", "content": "[get_weather()]"}], "tools": [WEATHER]},
            "read as 1 calls, not 0",
        ),
        ({"messages": [{"role": "user", "content": [PICTURE]}, TALK[-1]]}, "a picture is no data: URI"),
        ({"messages": TALK[2:], "tools": [WEATHER]}, "The first message is the assistant's"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_with_its_line(tmp_path: Path, row: Any, complaint: str) -> None:
    path = lines(tmp_path, {"messages": TALK, "tools": [WEATHER]}, row)
    with pytest.raises(SeavlmError, match=rf"train\.jsonl, line 2.*({complaint})") as caught:
        list(read_conversations(path))
    assert "\n" not in str(caught.value)
