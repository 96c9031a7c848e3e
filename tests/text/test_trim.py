from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from seavlm.text.language import LANGUAGES
from seavlm.text.tokenizer import SPECIALS, Tokenizer
from seavlm.text.trim import trim_tokenizer

OTHER_TEXTS = [
    "Привет, мир 🇱🇦👩‍👩‍👧!",
    "ꯃꯩꯇꯩ",
    "\t<table>\n\n\n" + " " * 50,
    "<bos><unused5>",
    "日本語のテキスト",
]


@pytest.fixture(scope="module")
def trimmed(material, article1, tmp_path_factory):
    out = tmp_path_factory.mktemp("trimmed")
    kept = trim_tokenizer(material.tokenizer_dir, out, article1.values())
    return out, kept, Tokenizer.from_dir(out)


@pytest.mark.parametrize("code", LANGUAGES)
def test_texts_of_the_corpus_come_out_as_before(code, trimmed, tokenizer, article1):
    _, kept, small = trimmed
    text = article1[code]
    for part in (text, *text.split(". "), *text.split()):  # also what the corpus has within
        ids = small.encode(part)
        if part == text:
            assert [kept[i] for i in ids] == tokenizer.encode(part)
        assert small.decode(ids) == part


@pytest.mark.parametrize("text", OTHER_TEXTS)
def test_other_texts_round_trip(text, trimmed, tokenizer):
    _, _, small = trimmed
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert not set(ids) & set(small.specials.values())


def test_kept_ids(trimmed, tokenizer):
    _, kept, small = trimmed
    assert kept == sorted(set(kept)) and kept[:4] == [0, 1, 2, 3]
    assert len(kept) == small.vocab_size < 3000
    assert set(small.specials) == set(SPECIALS)
    for name, new in small.specials.items():
        assert kept[new] == tokenizer.specials[name]
    for byte in range(256):
        piece = f"<0x{byte:02X}>"
        assert kept[small._backend.token_to_id(piece)] == tokenizer._backend.token_to_id(piece)
    for letter in map(chr, range(0x20, 0x7F)):
        assert [kept[i] for i in small.encode(letter)] == tokenizer.encode(letter)


def test_merges_are_closed(trimmed):
    model = trimmed[2].spec()["model"]
    vocab, made = model["vocab"], {left + right for left, right in model["merges"]}
    assert all({a, b, a + b} <= vocab.keys() for a, b in model["merges"])
    alone = [p for p in vocab if len(p) > 1 and p not in made and not p.startswith("<")]
    assert alone == []  # every piece can be reached
    assert sorted(vocab.values()) == list(range(len(vocab)))


def test_loads_in_transformers(trimmed, article1):
    out, kept, small = trimmed
    theirs = AutoTokenizer.from_pretrained(out)
    assert len(theirs) == len(kept)
    for text in [*article1.values(), *OTHER_TEXTS[:3]]:
        assert theirs(text).input_ids == [small.bos_id, *small.encode(text)]
    for name in ("pad", "bos", "image", "boi", "eoi"):
        assert getattr(theirs, f"{name}_token_id") == getattr(small, f"{name}_id")
    messages = [{"role": "user", "content": article1["lo"]}]
    assert small.start_of_turn_id in theirs.apply_chat_template(messages, return_dict=False)
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == small.chat_template


def test_trimming_again_changes_nothing(trimmed, article1, tmp_path):
    out, kept, _ = trimmed
    assert trim_tokenizer(out, tmp_path, article1.values()) == list(range(len(kept)))
    assert (tmp_path / "tokenizer.json").read_text() == (out / "tokenizer.json").read_text()


def test_from_a_gguf_file(material, from_gguf, tmp_path, trimmed, article1, monkeypatch):
    monkeypatch.setattr(Tokenizer, "from_gguf", lambda path: from_gguf)  # read once for all tests
    assert trim_tokenizer(material.gguf_270m, tmp_path, article1.values()) == trimmed[1]
