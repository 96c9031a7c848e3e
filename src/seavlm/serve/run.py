"""The server's process: what it listens with, and how it begins and ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 30.0  # that a client may take to send the head of a request
GRACE = 30  # seconds for the replies under way when it is told to end


class Patient(H11Protocol):
    """HTTP, for clients that say something: who does not send a request's head in time is hung up on. Between
    two requests that is uvicorn's own keep-alive, which ends with the first byte of the next."""

    _too_late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait(True)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait(self.conn.their_state is h11.IDLE)  # part of a head has come, no more

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait(False)
        super().connection_lost(exc)

    def _wait(self, for_head: bool) -> None:
        if for_head and self._too_late is None:
            self._too_late = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif not for_head and self._too_late is not None:
            self._too_late.cancel()
            self._too_late = None


class Draining(uvicorn.Server):
    """Not ready any more from the signal on, until which nothing changes."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.config.app.state.server.draining = True  # type: ignore[union-attr]
        super().handle_exit(sig, frame)


def run(app: FastAPI, host: str, port: int) -> None:
    """Until a signal ends it. SeavlmError where a backend cannot begin."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn.access").disabled = True  # the server has a line of its own for each request
    logging.getLogger("httpx").setLevel(logging.WARNING)
    _many_files()
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(_run(app, host, port))


async def _run(app: FastAPI, host: str, port: int) -> None:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    try:
        before = signal.signal(  # a vLLM that is loading does not outlive us
            signal.SIGTERM, lambda *_: task is not None and loop.call_soon_threadsafe(task.cancel)
        )
        await app.state.server.start()
        signal.signal(signal.SIGTERM, before)
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            http=Patient,
            log_config=None,
            timeout_graceful_shutdown=GRACE,
            timeout_keep_alive=30,
            h11_max_incomplete_event_size=64 * 1024,
            server_header=False,
        )
        await Draining(config).serve()
    finally:
        await app.state.server.stop()


def _many_files() -> None:
    """As many connections as the system lets us have."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
