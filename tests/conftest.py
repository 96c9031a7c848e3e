"""Fixtures that every room of the tests may use."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Material:
    """The real things that `make material` fetches."""

    tokenizer_dir: Path  # Gemma 3's tokenizer.json and tokenizer_config.json
    gguf_270m: Path  # Gemma 3 270M base, Q4_K_M


@pytest.fixture(scope="session")
def material() -> Material:
    root = Path(os.environ.get("SEAVLM_MATERIAL", ROOT / ".material"))
    found = Material(root / "tokenizer", root / "gemma-3-270m-q4_k_m.gguf")
    for path in (found.tokenizer_dir / "tokenizer.json", found.gguf_270m):
        if not path.exists():
            pytest.fail(f"{path} is missing: run `make material`")
    return found


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT
