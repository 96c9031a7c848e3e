"""A base model from nothing: small, whole, and able to read what it will be taught."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import seavlm
from seavlm.errors import SeavlmError
from seavlm.manifest import read_manifest
from seavlm.recipe import Init
from seavlm.train import init
from seavlm.weights.checkpoint import open_checkpoint

SHAPE: dict[str, Any] = {
    "text": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
    "vision": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
               "image_size": 28, "patch_size": 7},
    "mm_tokens_per_image": 4,
}  # fmt: skip


def test_a_model_from_nothing_answers(material: Any, tmp_path: Path) -> None:
    cfg = Init(tokenizer=str(material.tokenizer_dir), concepts=["food-fruit"], **SHAPE)
    metrics = init.run(cfg, out=tmp_path, seed=0, progress=False)
    assert read_manifest(tmp_path)["metrics"]["parameters"] == metrics["parameters"]
    vlm = seavlm.load(tmp_path / "model")
    assert vlm.tokenizer.vocab_size == metrics["vocabulary"] < 14_000
    text = "ທຸລຽນ"  # durian: a fruit's name, so it is in the vocabulary
    assert vlm.tokenizer.decode(vlm.tokenizer.encode(text)) == text
    picture = {"type": "image", "path": str(Path(__file__).parents[2] / "docs" / "pineapple.png")}
    asked = [{"role": "user", "content": [picture, {"type": "text", "text": "ນີ້ແມ່ນຫຍັງ?"}]}]
    assert vlm.generate(asked, max_new_tokens=2, temperature=0).token_ids
    again = init.run(cfg, out=tmp_path / "again", seed=0, progress=False)
    assert again["parameters"] == metrics["parameters"]
    name = "model.safetensors"
    assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "again" / "model" / name).read_bytes()


def test_the_tower_of_another_model_is_taken_bit_for_bit(
    material: Any, model_dir: Path, text_model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = shutil.copytree(model_dir, tmp_path / "other", dirs_exist_ok=True)
    history = {"init": {"metrics": {"tower": {"drawings": 7}, "carbon": {"hours": 1}}}}
    (other / "manifest.json").write_text(json.dumps(history), encoding="utf-8")
    plain = {"tokenizer": str(material.tokenizer_dir), "concepts": ["food-fruit"], "text": SHAPE["text"]}
    metrics = init.run(
        Init(**plain, tower=str(other), mm_tokens_per_image=4), out=tmp_path / "new", seed=0, progress=False
    )
    assert metrics["tower"] == {"drawings": 7, "carbon": {"hours": 1}}  # where it comes from goes along
    assert read_manifest(tmp_path / "new")["inputs"]["tower"]
    theirs, ours = open_checkpoint(other), open_checkpoint(tmp_path / "new" / "model")
    names = [name for name in theirs.names() if name.startswith("vision_tower.")]
    assert names and ours.config.vision == theirs.config.vision
    for name in names:
        assert torch.equal(ours.get(name), theirs.get(name).to(torch.bfloat16)), name
    with pytest.raises(SeavlmError, match="no vision tower"):
        init.run(Init(**plain, tower=str(text_model_dir)), out=tmp_path / "blind", seed=0, progress=False)
    for both in ({"tower": "nano", "vision": SHAPE["vision"]}, {}, {"tower": "nano", "distill": {}}):
        with pytest.raises(ValueError, match="describes the tower"):
            Init(**plain, **both)


def test_an_unknown_key_of_the_shape_is_told(tmp_path: Path) -> None:
    wrong = {**SHAPE, "text": {**SHAPE["text"], "hidden_sise": 3}}
    with pytest.raises(SeavlmError, match="hidden_sise"):
        init.run(Init(tokenizer="nano", **wrong), out=tmp_path, seed=0, progress=False)
    assert not (tmp_path / "model").exists()
