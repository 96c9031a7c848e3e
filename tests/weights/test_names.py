"""Names: every family in, transformers' own out, shapes as the model has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from seavlm.model.config import Gemma3Config
from seavlm.model.gemma3 import Gemma3
from seavlm.weights import names


@pytest.mark.parametrize("size", ["270m", "1b", "4b", "12b", "27b"])
def test_shapes_are_the_models(size: str) -> None:
    config = Gemma3Config.named(size)
    model = Gemma3(config, device="meta", dtype=torch.bfloat16)
    assert names.shapes(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_written_names_are_googles(originals: dict[str, Path], kind: str) -> None:
    config = Gemma3Config.from_dir(originals[kind])
    with safe_open(originals[kind] / "model.safetensors", "pt") as file:
        theirs = set(file.keys())
    ours = {names.to_disk(name, vision=kind == "vl") for name in names.shapes(config)}
    assert ours == {name.replace("vision_tower.", "vision_tower.vision_model.", 1) for name in theirs}
    assert {names.from_disk(name) for name in theirs} == set(names.shapes(config))


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("language_model.model.layers.3.mlp.up_proj.weight", "language_model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "language_model.layers.3.mlp.up_proj.weight"),
        ("model.layers.3.mlp.up_proj.weight", "language_model.layers.3.mlp.up_proj.weight"),
        ("model.norm.weight", "language_model.norm.weight"),
        ("vision_tower.vision_model.post_layernorm.bias", "vision_tower.post_layernorm.bias"),
        ("model.vision_tower.vision_model.post_layernorm.bias", "vision_tower.post_layernorm.bias"),
        ("model.vision_tower.post_layernorm.bias", "vision_tower.post_layernorm.bias"),
        (
            "model.multi_modal_projector.mm_soft_emb_norm.weight",
            "multi_modal_projector.mm_soft_emb_norm.weight",
        ),
        ("lm_head.weight", names.HEAD),
        ("language_model.lm_head.weight", names.HEAD),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("vision_tower.vision_model.embeddings.position_ids", None),
        ("something.else", "something.else"),
    ],
)
def test_from_disk(stored: str, canonical: str | None) -> None:
    assert names.from_disk(stored) == canonical


def test_canonical_names_map_to_themselves_and_back() -> None:
    for size in ("270m", "4b"):
        config = Gemma3Config.named(size)
        for name in names.shapes(config):
            assert names.from_disk(name) == name
            assert names.from_disk(names.to_disk(name, vision=config.vision is not None)) == name
            if name.startswith("language_model."):
                assert names.to_gguf(name) != name
                assert names.from_gguf(names.to_gguf(name)) == name


def test_gguf_names_are_llama_cpps() -> None:
    """Against the table of the gguf package, which its converter uses."""
    import gguf
    from gguf.tensor_mapping import get_tensor_name_map

    table = get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 18)
    for name in names.shapes(Gemma3Config.named("270m")):
        theirs = table.get_name(names.to_disk(name, vision=False), try_suffixes=(".weight",))
        assert names.to_gguf(name) == theirs


def test_llama_cpps_converter_knows_the_towers_names() -> None:
    import gguf
    from gguf.tensor_mapping import get_tensor_name_map

    config = Gemma3Config.named("4b")
    assert config.vision is not None
    table = get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, config.vision.num_hidden_layers)
    for name in names.shapes(config):
        if name.startswith("vision_tower."):
            written = names.to_disk(name, vision=True)
            assert table.get_name(written, try_suffixes=(".weight", ".bias")), written


def test_text_norms() -> None:
    norms = [name for name in names.shapes(Gemma3Config.named("4b")) if names.is_text_norm(name)]
    assert len(norms) == 34 * 6 + 1
