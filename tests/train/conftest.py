"""A whole small world to train in: a model of Gemma 3's shape with a byte tokenizer, and picture samples."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from seavlm.data.samples import write_samples
from seavlm.model.config import Gemma3Config, TextConfig, VisionConfig
from seavlm.model.gemma3 import Gemma3
from seavlm.recipe import Train
from seavlm.text.tokenizer import SPECIALS, Tokenizer
from seavlm.weights.checkpoint import save_checkpoint

MM_TOKENS = 4


def byte_tokenizer() -> Tokenizer:
    """Every byte a token: the specials, then <0x00> to <0xFF>."""
    specials = [{"id": i, "content": name, "special": True} for i, name in enumerate(SPECIALS)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    vocab = {name: i for i, name in enumerate([*SPECIALS, *(f"<0x{b:02X}>" for b in range(256)), "\u2581"])}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**token, **flags} for token in specials],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "ByteFallback"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
    }
    return Tokenizer(json.dumps(spec))


def small_config(tokenizer: Tokenizer) -> Gemma3Config:
    return Gemma3Config(
        text=TextConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=24,
            layer_types=("sliding_attention", "full_attention"),
            max_position_embeddings=1024,
            initializer_range=0.1,
        ),
        vision=VisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
        ),
        mm_tokens_per_image=MM_TOKENS,
        image_token_index=tokenizer.image_id,
        boi_token_index=tokenizer.boi_id,
        eoi_token_index=tokenizer.eoi_id,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_ids=(tokenizer.eos_id, tokenizer.end_of_turn_id),
        dtype="float32",
    )


def picture(colour: tuple[int, int, int], seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 60, (28, 28, 3)) + np.array(colour) // 2
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, format="PNG")
    return file.getvalue()


COLOURS = {"merah": (255, 0, 0), "hijau": (0, 255, 0), "biru": (0, 0, 255), "สีขาว": (255, 255, 255)}


def sample_rows(count: int) -> list[dict[str, Any]]:
    """Questions about one picture, about two, and without one; of differing lengths."""
    rows = []
    names = list(COLOURS)
    for i in range(count):
        name, other = names[i % 4], names[(i // 4) % 4]
        images, parts = [picture(COLOURS[name], i % 8)], [{"type": "image", "text": None}]
        question, answer = "Warna apa" + "?" * (1 + i % 3), name
        if i % 5 == 3:
            images.append(picture(COLOURS[other], i % 3))
            parts.append({"type": "text", "text": "dan"})
            parts.append({"type": "image", "text": None})
            question, answer = "Dua warna?", f"{name}, {other}"
        elif i % 5 == 4:
            images, parts, question, answer = [], [], f"Ulangi: {other}", other
        rows.append(
            {
                "id": f"sample-{i:03d}",
                "task": "name",
                "language": "id",
                "messages": [
                    {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                ],
                "images": [{"bytes": data, "path": None} for data in images],
                "meta": "{}",
            }
        )
    return rows


@dataclass(frozen=True)
class World:
    base: Path  # a Hugging Face directory
    data: Path  # a Parquet file of 40 samples
    rows: list[dict[str, Any]]
    mm_tokens: int = MM_TOKENS

    @staticmethod
    def settings(**changes: Any) -> Train:
        """Training settings for this world."""
        plain: dict[str, Any] = {
            "steps": 6,
            "batch_size": 8,
            "max_seq_len": 160,
            "micro_rows": 2,
            "lr": 3e-3,
            "warmup_ratio": 0.2,
            "save_dtype": "float32",
            "threads": 1,
            "device": "cpu",
            "watts": 20.0,
        }
        return Train(**{**plain, **changes})

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_dir(self.base)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    tokenizer = byte_tokenizer()
    tokenizer.save(root / "tokenizer")
    torch.manual_seed(3)
    config = small_config(tokenizer)
    model = Gemma3(config, dtype=torch.float32)
    tensors = ((name, p.detach()) for name, p in model.named_parameters())
    save_checkpoint(root / "base", config, tensors, dtype=torch.float32, copy_from=root / "tokenizer")
    rows = sample_rows(40)
    write_samples(root / "train.parquet", rows)
    return World(root / "base", root / "train.parquet", rows)
