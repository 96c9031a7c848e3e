"""The int8 vision tower: close to the plain one, for any sizes and in every build."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from seavlm.engine import kernels
from seavlm.engine.vision import Int8Vision
from seavlm.engine.vlm import load
from seavlm.errors import SeavlmError
from seavlm.image.preprocess import preprocess
from seavlm.model.config import LOCAL, Gemma3Config, TextConfig, VisionConfig
from seavlm.model.gemma3 import Gemma3

compiled = pytest.mark.skipif(kernels.library() is None, reason="built without a C++ compiler")


def libraries() -> list[str]:
    """The builds that this processor can run."""
    best = kernels.library()
    if best is None:
        return []
    return list(kernels.ISAS[kernels.ISAS.index(best.seavlm_best_isa().decode()) :])


def a_model(width: int, heads: int, hidden: int, side: int) -> Gemma3:
    """Two layers over side x side patches, a few larger channels in every norm."""
    torch.manual_seed(width)
    config = Gemma3Config(
        text=TextConfig(
            vocab_size=251, hidden_size=40, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, head_dim=32, layer_types=(LOCAL,),
        ),
        vision=VisionConfig(
            hidden_size=width, intermediate_size=hidden, num_hidden_layers=2, num_attention_heads=heads,
            image_size=7 * side, patch_size=7,
        ),
        mm_tokens_per_image=(side // 2) ** 2, image_token_index=250,
    )  # fmt: skip
    model = Gemma3(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in model.vision_tower.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.3)
            elif "norm" in name:
                p.normal_(1, 0.2)
                p[::17] += 1
    return model


def distance(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float(((found - wanted).norm(dim=(1, 2)) / wanted.norm(dim=(1, 2))).max())


@compiled
@pytest.mark.parametrize("isa", libraries())
@pytest.mark.parametrize(
    ("width", "heads", "hidden", "side", "threads"),
    [(24, 3, 50, 2, 1), (72, 1, 130, 6, 2), (80, 2, 144, 12, 3), (66, 6, 257, 16, 2), (320, 4, 96, 4, 1)],
)
def test_it_is_close_to_the_plain_tower(
    monkeypatch: pytest.MonkeyPatch, isa: str, width: int, heads: int, hidden: int, side: int, threads: int
) -> None:
    """Widths that are no multiple of 16, heads from 8 to 80, less than a block of patches and two of them."""
    monkeypatch.setattr(kernels, "library", lambda: kernels._open(kernels.path_of(isa)))
    model = a_model(width, heads, hidden, side)
    pixels = torch.randn(2, 3, 7 * side, 7 * side)
    with torch.inference_mode():
        wanted = model.encode_images(pixels)
        quick = Int8Vision(copy.deepcopy(model), threads)
        found = quick.encode_images(pixels)
        assert distance(found, wanted) < 0.012
        assert torch.equal(quick.encode_images(pixels), found)  # whichever thread did what
        assert torch.equal(quick.encode_images(pixels[1:]), found[1:])
        # What the rounding loses is small beside what any part of a layer does.
        for part in ("q_proj", "v_proj", "out_proj", "fc1", "fc2"):
            changed = copy.deepcopy(model)
            for name, p in changed.vision_tower.named_parameters():
                if f"layers.1.self_attn.{part}" in name or f"layers.1.mlp.{part}" in name:
                    p.mul_(0.7)
            assert distance(changed.encode_images(pixels), wanted) > distance(found, wanted)


@compiled
@pytest.mark.parametrize("isa", [isa for isa in libraries() if isa != "portable"])
def test_the_shipped_tower_sees_the_same(monkeypatch: pytest.MonkeyPatch, root: Path, isa: str) -> None:
    monkeypatch.setattr(kernels, "library", lambda: kernels._open(kernels.path_of(isa)))
    model = load("nano", dtype="float32").model
    images = [Image.open(root / "docs" / f"{name}.png") for name in ("elephant", "watermelon", "pineapple")]
    size = model.config.vision.image_size
    pixels = torch.from_numpy(preprocess([image.convert("RGB") for image in images], size))
    with torch.inference_mode():
        wanted = model.encode_images(pixels)
    before = sum(p.nbytes for p in model.vision_tower.encoder.parameters())
    quick = Int8Vision(model)
    assert distance(quick.encode_images(pixels), wanted) < (0.01 if isa == "avx512vnni" else 0.015)
    left = sum(p.nbytes for p in model.vision_tower.encoder.parameters())
    assert quick.weight_bytes < 0.6 * before and left < 0.01 * before  # the fp32 matrices are gone


@compiled
def test_what_it_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model(24, 3, 50, 4)
    with pytest.raises(SeavlmError) as plain:
        model.encode_images(torch.zeros(1, 3, 28, 35))
    quick = Int8Vision(model)
    with pytest.raises(SeavlmError) as wrong:
        quick.encode_images(torch.zeros(1, 3, 28, 35))
    assert str(wrong.value) == str(plain.value) and wrong.value.hint == plain.value.hint
    assert quick.encode_images(torch.zeros(0, 3, 28, 28)).shape == (0, 4, 40)
    text_only = Gemma3(Gemma3Config(text=model.config.text, vision=None), dtype=torch.float32)
    with pytest.raises(SeavlmError, match="text-only"):
        Int8Vision(text_only)
    monkeypatch.setattr(kernels, "library", lambda: None)
    with pytest.raises(SeavlmError, match=r"built without a C\+\+ compiler"):
        Int8Vision(model)
