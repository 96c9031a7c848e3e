"""What our own description of the interface promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.conftest import Live

JSON = {"content-type": "application/json"}
HELLO = [{"role": "user", "content": "x"}]
PATHS = {
    "ChatRequest": ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 2}),
    "CompletionRequest": ("/v1/completions", {"prompt": "x", "max_tokens": 2}),
    "ResponsesRequest": ("/v1/responses", {"input": "x", "max_output_tokens": 2}),
}
NUMBERS = [
    *("-1", "0", "1", "-0.0", "0.5", "1e308", "-1e308", "1e999", "5e-324", "NaN", "Infinity", "-Infinity"),
    *(str(2**31), str(2**63), str(2**64), "9" * 400, "9" * 5000, "1." + "9" * 400),
    *('"1"', '"x"', "true", "null", "[]", "{}", "[1e999]", f"[{2**70}]"),
    *('{"1": NaN}', '{"-1": 1}', f'{{"{2**70}": 1}}', '{"1": 1e999}'),
]


def test_no_number_makes_the_server_fail(live: Live) -> None:
    """Each numeric field that the description names, with each odd value: refused or served."""
    described = httpx.get(f"{live.url}/openapi.json").json()["components"]["schemas"]
    asked, served = 0, 0
    with httpx.Client(base_url=live.url, timeout=60) as client:
        for name, (path, body) in PATHS.items():
            for field, schema in described[name]["properties"].items():
                if not {"number", "integer"} & set(kinds(schema)):
                    continue
                for value in NUMBERS:
                    rest = json.dumps({key: one for key, one in body.items() if key != field})
                    text = f'{{"{field}": {value}, "max_tokens": 2, {rest[1:]}'
                    answer = client.post(path, content=text.encode(), headers=JSON)
                    assert answer.status_code in (200, 400), (path, field, value, answer.text)
                    if answer.status_code == 400:
                        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
                        assert len(answer.text) < 1000
                    asked, served = asked + 1, served + (answer.status_code == 200)
    assert asked > 700 and served > 50
    assert live.idle()


def kinds(schema: Any) -> list[str]:
    """All types that occur in a schema."""
    if isinstance(schema, list):
        return [kind for one in schema for kind in kinds(one)]
    if not isinstance(schema, dict):
        return []
    own = [schema["type"]] if isinstance(schema.get("type"), str) else []
    return own + [kind for one in schema.values() for kind in kinds(one)]


@pytest.mark.slow
def test_schemathesis_finds_no_fault(live: Live, tmp_path: Path) -> None:
    """In an environment of its own."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path], check=True)
    install = [tmp_path / "bin" / "python", "-m", "pip", "install", "--quiet", "schemathesis>=4"]
    subprocess.run(install, check=True, timeout=600)
    done = subprocess.run(
        [
            tmp_path / "bin" / "schemathesis",
            "run",
            f"{live.url}/openapi.json",
            *("--checks", "not_a_server_error"),
            *("--max-examples", "100"),
            *("--request-timeout", "60"),
            *("--seed", "1"),
        ],
        capture_output=True,
        text=True,
        timeout=1500,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert live.idle(30)
