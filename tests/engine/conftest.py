"""The small model, loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from seavlm.engine.vlm import VLM, load


@pytest.fixture
def vlm(model_dir: Path) -> VLM:
    return load(model_dir, device="cpu")
