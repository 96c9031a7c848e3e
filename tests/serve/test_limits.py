"""Keys and their allowances."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from seavlm.errors import SeavlmError
from seavlm.serve.limits import Allowance, Key, Keys
from seavlm.serve.server import Settings
from tests.serve.conftest import Live, serving


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def ask(live: Live, key: str, text: str = "hello", **more: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0} | more
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{live.url}/v1/chat/completions", json=body, headers=headers, timeout=30)


def test_an_allowance_fills_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("seavlm.serve.limits.time.monotonic", lambda: now)
    some = Allowance(60)
    assert some.wait(60) == 0 and some.wait(61) == 1
    some.take(90)
    assert some.wait() == 31
    now += 31
    assert some.wait() == 0 and some.wait(2) == 1


def test_each_key_has_its_own(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(
        f"keys:\n  - {{name: few, sha256: {digest('few')}, requests_per_minute: 2}}\n"
        f"  - {{name: short, sha256: {digest('short')}, tokens_per_minute: 30}}\n"
        f"  - {{name: one, sha256: {digest('one')}, parallel: 1}}\n"
    )
    with serving(Settings(keys=Keys.read(path))) as live:
        assert ask(live, "other").status_code == 401
        assert [ask(live, "few").status_code for _ in range(3)] == [200, 200, 429]
        refused = ask(live, "few")
        assert 0 < int(refused.headers["retry-after"]) <= 30
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert ask(live, "short", text="x " * 60).status_code == 200
        assert live.idle() and ask(live, "short").status_code == 429
        assert ask(live, "one").status_code == 200 and ask(live, "one", n=2).status_code == 400
        assert ask(live, "one", n=1).status_code == 200


def test_nobody_finds_what_others_have_asked(elephant: str) -> None:
    keys = Keys(keys=[Key(name=name, sha256=digest(name)) for name in ("a", "b")])
    content = [
        {"type": "image_url", "image_url": {"url": elephant}},
        {"type": "text", "text": "Apa ini? " * 20},
    ]
    with serving(Settings(keys=keys)) as live:
        found = []
        for key in ("a", "b", "a"):
            answer = ask(live, key, messages=[{"role": "user", "content": content}]).json()
            found.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            assert answer["choices"][0]["message"]["content"]
        assert found[:2] == [0, 0] and found[2] > 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no key"),
        ("keys: [{name: x, sha256: abc}]", "sha256"),
        (f"keys: [{{name: x, sha256: {digest('x')}, limit: 3}}]", "limit"),
        (f"keys: [{{name: x, sha256: {digest('x')}}}, {{name: y, sha256: {digest('x')}}}]", "the same"),
    ],
)
def test_a_broken_file_is_told(tmp_path: Path, cli: Callable, text: str, said: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(SeavlmError, match=said):
        Keys.read(path)
    assert cli("serve", "nano", "--keys", str(path)).code == 2
