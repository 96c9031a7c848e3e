"""Traces, as a collector gets them."""

from __future__ import annotations

import gzip
import http.server
import threading
from collections.abc import Callable, Iterator

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from seavlm.serve.server import Settings
from seavlm.serve.tracing import Tracing
from tests.serve.conftest import serving

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    found: list[ExportTraceServiceRequest] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
            found.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", found
    server.shutdown()


def test_a_reply_is_a_span_in_its_request_and_tells_no_words(
    collector: tuple[str, list[ExportTraceServiceRequest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, found = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    with serving(Settings(tracing=Tracing.from_environment())) as live:
        body = {"messages": [{"role": "user", "content": "kerahasiaan"}], "max_tokens": 3, "n": 2, "seed": 1}
        given = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "x-request-id": "mine"}
        answer = httpx.post(f"{live.url}/v1/chat/completions", json=body, headers=given, timeout=30)
        assert answer.status_code == 200
    spans = [
        span
        for export in found
        for resource in export.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    (asked,) = (span for span in spans if span.name == "POST /v1/chat/completions")
    replies = [span for span in spans if span.name == "chat nano"]
    assert len(replies) == 2 and asked.trace_id.hex() == TRACE
    told = {one.key: one.value for one in replies[0].attributes}
    assert told["gen_ai.usage.output_tokens"].int_value <= 3
    assert told["gen_ai.usage.input_tokens"].int_value == answer.json()["usage"]["prompt_tokens"]
    for span in replies:
        assert span.trace_id == asked.trace_id and span.parent_span_id == asked.span_id
        assert span.events[0].name == "first token"
        assert asked.start_time_unix_nano < span.start_time_unix_nano < span.end_time_unix_nano
    assert b"kerahasiaan" not in b"".join(export.SerializeToString() for export in found)


def test_it_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch, cli: Callable) -> None:
    assert Tracing.from_environment()._tracer is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    done = cli("serve", "nano", "--port", "0")
    assert done.code == 2 and "seavlm[otel]" in done.err
