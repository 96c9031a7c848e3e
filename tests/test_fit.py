"""`seavlm fit`: what it says is what a process takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from seavlm import fit as module
from seavlm.fit import fit
from seavlm.weights.refs import resolve


@pytest.mark.parametrize("how", [{"quantize": "int8"}, {"dtype": "float32"}])
def test_it_is_what_a_process_takes(root: Path, how: dict[str, str]) -> None:
    """nano, two requests with a picture each; within 15 % (benchmarks/fit.json has the real model)."""
    case = {"model": "nano", "context": 400, "batch": 2, "images": 1, **how}
    command = [sys.executable, root / "benchmarks" / "fit.py", "--case", json.dumps(case)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    measured = int(done.stdout.split()[-1])
    said = fit(resolve("nano"), context=400, batch=2, images=1, **how)
    assert said.peak == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_it_is_what_fine_tuning_takes(root: Path, train: str) -> None:
    """nano, three steps of two passes; within 15 %, where the allocator gives back what is freed."""
    case = {"model": "nano", "context": 256, "batch": 8, "images": 0, "dtype": "float32", "train": train}
    command = [sys.executable, root / "benchmarks" / "fit.py", "--case", json.dumps(case)]
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc keeps smaller pieces for the next one
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=exact)
    measured = int(done.stdout.split()[-1])
    said = fit(resolve("nano"), context=256, batch=8, train=train)
    assert said.peak == pytest.approx(measured, rel=0.15)
    base = said.parts["Python, libraries, tokenizer"]
    assert said.peak - base == pytest.approx(measured - base, rel=0.25)


def test_what_would_make_training_fit(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    nano = resolve("nano")
    lora, full = (fit(nano, context=256, batch=8, train=how) for how in ("lora", "full"))
    assert lora.peak < full.peak and lora.parts["moments of AdamW"] < full.parts["moments of AdamW"] / 5
    monkeypatch.setattr(module, "available_memory", lambda: (lora.peak + full.peak) // 2)
    done = cli("fit", "nano", "--context", "256", "--batch", "8", "--train", "full")
    assert done.code == 1 and "--train lora" in done.out and "--batch 4" in done.out
    assert "--recompute" in done.out
    done = cli("fit", "nano", "--quantize", "int3")
    assert done.code == 2 and "int8 or stored" in done.err
    done = cli("fit", "nano", "--train", "lore")
    assert done.code == 2 and "lora" in done.err


def test_the_command_shows_the_parts_and_the_sum(cli: Callable) -> None:
    done = cli("fit", "nano", "--context", "300", "--quantize", "int8", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["peak"] >= sum(found["parts"].values()) > found["parts"]["weights"] > 0
    shown = cli("fit", "nano", "--context", "300")
    assert "pages of the KV cache" in shown.out and "MiB" in shown.out


def test_more_takes_more(cli: Callable) -> None:
    nano = resolve("nano")
    small, long, many = (
        fit(nano, context=c, batch=b, quantize="int8") for c, b in ((64, 1), (400, 1), (400, 8))
    )
    pages = [one.parts["pages of the KV cache"] for one in (small, long, many)]
    assert pages[0] < pages[1] < pages[2]


def test_what_would_make_it_fit(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    nano = resolve("nano")
    int8 = fit(nano, context=400, batch=8, quantize="int8").peak
    plain = fit(nano, context=400, batch=8).peak
    assert int8 < plain
    monkeypatch.setattr(module, "available_memory", lambda: (int8 + plain) // 2)
    done = cli("fit", "nano", "--context", "400", "--batch", "8")
    assert done.code == 1 and "does not fit" in done.out and "--quantize int8" in done.out
    monkeypatch.setattr(module, "available_memory", lambda: 2**20)
    done = cli("fit", "nano", "--context", "400")
    assert done.code == 1 and "a smaller model" in done.out


def test_what_the_model_cannot_do_is_said(cli: Callable, material: object) -> None:
    done = cli("fit", "nano", "--context", "100000000")
    assert done.code == 2 and "at most" in done.err
    done = cli("fit", material.gguf_270m, "--images", "1")  # type: ignore[attr-defined]
    assert done.code == 2 and "text-only" in done.err
