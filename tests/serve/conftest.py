"""A live server, on a port of its own."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn

from seavlm.engine import kernels
from seavlm.engine.vlm import VLM, load
from seavlm.serve.app import create_app
from seavlm.serve.backend import Backend
from seavlm.serve.engine_backend import EngineBackend
from seavlm.serve.run import Patient
from seavlm.serve.server import Server, Settings


@dataclass
class Live:
    """A server that answers."""

    url: str
    server: Server
    stop: Callable[[], None]

    @property
    def backend(self) -> EngineBackend:
        """Of the first model."""
        return next(one for one in self.server.backends.values() if isinstance(one, EngineBackend))

    @property
    def vlm(self) -> VLM:
        return self.backend.vlm

    def idle(self, seconds: float = 5) -> bool:
        """Nothing is under way, or soon nothing is."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.backend.count == 0 and self.vlm.engine.idle:
                return True
            time.sleep(0.02)
        return False


@contextlib.contextmanager
def serving(
    settings: Settings, max_queue: int = 256, models: Sequence[str] = ("nano",), **engine: int
) -> Iterator[Live]:
    quantize = None if kernels.library() is None else "int8"
    vlms = [load(model, device="cpu", quantize=quantize, **engine) for model in models]
    with serving_backends([EngineBackend(vlm, max_queue=max_queue) for vlm in vlms], settings) as live:
        yield live


@contextlib.contextmanager
def serving_backends(backends: Sequence[Backend], settings: Settings) -> Iterator[Live]:
    app = create_app(backends, settings)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        runner = uvicorn.Server(uvicorn.Config(app, log_config=None, http=Patient))
        thread = threading.Thread(target=lambda: asyncio.run(runner.serve(sockets=[sock])), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        for _ in range(200):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health/ready").status_code == 200:
                    break
            time.sleep(0.05)

        def stop() -> None:
            runner.should_exit = True
            thread.join(20)

        try:
            yield Live(url, app.state.server, stop)
        finally:
            stop()


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    with serving(Settings()) as found:
        yield found


@pytest.fixture(scope="session")
def elephant(root: Path) -> str:
    """A picture as a data: URI."""
    data = base64.b64encode((root / "docs" / "elephant.png").read_bytes()).decode()
    return f"data:image/png;base64,{data}"
