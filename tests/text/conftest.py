from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from seavlm.text.tokenizer import Tokenizer
from seavlm.text.trim import trim_tokenizer

# Article 1 of the Universal Declaration of Human Rights.
ARTICLE_1: dict[str, str] = json.loads(Path(__file__).with_name("article1.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def article1() -> dict[str, str]:
    return ARTICLE_1


@pytest.fixture(scope="session")
def tokenizer(material) -> Tokenizer:
    return Tokenizer.from_dir(material.tokenizer_dir)


@pytest.fixture(scope="session")
def from_gguf(material) -> Tokenizer:
    """The tokenizer rebuilt from the metadata of the 270M weights."""
    return Tokenizer.from_gguf(material.gguf_270m)


@pytest.fixture(scope="session")
def reference(material):
    """transformers' tokenizer."""
    return AutoTokenizer.from_pretrained(material.tokenizer_dir)


@pytest.fixture(scope="session")
def english_only(material, article1, tmp_path_factory) -> Tokenizer:
    """A tokenizer that has bytes and nothing else for every script but English."""
    out = tmp_path_factory.mktemp("english")
    trim_tokenizer(material.tokenizer_dir, out, [article1["en"]])
    return Tokenizer.from_dir(out)
