"""A model behind HTTP: the same verdicts as in this process, and endpoints that fail in every way."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
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
    assert results.usage == {"prompt_tokens": 63, "new_tokens": 18, "no_reply": 0}
    assert seen[0]["temperature"] == 0 and seen[0]["_key"] == "Bearer secret"
    assert all(b"secret" not in file.read_bytes() for file in tmp_path.iterdir())


def test_busy_and_broken_endpoints_are_asked_again() -> None:
    def answer(body: dict, number: int) -> tuple[int, Any]:
        return {1: (429, "slow down"), 2: (503, "later"), 3: (200, "half an answ")}.get(
            number, (200, said("ก"))
        )

    with endpoint(answer) as (url, seen):
        model = Endpoint(url, model="m", concurrency=1)
        assert model.ask(asked(1)[0].messages) == "ก"
    assert len(seen) == 4 and model.retried == 3
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
    here = evaluate_model("nano", None, tmp_path / "here", tasks=tasks, dtype="float32", **options)
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
