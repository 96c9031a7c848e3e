"""A small random model behind the real tokenizer, cut down: an engine to ask, with nonsense for answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from seavlm.engine.vlm import VLM, load
from seavlm.image.preprocess import save_processor_config
from seavlm.model.config import Gemma3Config, TextConfig, VisionConfig
from seavlm.model.gemma3 import Gemma3
from seavlm.text.tokenizer import Tokenizer
from seavlm.text.trim import trim_tokenizer
from seavlm.weights.checkpoint import save_checkpoint

TEXTS = [
    "What is this? a cat, a dog, a mango; the answer is yes, no or 123.",
    "ນີ້ແມ່ນຫຍັງ? ແມວ ໝາ",
    "នេះជាអ្វី? ឆ្មា",
    "ဒါဘာလဲ။ ကြောင်",
    "இது என்ன? பூனை",
    "这是什么？猫",
    "Đây là cái gì? con mèo",
]
MM_TOKENS = 4


def write_model(
    folder: Path, tokenizer_dir: Path, *, seed: int, vision: bool = True, spare_rows: int = 64
) -> Path:
    """A checkpoint of random weights with the tokens of TEXTS and, as in 4B, rows that no token has."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    trim_tokenizer(tokenizer_dir, folder, TEXTS)
    tokenizer = Tokenizer.from_dir(folder)
    tower = VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
    )
    config = Gemma3Config(
        text=TextConfig(
            vocab_size=tokenizer.vocab_size + spare_rows,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=16,
            layer_types=("sliding_attention", "full_attention"),
            max_position_embeddings=256,
            initializer_range=0.3,
        ),
        vision=tower if vision else None,
        mm_tokens_per_image=MM_TOKENS,
        image_token_index=tokenizer.image_id,
        boi_token_index=tokenizer.boi_id,
        eoi_token_index=tokenizer.eoi_id,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_ids=(tokenizer.eos_id, tokenizer.end_of_turn_id),
    )
    model = Gemma3(config, dtype=torch.float32)
    with torch.no_grad():  # random weights of a size at which pictures and words move the logits
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    save_checkpoint(folder, config, model.state_dict().items())
    if vision:
        save_processor_config(folder, image_size=tower.image_size, mm_tokens_per_image=MM_TOKENS)
    generation = {"eos_token_id": list(config.eos_token_ids), "temperature": 0.7, "top_k": 5, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, material) -> Path:
    return write_model(tmp_path_factory.mktemp("engine") / "model", material.tokenizer_dir, seed=3)


@pytest.fixture(scope="session")
def text_model_dir(tmp_path_factory: pytest.TempPathFactory, material) -> Path:
    return write_model(
        tmp_path_factory.mktemp("engine") / "text", material.tokenizer_dir, seed=4, vision=False
    )


@pytest.fixture
def vlm(model_dir: Path) -> VLM:
    return load(model_dir, device="cpu")
