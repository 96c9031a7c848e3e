"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from seavlm.serve.backend import Backend, Ticket

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Of one server, in a registry of its own."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends, self._registry = backends, CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry, "namespace": "seavlm"}
        model = {"labelnames": ["model"], **own}
        self._answers = Counter("http_requests", "Answers.", ["path", "status"], **own)
        self._answer_seconds = Histogram(
            "http_request_seconds", "From request to the last byte.", ["path"], buckets=SECONDS, **own
        )
        self.refused = Counter("refused", "Requests refused because a queue or a limit was full.", **own)
        self._ends = Counter("replies", "Replies, by why they ended.", ["model", "finish_reason"], **own)
        self._prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **model)
        self._cached_tokens = Counter("cached_prompt_tokens", "Of these, found in the prefix cache.", **model)
        self._reply_tokens = Counter("generated_tokens", "Tokens of replies.", **model)
        self._images = Counter("images", "Views of pictures in prompts.", **model)
        self._first = Histogram(
            "time_to_first_token_seconds", "From a request's arrival in the engine.", buckets=SECONDS, **model
        )
        self._between = Histogram(
            "time_per_output_token_seconds",
            "Mean of a reply, after its first.",
            buckets=TOKEN_SECONDS,
            **model,
        )
        self._requests = Gauge("requests", "Under way or waiting.", ["model", "state"], **own)
        self._pages = Gauge("cache_pages", "Pages of keys and values in use.", ["model", "layers"], **own)

    def answered(self, path: str, status: int, seconds: float) -> None:
        self._answers.labels(path, str(status)).inc()
        self._answer_seconds.labels(path).observe(seconds)

    def ended(self, model: str, ticket: Ticket) -> None:
        """A reply has ended, one way or another."""
        self._ends.labels(model, ticket.finish_reason or "").inc()
        self._prompt_tokens.labels(model).inc(ticket.prompt_tokens)
        self._cached_tokens.labels(model).inc(ticket.cached_tokens)
        self._reply_tokens.labels(model).inc(ticket.num_tokens)
        self._images.labels(model).inc(ticket.images)
        if ticket.first_at:
            self._first.labels(model).observe(ticket.first_at - ticket.came)
            if ticket.num_tokens > 1:
                taken = ticket.last_at - ticket.first_at
                self._between.labels(model).observe(taken / (ticket.num_tokens - 1))

    def text(self) -> bytes:
        for backend in self._backends:
            running = backend.running
            self._requests.labels(backend.name, "running").set(running)
            self._requests.labels(backend.name, "waiting").set(max(0, backend.count - running))
            for kind, pages in backend.pages().items():
                self._pages.labels(backend.name, kind).set(pages)
        return generate_latest(self._registry)
