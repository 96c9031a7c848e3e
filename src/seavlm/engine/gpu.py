"""The runner for a GPU: the decoder on our kernels (`gpu_kernels.py`), all rows of a step as one.

A step in which every sequence has one token is a CUDA graph, up to the head: one launch, no waiting for
Python. Where only the best logits are asked for, only they leave the GPU.

Shapes: R rows (tokens), S slots (sequences), H heads, D head dim, P parts of a sum, M soft tokens a picture,
V vocabulary rows.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from seavlm.engine import gpu_kernels as kernels
from seavlm.engine.pages import BLOCK
from seavlm.engine.runner import Batch, Best, page_bytes, physical_memory
from seavlm.engine.torch_runner import VIEWS_PER_PASS
from seavlm.engine.weight_only import Matrix, processors
from seavlm.errors import SeavlmError
from seavlm.model.gemma3 import Gemma3

EVERYTHING = 2**30  # the window of layers that have none
PROGRAMS = 2  # of decode attention, a multiprocessor, where keys are shared out
KEYS_EACH = 128  # that a program has at least
CHUNK = 512  # of a row of logits


@dataclass
class _Layer:
    kind: str
    qkv: Matrix
    out: Matrix
    gate_up: Matrix
    down: Matrix
    norms: tuple[Tensor, Tensor]  # of queries and keys
    before_attention: Tensor
    after_attention: Tensor
    before_mlp: Tensor
    after_mlp: Tensor


class GpuRunner:
    """The decoder of `model` on a GPU, its tower as it is.

    device: where to compute, by default where the model is. quantize: None, "int8" or "int4"
    (`weight_only.py`). The weights of the model are taken over: it holds none of those that are rounded, and
    the same memory where they are not.
    """

    rows = 4096

    def __init__(
        self, model: Gemma3, *, device: torch.device | str | None = None, quantize: str | None = None
    ) -> None:
        self._place = torch.device(device) if device is not None else model.device
        self.model, self.config, self.device = model.eval(), model.config, str(self._place)
        self.dtype, self.quantized = model.dtype, quantize is not None
        decoder, text = model.language_model, model.config.text
        self._layers = [
            self._take(layer, kind, quantize)
            for layer, kind in zip(decoder.layers, text.layer_types, strict=True)
        ]
        if quantize and not any(layer.down.rounds for layer in self._layers):
            size = kernels.GROUP
            raise SeavlmError(
                f"{quantize} on a GPU is for matrices that divide into tiles of {size} x {size}",
                hint="Load this model without quantize.",
            )
        model.to(self._place)
        self._head = Matrix(decoder.embed_tokens.weight.detach())
        self._norm = decoder.norm.weight.detach()
        self._factor = torch.tensor(text.hidden_size**0.5, dtype=self.dtype, device=self._place)
        self._frequencies = {
            kind: table.to(self._place) for kind, table in decoder.inverse_frequencies().items()
        }
        self._window = {kind: text.window(kind) or EVERYTHING for kind in text.kinds}
        self._processors = processors(self._place)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._steps: dict[tuple[int, int], _Decode] = {}  # by sequences and blocks
        self._memory: Any = None  # of all CUDA graphs together, as one runs at a time
        self._banned: tuple[tuple[int, ...], Tensor | None] = (), None

    @torch.no_grad()
    def _take(self, layer: Any, kind: str, quantize: str | None) -> _Layer:
        """The matrices of a `DecoderLayer`, those with the same input as one."""
        attention, mlp = layer.self_attn, layer.mlp

        def joined(*parts: torch.nn.Linear, quantize: str | None = quantize) -> Matrix:
            weight = torch.cat([part.weight.detach().to(self._place) for part in parts])
            matrix = Matrix.rounded(weight, quantize)
            ends = [0, *itertools.accumulate(part.out_features for part in parts)]
            for part, (first, end) in zip(parts, itertools.pairwise(ends), strict=True):
                held = weight.new_empty(0, part.in_features) if matrix.rounds else weight[first:end]
                part.weight = torch.nn.Parameter(held, part.weight.requires_grad and not matrix.rounds)
            return matrix

        # What a gated product makes of its rows must divide into groups too.
        wide = quantize if mlp.down_proj.in_features % kernels.GROUP == 0 else None

        def norm(part: torch.nn.Module) -> Tensor:
            weight: Any = part.weight
            return weight.detach().to(self._place)

        return _Layer(
            kind,
            joined(attention.q_proj, attention.k_proj, attention.v_proj),
            joined(attention.o_proj),
            joined(mlp.gate_proj, mlp.up_proj, quantize=wide),
            joined(mlp.down_proj, quantize=wide),
            (norm(attention.q_norm), norm(attention.k_norm)),
            norm(layer.input_layernorm),
            norm(layer.post_attention_layernorm),
            norm(layer.pre_feedforward_layernorm),
            norm(layer.post_feedforward_layernorm),
        )

    # --- the engine's protocol (`runner.py`)

    def allocate(self, pages: dict[str, int]) -> None:
        """A page more than asked for of each kind: rows that only fill up a CUDA graph write there."""
        self._steps.clear()
        self._keys, self._values, self._memory = [], [], None
        text = self.config.text
        shape = (BLOCK, text.num_key_value_heads, text.head_dim)
        place: dict[str, Any] = {"device": self._place, "dtype": self.dtype}
        self._keys = [torch.empty(pages[kind] + 1, *shape, **place) for kind in text.layer_types]
        self._values = [torch.empty(pages[kind] + 1, *shape, **place) for kind in text.layer_types]
        self._spare = dict(pages)

    def try_out(self) -> None:
        """Read a few tokens and write one, so that all kernels are compiled: raises what they raise on a GPU
        that cannot run them."""
        count, limit = kernels.MOST_ROWS + 2, self.config.text.vocab_size
        self.allocate({kind: 2 for kind in self.config.text.kinds})
        tables = {kind: np.asarray([[0, 1]], np.int32) for kind in self.config.text.kinds}
        for first, size in ((0, count), (count, 1)):
            at = np.arange(first, first + size, dtype=np.int32)
            rows = np.stack((np.zeros_like(at), at, at), 1)
            wanted = np.asarray([size - 1], np.int32)
            self.forward(Batch(np.zeros(size, np.int64), rows, tables, wanted=wanted, best=1, limit=limit))

    def page_bytes(self, kind: str) -> int:
        return page_bytes(self.config, kind, self.config.text.head_dim * self.dtype.itemsize)

    def memory(self) -> int:
        """Of what is free, what a step of `rows` rows leaves."""
        if self._place.type != "cuda":
            return physical_memory() // 4
        torch.cuda.empty_cache()  # of what was there while the weights were put together
        text, size = self.config.text, self.dtype.itemsize
        step = self.rows * (3 * text.intermediate_size + 10 * text.hidden_size) * size
        step += 2 * kernels.MOST_ROWS * text.vocab_size * 4  # logits
        if self.quantized:  # unpacked
            step += 2 * text.intermediate_size * text.hidden_size * size
        return max(0, int(torch.cuda.mem_get_info(self._place)[0] * 0.95) - step)

    def copy_page(self, kind: str, source: int, target: int) -> None:
        for layer, own in enumerate(self.config.text.layer_types):
            if own == kind:
                self._keys[layer][target] = self._keys[layer][source]
                self._values[layer][target] = self._values[layer][source]

    def _here(self) -> Any:
        """Kernels start on the GPU that is current."""
        return torch.cuda.device(self._place) if self._place.type == "cuda" else contextlib.nullcontext()

    @torch.inference_mode()
    def encode(self, pixels: Sequence[np.ndarray]) -> list[Tensor]:
        found: list[Tensor] = []
        with self._here():
            for start in range(0, len(pixels), VIEWS_PER_PASS):
                some = torch.from_numpy(np.stack(pixels[start : start + VIEWS_PER_PASS]))
                found += self.model.encode_images(some.to(self._place, self.dtype))
            return [embedding.clone() for embedding in found]  # each to be dropped on its own

    @torch.inference_mode()
    def forward(self, batch: Batch) -> np.ndarray | Best:
        with self._here():
            slots, wanted = batch.rows[:, 0], torch.from_numpy(batch.wanted.astype(np.int64))
            if len(np.unique(slots)) == len(slots) and not batch.pictures:
                h = self._decode(batch)
                if len(wanted) < len(slots):
                    h = h[wanted.to(self._place)]
                return self._answer(h, batch)
            ids = batch.ids.copy()
            for at, embedding in batch.pictures:  # the placeholder may have no row
                ids[at : at + len(embedding)] = 0
            most = kernels.piece_rows(self.config.text.head_dim, self.dtype)
            h = self._compute(
                torch.from_numpy(ids).to(self._place),
                torch.from_numpy(batch.rows).to(self._place),
                {kind: torch.from_numpy(table).to(self._place) for kind, table in batch.tables.items()},
                pieces=torch.from_numpy(_pieces(slots, most)).to(self._place),
                pictures=batch.pictures,
                wanted=wanted.to(self._place),
            )
            return self._answer(h, batch)

    def _answer(self, h: Tensor, batch: Batch) -> np.ndarray | Best:
        """Of final hidden states [wanted, C] the logits, a few rows at a time, or the best of them."""
        parts = h.split(kernels.MOST_ROWS)
        if not batch.best:
            logits = np.empty((len(h), self.config.text.vocab_size), np.float32)
            for part, rows in zip(parts, torch.from_numpy(logits).split(kernels.MOST_ROWS), strict=True):
                rows.copy_(self._head.times(part, wide=True)[0])
            return logits
        if self._banned[0] != tuple(batch.banned):
            ids = torch.tensor(batch.banned, device=self._place) if batch.banned else None
            self._banned = tuple(batch.banned), ids
        masks: Sequence[Tensor | None] = [None] * len(parts)
        if batch.allowed is not None:
            masks = torch.from_numpy(batch.allowed()).to(self._place).split(kernels.MOST_ROWS)
        found = [
            best(
                self._head.times(part, wide=True)[0, :, : batch.limit or None],
                batch.best,
                self._banned[1],
                mask,
            )
            for part, mask in zip(parts, masks, strict=True)
        ]
        ids, logits = torch.cat(found, 1).cpu().numpy()
        return Best(ids.astype(np.int64), logits.astype(np.float32))

    # --- a step

    def _compute(
        self,
        ids: Tensor,
        rows: Tensor,
        tables: dict[str, Tensor],
        *,
        pieces: Tensor | None = None,
        parts: dict[str, int] | None = None,
        pictures: Sequence[tuple[int, Tensor]] = (),
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [wanted, C]. ids [R]; rows, tables: as in `Batch`; pieces: see
        `kernels.attend`, or else parts: kind -> see `kernels.attend_one`; wanted: rows, by default all."""
        text = self.config.text
        heads, eps, scale = text.num_attention_heads, text.rms_norm_eps, text.query_pre_attn_scalar**-0.5
        x = F.embedding(ids, self._head.weight) * self._factor
        for at, embedding in pictures:
            x[at : at + len(embedding)] = embedding
        angles = {}
        for kind, frequencies in self._frequencies.items():
            turned = rows[:, 1, None].float() * frequencies
            angles[kind] = turned.cos(), turned.sin()
        # Few rows go to rounded weights as integers.
        few = len(ids) <= kernels.MOST_ROWS
        split = few and self._layers[0].qkv.rounds
        split_heads = split and pieces is None and text.head_dim % kernels.GROUP == 0
        h: Any
        x, h = kernels.add_norm(x, None, None, self._layers[0].before_attention, eps, split=split)
        for number, layer in enumerate(self._layers):
            pages = self._keys[number], self._values[number]
            table, window = tables[layer.kind], self._window[layer.kind]
            qkv = layer.qkv.times(h, splits=True)
            q = kernels.place_heads(qkv, *pages, rows, table, angles[layer.kind], layer.norms, eps, heads)
            if pieces is None:
                share = 1 if parts is None else parts[layer.kind]
                seen: Any = kernels.attend_one(
                    q, *pages, rows, table, scale, window, share, split=split_heads and layer.out.rounds
                )
            else:
                seen = kernels.attend(q, *pages, rows, table, pieces, scale, window)
            d = layer.out.times(seen, splits=True)
            split = few and layer.gate_up.rounds
            x, h = kernels.add_norm(x, d, layer.after_attention, layer.before_mlp, eps, split=split)
            d = layer.down.times(layer.gate_up.gated(h), splits=True)
            last = number + 1 == len(self._layers)
            if last and wanted is not None:
                x, d = x[wanted], d[:, wanted]
            then = self._norm if last else self._layers[number + 1].before_attention
            split = few and not last and self._layers[number + 1].qkv.rounds
            x, h = kernels.add_norm(x, d, layer.after_mlp, then, eps, split=split)
        return h

    def _decode(self, batch: Batch) -> Tensor:
        """A token of each sequence -> final hidden states [B, C]. Sizes are rounded up to powers of two: a
        graph each."""
        positions, count = batch.rows[:, 1], len(batch.rows)
        size, blocks = _power_of_two(count), _power_of_two(int(positions.max()) // BLOCK + 1)
        step = self._steps.get((size, blocks))
        if step is None:
            step = _Decode(self, size, blocks)
        step.fill(batch, self._spare)
        if (size, blocks) not in self._steps:
            if self._place.type == "cuda":
                self._memory = self._memory or torch.cuda.graph_pool_handle()
                step.capture(self._memory)
            self._steps[size, blocks] = step
        h = step.run()[:count]
        if not len(batch.wanted):  # nobody will wait for it, and the next step writes over what is sent to it
            torch.cuda.current_stream().synchronize() if self._place.type == "cuda" else None
        return h

    def _parts(self, kind: str, size: int, blocks: int) -> int:
        """Programs that share the keys of one head of one sequence: enough to keep all processors busy."""
        keys = min(blocks * BLOCK, self._window[kind])
        wanted = PROGRAMS * self._processors // (size * self.config.text.num_key_value_heads)
        return _power_of_two(max(1, min(wanted, keys // KEYS_EACH, 64)))


class _Decode:
    """A new token of each of B sequences of at most `blocks` pages. All that changes from step to step is in
    one buffer, so that a CUDA graph of one step does for all."""

    def __init__(self, runner: GpuRunner, count: int, blocks: int) -> None:
        self._runner, self._count, self._blocks = runner, count, blocks
        text = runner.config.text
        size = count * (1 + 3 + blocks * len(text.kinds))
        on_gpu = runner._place.type == "cuda"
        self._sent = torch.zeros(size, dtype=torch.int32, pin_memory=on_gpu)
        self._got = torch.zeros(size, dtype=torch.int32, device=runner._place)
        self._there, self._here = self._views(self._sent), self._views(self._got)
        self._parts = {kind: runner._parts(kind, count, blocks) for kind in text.kinds}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._hidden: Tensor | None = None

    def _views(self, buffer: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """ids [B], rows [B, 3], kind -> pages [B, blocks]."""
        count, kinds = self._count, self._runner.config.text.kinds
        ids, rows, *tables = buffer.split([count, 3 * count, *[count * self._blocks] * len(kinds)])
        return (
            ids,
            rows.view(count, 3),
            {kind: table.view(count, self._blocks) for kind, table in zip(kinds, tables, strict=True)},
        )

    def fill(self, batch: Batch, spare: dict[str, int]) -> None:
        """spare: kind -> page for the rows past those of the batch."""
        ids, rows, tables = self._there
        count = len(batch.ids)
        ids[:count] = torch.from_numpy(batch.ids)
        ids[count:] = 0
        rows[:, 0] = torch.arange(self._count)
        rows[:count, 1:] = torch.from_numpy(batch.rows[:, 1:])
        rows[count:, 1:] = 0
        for kind, table in tables.items():
            known = batch.tables[kind][batch.rows[:, 0], : self._blocks]
            table.fill_(spare[kind])
            table[:count, : known.shape[1]] = torch.from_numpy(known)
        self._got.copy_(self._sent, non_blocking=True)

    def capture(self, memory: Any) -> None:
        """Record a step on what was filled in: keys and values are written as by `run`."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._forward()  # libraries set themselves up on the first call, which cannot be recorded
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory, stream=side):
            self._hidden = self._forward()
        self._graph = graph

    def run(self) -> Tensor:
        """Final hidden states [B, C]; from a graph they stand until the next run of any."""
        if self._graph is None or self._hidden is None:
            return self._forward()
        self._graph.replay()
        return self._hidden

    def _forward(self) -> Tensor:
        return self._runner._compute(*self._here, parts=self._parts)


def best(logits: Tensor, k: int, banned: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """The k largest of each row [R, V], the largest first, without the ids `banned`, and of those whose bit
    is set in `mask`, int32 [R, V / 32]: float64 [2, R, k], ids and logits. NaN counts as the largest.

    A GPU takes long for a long row, so it is cut into chunks: the k largest lie in the k chunks with the
    largest maxima.
    """
    k = min(k, logits.shape[1])
    logits = F.pad(logits, (0, -logits.shape[1] % CHUNK), value=-torch.inf)
    if banned is not None:
        logits = logits.index_fill(1, banned, -torch.inf)
    if mask is not None:
        mask = F.pad(mask, (0, logits.shape[1] // 32 - mask.shape[1]))
        places = torch.arange(32, device=mask.device, dtype=torch.int32)
        logits = logits.masked_fill((mask[..., None] >> places & 1).flatten(1) == 0, -torch.inf)
    chunks = logits.unflatten(1, (-1, CHUNK))
    some = min(k, chunks.shape[1])
    which = chunks.amax(2).topk(some, dim=1).indices if some > 1 else chunks.amax(2).argmax(1, keepdim=True)
    among = chunks.gather(1, which[..., None].expand(-1, -1, CHUNK)).flatten(1)
    values, places = among.topk(k, dim=1) if k > 1 else among.max(1, keepdim=True)
    ids = which.gather(1, places // CHUNK) * CHUNK + places % CHUNK
    return torch.stack((ids.double(), values.double()))


def _power_of_two(number: int) -> int:
    """The smallest that is not below `number`."""
    return 1 << (number - 1).bit_length()


def _pieces(slots: np.ndarray, most: int) -> np.ndarray:
    """int32 [n, 2]: first row and number of rows, at most `most`, each of one slot."""
    edges = [0, *(np.flatnonzero(np.diff(slots)) + 1).tolist(), len(slots)]
    return np.asarray(
        [
            (first, min(most, end - first))
            for begin, end in itertools.pairwise(edges)
            for first in range(begin, end, most)
        ],
        np.int32,
    )
