"""Broken things that people hand in: one line says what and what to do, nothing is left half-written."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file


def told_in_one_line(done, *words: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr that holds `words`."""
    assert done.code == 2, done
    assert done.out == ""
    assert done.err.startswith("seavlm: error: ") and done.err.count("\n") == 1, done.err
    for word in words:
        assert word in done.err, done.err


def png(tmp_path: Path, name: str = "p.png", size: tuple[int, int] = (64, 48)) -> Path:
    path = tmp_path / name
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
        path
    )
    return path


def test_truncated_png(cli: Callable, tmp_path: Path) -> None:
    path = png(tmp_path)
    data = path.read_bytes()
    for keep in (len(data) // 2, 40, 12, 0):
        path.write_bytes(data[:keep])
        told_in_one_line(cli("ask", path, "What is this?"), "p.png")


def test_one_pixel(cli: Callable, tmp_path: Path) -> None:
    told_in_one_line(cli("ask", png(tmp_path, size=(1, 1)), "What is this?"), "p.png", "1x1", "real picture")


def test_text_file_named_png(cli: Callable, tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("buy mangoes", encoding="utf-8")
    told_in_one_line(cli("ask", path, "What is this?"), "notes.png", "not a picture", "PNG, JPEG")


def test_huge_header(cli: Callable, tmp_path: Path) -> None:
    """100,000 x 100,000 pixels in 57 bytes: refused by its header, before 30 GB are asked for."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    path = tmp_path / "bomb.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
        )
    )
    told_in_one_line(cli("ask", path, "What is this?"), "pixels")


def test_unknown_model(cli: Callable, tmp_path: Path) -> None:
    told_in_one_line(cli("ask", "hello", "--model", "nanoo"), "nanoo", "nano")


def test_wrong_recipe_key(cli: Callable, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\ntrain:\n  learning_rat: 1\n", encoding="utf-8")
    for verb in ("build", "train", "merge", "eval", "card"):
        told_in_one_line(cli(verb, recipe, "--out", tmp_path / "out"), 'unknown key "train.learning_rat"')
    assert not (tmp_path / "out").exists()
    told_in_one_line(cli("build", tmp_path / "none.yaml"), "no recipe at", "r.yaml")


def test_a_stage_before_its_turn_names_the_one_to_run(cli: Callable, tmp_path: Path, model_dir: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: r\nbase: {model_dir}\n", encoding="utf-8")
    for verb, first in (
        ("train", "data samples"),
        ("merge", "train"),
        ("eval", "data samples"),
        ("card", "eval"),
    ):
        told_in_one_line(cli(verb, recipe, "--out", tmp_path / "out"), f"First run: seavlm {first}")


@pytest.fixture
def sharded(model_dir: Path, tmp_path: Path) -> Path:
    """The small model, written in several files."""
    from seavlm.weights.checkpoint import open_checkpoint, save_checkpoint

    source = open_checkpoint(model_dir)
    folder = tmp_path / "sharded"
    tensors = ((name, source.get(name)) for name in source.names())
    save_checkpoint(folder, source.config, tensors, max_shard_bytes=60_000, copy_from=model_dir)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_sharded_model_answers_the_same(cli: Callable, sharded: Path, model_dir: Path) -> None:
    answers = [cli("ask", "What is this?", "-m", m, "--max-new-tokens", 8) for m in (sharded, model_dir)]
    assert answers[0] == answers[1] and answers[0].code == 0


def test_missing_shard(cli: Callable, sharded: Path, tmp_path: Path, model_dir: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    told_in_one_line(cli("ask", "hello", "-m", sharded), victim.name)
    out = tmp_path / "merged"
    told_in_one_line(cli("merge", sharded, model_dir, "--beta", 0.5, "--out", out), victim.name)
    assert not list(tmp_path.glob("merged*"))


def test_cut_off_shard(cli: Callable, sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-1000])
    told_in_one_line(cli("ask", "hello", "-m", sharded), victim.name)


def test_nan_in_a_checkpoint(cli: Callable, model_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    (file,) = broken.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][3, 5] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    told_in_one_line(cli("ask", "hello", "-m", broken), "layers.1.mlp.up_proj.weight", "NaN")
    out = tmp_path / "merged"
    told_in_one_line(
        cli("merge", broken, model_dir, "--beta", 0.5, "--out", out), "layers.1.mlp.up_proj.weight"
    )
    assert not list(tmp_path.glob("merged*"))


def test_not_a_model(cli: Callable, tmp_path: Path, model_dir: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    told_in_one_line(cli("ask", "hello", "-m", empty), "config.json")
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    told_in_one_line(cli("ask", "hello", "-m", other), "llama")
    (other / "config.json").write_text("{")
    told_in_one_line(cli("ask", "hello", "-m", other), "config.json")
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"GGUF" + b"\0" * 100)
    told_in_one_line(cli("ask", "hello", "-m", junk), "junk.gguf")


def test_a_tokenizer_that_does_not_belong(cli: Callable, model_dir: Path, material, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    shutil.copyfile(material.tokenizer_dir / "tokenizer.json", other / "tokenizer.json")
    told_in_one_line(cli("ask", "hello", "-m", other), "embedding rows", "tokenizer")


def test_questions_that_are_none(cli: Callable, tmp_path: Path, model_dir: Path) -> None:
    (tmp_path / "eval.parquet").write_text("nothing", encoding="utf-8")
    told_in_one_line(cli("eval", model_dir, "--data", tmp_path, "--out", tmp_path / "out"), "eval.parquet")
    assert not (tmp_path / "out").exists()
