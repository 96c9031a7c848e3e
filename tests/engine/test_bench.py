"""What `bench` and `doctor` measure is there, plausible, and written down."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seavlm.doctor import advice, examine
from seavlm.engine.bench import declaration, divergence
from seavlm.engine.vlm import load
from seavlm.text.language import LANGUAGES


def test_the_declaration_is_there_in_all_languages() -> None:
    assert set(declaration()) == set(LANGUAGES)
    assert all(len(text) > 1500 for text in declaration().values())


def test_bench_measures_and_writes(cli: Callable, tmp_path: Path) -> None:
    done = cli("bench", "nano", "--repeats", "1", "--out", tmp_path)
    assert done.code == 0, done.err
    told = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    found = {(row["work"], row.get("batch"), row.get("context")): row for row in told["rows"]}
    assert found[("prefill", None, 128)]["value"] > found[("decode", 1, 128)]["value"] > 0
    assert 0.2 < found[("cold start", None, None)]["value"] < 60
    assert 100 < found[("peak memory", None, None)]["value"] < 4000
    assert {row["engine"] for row in told["rows"]} == {"seavlm auto"} and told["machine"]["cores"]
    assert "decode, batch 8" in done.out
    with Image.open(tmp_path / "bench.png") as drawn:
        assert np.asarray(drawn.convert("L")).std() > 10


def test_divergence_is_zero_to_itself_and_grows_with_noise() -> None:
    exact, other = load("nano", dtype="float32"), load("nano", dtype="bfloat16")
    assert max(divergence(exact, exact).values()) == pytest.approx(0, abs=1e-9)
    assert 0 < max(divergence(other, exact).values()) < 0.1


def test_doctor_tells_what_is_there_and_what_would_help(cli: Callable) -> None:
    done = cli("doctor", "--json")
    assert done.code == 0
    told = json.loads(done.out)["found"]
    assert told["cores"] >= 1 and 0.5 < told["memory read, GB/s"] < 2000
    text = cli("doctor").out
    assert "memory read, GB/s" in text and "tokens a second" in text.replace("\n", " ")
    found = {**examine(), "kernels": None, "compiler": None}
    assert any("apt install g++" in line for line in advice(found))
