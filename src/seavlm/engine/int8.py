"""The runner of our CPU kernels: the decoder in 8 bits or less (kernels/decoder.cpp), pictures in vision.py.

Weights are integers with a scale for each 32 (`quantize.py`: rounded to int8, or as a GGUF file has them);
activations are rounded to int8 as they come, each 32 with a scale of their own; queries, keys and values too,
each head with one; sums, norms, softmax and the residual stream are fp32. A row's numbers are the same to the
bit whatever else is in the batch. No torch where there are no pictures.

Shapes: R rows of a step, M soft tokens a picture, C width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from seavlm.engine import kernels
from seavlm.engine.quantize import Packed, StoredRows
from seavlm.engine.runner import Batch, aligned, apart, page_bytes, physical_memory
from seavlm.errors import SeavlmError
from seavlm.model.config import GLOBAL, LOCAL, Gemma3Config, TextConfig

if TYPE_CHECKING:
    from seavlm.engine.vision import Int8Vision

KEPT_LOGITS = 64  # rows
NORMS = ("input", "post_attention", "pre_feedforward", "post_feedforward", "q", "k")


class Int8Runner:
    """A runner (`seavlm.engine.runner`). weights: from `quantize.pack_decoder`, or mapped from a file;
    stored: where to read rows of the embedding instead of in them.

    Raises SeavlmError when the kernels were not built, or for sizes that they do not take.
    """

    rows = 512
    device = "cpu"

    def __init__(
        self,
        config: Gemma3Config,
        weights: Mapping[str, np.ndarray],
        *,
        vision: Int8Vision | None = None,
        threads: int | None = None,
        stored: StoredRows | None = None,
    ) -> None:
        self.lib, self.config, self.vision, self.stored = library_for(config), config, vision, stored
        self.pace = kernels.pace(threads)
        self._kept: list[Any] = [weights]  # what the structures point at
        text = config.text
        layers = [self._layer(weights, i, text) for i in range(text.num_hidden_layers)]
        self._layers = (kernels.Layer * len(layers))(*layers)
        tables = {kind: self._keep(inverse_frequencies(text, kind)) for kind in text.kinds}
        some = next(iter(tables.values()))
        self.embedding = Packed.stored(weights, "embedding")
        self._logits = aligned(KEPT_LOGITS, self.embedding.n * 4).view(np.float32)
        self.norm = np.ascontiguousarray(weights["norm"], np.float32)
        self.observe: Callable[[np.ndarray], None] | None = None  # shown the head's input [R, C] of each step
        embedding, head, rotation = self._matrix(self.embedding), [], None
        if "head.rotation" in weights:
            parts = [i for i in range(3) if f"head.{i}.about" in weights]
            head = [self._matrix(Packed.stored(weights, f"head.{part}")) for part in (0, *parts)]
            rotation = self._keep(weights["head.rotation"], np.float16)
        self._model = kernels.Model(
            self._layers, len(layers), text.hidden_size, text.num_attention_heads, text.num_key_value_heads,
            text.head_dim, text.intermediate_size, text.sliding_window, text.rms_norm_eps,
            text.query_pre_attn_scalar**-0.5, self._keep(self.norm),
            tables.get(GLOBAL, some), tables.get(LOCAL, some), embedding,
            (kernels.Matrix * 4)(*head or [embedding]), len(head) or 1, rotation,
        )  # fmt: skip
        self.weight_bytes = sum(array.nbytes for array in weights.values())

    def _layer(self, weights: Mapping[str, np.ndarray], number: int, text: TextConfig) -> kernels.Layer:
        name = f"layers.{number}"
        parts = [f"{name}.qkv.{i}" for i in range(3) if f"{name}.qkv.{i}.about" in weights]
        qkv = [self._matrix(Packed.stored(weights, part)) for part in parts]
        others = [self._matrix(Packed.stored(weights, f"{name}.{part}")) for part in ("o", "gate_up", "down")]
        norms = [self._keep(weights[f"{name}.{norm}_norm"]) for norm in NORMS]
        local = text.window(text.layer_types[number]) is not None
        return kernels.Layer((kernels.Matrix * 3)(*qkv), *others, *norms, local)

    def _matrix(self, packed: Packed) -> kernels.Matrix:
        self._kept.append(packed)
        return packed.matrix()

    def _keep(self, array: np.ndarray, dtype: type = np.float32) -> int:
        """The address of an array that lives as long as the runner."""
        array = np.ascontiguousarray(array, dtype)
        self._kept.append(array)
        return array.ctypes.data

    # --- the runner

    def allocate(self, pages: dict[str, int]) -> None:
        """The system gives the memory when a page is first written."""
        kinds = self.config.text.layer_types
        size = {kind: self.page_bytes(kind) // kinds.count(kind) for kind in set(kinds)}
        self._pools = [aligned(pages[kind], size[kind]) for kind in kinds]
        self._pages = np.array([pool.ctypes.data for pool in self._pools], np.uintp)

    def page_bytes(self, kind: str) -> int:
        return page_bytes(self.config, kind, head_bytes(self.config))

    def memory(self) -> int:
        return physical_memory() // 4

    def copy_page(self, kind: str, source: int, target: int) -> None:
        for pool, own in zip(self._pools, self.config.text.layer_types, strict=True):
            if own == kind:
                pool[target] = pool[source]

    def encode(self, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
        assert self.vision is not None
        return [apart(self.vision.encode(one)) for one in pixels]

    def forward(self, batch: Batch) -> np.ndarray:
        count = len(batch.ids)
        ids = batch.ids.copy()
        for first, embedding in batch.pictures:  # the placeholder's own id may have no row
            ids[first : first + len(embedding)] = 0
        if self.stored is not None:
            x = self.stored.rows(ids) * np.float32(self.config.text.hidden_size**0.5)
        else:
            x = np.empty((count, self.config.text.hidden_size), np.float32)
            self.lib.seavlm_embed(self._model, ids.ctypes.data, count, x.ctypes.data)
        for first, embedding in batch.pictures:
            x[first : first + len(embedding)] = embedding
        rows = np.ascontiguousarray(batch.rows, np.int32)
        wanted = np.ascontiguousarray(batch.wanted, np.int32)
        tables = [np.ascontiguousarray(batch.tables[kind], np.int32) for kind in (GLOBAL, LOCAL)]
        logits = self._room(len(wanted))
        with kernels.ONE_AT_A_TIME, self.pace.step() as threads:
            self.lib.seavlm_forward(
                self._model, self._pages.ctypes.data, tables[0].ctypes.data, tables[1].ctypes.data,
                tables[0].shape[1], x.ctypes.data, rows.ctypes.data, count, wanted.ctypes.data, len(wanted),
                logits.ctypes.data, threads,
            )  # fmt: skip
        if self.observe is not None:
            rms = np.sqrt((x * x).mean(axis=1, keepdims=True) + self.config.text.rms_norm_eps)
            self.observe(x / rms * self.norm)
        return logits[:, : self.config.text.vocab_size]

    def _room(self, rows: int) -> np.ndarray:
        """float32 [rows, V up to the next multiple of 16]. A few are kept: new memory costs a millisecond."""
        if rows > KEPT_LOGITS:
            return np.empty((rows, self.embedding.n), np.float32)
        return self._logits[:rows]


def head_bytes(config: Gemma3Config) -> int:
    """Of a key or a value of one head: int8 [D] and a float32 scale."""
    return config.text.head_dim + 4


def library_for(config: Gemma3Config) -> Any:
    """The kernels; SeavlmError where they were not built or do not take the model's sizes."""
    lib, text = kernels.required(), config.text
    sizes = {
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_attention_heads x head_dim": text.num_attention_heads * text.head_dim,
        "head_dim": text.head_dim,
    }
    for name, size in sizes.items():
        if size % 32:
            raise SeavlmError(
                f"int8 kernels need multiples of 32, and {name} is {size}",
                hint="Run this model in float32 or bfloat16.",
            )
    return lib


def inverse_frequencies(text: TextConfig, kind: str) -> np.ndarray:
    """float32 [D / 2]: theta^(-2 i / D) / factor, as `seavlm.model.layers.inverse_frequencies`."""
    theta, factor = text.rope(kind)
    exponents = np.arange(0, text.head_dim, 2, dtype=np.float32) / np.float32(text.head_dim)
    return (1.0 / np.power(np.float32(theta), exponents) / np.float32(factor)).astype(np.float32)
