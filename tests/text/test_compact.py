"""The compact tokenizer gives the library's ids, of every text."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from seavlm.engine.bench import declaration
from seavlm.errors import SeavlmError
from seavlm.text import compact
from seavlm.text.compact import Compact, write_compact
from seavlm.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, material: Any) -> Path:
    folder = tmp_path_factory.mktemp("compact")
    for file in material.tokenizer_dir.iterdir():
        shutil.copyfile(file, folder / file.name)
    assert write_compact(folder)
    return folder


@pytest.fixture(scope="module")
def both(folder: Path, material: Any) -> tuple[Tokenizer, Tokenizer]:
    quick, library = Tokenizer.from_dir(folder), Tokenizer.from_dir(material.tokenizer_dir)
    assert isinstance(quick._backend, Compact) and not isinstance(library._backend, Compact)
    return quick, library


def test_text_of_eleven_languages(both: tuple[Tokenizer, Tokenizer]) -> None:
    quick, library = both
    for text in declaration().values():
        ids = quick.encode(text)
        assert ids == library.encode(text) and quick.decode(ids) == text
        for start in range(0, 1500, 37):
            piece = text[start : start + 61]
            assert quick.encode(piece) == library.encode(piece)


def test_oddities(both: tuple[Tokenizer, Tokenizer]) -> None:
    quick, library = both
    pieces = [
        " ", "  ", "\n", "\n\n", "\t\t", "\u2581", "\u2581\u2581\u2581", "<table>", "</td>", "<unused3>",
        "<unused99999>", "<bos>", "<start_of_image>", "[multimodal]", "<mask>", "a", "the", "Z", "0",
        "1234567",
        "\U0001f418", "\u200d", "\u0301", "\ue000", "\x00", "\U0010ffff", "\ud800",
        "ກ", "ក្ក", "မြန်", "நி", "的", "Đ", "<", ">", "<0x41>", "\r\n", "==",
    ]  # fmt: skip
    chance = random.Random(0)
    for _ in range(1500):
        text = "".join(chance.choices(pieces, k=chance.randint(0, 25)))
        assert quick.encode(text) == library.encode(text), repr(text)
    for _ in range(300):
        letters = [
            chance.choice([chance.randrange(32, 127), chance.randrange(0x0E00, 0x1100)]) for _ in range(30)
        ]
        text = "".join(map(chr, letters))
        assert quick.encode(text) == library.encode(text), repr(text)


def test_long_texts_go_to_the_library(both: tuple[Tokenizer, Tokenizer]) -> None:
    quick, library = both
    text = "\n".join(declaration().values()) * 2
    assert len(text) > compact.LONGEST and quick.encode(text) == library.encode(text)
    assert quick.encode_batch([text, "a b"]) == library.encode_batch([text, "a b"])


def test_it_knows_the_same_tokens(both: tuple[Tokenizer, Tokenizer]) -> None:
    quick, library = both
    assert quick.vocab_size == library.vocab_size and quick.specials == library.specials
    for i in [*range(0, quick.vocab_size, 997), quick.vocab_size - 1, *quick.specials.values()]:
        assert quick.token_bytes(i) == library.token_bytes(i)
    with pytest.raises(SeavlmError, match="outside the vocabulary"):
        quick.token_bytes(quick.vocab_size)


def test_it_stands_for_its_own_file_only(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", compact.NAME):
        shutil.copyfile(folder / name, tmp_path / name)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    assert not isinstance(Tokenizer.from_dir(tmp_path)._backend, Compact)
    shutil.copyfile(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / compact.NAME).write_bytes((folder / compact.NAME).read_bytes()[:-999])
    with pytest.raises(SeavlmError, match="is damaged"):
        Tokenizer.from_dir(tmp_path)
    spec["model"]["byte_fallback"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    assert not write_compact(tmp_path)
