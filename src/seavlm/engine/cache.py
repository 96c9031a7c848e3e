"""The contiguous KV cache: every layer keeps every token, in columns that all rows of a batch share.

Shapes: B batch, T new tokens, K keys, H KV heads, D head dim, L the cache's capacity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seavlm.errors import SeavlmError
from seavlm.model.attention import PADDING, UNWRITTEN, Layout
from seavlm.model.config import Gemma3Config


class KVCache:
    """Keys and values of up to `max_len` tokens (padding included) for `batch_size` rows.

    Rows may be padded on either side: positions and segments are kept per row, so a padded row goes on at its
    own next position. Local layers look at the last window of columns only, while no row is padded.
    Hand it to `Gemma3.forward(..., cache=cache)`; `reset` makes it empty again without giving memory back.
    """

    def __init__(
        self,
        config: Gemma3Config,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        text = config.text
        self.config, self.text, self.batch_size, self.max_len = config, text, batch_size, max_len
        shape = (batch_size, text.num_key_value_heads, max_len, text.head_dim)
        self.k = [torch.empty(shape, device=device, dtype=dtype) for _ in text.layer_types]
        self.v = [torch.empty(shape, device=device, dtype=dtype) for _ in text.layer_types]
        self.positions = torch.zeros(batch_size, max_len, device=device, dtype=torch.int64)
        self.segments = torch.full_like(self.positions, UNWRITTEN)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.start = self.length = 0  # columns before, and after, the newest tokens
        self.dense = True
        self._next = torch.zeros_like(self.positions[:, 0])
        self.segments.fill_(UNWRITTEN)

    def next_positions(self) -> Tensor:
        """[B] int64: where each row goes on."""
        return self._next

    def extend(self, layout: Layout) -> None:
        """Take in where T new tokens stand; their k and v follow layer by layer in `update`."""
        rows, tokens = layout.positions.shape
        if rows != self.batch_size:
            raise SeavlmError(f"{rows} rows for a KV cache of {self.batch_size}")
        if self.length + tokens > self.max_len:
            raise SeavlmError(
                f"the KV cache holds {self.max_len} tokens, {self.length} are taken and {tokens} more came",
                hint="Make it longer, or the conversation shorter.",
            )
        self.start, self.length = self.length, self.length + tokens
        new = slice(self.start, self.length)
        self.positions[:, new] = layout.positions
        self.segments[:, new] = layout.segments
        after = (layout.positions + 1).masked_fill(layout.segments == PADDING, 0).amax(dim=1)
        self._next = torch.maximum(self._next, after)
        self.dense = self.dense and layout.dense

    def _columns(self, kind: str) -> slice:
        window = self.text.window(kind)
        first = 0 if window is None or not self.dense else max(0, self.start - window + 1)
        return slice(first, self.length)

    def keys(self, kind: str) -> tuple[Tensor, Tensor]:
        """Positions and segments, each [B, K], of the columns that layers of this kind look at."""
        columns = self._columns(kind)
        return self.positions[:, columns], self.segments[:, columns]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, H, T, D] of the newest tokens; return [B, H, K, D] of the columns to look at."""
        new, columns = slice(self.start, self.length), self._columns(self.text.layer_types[layer])
        self.k[layer][:, :, new] = k
        self.v[layer][:, :, new] = v
        return self.k[layer][:, :, columns], self.v[layer][:, :, columns]
