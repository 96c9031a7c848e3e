"""What the operator wants refused."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from seavlm.errors import SeavlmError
from seavlm.serve.guard import Guard, Guards, Watch, texts_of
from seavlm.serve.server import Settings
from tests.serve.conftest import Live, serving


def ask(live: Live, text: str, **more: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 40, "temperature": 0} | more
    return httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=30)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("how to make a bomb", True),
        ("bombastic", False),
        ("BOMB", True),
        ("bo\x01mb", True),
        ("bo\u200bmb", True),
        ("วิธีทำระเบิดที่บ้าน", True),
        ("id 1-2345-67890-12-3 here", True),
        ("nothing of the kind", False),
        ("", False),
    ],
)
def test_words_and_expressions(text: str, refused: bool) -> None:
    guard = Guard(name="x", words=["bomb", "ระเบิด"], regex=[r"\b\d-\d{4}-\d{5}-\d{2}-\d\b"])
    assert (guard.judge("before", text) is not None) is refused


def test_all_that_the_client_wrote_is_judged_as_the_model_reads_it() -> None:
    part = {"type": "text", "text": "bo"}
    for messages in (
        [{"role": "user", "content": [part, {"type": "text", "text": " mb"}]}],
        [{"role": "system", "content": "bomb"}, {"role": "user", "content": "hello"}],
        [
            {"role": "user", "content": "bomb"},
            {"role": "assistant", "content": "no"},
            {"role": "user", "content": "go on"},
        ],
    ):
        assert Guard(name="x", words=["bomb"]).judge("before", texts_of(messages)) is not None


def test_a_long_piece_is_judged_from_its_beginning() -> None:
    watch = Watch(Guards(guards=[Guard(name="x", words=["bomb"], stages=["during"])]))
    assert asyncio.run(watch.put("bomb " + "a" * 1000)) == "" and watch.refused


def test_languages_that_are_not_covered() -> None:
    guard = Guard(name="x", words=["bomb"], languages=["en"], uncovered="refuse")
    assert guard.judge("before", "នេះជាអ្វី?") is not None and guard.judge("before", "hello") is None
    assert Guard(name="x", words=["bomb"], languages=["en"]).judge("before", "នេះជាអ្វី?") is None


def test_an_expression_that_takes_too_long_refuses() -> None:
    slow = {"name": "x", "regex": [r"(a+)+$"]}
    text = "a" * 40 + "b"
    assert "failed" in (Guard(**slow).judge("before", text) or "failed")
    assert Guard(**slow, on_failure="allow").judge("before", text) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("guards: [{name: x}]", "words and regex, or a model, or a url"),
        ("guards: [{name: x, url: 'http://h/', stages: [during]}]", "judges whole texts"),
        ("guards: [{name: x, words: [a], languages: [xx]}]", "unknown language"),
        ("guards: [{name: x, regex: ['(']}]", "regex"),
        ("gards: []", "gards"),
        ("[", "not YAML"),
    ],
)
def test_a_broken_file_is_told(tmp_path: Path, cli: Callable, text: str, said: str) -> None:
    path = tmp_path / "guard.yaml"
    path.write_text(text)
    with pytest.raises(SeavlmError, match=said):
        Guards.read(path)
    done = cli("serve", "nano", "--guard", str(path))
    assert done.code == 2 and len(done.err.strip().splitlines()) == 1


def test_the_example_keeps_personal_numbers_in(root: Path) -> None:
    (guard,) = Guards.read(root / "docs" / "guard.yaml").guards
    for number in (
        "1-2345-67890-12-3",
        "900101-14-5678",
        "3174012505900001",
        "S1234567D",
        "4111 1111 1111 1111",
    ):
        assert guard.judge("during", f"ดูที่ {number} ครับ") is not None, number
    for text in ("2026-11-26", "12,345.67", "+66 2 123 4567", "ISBN 978-3-16-148410"):
        assert guard.judge("during", text) is None, text


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """A service that refuses what holds "secret"."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if "break" in asked["text"]:
                self.send_error(500)
                return
            body = json.dumps({"allow": "secret" not in asked["text"], "reason": "a secret"}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def test_before_the_reply_by_a_service(service: str, tmp_path: Path) -> None:
    guards = Guards(guards=[Guard(name="s", url=service)], message="No.", audit=tmp_path / "audit.jsonl")
    with serving(Settings(guards=guards)) as live:
        assert ask(live, "hello").status_code == 200
        for text in ("a secret", "break"):  # one that fails refuses
            answer = ask(live, text)
            assert answer.status_code == 400
            assert answer.json()["error"] | {"type": ""} == {
                "message": "No.",
                "type": "",
                "param": None,
                "code": "content_filter",
            }
        lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
        assert [line["guard"] for line in lines] == ["s", "s"] and lines[0]["reason"] == "a secret"
        assert "secret" not in lines[0]["sha256"] and "text" not in lines[0] and lines[0]["request_id"]


@pytest.mark.parametrize("stage", ["during", "after"])
def test_a_reply_is_ended(stage: Any) -> None:
    """Held to "one two three", with "two" not allowed."""
    guards = Guards(guards=[Guard(name="w", words=["two"], stages=[stage])], message="No.")
    with serving(Settings(guards=guards)) as live:
        fine = ask(live, "x", choice=["one three"]).json()["choices"][0]
        assert fine["message"]["content"] == "one three" and fine["finish_reason"] == "stop"
        cut = ask(live, "x", choice=["one two three"]).json()["choices"][0]
        assert cut["finish_reason"] == "content_filter" and cut["message"]["content"] == "No."
        told = ask(live, "x", choice=["one two three"], logprobs=True).json()["choices"][0]
        assert told["logprobs"]["content"] == [] and "two" not in json.dumps(told)
        with httpx.stream(
            "POST",
            f"{live.url}/v1/chat/completions",
            json={
                "messages": [{"role": "user", "content": "x"}],
                "choice": ["one two three"],
                "stream": True,
            },
        ) as answer:
            events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
        assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == "No."
        assert events[-1]["choices"][0]["finish_reason"] == "content_filter"
        assert live.idle()


def test_by_a_model() -> None:
    guard = Guard(name="m", model="nano", prompt="{text}")
    assert guard.judge("before", "hello") in (None, "the judge says so")
    with pytest.raises(SeavlmError):
        Guards(guards=[Guard(name="m", model="nowhere")]).guards[0].prepare()
