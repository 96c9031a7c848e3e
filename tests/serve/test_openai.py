"""The server as OpenAI's own client sees it."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest

from seavlm.serve.responses import Response, ResponsesRequest, events
from seavlm.text.tools import Call
from tests.image.test_documents import a_pdf
from tests.serve.conftest import Live

ASK = [{"role": "user", "content": "What is this?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0)


def seen(picture: str, question: str) -> list[dict[str, Any]]:
    return [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": picture}},
                {"type": "text", "text": question},
            ],
        }
    ]


def chat(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(
        **({"model": "nano", "messages": ASK, "max_tokens": 16, "temperature": 0} | more)
    )


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "nano" and model.owned_by == "seavlm"
    assert client.models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_reply_about_a_picture_is_the_engines_and_streams_as_the_same(
    client: openai.OpenAI, live: Live, elephant: str
) -> None:
    question = seen(elephant, "ນີ້ແມ່ນຫຍັງ?")
    whole = chat(client, messages=question)
    said = whole.choices[0].message.content
    assert said and whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(chat(client, messages=question, stream=True, stream_options={"include_usage": True}))
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    first, *middle, last, usage = chunks
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content == ""
    assert "".join(c.choices[0].delta.content for c in middle) == said
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert not last.choices[0].delta.content
    assert usage.choices == [] and usage.usage.completion_tokens == whole.usage.completion_tokens
    assert usage.usage.prompt_tokens_details.cached_tokens > 0


def test_several_pictures_and_turns(client: openai.OpenAI, elephant: str) -> None:
    talk = [
        {"role": "system", "content": "Be short."},
        *seen(elephant, "Apa ini?"),
        {"role": "assistant", "content": "Gajah."},
        {"role": "user", "content": "And"},
        *seen(elephant, "this?"),  # two users in a row
    ]
    assert chat(client, messages=talk).choices[0].message.content
    talk[1]["content"][0]["image_url"]["detail"] = "high"
    assert chat(client, messages=talk).usage.prompt_tokens


def test_seed_n_stop_and_logprobs(client: openai.OpenAI) -> None:
    one, two = (chat(client, temperature=1.5, seed=5, n=3, max_tokens=12) for _ in range(2))
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in two.choices]
    assert len(set(texts)) > 1 and [choice.index for choice in one.choices] == [0, 1, 2]
    whole = chat(client, temperature=1.5, seed=5, max_tokens=12).choices[0].message.content
    assert whole == texts[0]
    cut = chat(client, temperature=1.5, seed=5, max_tokens=12, stop=[whole[3]])
    assert cut.choices[0].message.content == whole[: whole.index(whole[3])]
    assert cut.choices[0].finish_reason == "stop"
    told = chat(client, logprobs=True, top_logprobs=3).choices[0]
    assert b"".join(bytes(t.bytes) for t in told.logprobs.content).decode() == told.message.content
    for token in told.logprobs.content:
        assert len(token.top_logprobs) == 3 and token.top_logprobs[0].logprob == token.logprob <= 0


def test_a_reply_is_held_to_a_schema(client: openai.OpenAI) -> None:
    class Animal(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=8)
        legs: int = pydantic.Field(ge=0, le=99)
        wild: bool

    for seed in range(4):
        found = client.chat.completions.parse(
            model="nano", messages=ASK, response_format=Animal, temperature=1.5, seed=seed, max_tokens=120
        )
        assert isinstance(found.choices[0].message.parsed, Animal)
        assert list(json.loads(found.choices[0].message.content)) == ["name", "legs", "wild"]
    form = {"type": "json_object"}
    text = chat(client, response_format=form, temperature=1, seed=1, max_tokens=200).choices[0]
    assert text.finish_reason == "length" or isinstance(json.loads(text.message.content), dict)
    extra = {"regex": r"(cat|dog), \d{2}"}
    assert chat(client, extra_body=extra).choices[0].message.content[3:5] == ", "
    extra = {"choice": ["ช้าง", "ควาย"]}
    assert chat(client, extra_body=extra).choices[0].message.content in ("ช้าง", "ควาย")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_functions_are_called(client: openai.OpenAI, choice: Any) -> None:
    given = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 200, "temperature": 1, "seed": 2}
    given["parallel_tool_calls"] = False
    reply = chat(client, **given).choices[0]
    assert reply.finish_reason == "tool_calls" and reply.message.content is None
    (call,) = reply.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather" and set(arguments) == {"city", "days"}
    name, text, ids, reason = "", "", set(), None
    for chunk in chat(client, **given, stream=True):
        reason = chunk.choices[0].finish_reason or reason
        for delta in chunk.choices[0].delta.tool_calls or ():
            assert delta.index == 0
            ids |= {delta.id} - {None}
            name += delta.function.name or ""
            text += delta.function.arguments or ""
    assert (name, json.loads(text), reason, len(ids)) == ("get_weather", arguments, "tool_calls", 1)
    talk = [
        *ASK,
        reply.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "31 C"},
    ]
    after = chat(client, messages=talk, tools=[WEATHER]).choices[0]
    assert after.finish_reason in ("stop", "length") and after.message.content


def test_plain_completions(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model="nano", prompt=["Hello", "สวัสดี"], max_tokens=6, temperature=0, logprobs=2, n=2
    )
    assert len(found.choices) == 4 and found.choices[0].text == found.choices[1].text
    streamed = client.completions.create(
        model="nano", prompt="สวัสดี", max_tokens=6, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == found.choices[2].text


def test_many_at_once_say_what_each_says_alone(live: Live) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        text = ""
        stream = await client.chat.completions.create(
            model="nano",
            messages=[{"role": "user", "content": f"Question {number}"}],
            temperature=1,
            seed=number,
            max_tokens=10,
            stream=True,
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
        return text

    async def run() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0) as client:
            crowd = await asyncio.gather(*(ask(client, number) for number in range(32)))
            return crowd, [await ask(client, number) for number in range(32)]

    crowd, alone = asyncio.run(run())
    assert crowd == alone and live.idle()


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, None),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 17}, "n"),
        ({"n": 10**30}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"top_logprobs": 3}, None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, None),
        ({"tool_choice": "required"}, None),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, None),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
    ],
    ids=str,
)
def test_what_is_out_of_bounds_is_refused_in_openais_form(
    client: openai.OpenAI, wrong: dict[str, Any], param: str | None
) -> None:
    try:
        with pytest.raises(openai.BadRequestError) as told:
            chat(client, **wrong)
    except ValueError as error:  # the client itself cannot write it
        assert "JSON" in str(error)
        return
    body = told.value.body
    assert isinstance(body, dict) and set(body) == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error" and body["message"]
    assert param is None or str(body["param"]).startswith(param)


def test_the_readmes_client_works(live: Live, root: Path) -> None:
    (code,) = re.findall(r"^```py\n(.*?)^```$", (root / "README.md").read_text("utf-8"), flags=re.M | re.S)
    done = subprocess.run(
        [sys.executable, "-c", code.replace("http://127.0.0.1:8000", live.url)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_responses(client: openai.OpenAI, elephant: str) -> None:
    question = [
        {"role": "developer", "content": "Be short."},
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": elephant, "detail": "auto"},
                {"type": "input_text", "text": "ນີ້ແມ່ນຫຍັງ?"},
            ],
        },
    ]
    given: dict[str, Any] = {"model": "nano", "input": question, "max_output_tokens": 16, "temperature": 0}
    whole = client.responses.create(**given)
    assert whole.status in ("completed", "incomplete") and whole.output_text
    assert whole.usage and whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    kinds, text, last = [], "", None
    for event in client.responses.create(**given, stream=True):
        assert event.sequence_number == len(kinds)
        kinds.append(event.type)
        text += event.delta if event.type == "response.output_text.delta" else ""
        last = event
    assert kinds[:2] == ["response.created", "response.in_progress"] and text == whole.output_text
    assert last is not None and last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == text
    tool = WEATHER["function"]
    given |= {"tools": [{"type": "function", **tool}], "tool_choice": "required", "max_output_tokens": 300}
    called = client.responses.create(**given, parallel_tool_calls=False)
    (call,) = called.output
    assert call.type == "function_call" and set(json.loads(call.arguments)) == {"city", "days"}
    talk = [
        *question,
        call.model_dump(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "31"},
    ]
    assert client.responses.create(model="nano", input=talk, max_output_tokens=8).id.startswith("resp_")
    form = {"format": {"type": "json_schema", "name": "x", "schema": tool["parameters"]}}
    held = client.responses.create(model="nano", input="hello", text=form, temperature=1)
    assert set(json.loads(held.output_text)) == {"city", "days"}
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="nano", input="x", previous_response_id="resp_1")


def test_a_document_is_read_page_by_page(client: openai.OpenAI) -> None:
    data = base64.b64encode(a_pdf(3)).decode()
    for text in (data, f"data:application/pdf;base64,{data}"):
        part = {"type": "file", "file": {"file_data": text, "filename": "three.pdf"}}
        talk = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]
        found = chat(client, messages=talk)
        assert found.usage.prompt_tokens > 3 * 4 and found.choices[0].finish_reason
    for wrong in ("bm90aGluZw==", "A", "!!", ""):
        talk[0]["content"][0]["file"]["file_data"] = wrong  # type: ignore[index]
        with pytest.raises(openai.BadRequestError):
            chat(client, messages=talk)


def test_an_empty_reply_is_announced_too() -> None:
    async def pieces() -> AsyncIterator[tuple[str, list[Call], str | None, dict[str, Any] | None]]:
        used = {"prompt_tokens": 1, "prompt_tokens_details": {}, "completion_tokens": 0, "total_tokens": 1}
        yield "", [], "stop", used

    async def told() -> list[dict[str, Any]]:
        response = Response(ResponsesRequest(input="x"), "nano")
        return [json.loads(event.split("data: ")[1]) async for event in events(response, pieces())]

    kinds = [event["type"].removeprefix("response.") for event in asyncio.run(told())]
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added", "output_text.done"),
        *("content_part.done", "output_item.done", "completed"),
    ]
