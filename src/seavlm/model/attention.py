"""Grouped-query attention, and the only place that decides which token sees which.

Whatever arranges the tokens (padding on either side, several samples packed in one row, pictures, chunked
prefill, a cache that keeps everything or a ring of the last W) only says where each token stands. The rule:

    query q sees key k  iff  they belong to the same segment
                        and  k.position <= q.reach              reach: the query's own position, or, inside a
                                                                picture, that of the picture's last soft token
                        and  q.position - k.position < window   on local layers

Shapes: B batch, T new tokens (queries), K keys, H heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seavlm.model.config import TextConfig
from seavlm.model.layers import RMSNorm, rotate

PADDING = -1  # the segment of padding: it sees itself and nobody else sees it
UNWRITTEN = -2  # the segment of cache slots that hold nothing: no query has it


class Cache(Protocol):
    """What the model asks of a KV cache (`seavlm.engine.cache` has one).

    Once per forward the decoder calls `extend` with the new tokens, then `keys` per kind of layer, then
    `update` once per layer. `keys` and `update` speak of the same K slots in one order, the new tokens among
    them. K may differ between kinds: a local layer needs no keys further back than its window. Slots with
    nothing in them are UNWRITTEN; a `dense` cache hands out none of those.
    """

    length: int  # tokens (padding included) written so far
    dense: bool  # every layout so far was (see Layout)

    def next_positions(self) -> Tensor:
        """[B] int64: the position of each row's next token."""

    def extend(self, layout: Layout) -> None:
        """Make room for T new tokens that stand where `layout` says."""

    def keys(self, kind: str) -> tuple[Tensor, Tensor]:
        """Positions and segments, each [B, K], of the keys that layers of this kind get from `update`."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new k and v, each [B, Hkv, T, D]; return what this layer attends to, [B, Hkv, K, D]."""


@dataclass
class Layout:
    """Where T new tokens stand: all [B, T] int64."""

    positions: Tensor
    segments: Tensor
    reach: Tensor  # the last position a token sees
    dense: bool  # positions rise by one a column: no padding, no packing, no positions of the caller's own
    has_images: bool

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[1]

    @property
    def plain(self) -> bool:
        """Only the order of tokens decides what they see."""
        return self.dense and not self.has_images


def make_layout(
    input_ids: Tensor,
    *,
    position_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    is_image: Tensor | None = None,
    cache: Cache | None = None,
) -> Layout:
    """Work out positions, segments and reach from what the caller gave, all [B, T]; see `Gemma3.forward`."""
    batch, tokens = input_ids.shape
    column = torch.arange(tokens, device=input_ids.device).expand(batch, tokens)
    start = cache.next_positions()[:, None] if cache is not None and cache.length else 0
    segments = torch.zeros_like(column) if segment_ids is None else segment_ids.long()
    if position_ids is not None:
        positions = position_ids.expand(batch, tokens)
    elif segment_ids is not None:
        begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
        positions = column - torch.where(begins, column, 0).cummax(dim=1).values + start
    elif attention_mask is not None:
        positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0) + start
    else:
        positions = column + start
    if attention_mask is not None:
        segments = segments.masked_fill(attention_mask == 0, PADDING)
    reach = positions if is_image is None else _image_reach(positions, segments, is_image)
    dense = position_ids is None and segment_ids is None and attention_mask is None
    return Layout(positions, segments, reach, dense=dense, has_images=is_image is not None)


def _image_reach(positions: Tensor, segments: Tensor, is_image: Tensor) -> Tensor:
    """Each token's own position, and for soft tokens that of the last one in their contiguous run."""
    goes_on = is_image[:, :-1] & is_image[:, 1:] & (segments[:, :-1] == segments[:, 1:])
    column = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    ends = torch.where(F.pad(goes_on, (0, 1)), positions.shape[1], column)  # own column where a run ends
    return positions.gather(1, ends.flip(1).cummin(dim=1).values.flip(1))


def visible(layout: Layout, key_positions: Tensor, key_segments: Tensor, window: int | None) -> Tensor:
    """bool [B, T, K]: which keys each query sees. The rule at the top of the file, and its only copy."""
    k = key_positions[:, None, :]
    seen = (layout.segments[:, :, None] == key_segments[:, None, :]) & (k <= layout.reach[:, :, None])
    return seen if window is None else seen & (layout.positions[:, :, None] - k < window)


@dataclass
class Mask:
    """How one kind of layer masks its scores: `bias` bool [B, 1, T, K], or None and then perhaps `causal`."""

    bias: Tensor | None = None
    causal: bool = False


def make_mask(layout: Layout, kind: str, window: int | None, cache: Cache | None) -> Mask:
    """The mask of one kind of layer; cheaper forms of it for plain prefill and plain one-token decode."""
    fresh = cache is None or cache.length == layout.num_tokens
    if layout.plain and fresh and (window is None or layout.num_tokens <= window):
        return Mask(causal=True)
    positions, segments = (layout.positions, layout.segments) if cache is None else cache.keys(kind)
    one = layout.plain and layout.num_tokens == 1 and cache is not None and cache.dense
    if one and (window is None or positions.shape[1] <= window):
        return Mask()
    return Mask(visible(layout, positions, segments, window)[:, None])


class Attention(nn.Module):
    """Grouped-query attention with per-head RMSNorm on q and k before the rotary embedding; no biases."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        width, dim = config.hidden_size, config.head_dim
        self.layer, self.head_dim = layer, dim
        self.grouped = config.num_attention_heads != config.num_key_value_heads
        self.scale = config.query_pre_attn_scalar**-0.5
        self.q_proj = nn.Linear(width, config.num_attention_heads * dim, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, width, bias=False)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Cache | None) -> Tensor:
        heads = (-1, self.head_dim)
        q = self.q_norm(self.q_proj(x).unflatten(-1, heads)).transpose(1, 2)  # [B, H, T, D]
        k = self.k_norm(self.k_proj(x).unflatten(-1, heads)).transpose(1, 2)  # [B, Hkv, T, D]
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask.bias, is_causal=mask.causal, scale=self.scale, enable_gqa=self.grouped
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))
