"""The config: Google's sizes, and `config.json` as transformers 5.23 writes and reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from seavlm.errors import SeavlmError
from seavlm.model.config import GLOBAL, LOCAL, Gemma3Config, TextConfig, VisionConfig, layer_pattern
from seavlm.parity import small_config

SIZES = ("270m", "1b", "4b", "12b", "27b")


@pytest.mark.parametrize(
    "config", [*map(Gemma3Config.named, SIZES), small_config(), small_config(vision=False)]
)
def test_round_trip(config: Gemma3Config) -> None:
    assert Gemma3Config.from_dict(config.to_dict()) == config
    assert Gemma3Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("size", SIZES)
def test_transformers_reads_what_we_write(size: str, tmp_path: Path) -> None:
    config = Gemma3Config.named(size)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    hf = transformers.AutoConfig.from_pretrained(tmp_path)
    text = hf.get_text_config()
    assert type(hf).__name__ == ("Gemma3Config" if config.vision else "Gemma3TextConfig")
    for key in ("vocab_size", "hidden_size", "head_dim", "query_pre_attn_scalar", "sliding_window"):
        assert getattr(text, key) == getattr(config.text, key)
    assert tuple(text.layer_types) == config.text.layer_types
    rope = text.rope_parameters
    assert rope[LOCAL]["rope_theta"] == 10_000 and rope[LOCAL]["rope_type"] == "default"
    assert (
        rope[GLOBAL]["rope_theta"] == 1_000_000 and rope[GLOBAL].get("factor", 1.0) == config.text.rope_factor
    )
    if config.vision:
        assert hf.vision_config.vision_use_head is False
        assert (hf.vision_config.image_size, hf.vision_config.patch_size) == (896, 14)
        assert hf.image_token_id == config.image_token_index
    # and back: what transformers writes, in its own words
    hf.save_pretrained(tmp_path)
    assert Gemma3Config.from_dir(tmp_path) == config


def test_published_4b_config() -> None:
    """Google's 4B config names few keys; the rest are class defaults."""
    published = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }
    assert Gemma3Config.from_dict(published) == Gemma3Config.named("4b")


def test_older_text_config() -> None:
    """The 1B spelling: rope keys at the top, the pattern as a number, eos as one number."""
    older = {
        "model_type": "gemma3_text",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 262144,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    config = Gemma3Config.from_dict(older, {"eos_token_id": [1, 106]})
    assert config == Gemma3Config.named("1b")
    assert Gemma3Config.from_dict(older).eos_token_ids == (1,)
    assert Gemma3Config.from_dict(older | {"sliding_window_pattern": 3}).text.layer_types == layer_pattern(
        26, 3
    )
    assert Gemma3Config.from_dict(older | {"rope_theta": 5e5, "rope_local_base_freq": 2e4}).text.rope(
        LOCAL
    ) == (2e4, 1)


def test_empty_config_is_the_class_default() -> None:
    """As transformers has them."""
    hf = transformers.Gemma3Config()
    ours = Gemma3Config.from_dict({"model_type": "gemma3", "mm_tokens_per_image": 49})
    assert ours.text == TextConfig() and ours.vision == VisionConfig()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "sliding_window"):
        assert getattr(ours.text, name) == getattr(hf.text_config, name)
    for name in ("hidden_size", "num_attention_heads", "image_size", "patch_size"):
        assert getattr(ours.vision, name) == getattr(hf.vision_config, name)


def test_pattern() -> None:
    """Layer i is global iff (i + 1) % 6 == 0: 10 global and 52 local layers in 27B."""
    types = Gemma3Config.named("27b").text.layer_types
    assert [i for i, kind in enumerate(types) if kind == GLOBAL] == list(range(5, 62, 6))
    assert types.count(GLOBAL) == 10 and types.count(LOCAL) == 52


def test_irregular_pattern_survives(tmp_path: Path) -> None:
    config = Gemma3Config(text=TextConfig(num_hidden_layers=4, layer_types=(GLOBAL, LOCAL, LOCAL, GLOBAL)))
    assert "sliding_window_pattern" not in config.to_dict()
    assert Gemma3Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, ("llama", "gemma3")),
        ({"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping", "50.0")),
        ({"final_logit_softcapping": 30.0}, ("final_logit_softcapping", "30.0")),
        ({"hidden_activation": "silu"}, ("silu", "gelu_pytorch_tanh")),
        ({"use_bidirectional_attention": True}, ("use_bidirectional_attention",)),
        ({"tie_word_embeddings": False}, ("tie_word_embeddings",)),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ("yarn", "linear")),
        ({"rope_scaling": {"rope_type": "linear"}}, ("factor",)),
        ({"layer_types": ["sliding_attention"]}, ("1", "26")),
        ({"layer_types": ["full_atention"] * 26}, ("full_atention", "full_attention")),
        ({"num_key_value_heads": 3}, ("8", "3")),
        ({"hidden_size": 0}, ("hidden_size", "0")),
        ({"hidden_size": "wide"}, ("hidden_size", "wide")),
        ({"hidden_size": 2305}, ("2305", "8")),
        ({"head_dim": 15}, ("head_dim", "15")),
    ],
)
def test_refused(change: dict, words: tuple[str, ...]) -> None:
    """What Gemma 3 is not is refused in one line that names it."""
    with pytest.raises(SeavlmError) as error:
        Gemma3Config.from_dict({"model_type": "gemma3_text"} | change)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


def test_refused_pictures() -> None:
    with pytest.raises(SeavlmError, match="250 does not fit 64x64"):
        Gemma3Config(vision=Gemma3Config.named("4b").vision, mm_tokens_per_image=250)
    with pytest.raises(SeavlmError, match=r"unknown Gemma 3 size '28b'.*27b"):
        Gemma3Config.named("28b")
    with pytest.raises(SeavlmError, match=r"no config.json in"):
        Gemma3Config.from_dir("/nowhere")


def test_broken_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SeavlmError, match="not valid JSON"):
        Gemma3Config.from_dir(tmp_path)


def test_needs_no_torch() -> None:
    """Looking at a config must not cost the import of torch."""
    code = "import sys, seavlm.model.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
