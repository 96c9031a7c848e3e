"""Against transformers 5.23: every case of `seavlm-parity`, and proof that they would notice a mistake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seavlm import parity
from seavlm.model import attention, decoder, layers
from seavlm.model.config import GLOBAL, LOCAL, Gemma3Config
from seavlm.model.gemma3 import Gemma3

Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("case", parity.CASES)
def test_case(case: str) -> None:
    row = parity.CASES[case](case)
    assert row.difference <= parity.TOLERANCE
    assert row.equal == row.tokens > 0


@pytest.fixture(scope="module")
def original() -> tuple[Gemma3Config, dict[str, Tensor], Tensor, Tensor, Tensor]:
    """A model (local + global layer), a prompt with two pictures, and transformers' logits for it."""
    model = parity.random_model(parity.small_config())
    ids, pixels = parity.with_images(parity.text_ids(1, 45), (0, 4), (0, 20))
    return (
        model.config,
        model.state_dict(),
        ids,
        pixels,
        parity.reference_logits(parity.reference(model), ids, pixels),
    )


def difference(original: tuple, config: Gemma3Config | None = None) -> float:
    """Largest logit difference of a model with the original's weights, and perhaps another config."""
    right, weights, ids, pixels, logits = original
    model = Gemma3(config or right)
    model.load_state_dict(weights)
    with torch.no_grad():
        return float((model(ids, pixel_values=pixels) - logits).abs().max())


def test_unbroken(original: tuple) -> None:
    assert difference(original) <= parity.TOLERANCE


@pytest.mark.parametrize(
    "wrong",
    [
        {"sliding_window": 6},
        {"sliding_window": 8},
        {"query_pre_attn_scalar": 16},
        {"rope_factor": 1.0},
        {"rope_theta": 10_000.0},
        {"rope_local_theta": 1_000_000.0},
        {"layer_types": (GLOBAL, LOCAL)},
        {"rms_norm_eps": 1e-2},
    ],
    ids=str,
)
def test_notices_config(original: tuple, wrong: dict) -> None:
    """A wrong number in the config is a hundred times over the tolerance."""
    config = original[0]
    assert difference(original, replace(config, text=replace(config.text, **wrong))) > 100 * parity.TOLERANCE


def causal_images(patch: Patch) -> None:
    patch.setattr(attention, "_image_reach", lambda positions, segments, is_image: positions)


def images_see_the_next_image(patch: Patch) -> None:
    def reach(positions: Tensor, segments: Tensor, is_image: Tensor) -> Tensor:
        last = torch.where(is_image, positions, 0).amax(1, keepdim=True)
        return torch.where(is_image, last, positions)

    patch.setattr(attention, "_image_reach", reach)


def images_ignore_the_window(patch: Patch) -> None:
    right = attention.visible

    def visible(layout: attention.Layout, k: Tensor, segments: Tensor, window: int | None) -> Tensor:
        same_image = layout.reach[:, :, None] == layout.reach[:, None, :]
        return right(layout, k, segments, window) | same_image

    patch.setattr(attention, "visible", visible)


def only_global_layers_see_images(patch: Patch) -> None:
    right = attention.visible

    def visible(layout: attention.Layout, k: Tensor, segments: Tensor, window: int | None) -> Tensor:
        if window is not None:
            layout = replace(layout, reach=layout.positions)
        return right(layout, k, segments, window)

    patch.setattr(attention, "visible", visible)


def norm_without_the_one(patch: Patch) -> None:
    def forward(self: layers.RMSNorm, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    patch.setattr(layers.RMSNorm, "forward", forward)


def unscaled_embeddings(patch: Patch) -> None:
    patch.setattr(decoder.Decoder, "embed", lambda self, ids: self.embed_tokens(ids))


def scaled_pictures(patch: Patch) -> None:
    right = Gemma3.encode_images
    patch.setattr(Gemma3, "encode_images", lambda self, pixels: right(self, pixels) * 48**0.5)


def no_post_norms(patch: Patch) -> None:
    def forward(self: decoder.DecoderLayer, x: Tensor, *rest: object) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *rest)
        return x + self.mlp(self.pre_feedforward_layernorm(x))

    patch.setattr(decoder.DecoderLayer, "forward", forward)


def interleaved_rope(patch: Patch) -> None:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pairs = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos + pairs * sin

    patch.setattr(attention, "rotate", rotate)


def norm_after_rope(patch: Patch) -> None:
    """q and k rotated first, normed second."""

    def forward(
        self: attention.Attention, x: Tensor, rope: tuple[Tensor, Tensor], mask: attention.Mask, cache
    ) -> Tensor:
        heads = (-1, self.head_dim)
        q, k, v = (p(x).unflatten(-1, heads).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(layers.rotate(q, *rope)), self.k_norm(layers.rotate(k, *rope))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask.bias, is_causal=mask.causal, scale=self.scale, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))

    patch.setattr(attention.Attention, "forward", forward)


@pytest.mark.parametrize(
    "mistake",
    [
        norm_after_rope,
        causal_images,
        images_see_the_next_image,
        images_ignore_the_window,
        only_global_layers_see_images,
        norm_without_the_one,
        unscaled_embeddings,
        scaled_pictures,
        no_post_norms,
        interleaved_rope,
    ],
)
def test_notices_code(original: tuple, monkeypatch: Patch, mistake: Callable[[Patch], None]) -> None:
    """A rule of the model done wrongly is a hundred times over the tolerance."""
    mistake(monkeypatch)
    assert difference(original) > 100 * parity.TOLERANCE


def test_exact_gelu_is_noticed(original: tuple, monkeypatch: Patch) -> None:
    """erf instead of tanh is the smallest mistake one can make; it still shows."""
    right = torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x, approximate="none": right(x))
    assert difference(original) > 2 * parity.TOLERANCE


def test_tower_and_projector_alone() -> None:
    """Patch features and soft tokens equal transformers', with pools of 4x4 patches."""
    model = parity.random_model(parity.small_config())
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    hf = parity.reference(model).model
    with torch.no_grad():
        theirs = hf.get_image_features(pixels, return_dict=True)
        assert torch.allclose(model.vision_tower(pixels), theirs.last_hidden_state, atol=1e-5)
        assert model.config.pool_size == 4
        assert torch.allclose(model.encode_images(pixels), theirs.pooler_output, atol=1e-5)
        pooled = model.pool_images(pixels)
        assert torch.equal(model.project_images(pooled), model.encode_images(pixels))


def test_bfloat16_stays_close() -> None:
    """In bf16 both round at the same places: most greedy choices agree and no logit strays."""
    model = parity.random_model(parity.small_config(parity.SIX_TO_ONE))
    hf = parity.reference(model).bfloat16()
    ids, pixels = parity.with_images(parity.text_ids(1, 45), (0, 4), (0, 20))
    exact = parity.reference_logits(hf.float(), ids, pixels)
    theirs = parity.reference_logits(hf.bfloat16(), ids, pixels.bfloat16()).float()
    with torch.no_grad():
        ours = model.bfloat16()(ids, pixel_values=pixels).float()
    assert ours.dtype == torch.float32
    assert (ours - exact).pow(2).mean() < 1.5 * (theirs - exact).pow(2).mean()


def test_table(capsys: pytest.CaptureFixture[str], monkeypatch: Patch) -> None:
    """The command prints a line per case and fails when one does not hold."""
    monkeypatch.setattr(
        parity,
        "CASES",
        {"good": lambda c: parity.Row(c, 2e-6, 16, 16), "bad": lambda c: parity.Row(c, 2e-6, 3, 16)},
    )
    assert parity.main(["--no-real"]) == 1
    out = capsys.readouterr().out
    assert "good" in out and "16 / 16" in out and "3 / 16" in out and "2.0e-06" in out
    del parity.CASES["bad"]
    assert parity.main(["--no-real"]) == 0
    # a case that cannot run does not hide those that did
    assert parity.main(["--gguf", "/nowhere/model.gguf"]) == 2
    shown = capsys.readouterr()
    assert "good" in shown.out and "/nowhere/model.gguf" in shown.err and "Traceback" not in shown.err
