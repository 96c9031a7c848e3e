"""Traces for OpenTelemetry (an extra: pip install 'seavlm[otel]'): a span for each request, and in it one for
each reply, with names of its conventions for generative AI. What was asked and answered is in none.

    OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318 seavlm serve nano
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from seavlm import __version__
from seavlm.errors import SeavlmError
from seavlm.serve.backend import Ticket

SWITCHES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class Tracing:
    """provider: OpenTelemetry's, or None for no traces."""

    def __init__(self, provider: Any = None) -> None:
        self._provider = provider
        self._tracer = None if provider is None else provider.get_tracer("seavlm", __version__)

    @classmethod
    def from_environment(cls) -> Tracing:
        """As OpenTelemetry's own variables say. SeavlmError where they ask for what is not installed."""
        if not any(os.environ.get(name) for name in SWITCHES):
            return cls()
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise SeavlmError(
                f"{SWITCHES[0]} is set, and OpenTelemetry is not installed",
                hint="pip install 'seavlm[otel]', or unset it.",
            ) from None
        name = os.environ.get("OTEL_SERVICE_NAME", "seavlm")
        provider = TracerProvider(resource=Resource.create({"service.name": name}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def stop(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()

    @contextlib.contextmanager
    def request(self, headers: Mapping[bytes, bytes]) -> Iterator[Callable[..., None]]:
        """Around a request; what is yielded notes its method, path, status and id."""
        if self._tracer is None:
            yield lambda *_: None
            return
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        given = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
        caller = TraceContextTextMapPropagator().extract(given)
        with self._tracer.start_as_current_span("request", caller, SpanKind.SERVER) as span:

            def note(method: str, path: str, status: int, request_id: str) -> None:
                span.update_name(f"{method} {path}")
                told = {"http.request.method": method, "http.route": path}
                span.set_attributes(told | {"seavlm.request_id": request_id})
                span.set_attribute("http.response.status_code", status)
                if status >= 500:
                    span.set_status(Status(StatusCode.ERROR))

            yield note

    def reply(self, model: str, ticket: Ticket) -> None:
        """That a reply has ended, in the trace of its request."""
        if self._tracer is not None:
            ticket.context.run(self._reply, model, ticket)

    def _reply(self, model: str, ticket: Ticket) -> None:
        now, ticks = time.time_ns(), time.perf_counter()

        def at(moment: float) -> int:
            return now - int((ticks - moment) * 1e9)

        assert self._tracer is not None
        span = self._tracer.start_span(
            f"chat {model}",
            start_time=at(ticket.came),
            attributes={
                "gen_ai.operation.name": "chat",
                "gen_ai.request.model": model,
                "gen_ai.usage.input_tokens": ticket.prompt_tokens,
                "gen_ai.usage.output_tokens": ticket.num_tokens,
                "gen_ai.response.finish_reasons": [ticket.finish_reason or ""],
                "seavlm.cached_tokens": ticket.cached_tokens,
                "seavlm.images": ticket.images,
            },
        )
        if ticket.first_at:
            span.add_event("first token", timestamp=at(ticket.first_at))
        span.end(now)
