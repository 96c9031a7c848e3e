"""The runner of the plain PyTorch model, on any device.

Pieces of like length go into padded batches; their pages are gathered, and `Gemma3` does the rest, with the
one mask rule of `model/attention.py`. It is what the others are measured by: `int8.py`, `gpu.py`.

Shapes: B batch, T tokens, K keys, H KV heads, D head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seavlm.engine.pages import BLOCK
from seavlm.engine.runner import Batch, apart, page_bytes, physical_memory
from seavlm.model.attention import PADDING, UNWRITTEN, Layout
from seavlm.model.config import Gemma3Config
from seavlm.model.gemma3 import Gemma3

VIEWS_PER_PASS = 16  # through the vision tower
WASTE = 1.25  # rows of a padded batch, padding included, over those without: at most this


class TorchRunner:
    """`Gemma3` on its device, in its dtype."""

    rows = 2048

    def __init__(self, model: Gemma3) -> None:
        self.model, self.config, self.device = model.eval(), model.config, str(model.device)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def allocate(self, pages: dict[str, int]) -> None:
        text = self.config.text
        shape = (BLOCK, text.num_key_value_heads, text.head_dim)
        place: dict[str, Any] = {"device": self.model.device, "dtype": self.model.dtype}
        self._keys = [torch.empty(pages[kind], *shape, **place) for kind in text.layer_types]
        self._values = [torch.empty(pages[kind], *shape, **place) for kind in text.layer_types]

    def page_bytes(self, kind: str) -> int:
        return page_bytes(self.config, kind, self.config.text.head_dim * self.model.dtype.itemsize)

    def memory(self) -> int:
        if self.model.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.model.device)[0] * 0.9)
        return physical_memory() // 4

    def copy_page(self, kind: str, source: int, target: int) -> None:
        for layer, own in enumerate(self.config.text.layer_types):
            if own == kind:
                self._keys[layer][target] = self._keys[layer][source]
                self._values[layer][target] = self._values[layer][source]

    @torch.inference_mode()
    def encode(self, pixels: Sequence[np.ndarray]) -> list[Tensor]:
        found: list[Tensor] = []
        for start in range(0, len(pixels), VIEWS_PER_PASS):
            some = torch.from_numpy(np.stack(pixels[start : start + VIEWS_PER_PASS]))
            found += self.model.encode_images(some.to(self.model.device, self.model.dtype))
        if self.model.device.type != "cpu":
            return [embedding.clone() for embedding in found]  # each to be dropped on its own
        copies = [apart(embedding.contiguous().view(torch.uint8).numpy()) for embedding in found]
        return [torch.from_numpy(copy).view(self.model.dtype) for copy in copies]

    @torch.inference_mode()
    def forward(self, batch: Batch) -> np.ndarray:
        place, text = self.model.device, self.config.text
        logits = np.empty((len(batch.wanted), text.vocab_size), np.float32)
        for parts in _alike(batch.rows[:, 0]):
            count, longest = len(parts), max(end - first for first, end in parts)
            ids = torch.zeros(count, longest, dtype=torch.int64)
            real = torch.zeros(count, longest, dtype=torch.bool)
            wanted = torch.zeros(count, longest, dtype=torch.bool)
            order: list[int] = []  # of this part's wanted rows, where their logits go
            pictures: list[Tensor] = []
            for i, (first, end) in enumerate(parts):
                ids[i, : end - first] = torch.from_numpy(batch.ids[first:end])
                real[i, : end - first] = True
                mine = np.flatnonzero((batch.wanted >= first) & (batch.wanted < end))
                wanted[i, torch.from_numpy(batch.wanted[mine].astype(np.int64) - first)] = True
                order += mine.tolist()
                for at, embedding in batch.pictures:
                    if first <= at < end:
                        ids[i, at - first : at - first + len(embedding)] = self.config.image_token_index
                        pictures.append(embedding)
            slots = [int(batch.rows[first, 0]) for first, _ in parts]
            starts = [int(batch.rows[first, 1]) for first, _ in parts]
            cache = _PagedBatch(
                self.config,
                self._keys,
                self._values,
                {kind: table[slots] for kind, table in batch.tables.items()},
                starts,
                [end - first for first, end in parts],
            )
            found = self.model(
                ids.to(place),
                image_embeds=torch.stack(pictures) if pictures else None,
                attention_mask=None if bool(real.all()) else real.to(place),
                cache=cache,
                logits_mask=wanted.to(place),
            )
            logits[order] = found.float().cpu().numpy()
        return logits


def _alike(slots: np.ndarray) -> Iterator[list[tuple[int, int]]]:
    """Ranges of rows, one a slot, in groups that can be padded to one length without much waste."""
    edges = [0, *(np.flatnonzero(np.diff(slots)) + 1).tolist(), len(slots)]
    parts = sorted(itertools.pairwise(edges), key=lambda part: part[0] - part[1])
    group: list[tuple[int, int]] = []
    total = longest = 0
    for first, end in parts:
        longest = longest or end - first
        if group and longest * (len(group) + 1) > WASTE * (total + end - first):
            yield group
            group, total, longest = [], 0, end - first
        group.append((first, end))
        total += end - first
    yield group


class _PagedBatch:
    """The pages of the sequences of one padded batch, as `Gemma3` asks for a cache (`model.attention.Cache`).

    tables: kind -> [B, blocks]. starts, sizes: of each row, the first new position and how many there are.
    """

    def __init__(
        self,
        config: Gemma3Config,
        keys: list[Tensor],
        values: list[Tensor],
        tables: dict[str, np.ndarray],
        starts: list[int],
        sizes: list[int],
    ) -> None:
        self.text, self._k, self._v = config.text, keys, values
        self._device = keys[0].device
        self._tables, self._starts, self._sizes = tables, starts, sizes
        self.length = max(starts)  # any but 0: positions go on from `next_positions`
        self.dense = len(starts) == 1

    def next_positions(self) -> Tensor:
        return torch.tensor(self._starts, device=self._device)

    def extend(self, layout: Layout) -> None:
        """Work out, for each kind, where the new tokens go and which pages and columns are looked at."""
        self._layout = layout
        self._fresh = not any(self._starts)  # nothing but the new tokens: what was computed is looked at
        ends = [start + size for start, size in zip(self._starts, self._sizes, strict=True)]
        self.length = max(ends)
        real = (layout.segments != PADDING).cpu().numpy()
        rows, columns = real.nonzero()
        positions = np.asarray(self._starts)[rows] + columns
        self._from = self._tensor(rows), self._tensor(columns)
        self._to: dict[str, Tensor] = {}
        self._pages: dict[str, Tensor] = {}
        self._columns: dict[str, slice] = {}
        self._keys: dict[str, tuple[Tensor, Tensor]] = {}
        self._there: dict[str, Tensor | None] = {}
        for kind in self.text.kinds:
            table, window = self._tables[kind], self.text.window(kind)
            page = table[rows, positions // BLOCK].astype(np.int64)
            self._to[kind] = self._tensor(page * BLOCK + positions % BLOCK)
            if self._fresh:
                self._keys[kind] = layout.positions, layout.segments
                continue
            oldest = [0 if window is None else max(0, start - window + 1) for start in self._starts]
            begin = np.asarray(oldest) // BLOCK  # [B]
            blocks = max(-(-end // BLOCK) - b for end, b in zip(ends, begin.tolist(), strict=True))
            numbers = begin[:, None] + np.arange(blocks)
            self._pages[kind] = self._tensor(
                np.take_along_axis(table, np.minimum(numbers, table.shape[1] - 1), 1).astype(np.int64)
            )
            where = begin[:, None] * BLOCK + np.arange(blocks * BLOCK)  # [B, K]
            cut = slice(0, blocks * BLOCK)
            if len(ends) == 1:
                cut = slice(oldest[0] - int(begin[0]) * BLOCK, ends[0] - int(begin[0]) * BLOCK)
            self._columns[kind] = cut
            there = where < np.asarray(ends)[:, None]
            self._keys[kind] = (
                self._tensor(where[:, cut]),
                self._tensor(np.where(there, 0, UNWRITTEN)[:, cut]),
            )
            # What others left in a page, a NaN perhaps, must not come in, not even with weight zero.
            self._there[kind] = None if there[:, cut].all() else self._tensor(there[:, cut])

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def keys(self, kind: str) -> tuple[Tensor, Tensor]:
        return self._keys[kind]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kind = self.text.layer_types[layer]
        rows, columns = self._from
        found = []
        for pool, new in ((self._k[layer], k), (self._v[layer], v)):
            pool.flatten(0, 1)[self._to[kind]] = new[rows, :, columns]
            if self._fresh:
                found.append(new)
            else:
                gathered = pool[self._pages[kind]].flatten(1, 2)[:, self._columns[kind]]  # [B, K, H, D]
                if (there := self._there[kind]) is not None:
                    gathered = gathered.masked_fill(~there[:, :, None, None], 0)
                found.append(gathered.transpose(1, 2))
        return found[0], found[1]
