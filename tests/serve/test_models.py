"""Several models behind one address."""

from __future__ import annotations

import httpx
import pytest

from seavlm.engine.vlm import load
from seavlm.errors import SeavlmError
from seavlm.serve.engine_backend import EngineBackend
from seavlm.serve.server import Server, Settings
from tests.serve.conftest import serving_backends


def test_each_answers_to_its_name(elephant: str) -> None:
    models = [load(name, device="cpu") for name in ("nano", "nano-global")]
    with serving_backends([EngineBackend(vlm) for vlm in models], Settings()) as live:
        listed = httpx.get(f"{live.url}/v1/models").json()["data"]
        assert [one["id"] for one in listed] == ["nano", "nano-global"]
        parts = [{"type": "image_url", "image_url": {"url": elephant}}, {"type": "text", "text": "Apa ini?"}]
        asked = [{"role": "user", "content": parts}]
        for name, vlm in zip(("nano", "nano-global"), models, strict=True):
            body = {"model": name, "messages": asked, "temperature": 0, "max_tokens": 6}
            answer = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=60).json()
            assert answer["model"] == name
            expected = load(name, device="cpu").generate(asked, temperature=0, max_new_tokens=6)
            assert answer["choices"][0]["message"]["content"] == expected.text and vlm.name == name
        del body["model"]
        answer = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["model"] == "nano"
        wrong = httpx.post(f"{live.url}/v1/chat/completions", json=body | {"model": "gpt"}, timeout=60)
        assert wrong.status_code == 404 and "nano-global" in wrong.json()["error"]["message"]
        told = httpx.get(f"{live.url}/metrics").text
        assert 'seavlm_generated_tokens_total{model="nano-global"}' in told
    with pytest.raises(SeavlmError, match="same name"):
        Server([EngineBackend(models[0]), EngineBackend(models[0])], Settings())
