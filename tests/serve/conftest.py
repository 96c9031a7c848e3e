"""A live server, on a port of its own."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn

from seavlm.engine import kernels
from seavlm.engine.vlm import load
from seavlm.serve.app import Server, Settings, create_app


@dataclass
class Live:
    """A server that answers."""

    url: str
    server: Server

    def idle(self, seconds: float = 5) -> bool:
        """Nothing is under way, or soon nothing is."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.server.worker.count == 0 and self.server.vlm.engine.idle:
                return True
            time.sleep(0.02)
        return False


@contextlib.contextmanager
def serving(settings: Settings, **engine: int) -> Iterator[Live]:
    quantize = None if kernels.library() is None else "int8"
    app = create_app(load("nano", device="cpu", quantize=quantize, **engine), settings)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        runner = uvicorn.Server(uvicorn.Config(app, log_config=None))
        thread = threading.Thread(target=lambda: asyncio.run(runner.serve(sockets=[sock])), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        for _ in range(200):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health/ready").status_code == 200:
                    break
            time.sleep(0.05)
        try:
            yield Live(url, app.state.server)
        finally:
            runner.should_exit = True
            thread.join(20)


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    with serving(Settings()) as found:
        yield found


@pytest.fixture(scope="session")
def elephant(root: Path) -> str:
    """A picture as a data: URI."""
    data = base64.b64encode((root / "docs" / "elephant.png").read_bytes()).decode()
    return f"data:image/png;base64,{data}"
