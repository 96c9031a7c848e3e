"""`seavlm serve` as a process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import httpx


def test_it_listens_beyond_this_machine_only_with_a_key(cli: Callable) -> None:
    done = cli("serve", "nano", "--host", "0.0.0.0")
    assert done.code == 2 and "no API key" in done.err and len(done.err.strip().splitlines()) == 1
    assert cli("serve", "nowhere").code == 2


def test_replies_under_way_are_finished_when_it_is_told_to_end() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "seavlm.cli", "serve", "nano", "--device", "cpu", "--port", str(port)],
        stderr=subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if k != "SEAVLM_API_KEY"},
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health/ready").status_code == 200:
                break
        time.sleep(0.1)
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 300, "temperature": 1.5}
    body |= {"stream": True, "logit_bias": {str(i): -100 for i in (1, 106)}, "seed": 1}
    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(60)
    process.send_signal(signal.SIGTERM)
    reader.join(60)
    _, said = process.communicate(timeout=60)
    assert "data: [DONE]" in lines and '"finish_reason": ' in lines[-4]
    assert process.returncode in (0, -signal.SIGTERM) and "Traceback" not in said
    assert '"status": 200' in said and "temperature" not in said  # no prompts in the log
