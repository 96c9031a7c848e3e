"""Endpoints as they are: what OpenAI, vLLM, llama.cpp, Mistral and OpenRouter answer, and servers that do
what no server should. All of them really run, on this machine."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from seavlm.errors import SeavlmError
from seavlm.evals import http
from seavlm.evals.http import Endpoint
from seavlm.evals.run import evaluate, rescore
from seavlm.evals.tasks import Question

ASK = [{"role": "user", "content": "?"}]
Server = BaseHTTPRequestHandler


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.01)


@contextlib.contextmanager
def serving(
    answer: Callable[[Server, dict, int], None], host: str = "127.0.0.1", tls: Path | None = None
) -> Iterator[tuple[str, list[tuple[str, dict, dict]]]]:
    """(the URL, what has come: path, headers, body). answer: to the server, a body and its number."""
    seen: list[tuple[str, dict, dict]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            with lock:
                seen.append((self.path, dict(self.headers), body))
                number = len(seen)
            with contextlib.suppress(OSError):
                answer(self, body, number)

        do_GET = do_POST

        def log_message(self, *args: object) -> None:
            pass

    class Threads(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        request_queue_size = 128
        daemon_threads = True

        def handle_error(self, *args: object) -> None:
            pass

    server = Threads((host, 0), Handler)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls / "cert.pem", tls / "key.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    name = f"[{host}]" if ":" in host else host
    try:
        yield f"http{'s' if tls else ''}://{name}:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def put(server: Server, status: int, body: Any, **headers: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    server.send_response(status)
    plain = {"content-type": "application/json", "content-length": str(len(data))}
    for name, value in (plain | {name.replace("_", "-"): value for name, value in headers.items()}).items():
        server.send_header(name, value)
    server.end_headers()
    server.wfile.write(data)


def said(content: Any, finish: str | None = "stop", used: Any = (7, 2), **more: Any) -> dict:
    usage = {"prompt_tokens": used[0], "completion_tokens": used[1]} if used else None
    message = {"role": "assistant", "content": content} | more
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}


def questions(count: int) -> list[Question]:
    return [
        Question(
            f"q{i}", "choose", "th", f"c{i}", f"{i}?", ("ก",), ("ก", "ข"), ("ก", "ข"),
            messages=[{"role": "user", "content": f"{i}?"}],
        )
        for i in range(count)
    ]  # fmt: skip


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
OPENAI = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "gpt-4o",
    "service_tier": "default",
    "choices": [
        {
            "index": 0, "logprobs": None, "finish_reason": "stop",
            "message": {"role": "assistant", "content": "ก", "refusal": None, "annotations": []},
        }
    ],
    "usage": {
        "prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9,
        "completion_tokens_details": {"reasoning_tokens": 0},
    },
}  # fmt: skip
SHAPES: dict[str, tuple[Any, tuple[str, int, int, str]]] = {
    "openai": (OPENAI, ("ก", 7, 2, "")),
    "openai refuses": (said(None, refusal="I can't."), ("I can't.", 7, 2, "")),
    "vllm": (said("ก", reasoning=None, tool_calls=[], function_call=None), ("ก", 7, 2, "")),
    "vllm, cut in thought": (said(None, "length", reasoning="Let me"), ("", 7, 2, "length")),
    "llama.cpp": (
        said("ก", reasoning_content="Let me") | {"timings": {"predicted_ms": 1.5}, "__verbose": {}},
        ("ก", 7, 2, ""),
    ),
    "parts": (
        said([{"type": "thinking", "thinking": ["So"]}, {"type": "text", "text": "ก"}]),
        ("ก", 7, 2, ""),
    ),
    "a function is called": (
        said(None, "tool_calls", tool_calls=[CALL]), ('[{"name": "add", "arguments": {"a": 1}}]', 7, 2, "")
    ),
    "with words, and arguments that are no text": (
        said("Sum:", tool_calls=[{"function": {"name": "add", "arguments": {"a": 1}}}]),
        ('Sum:\n[{"name": "add", "arguments": {"a": 1}}]', 7, 2, ""),
    ),
    "cut": (said("ก", "length"), ("ก", 7, 2, "length")),
    "kept back": ({"choices": [{"finish_reason": "content_filter"}]}, ("", 0, 0, "content_filter")),
    "no usage": (said("ก", used=None), ("ก", 0, 0, "")),
    "no numbers": (said("ก", used=("7", -1)), ("ก", 0, 0, "")),
    "without end": (said("ก" * 20_000), ("ก" * 64 * 256, 7, 2, "length")),
    "unknown end": (said("ก", "eos"), ("ก", 7, 2, "")),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_what_servers_really_answer_is_read(shape: str) -> None:
    told, wanted = SHAPES[shape]
    with serving(lambda server, body, n: put(server, 200, told)) as (url, _):
        reply = Endpoint(url, model="m").ask(ASK)
    assert (str(reply), reply.prompt_tokens, reply.new_tokens, reply.finish) == wanted and not reply.error


STREAM = b"".join(
    b"data: " + json.dumps(event).encode() + b"\n\n"
    for event in (
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {"content": "กา"}}], "usage": None},
        {"choices": [{"index": 0, "delta": {"content": "ร"}, "finish_reason": "length"}]},
        {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}},
    )
)


def test_a_server_that_only_streams() -> None:
    def answer(server: Server, body: dict, number: int) -> None:
        if not body.get("stream"):
            put(server, 400, {"error": {"message": "This model only support stream mode"}})
        elif number == 2:
            put(server, 200, STREAM[:150], content_type="text/event-stream")  # breaks off
        else:
            put(
                server,
                200,
                b": a remark\n\n" + STREAM + b"data: [DONE]\n\n",
                content_type="text/event-stream",
            )

    with serving(answer) as (url, seen):
        model = Endpoint(url, model="m")
        for _ in range(2):
            reply = model.ask(ASK)
            assert (reply, reply.prompt_tokens, reply.new_tokens, reply.finish) == ("การ", 7, 2, "length")
    assert len(seen) == 4 and model.retried == 1 and model.without == []


def test_options_that_are_not_taken_are_left_out_and_told() -> None:
    """OpenAI's reasoning models, then Mistral's, in their words."""

    def openai(server: Server, body: dict, number: int) -> None:
        for name, why in (
            ("max_tokens", "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
             "'max_completion_tokens' instead."),
            ("temperature", "Unsupported value: 'temperature' does not support 0 with this model."),
        ):  # fmt: skip
            if name in body:
                return put(
                    server, 400, {"error": {"message": why, "param": name, "code": "unsupported_parameter"}}
                )
        put(server, 200, said("ก"))

    def mistral(server: Server, body: dict, number: int) -> None:
        why = [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]
        put(server, 422, {"object": "error", "message": {"detail": why}}) if "seed" in body else put(
            server, 200, said("ก")
        )

    with serving(openai) as (url, seen):
        model = Endpoint(url, model="m", max_new_tokens=99, concurrency=3)
        assert [str(one) for one in model([ASK] * 6)] == ["ก"] * 6
    assert seen[-1][2]["max_completion_tokens"] == 99 and "temperature" not in seen[-1][2]
    assert model.without == ["temperature"]
    with serving(mistral) as (url, seen):
        model = Endpoint(url, model="m", response_formats=[{"type": "json_object"}])
        assert model.ask(ASK) == model.ask(ASK) == "ก" and len(seen) == 3
    assert seen[-1][2]["max_tokens"] == 256 and "response_format" in seen[-1][2] and model.without == ["seed"]

    def too_long(server: Server, body: dict, number: int) -> None:
        put(server, 400, {"error": {"message": "'max_tokens' or 'max_completion_tokens' is too large: 256"}})

    with serving(too_long) as (url, seen):
        model = Endpoint(url, model="m")
        assert model.ask(ASK).error.startswith("400 'max_tokens' or") and len(seen) == 2
        assert "max_tokens" in model.ways[0] and not model.without, "it did not help"


def test_errors_in_answers_that_say_200() -> None:
    told = [
        {"error": {"message": "Provider returned error", "code": 429}},
        {"error": {"message": "down", "code": "server_error"}},
        said("ก...", "error"),
        {"choices": [{"error": {"code": 502, "message": "lost"}, "message": None, "finish_reason": "error"}]},
        said("ก"),
        {"error": {"message": "flagged", "code": 403}},
        {"choices": []},
        {"error": {"message": "too long", "code": 400}},
    ]
    with serving(lambda server, body, n: put(server, 200, told[n - 1])) as (url, _):
        model = Endpoint(url, model="m")
        assert model.ask(ASK) == "ก" and model.retried == 4
        assert [model.ask(ASK).error for _ in range(3)] == [
            "403 flagged", "it does not answer as OpenAI's interface does", "400 too long",
        ]  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        b'{"hello": 1}',
        b"[]",
        b"null",
        b'{"choices": [{"message": {"content": 7}}]}',
        b'{"choices": {"0": 1}}',
    ],
)
def test_what_is_not_openais_is_said_at_once(body: bytes) -> None:
    with (
        serving(lambda server, _, n: put(server, 200, body)) as (url, seen),
        pytest.raises(SeavlmError, match=r"does not answer as OpenAI's interface does\. Give the URL"),
    ):
        Endpoint(url, model="m").ask(ASK)
    assert len(seen) == 1


def test_pages_and_nonsense_are_shown() -> None:
    page = b"<!doctype html>\n<h1>Welcome</h1>"
    for body, start in ((page, "<!doctype html> <h1>"), (b"[" * 100_000, r"\[\[\["), (b"", "''")):
        with (
            serving(lambda server, _, n, body=body: put(server, 200, body, content_type="text/html")) as (
                url,
                _,
            ),
            pytest.raises(
                SeavlmError, match=f"after 2 tries: what it answers is no JSON: .*{start}.*ends in /v1"
            ),
        ):
            Endpoint(url, model="m", retries=1).ask(ASK)


def test_an_answer_without_end_or_in_another_coding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "LARGEST", 1 << 20)
    large = json.dumps(said("x" * (2 << 20))).encode()

    def answer(server: Server, body: dict, number: int) -> None:
        if number == 1:
            return put(server, 200, large)
        if number == 2:
            return put(server, 200, gzip.compress(large), content_encoding="gzip")
        if number == 3:
            return put(server, 200, gzip.compress(json.dumps(said("ก")).encode()), content_encoding="gzip")
        server.send_response(200)
        server.end_headers()
        while True:  # a byte now and then: no read ever takes long
            server.wfile.write(b" ")
            time.sleep(0.05)

    with serving(answer) as (url, _):
        model = Endpoint(url, model="m", timeout=0.5, retries=0)
        assert [model.ask(ASK).error for _ in range(2)] == ["the answer has more than 1 MB"] * 2
        assert model.ask(ASK) == "ก"
        with pytest.raises(SeavlmError, match="the answer does not end"):
            model.ask(ASK)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_is_taken_nowhere_else(status: int) -> None:
    with serving(lambda server, body, n: put(server, 200, said("ก"))) as (other, theirs):
        place = f"{other}/chat/completions"
        with serving(lambda server, body, n: put(server, status, {}, location=place)) as (url, seen):
            with pytest.raises(SeavlmError, match=f"sends us on to {other}"):
                Endpoint(url, model="m", key="sk-secret").ask(ASK)
            with pytest.raises(SeavlmError, match=f"sends us on to {other}"):
                Endpoint(url, key="sk-secret")
    assert len(seen) == 2 and seen[0][1]["Authorization"] == "Bearer sk-secret" and theirs == []


def test_the_key_is_told_nowhere() -> None:
    def answer(server: Server, body: dict, number: int) -> None:
        put(server, 400, {"error": {"message": f"{server.headers['Authorization']} has no such model"}})

    with serving(answer) as (url, _):
        assert (
            Endpoint(url, model="m", key="sk-secret\n").ask(ASK).error == "400 Bearer *** has no such model"
        )
        for key in ("sk\nsecret", "sk-ก"):
            with pytest.raises(SeavlmError, match="has letters that no key has") as error:
                Endpoint(url, model="m", key=key)
            assert key not in str(error.value)
    for bad in ("http://me:word@host/v1", "https://host/v1?key=word"):
        with pytest.raises(SeavlmError, match="has a user, a query or a fragment") as error:
            Endpoint(bad, model="m")
        assert "word" not in str(error.value)
    for bad in ("http://", "http://[::1/v1", "http://host:port/v1", "http://a b/v1"):
        with pytest.raises(SeavlmError, match="URL is none"):
            Endpoint(bad, model="m")


def test_a_storm_of_429_is_outlived_and_credit_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(server: Server, body: dict, number: int) -> None:
        put(server, 429, {}, retry_after="0") if number <= 12 else put(server, 200, said("ก"))

    monkeypatch.setattr(http, "LONGEST_PAUSE", 0.02)
    with serving(answer) as (url, seen):
        model = Endpoint(url, model="m", retries=2)
        assert model.ask(ASK) == "ก" and len(seen) == 13
        monkeypatch.setattr(http, "PATIENCE", 0.1)
    told = {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}
    for headers, body, match in (
        ({}, told, "refuses: 429 You exceeded .*insufficient_quota.*no credit"),
        ({"retry_after": "86400"}, {}, "asks to come back in 86,400 s: 429"),
        ({}, {}, "gave no answer after .* tries: 429"),
    ):
        with (
            serving(lambda server, _, n, body=body, headers=headers: put(server, 429, body, **headers)) as (
                url,
                _,
            ),
            pytest.raises(SeavlmError, match=match),
        ):
            Endpoint(url, model="m", retries=2).ask(ASK)


def test_many_models_and_other_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(server: Server, body: dict, number: int) -> None:
        names = [{"id": f"model-{i}"} for i in range(300 if many else 1)]
        put(server, 200, said("ก") if body else {"object": "list", "data": names})

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody listens; it is for other machines
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    many = True
    with serving(answer) as (url, _):
        with pytest.raises(SeavlmError, match=r"has 300 models\. Choose one with --name: model-0, "):
            Endpoint(url)
        many = False
        assert Endpoint(url).model == "model-0" and Endpoint(url).ask(ASK) == "ก"
        with pytest.raises(SeavlmError, match="Connection refused"):  # through the proxy
            Endpoint("http://localhost.localdomain/v1", model="m", retries=0).ask(ASK)
    if socket.has_ipv6:
        with contextlib.suppress(OSError), serving(answer, host="::1") as (url, _):
            assert Endpoint(url).ask(ASK) == "ก"


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes the certificate")
def test_a_certificate_that_nobody_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=here -addext subjectAltName=IP:127.0.0.1"
    command = ["openssl", *words.split(), "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"]
    subprocess.run(command, check=True, capture_output=True)
    with serving(lambda server, body, n: put(server, 200, said("ก")), tls=tmp_path) as (url, seen):
        with pytest.raises(
            SeavlmError, match=r"has no certificate to be trusted: self[- ]signed .*SSL_CERT_FILE"
        ):
            Endpoint(url, model="m", key="sk-secret").ask(ASK)
        assert seen == []
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        assert Endpoint(url, model="m", key="sk-secret").ask(ASK) == "ก"


@pytest.mark.parametrize("concurrency", [1, 8, 64])
def test_as_many_at_once_as_was_said(concurrency: int) -> None:
    now, most, lock = 0, 0, threading.Lock()

    def answer(server: Server, body: dict, number: int) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05 if concurrency > 1 else 0)
        with lock:
            now -= 1
        put(server, 200, said(body["messages"][0]["content"]))  # it says what it was asked

    talks = [[{"role": "user", "content": f"{i}"}] for i in range(3 * concurrency)]
    with serving(answer) as (url, _):
        replies = Endpoint(url, model="m", concurrency=concurrency)(talks)
    assert replies == [str(i) for i in range(3 * concurrency)] and 0.5 * concurrency <= most <= concurrency


def test_what_was_cut_kept_back_or_not_counted_is_told(tmp_path: Path, cli: Callable) -> None:
    def answer(server: Server, body: dict, number: int) -> None:
        told = [said("ก", "length"), said(None, "length"), said("", "content_filter"), said("ข", used=None)]
        put(server, 200, told[int(body["messages"][0]["content"][0])])

    with serving(answer) as (url, _):
        results = evaluate(Endpoint(url, model="m"), questions(4), tmp_path, key="k", progress=False)
    counts = {"no_reply": 0, "cut": 2, "cut_empty": 1, "withheld": 1, "uncounted": 1}
    assert results.usage == {"prompt_tokens": 21, "new_tokens": 6, **counts}
    assert rescore(tmp_path).usage == results.usage
    done = cli("eval", "--rescore", tmp_path, "--price", "1000000,500000")
    said_ = " ".join(done.err.split())
    assert "costs 24.0000; without those of 1 replies, of which the endpoint does not tell" in said_
    assert "2 replies were cut at the longest that was asked for" in said_
    assert "1 of them before they said a word" in said_ and "1 replies were kept back" in said_


@pytest.mark.parametrize("presses", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_keeps_what_is_paid_and_the_same_command_goes_on(
    tmp_path: Path, presses: int, cli: Callable
) -> None:
    """Of `seavlm eval` itself: what was under way is waited for, unless Ctrl-C comes again."""
    slow = threading.Event()

    def answer(server: Server, body: dict, number: int) -> None:
        if number > 4:
            time.sleep(0 if slow.is_set() else 1.5 if presses == 1 else 20)
        put(server, 200, said("ไทย"))

    with serving(answer) as (url, seen):
        out = tmp_path / "out"
        words = ["eval", url, "--name", "m", "--suite", "flags", "--limit", "1", "--out", out, "-q"]
        words += ["--concurrency", "3"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "seavlm.cli", *words]
        run = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            # Where the tests run in the background, Ctrl-C is ignored, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        until = time.monotonic() + 60
        while len(seen) < 7 and time.monotonic() < until:
            time.sleep(0.02)
        assert len(seen) == 7
        began = time.monotonic()
        for _ in range(presses):
            run.send_signal(signal.SIGINT)
            time.sleep(0.3)
        _, told = run.communicate(timeout=30)
        assert run.returncode == 130 and "stopped" in told and time.monotonic() - began < 15
        kept = len((out / "replies.jsonl").read_text(encoding="utf-8").splitlines()) - 1
        assert kept == (7 if presses == 1 else 4) and len(seen) == 7, "no more was asked"
        slow.set()
        assert cli(*words).code == 0
        results = rescore(out)
        assert len(seen) == 7 + len(results.records) - kept and results.usage["no_reply"] == 0
