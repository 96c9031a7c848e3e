"""What Prometheus is told."""

from __future__ import annotations

from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from seavlm.engine.engine import Engine
from seavlm.engine.sequence import Sequence
from seavlm.model.config import GLOBAL, LOCAL

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Of one server, in a registry of its own."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine) -> None:
        self._engine, self._registry = engine, CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry, "namespace": "seavlm"}
        self._answers = Counter("http_requests", "Answers.", ["path", "status"], **own)
        self._answer_seconds = Histogram(
            "http_request_seconds", "From request to the last byte.", ["path"], buckets=SECONDS, **own
        )
        self.refused = Counter("refused", "Requests refused because the queue was full.", **own)
        self._ends = Counter("replies", "Replies, by why they ended.", ["finish_reason"], **own)
        self._prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **own)
        self._cached_tokens = Counter("cached_prompt_tokens", "Of these, found in the prefix cache.", **own)
        self._reply_tokens = Counter("generated_tokens", "Tokens of replies.", **own)
        self._images = Counter("images", "Views of pictures in prompts.", **own)
        self._first = Histogram(
            "time_to_first_token_seconds", "From a request's arrival in the engine.", buckets=SECONDS, **own
        )
        self._between = Histogram(
            "time_per_output_token_seconds", "Mean of a reply, after its first.", buckets=TOKEN_SECONDS, **own
        )
        self._requests = Gauge("requests", "Under way or waiting.", ["state"], **own)
        self._pages = Gauge("cache_pages", "Pages of keys and values in use.", ["layers"], **own)

    def answered(self, path: str, status: int, seconds: float) -> None:
        self._answers.labels(path, str(status)).inc()
        self._answer_seconds.labels(path).observe(seconds)

    def ended(self, sequence: Sequence) -> None:
        """A reply has ended, one way or another."""
        self._ends.labels(sequence.finish_reason or "").inc()
        self._prompt_tokens.inc(len(sequence.prompt.ids))
        self._cached_tokens.inc(sequence.cached)
        self._reply_tokens.inc(len(sequence.ids))
        self._images.inc(len(sequence.prompt.pictures))
        if sequence.first_token_at:
            self._first.observe(sequence.first_token_at - sequence.started)
            if len(sequence.ids) > 1:
                taken = sequence.last_token_at - sequence.first_token_at
                self._between.observe(taken / (len(sequence.ids) - 1))

    def text(self, count: int) -> bytes:
        running = len(self._engine.scheduler.running)
        self._requests.labels("running").set(running)
        self._requests.labels("waiting").set(max(0, count - running))
        for kind in (GLOBAL, LOCAL):
            self._pages.labels(kind).set(self._engine.pages.in_use(kind))
        return generate_latest(self._registry)
