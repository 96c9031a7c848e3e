"""The contiguous KV cache: what it keeps and hands out, and that decoding through it changes no logit."""

from __future__ import annotations

import pytest
import torch

from seavlm.engine.cache import KVCache
from seavlm.model.config import GLOBAL, LOCAL
from seavlm.parity import SIX_TO_ONE, pad, random_model, small_config, text_ids, with_images

CONFIG = small_config(SIX_TO_ONE)  # window 7


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_cached_is_uncached(side: str) -> None:
    """Prefill with pictures, then two tokens, then one at a time, each row at its own positions."""
    model = random_model(CONFIG)
    ids, pixels = with_images(text_ids(2, 40), (0, 3), (1, 4))
    more = text_ids(2, 20, seed=5)
    rows = [ids[0], ids[1] if side == "none" else ids[1, :23]]
    batch, mask = pad(rows, "right" if side == "right" else "left")
    cache = KVCache(CONFIG, 2, 64)
    with torch.no_grad():
        model(batch, pixel_values=pixels, attention_mask=None if side == "none" else mask, cache=cache)
        assert cache.next_positions().tolist() == [40, len(rows[1])]
        steps = [model(more[:, :2], cache=cache)]
        steps += [model(more[:, i : i + 1], cache=cache) for i in range(2, 20)]
        got = torch.cat(steps, dim=1)
        for i, row in enumerate(rows):
            whole = model(torch.cat([row, more[i]])[None], pixel_values=pixels[i : i + 1])
            assert (got[i] - whole[0, len(row) :]).abs().max() <= 3e-5


def test_local_layers_look_at_their_window_only() -> None:
    model = random_model(CONFIG)
    cache = KVCache(CONFIG, 1, 30)
    with torch.no_grad():
        model(text_ids(1, 20), cache=cache)
        model(text_ids(1, 1), cache=cache)
    assert cache.keys(LOCAL)[0].tolist() == [list(range(14, 21))]
    assert cache.keys(GLOBAL)[0].tolist() == [list(range(21))]


def test_reset_starts_anew() -> None:
    model = random_model(CONFIG)
    cache = KVCache(CONFIG, 1, 30)
    ids = text_ids(1, 12)
    with torch.no_grad():
        first = model(ids, attention_mask=torch.ones_like(ids), cache=cache)
        cache.reset()
        assert cache.length == 0 and cache.next_positions().tolist() == [0]
        assert torch.allclose(model(ids, cache=cache), first, atol=1e-5)


def test_packed_prefill_then_decode_goes_on_with_segment_zero() -> None:
    """A packed row in a cache: new tokens belong to segment 0 unless they say otherwise."""
    model = random_model(CONFIG)
    ids = text_ids(1, 20)
    segments = torch.tensor([[1] * 8 + [0] * 12])
    cache = KVCache(CONFIG, 1, 30)
    with torch.no_grad():
        model(ids, segment_ids=segments, cache=cache)
        token = text_ids(1, 1, seed=9)
        got = model(token, position_ids=torch.tensor([[12]]), cache=cache)
        alone = model(torch.cat([ids[:, 8:], token], dim=1))
    assert torch.allclose(got[:, -1], alone[:, -1], atol=1e-5)
