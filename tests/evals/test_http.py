"""A model behind HTTP: the same verdicts as in this process, and endpoints that fail in every way."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import uvicorn
from PIL import Image

from seavlm.build import evaluate_model
from seavlm.errors import SeavlmError
from seavlm.evals import http
from seavlm.evals.http import Endpoint, to_openai
from seavlm.evals.run import evaluate, rescore
from seavlm.evals.tasks import Question
from seavlm.manifest import read_manifest


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.01)


@contextlib.contextmanager
def endpoint(answer: Callable[[dict, int], tuple[int, Any]]) -> Iterator[tuple[str, list[dict]]]:
    """A server that answers with what `answer(body, number of this request)` gives: (status, body)."""
    seen: list[dict] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append(body | {"_key": self.headers.get("Authorization")})
                number = len(seen)
            status, told = answer(body, number)
            if told is None:  # closed within the answer
                self.send_response(200)
                self.send_header("Content-Length", "900")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                return self.connection.shutdown(socket.SHUT_RDWR)
            data = (told if isinstance(told, str) else json.dumps(told)).encode()
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()


def said(text: str) -> dict:
    return {
        "choices": [{"message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 2},
    }


def asked(count: int) -> list[Question]:
    return [
        Question(
            f"q{i}", "choose", "th", f"c{i}", f"{i}?", ("ก",), ("ก", "ข", "ค", "ง"), tuple("กขคง"),
            messages=[{"role": "user", "content": [{"type": "text", "text": f"{i}?"}]}],
        )
        for i in range(count)
    ]  # fmt: skip


def test_replies_tokens_and_order(tmp_path: Path) -> None:
    with endpoint(lambda body, n: (200, said("ก" if body["messages"][0]["content"] == "1?" else "ข"))) as (
        url,
        seen,
    ):
        model = Endpoint(url, model="m", key="secret", concurrency=4)
        results = evaluate(model, asked(9), tmp_path, key="k", progress=False)
    assert [record["verdict"] == "correct" for record in results.records] == [i == 1 for i in range(9)]
    told = {name: count for name, count in results.usage.items() if count}
    assert told == {"prompt_tokens": 63, "new_tokens": 18}
    assert seen[0]["temperature"] == 0 and seen[0]["_key"] == "Bearer secret"
    assert all(b"secret" not in file.read_bytes() for file in tmp_path.iterdir())


def test_busy_and_broken_endpoints_are_asked_again() -> None:
    def answer(body: dict, number: int) -> tuple[int, Any]:
        return {1: (429, "slow down"), 2: (503, "later"), 3: (200, "half an answ"), 4: (200, None)}.get(
            number, (200, said("ก"))
        )

    with endpoint(answer) as (url, seen):
        model = Endpoint(url, model="m", concurrency=1)
        assert model.ask(asked(1)[0].messages) == "ก"
    assert len(seen) == 5 and model.retried == 4
    with pytest.raises(SeavlmError, match="no answer after 3 tries"):
        Endpoint(url, model="m", retries=2).ask(asked(1)[0].messages)  # it is gone


def test_a_refused_question_is_told_apart_and_the_rest_goes_on(tmp_path: Path) -> None:
    def answer(body: dict, number: int) -> tuple[int, Any]:
        if body["messages"][0]["content"] == "2?":
            return 400, {"error": {"message": "too long"}}
        return 200, said("ก")

    with endpoint(answer) as (url, seen):
        results = evaluate(Endpoint(url, model="m"), asked(5), tmp_path, key="k", progress=False)
        assert results.records[2]["verdict"] == "no_reply" and results.records[2]["error"] == "400 too long"
        assert results.usage["no_reply"] == 1 and results.suites["all"].wrong_format == 0
        assert rescore(tmp_path).records == results.records
        evaluate(Endpoint(url, model="m"), asked(5), tmp_path, key="k", progress=False)
        assert len(seen) == 6, "only what got no reply is asked again"


def test_a_question_that_breaks_the_endpoint_does_not_stop_the_others(tmp_path: Path) -> None:
    def answer(body: dict, number: int) -> tuple[int, Any]:
        return (500, "out of memory") if body["messages"][0]["content"] in bad else (200, said("ก"))

    bad = {"3?"}
    with endpoint(answer) as (url, seen):
        results = evaluate(Endpoint(url, model="m", retries=1), asked(20), tmp_path, key="k", progress=False)
        assert results.usage["no_reply"] == 1 and results.records[3]["error"].startswith("500")
        bad = {f"{i}?" for i in range(20)}
        before = len(seen)
        with pytest.raises(SeavlmError, match="answers nothing any more: 500"):
            evaluate(Endpoint(url, model="m", retries=1), asked(20), tmp_path / "b", key="k", progress=False)
        assert len(seen) - before <= 2 * 16
        bad = set()
        again = evaluate(Endpoint(url, model="m"), asked(20), tmp_path / "b", key="k", progress=False)
        assert again.usage["no_reply"] == 0


def test_a_damaged_picture_or_letter_costs_one_question(tmp_path: Path) -> None:
    def answer(body: dict, number: int) -> tuple[int, Any]:
        parts = body["messages"][0]["content"]
        if any(part["type"] == "image_url" for part in parts if isinstance(part, dict)):
            return 400, {"error": {"message": "no picture"}}
        return 200, '{"choices": [{"message": {"content": "ก\\ud83d"}}]}'

    questions = asked(3)
    for place, data in ((0, b"no picture at all"), (1, b"\x89PNG\r\n\x1a\n" + b"\0" * 40)):
        part = {"type": "image", "image": data}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]
        questions[place] = replace(questions[place], messages=messages, image_sha256=(f"{place}",))
    with endpoint(answer) as (url, _):
        results = evaluate(Endpoint(url, model="m"), questions, tmp_path, key="k", progress=False)
    assert [record["verdict"] for record in results.records] == ["no_reply", "no_reply", "correct"]
    assert results.records[2]["reply"] == "ก\ufffd" and rescore(tmp_path).records == results.records
    assert pq.read_table(tmp_path / "pictures.parquet").num_rows == 0


def test_when_to_try_again() -> None:
    later = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert http._seconds("7") == 7 and http._seconds("-1") == 0 and http._seconds("soon") is None
    assert 28 <= (http._seconds(later) or 0) <= 31
    with (
        endpoint(lambda body, n: (200, {})) as (url, _),
        pytest.raises(SeavlmError, match="not list its models"),
    ):
        Endpoint(url)  # this one answers no GET


def test_what_is_under_way_when_a_run_ends_is_kept(tmp_path: Path) -> None:
    def answer(body: dict, number: int) -> tuple[int, Any]:
        if broken and body["messages"][0]["content"] == "0?":
            return 401, {"error": {"message": "no credit"}}
        time.sleep(0.2)
        return 200, said("ก")

    broken = True
    with endpoint(answer) as (url, seen):
        with pytest.raises(SeavlmError, match="no credit"):
            evaluate(Endpoint(url, model="m", concurrency=4), asked(8), tmp_path, key="k", progress=False)
        assert len(seen) == 4
        broken = False
        evaluate(Endpoint(url, model="m"), asked(8), tmp_path, key="k", progress=False)
        assert len(seen) == 4 + 5


def test_a_run_that_breaks_off_goes_on(tmp_path: Path) -> None:
    def answer(body: dict, number: int) -> tuple[int, Any]:
        return (401, {"error": {"message": "no credit"}}) if broken and number > 6 else (200, said("ก"))

    broken = True
    with endpoint(answer) as (url, seen):
        with pytest.raises(SeavlmError, match="refuses: 401 no credit"):
            evaluate(Endpoint(url, model="m", concurrency=2), asked(20), tmp_path, key="k", progress=False)
        broken, before = False, len(seen)
        results = evaluate(Endpoint(url, model="m"), asked(20), tmp_path, key="k", progress=False)
        assert len(seen) - before <= 15 and len(results.records) == 20
        again = evaluate(Endpoint(url, model="m"), asked(20), tmp_path, key="k", progress=False)
        assert again.records == results.records and len(seen) - before <= 15


def test_pictures_arrive_lossless_and_in_their_place() -> None:
    picture = Image.effect_noise((40, 30), 80).convert("RGB")
    encoded = {}
    for kind in ("PNG", "WEBP", "JPEG"):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
        encoded[kind] = buffer.getvalue()
    parts = [{"type": "text", "text": "before"}]
    for data in encoded.values():
        parts += [{"type": "image", "image": data}, {"type": "text", "text": "after"}]
    (turn,) = to_openai([{"role": "user", "content": parts}])
    assert [part["type"] for part in turn["content"]] == ["text", *("image_url", "text") * 3]
    for data, part in zip(encoded.values(), turn["content"][1::2], strict=True):
        head, _, body = part["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        arrived = Image.open(io.BytesIO(base64.b64decode(body)))
        assert arrived.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()
        if data is encoded["PNG"]:  # the hash that is kept is of what was sent
            assert base64.b64decode(body) == data


def test_the_same_suite_through_http_and_the_engine_gives_equal_verdicts(tmp_path: Path) -> None:
    """nano, greedy: every reply, verdict and score, with pictures, sheets of text, and functions."""
    from seavlm.engine.vlm import load
    from seavlm.serve.app import create_app
    from seavlm.serve.engine_backend import EngineBackend
    from seavlm.serve.server import Settings

    options = {"suite": "offline", "limit": 1, "max_new_tokens": 24, "progress": False}
    tasks = ["name", "choose", "flag", "count", "reading", "json", "calls"]
    app = create_app([EngineBackend(load("nano", device="cpu", dtype="float32"))], Settings())
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        runner = uvicorn.Server(uvicorn.Config(app, log_config=None))
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
        served = evaluate_model(url, None, tmp_path / "served", tasks=tasks, **options)
        runner.should_exit = True
        thread.join(20)
    told: list[str] = []
    options["tell"] = told.append
    here = evaluate_model("nano", None, tmp_path / "here", tasks=tasks, dtype="float32", **options)
    assert re.search(r"told apart from a difference of \d+\.\d points on, in one language from \d+", told[0])
    same = [record for record in here.records if record["task"] != "ranked"]  # HTTP does not rank
    assert len(served.records) == len(same) == 77
    for one, other in zip(served.records, same, strict=True):
        assert one == other, one["id"]
    assert served.suites == here.suites and served.usage["new_tokens"] > 0
    assert {cell.task: cell for cell in served.cells}.keys() == set(tasks)
    kept = pq.read_table(tmp_path / "served" / "questions.parquet").to_pylist()
    assert kept[0]["prompt"] and kept[0]["image_sha256"] and kept[0]["reply"] is not None
    told, ours = (read_manifest(tmp_path / place) for place in ("served", "here"))
    assert "unknown" in told["metrics"]["carbon"] and "model" not in told["inputs"]  # nobody saw its weights
    assert ours["metrics"]["carbon"]["kg_co2e"] > 0 and len(ours["inputs"]["model"]) == 64
