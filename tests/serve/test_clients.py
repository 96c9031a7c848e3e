"""Clients that are not OpenAI's own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.conftest import Live

PACKAGES = ("ai@5", "@ai-sdk/openai-compatible@1", "zod@4")


def test_vercels_ai_sdk(live: Live, root: Path, tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("there is no npm")
    fetched = subprocess.run(
        ["npm", "install", "--silent", "--no-audit", "--no-fund", *PACKAGES],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    if fetched.returncode:
        pytest.skip(f"npm: {fetched.stderr[-200:]}")
    script = tmp_path / "ai_sdk.mjs"
    shutil.copy(root / "tests" / "serve" / script.name, script)
    done = subprocess.run(
        ["node", script, live.url, root / "docs" / "elephant.png"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["seen"] and told["seen"] == told["streamed"] and told["usage"]["totalTokens"] > 0
    assert set(told["object"]) == {"name", "legs"}
    assert told["calls"][0][0] == "weather" and told["results"] == 1


def test_langchain_and_instructor(live: Live, elephant: str, root: Path, tmp_path: Path) -> None:
    """In an environment of their own: what they need does not go with what we are tested with."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path], check=True)
    python = tmp_path / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "langchain-openai", "instructor"]
    subprocess.run(install, check=True, timeout=600)
    script = root / "tests" / "serve" / "other_clients.py"
    done = subprocess.run([python, script, live.url, elephant], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
