"""Norm, rotary tables and embedding scale: the order of operations and of roundings."""

from __future__ import annotations

import pytest
import torch

from seavlm.model.config import GLOBAL, LOCAL, Gemma3Config
from seavlm.model.decoder import Decoder
from seavlm.model.layers import RMSNorm, inverse_frequencies, rope_tables, rotate
from seavlm.parity import small_config


def test_rmsnorm_casts_last() -> None:
    """All in fp32, times (1 + w), one rounding at the end: exact, bit for bit."""
    torch.manual_seed(0)
    norm = RMSNorm(64, 1e-6).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 64, dtype=torch.bfloat16) * 30
    wide = x.double()
    exact = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight.double())
    assert torch.equal(norm(x), exact.float().bfloat16())
    early = (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16() * (1 + norm.weight)
    assert not torch.equal(norm(x), early)


def test_rmsnorm_of_tiny_input_leans_on_eps() -> None:
    norm = RMSNorm(4, 1e-6)
    assert torch.allclose(norm(torch.full((1, 4), 1e-3)), torch.full((1, 4), 0.5**0.5))


@pytest.mark.parametrize(
    ("size", "factor"), [("270m", 25.25), ("1b", 34.0), ("4b", 50.5), ("12b", 62.0), ("27b", 73.5)]
)
def test_embedding_scale_is_rounded(size: str, factor: float) -> None:
    """sqrt(width) in the weights' dtype; these are the bf16 values of Google's sizes."""
    width = Gemma3Config.named(size).text.hidden_size
    with torch.device("meta"):
        decoder = Decoder(small_config().text)
    decoder.config = Gemma3Config.named(size).text
    decoder.embed_tokens = torch.nn.Embedding(2, width, dtype=torch.bfloat16)
    torch.nn.init.ones_(decoder.embed_tokens.weight)
    assert decoder.embed(torch.tensor([1])).unique().tolist() == [factor]
    decoder.embed_tokens.float()
    assert decoder.embed(torch.tensor([1]))[0, 0].item() == pytest.approx(width**0.5)


def test_frequencies() -> None:
    """Local 10k unscaled; global 1M divided by 8 from 4B on."""
    text = Gemma3Config.named("4b").text
    assert text.rope(LOCAL) == (10_000, 1) and text.rope(GLOBAL) == (1_000_000, 8)
    assert Gemma3Config.named("1b").text.rope(GLOBAL) == (1_000_000, 1)
    local, scaled = inverse_frequencies(256, 10_000, 1), inverse_frequencies(256, 1_000_000, 8)
    assert len(local) == 128 and local[0] == 1 and scaled[0] == 1 / 8
    assert local[64].item() == pytest.approx(1e-2) and scaled[64].item() == pytest.approx(1e-3 / 8)


def test_rotation_is_half_split_and_relative() -> None:
    """Dimension i turns with i + D/2, over all of head_dim; scores depend on distance alone."""
    inv_freq = inverse_frequencies(8, 100.0, 1.0)
    cos, sin = rope_tables(torch.tensor([[1]]), inv_freq, torch.float32)
    x = torch.zeros(1, 1, 1, 8)
    x[..., 1] = 1.0
    turned = rotate(x, cos, sin)[0, 0, 0]
    angle = inv_freq[1]
    assert turned[1] == angle.cos() and turned[5] == angle.sin() and turned.count_nonzero() == 2
    q, k = torch.randn(2, 1, 1, 1, 8)

    def score(a: int, b: int) -> float:
        at = [rope_tables(torch.tensor([[p]]), inv_freq, torch.float32) for p in (a, b)]
        return float((rotate(q, *at[0]) * rotate(k, *at[1])).sum())

    assert score(5, 2) == pytest.approx(score(1005, 1002), abs=1e-4)


def test_tables_take_the_activations_dtype() -> None:
    """Angles in fp32 (a bf16 position past 256 would be wrong), tables in the activations' dtype."""
    inv_freq = inverse_frequencies(8, 10_000.0, 1.0)
    cos, _ = rope_tables(torch.tensor([[1001]]), inv_freq, torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    assert cos[0, 0, 0, 0].item() == torch.tensor(1001.0).cos().bfloat16().item()
