"""Tiny random models as transformers writes them: one that sees, one that only reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

TEXT: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 20,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "vision_use_head": False,
}
IDS = {"image_token_index": 290, "boi_token_index": 288, "eoi_token_index": 289}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(scope="session")
def references() -> dict[str, Any]:
    """ "vl" and "text": transformers models, with norm weights and biases that are not all zero or one."""
    import transformers

    torch.manual_seed(0)
    vl = transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, **IDS)
    models = {
        "vl": transformers.Gemma3ForConditionalGeneration(vl),
        "text": transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TEXT)),
    }
    for model in models.values():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return {kind: model.eval() for kind, model in models.items()}


@pytest.fixture(scope="session")
def originals(references: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same, saved by transformers in one file; do not change them."""
    root = tmp_path_factory.mktemp("originals")
    for kind, model in references.items():
        model.save_pretrained(root / kind)
    return {kind: root / kind for kind in references}


@pytest.fixture(params=["vl", "text"])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
