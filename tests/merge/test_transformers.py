"""Checkpoints as the installed transformers saves them, merged here and opened there again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from seavlm.merge.stream import merge_checkpoints, merge_recipe

pytestmark = pytest.mark.filterwarnings("ignore")  # their deprecations are their own


def made(seed: int) -> Any:
    """A small model with a tower, all its numbers drawn anew: norms and biases are not left at one value."""
    text = transformers.Gemma3TextConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        max_position_embeddings=128,
    )
    tower = transformers.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        vision_use_head=False,
    )
    tokens = {"boi_token_index": 90, "eoi_token_index": 91, "image_token_index": 92}
    config = transformers.Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4, **tokens)
    torch.manual_seed(seed)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def logits(model: Any) -> torch.Tensor:
    """[1, T, V] for a picture of noise and some tokens."""
    ids = torch.tensor([[2, 5, 90, 92, 92, 92, 92, 91, 17, 33, 8]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels, token_type_ids=(ids == 92).long()).logits


def opened(place: Path, dtype: torch.dtype = torch.float32) -> Any:
    """By transformers, which misses nothing and finds nothing that it does not know."""
    model, told = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        place, dtype=dtype, output_loading_info=True
    )
    assert not any(told.values()), told
    return model.eval()


@pytest.mark.parametrize(
    "layouts,shard", [((True, True), "1GB"), ((False, False), "30KB"), ((True, False), "1GB")]
)
def test_saved_there_merged_here_opened_there(tmp_path: Path, layouts: tuple[bool, bool], shard: str) -> None:
    """Both layouts of keys, also one with the other: the merge is the mean of what transformers holds."""
    models = [made(1), made(2)]
    places = [tmp_path / "regional", tmp_path / "global"]
    for model, place, original in zip(models, places, layouts, strict=True):
        model.save_pretrained(place, save_original_format=original, max_shard_size=shard)
        keys = {key for file in place.glob("*.safetensors") for key in load_file(file)}
        tower = "vision_tower.encoder." if original else "model.vision_tower.encoder."
        assert any(key.startswith(tower) for key in keys)
    merge_checkpoints(places, [0.3, 0.7], tmp_path / "out")
    merged = opened(tmp_path / "out")
    a, b = (model.state_dict() for model in models)
    mean = {name: 0.3 * a[name].double() + 0.7 * b[name].double() for name in a}
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor.double(), mean[name], rtol=1e-6, atol=1e-7)
    wanted = made(0)
    wanted.load_state_dict(mean)
    torch.testing.assert_close(logits(merged), logits(wanted), rtol=1e-4, atol=1e-4)


def test_the_layout_does_not_matter(tmp_path: Path) -> None:
    """ties in bfloat16: the same bytes from either layout, as parent and as base."""
    for i, name in enumerate(("base", "a", "b")):
        for original in (True, False):
            made(i).to(torch.bfloat16).save_pretrained(
                tmp_path / f"{original}" / name, save_original_format=original
            )
    for original in (True, False):
        place = tmp_path / f"{original}"
        models = [{"model": str(place / name), "parameters": {"weight": 1.0}} for name in "ab"]
        raw = {"merge_method": "ties", "base_model": str(place / "base"), "models": models}
        merge_recipe(raw | {"parameters": {"density": 0.5}}, place / "out")
    first, second = (tmp_path / f"{original}" / "out" / "model.safetensors" for original in (True, False))
    assert first.read_bytes() == second.read_bytes()
    assert opened(tmp_path / "True" / "out", torch.bfloat16).dtype == torch.bfloat16
