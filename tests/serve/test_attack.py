"""Small requests that once took the server minutes, its memory or its secrets."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from seavlm.errors import SeavlmError
from seavlm.image.decode import decode
from seavlm.serve.backend import Token
from seavlm.serve.guard import Guard, Guards
from seavlm.serve.limits import Key, Keys
from seavlm.serve.replies import Plain
from seavlm.serve.requests import ChatRequest
from seavlm.serve.server import Settings, picture_below
from seavlm.text.language import plausible_languages
from seavlm.text.normalize import normalize
from seavlm.text.openai import Message, to_messages
from tests.serve.conftest import Live, serving

HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


def soon(began: float) -> bool:
    return time.monotonic() - began < 10  # all of it takes a second


def test_marks_and_tags_without_end() -> None:
    began = time.monotonic()
    for many in ("\u0301\u0323", "\u0344", "\u0301\u0323" * 15 + "\u200d", "\u0344" * 25 + "\ufe0f"):
        text = normalize("a" + many * 50_000)
        assert len(text) < 64 and normalize(text) == text
    assert normalize("👍" + "\U000e0061" * 100_000 + "x").endswith("\U000e0061x")
    assert len(normalize("👍" + "\u200d\U0001f3fd" * 50_000)) == 100_001
    assert plausible_languages("a" + "\u0301\u0323" * 100_000)
    assert soon(began)


def test_many_messages_of_one_role() -> None:
    began = time.monotonic()
    told = [Message(role="user", content="a" * 5_000_000)] + [Message(role="user", content="b")] * 4000
    ((turn,), joined) = to_messages(told), "a" * 5_000_000 + "\n\nb" * 4000
    assert turn["content"] == [{"type": "text", "text": joined}]
    assert soon(began)


def test_chances_of_a_long_reply() -> None:
    began = time.monotonic()
    told = Plain().chances([Token(b"ab", -1.0, [])] * 100_000)
    assert told["text_offset"][:3] == [0, 2, 4] and len(told["text_offset"]) == 100_000
    assert soon(began)


def test_a_jpeg_of_many_scans() -> None:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(out, "JPEG", progressive=True)
    raw = out.getvalue()
    assert decode(raw).size == (64, 64)
    last = raw[raw.rindex(b"\xff\xda") : -2]
    with pytest.raises(SeavlmError, match="scans"):
        decode(raw[:-2] + last * 200 + raw[-2:])


def test_grey_of_sixteen_bits_stays_as_it_was() -> None:
    levels = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    told = np.asarray(decode(Image.fromarray(levels)))[..., 0]
    assert (told == np.floor(levels / 257 + 0.5)).all()


def test_a_path_of_many_points_opens_no_more_files(tmp_path: Path, root: Path) -> None:
    (tmp_path / "a.png").write_bytes((root / "docs" / "elephant.png").read_bytes())
    (tmp_path / "b").mkdir()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert picture_below(tmp_path, "/./" * 500 + "a.png").size
    for wrong in ("/./" * 1_000_000 + "a.png", "/b/../a.png", "/b" * 1000, "/b"):
        with pytest.raises(SeavlmError):
            picture_below(tmp_path, wrong)
    assert not before or len(os.listdir("/proc/self/fd")) == before


def test_texts_that_can_never_fit_and_json_of_too_many_parts(live: Live) -> None:
    def post(body: bytes) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return httpx.post(f"{live.url}/v1/chat/completions", content=body, headers=headers, timeout=30)

    began = time.monotonic()
    told = b'{"messages":[{"role":"user","content":"%s"}]}'
    assert "tokens" in post(told % (b"hello wor" * 3_000_000)).json()["error"]["message"]
    for many in (b"[],", b'{"a":1},'):
        body = b'{"messages":[{"role":"user","content":"x"}],"x":[' + many * 2_000_000 + b"0]}"
        assert post(body).status_code == 413
    assert post(told % b"hello").status_code == 200
    assert soon(began)


def test_a_long_text_leaves_the_other_threads_alone(live: Live) -> None:
    ids = live.vlm.tokenizer.encode("hello wor" * 1000)
    assert live.vlm.tokenizer.decode(ids) == "hello wor" * 1000


def test_what_may_take_long_is_done_apart() -> None:
    def slow(**more: Any) -> bool:
        return ChatRequest(**(HELLO | more)).slow

    picture = [{"type": "image_url", "image_url": "data:,"}]
    assert not slow() and not slow(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}])
    assert slow(messages=[{"role": "user", "content": picture}]) and slow(regex="a") and slow(choice=["a"])
    assert slow(response_format={"type": "json_object"})


def test_pages_of_other_sites_may_not_ask_where_no_key_is_needed(live: Live) -> None:
    for origin, status in (
        ("https://evil.example", 403),
        ("http://127.0.0.1.evil.example", 403),
        ("http://localhost:80.evil.example", 403),
        ("null", 403),
        ("http://localhost:3000", 200),
        ("http://[::1]", 200),
    ):
        answer = httpx.post(f"{live.url}/v1/chat/completions", json=HELLO, headers={"origin": origin})
        assert answer.status_code == status, origin


def test_a_prompt_counts_once_for_a_key_too() -> None:
    with serving(Settings(keys=Keys.one("k"))) as live:
        headers = {"authorization": "Bearer k"}
        url = f"{live.url}/v1/chat/completions"
        one, four = (httpx.post(url, json=HELLO | {"n": n}, headers=headers).json()["usage"] for n in (1, 4))
        assert one["prompt_tokens"] == four["prompt_tokens"]


def test_chances_tell_nothing_that_no_guard_has_judged() -> None:
    """The stop text cuts off what the guard would have found."""
    guards = Guards(guards=[Guard(name="w", words=["two"], stages=["during", "after"])])
    with serving(Settings(guards=guards)) as live:
        body = HELLO | {"choice": ["one two three"], "max_tokens": 20, "logprobs": True, "top_logprobs": 5}
        body["stop"] = ["wo"]
        told = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=30).json()["choices"][0]
        assert told["message"]["content"] == "one t" and told["finish_reason"] == "stop"
        tokens = told["logprobs"]["content"]
        assert "one t".startswith("".join(one["token"] for one in tokens))
        assert tokens and not any(one["top_logprobs"] for one in tokens)


def test_a_complaint_is_short(live: Live) -> None:
    body = HELLO | {"logit_bias": {"k" * 1_000_000: 1}}
    answer = httpx.post(f"{live.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400 and len(answer.content) < 2000


@pytest.mark.parametrize("size", [300, 4000, 20_000])
def test_a_chain_of_references_takes_nobody_down(live: Live, size: int) -> None:
    chain: dict[str, Any] = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(size)}
    schema = {"$defs": chain | {f"a{size}": {"enum": ["x"]}}, "$ref": "#/$defs/a0"}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    for more in ({"response_format": form}, {"tools": [tool], "tool_choice": "required"}):
        body = HELLO | more
        answer = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code in ((200, 400) if size < 1000 else (400,))
    assert httpx.post(f"{live.url}/v1/completions", json={"prompt": "x"}, timeout=60).status_code == 200


def test_forms_that_cannot_be_followed_in_time_are_refused(live: Live) -> None:
    properties = {f"p{i}": {"type": "string"} for i in range(10_000)}
    schema = {"type": "object", "properties": properties}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    for more in ({"response_format": form}, {"choice": ["a" * 2000]}, {"stop": ["a" * 300]}):
        body = HELLO | more
        began = time.monotonic()
        answer = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 400 and time.monotonic() - began < 5


def test_who_asks_for_much_does_not_keep_others_waiting() -> None:
    digest = [hashlib.sha256(name.encode()).hexdigest() for name in ("greedy", "modest")]
    keys = [Key(name=name, sha256=one) for name, one in zip(("greedy", "modest"), digest, strict=True)]
    with serving(Settings(keys=Keys(keys=keys)), max_sequences=2) as live:
        long = {"prompt": "x", "max_tokens": 300, "n": 16, "temperature": 1.5}
        long["logit_bias"] = {str(i): -100 for i in live.vlm.config.eos_token_ids}
        ended: list[str] = []

        def ask(key: str, body: dict[str, Any]) -> None:
            headers = {"authorization": f"Bearer {key}"}
            answer = httpx.post(f"{live.url}/v1/completions", json=body, headers=headers, timeout=100)
            ended.append(f"{key} {answer.status_code}")

        threads = [threading.Thread(target=ask, args=("greedy", long)) for _ in range(3)]
        for thread in threads:
            thread.start()
        while live.backend.count < 48:
            time.sleep(0.01)
        ask("modest", long | {"n": 1, "max_tokens": 2})
        assert ended == ["modest 200"]
        for thread in threads:
            thread.join()
        assert ended == ["modest 200", *["greedy 200"] * 3] and live.idle()


def test_more_replies_than_a_key_may_have_at_once_are_told_so() -> None:
    key = Key(name="a", sha256=hashlib.sha256(b"a").hexdigest(), parallel=2)
    with serving(Settings(keys=Keys(keys=[key]))) as live:
        for n, status in ((3, 400), (2, 200)):
            body, headers = {"prompt": "x", "max_tokens": 2, "n": n}, {"authorization": "Bearer a"}
            answer = httpx.post(f"{live.url}/v1/completions", json=body, headers=headers, timeout=60)
            assert answer.status_code == status


def test_who_says_nothing_is_not_listened_to(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seavlm.serve.run.HEAD_SECONDS", 0.3)
    monkeypatch.setattr("seavlm.serve.app.BODY_PAUSE", 0.3)
    host, port = live.url.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
    for said, told in (
        (b"", b""),
        (head, b""),
        (head + b"content-length: 99\r\n\r\n{", b"HTTP/1.1 408 "),
    ):
        with socket.create_connection((host, int(port)), timeout=10) as quiet:
            quiet.sendall(said)
            assert quiet.recv(13) == told
    whole = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as quiet:  # nor in the midst of a second one
        quiet.sendall(whole)
        assert quiet.recv(9) == b"HTTP/1.1 "
        quiet.sendall(head)
        while quiet.recv(4096):
            pass
    with httpx.Client() as client:  # and who has said something may think before the next
        assert client.get(f"{live.url}/health/live").status_code == 200
        time.sleep(0.6)
        assert client.get(f"{live.url}/health/live").status_code == 200


def test_words_are_found_behind_strokes_and_fillers() -> None:
    guards = Guards(guards=[Guard(name="w", words=["secret"], stages=["before"])])
    for hidden in ("s\u0336ecret", "se\u3164cret", "se\u200bcret", "SECRET"):
        assert guards.refusal("before", f"the {hidden} word") == "w"
