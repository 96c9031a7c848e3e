"""Gemma 3 with its decoder in int8, on the CPU: what `seavlm.model.gemma3.Gemma3` is to the engine, faster.

Weights are rounded to int8, each 32 of a row with a scale of their own, and so are activations as they come;
sums, norms, softmax and the residual stream are fp32 (kernels/decoder.cpp). The vision tower and projector
stay as they were.

Shapes: B batch, T tokens, R rows (tokens that are no padding), V vocabulary rows.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seavlm.engine import kernels
from seavlm.engine.pages import BLOCK
from seavlm.engine.runner import Batch, page_bytes
from seavlm.engine.vision import Int8Vision
from seavlm.errors import SeavlmError
from seavlm.model.config import GLOBAL, LOCAL
from seavlm.model.gemma3 import Gemma3


class Int8Gemma3:
    """A runner (`seavlm.engine.runner`). Takes over a loaded `Gemma3`; the decoder's fp32 weights are given
    up matrix by matrix.

    Raises SeavlmError when the kernels were not built, or for sizes that they do not take.
    """

    rows = 512
    device = "cpu"

    def __init__(self, model: Gemma3, threads: int | None = None) -> None:
        lib = kernels.library()
        if lib is None:
            raise SeavlmError(
                "int8 needs the compiled kernels, and this package was built without a C++ compiler",
                hint="Install one (Debian: apt install g++) and run: python -m seavlm.engine.kernels",
            )
        self.lib, self.config = lib, model.config
        self.threads = threads or torch.get_num_threads()
        self._lock = threading.Lock()  # the kernels' scratch memory is one
        text = model.config.text
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
        self.vision = None if model.config.vision is None else Int8Vision(model, self.threads)
        self._kept: list[Tensor] = []  # what the structures point at
        decoder: Any = model.language_model
        self._embedding = self._pack(decoder.embed_tokens.weight)
        layers = []
        for kind, layer in zip(text.layer_types, decoder.layers, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            qkv = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
            both = torch.stack(  # sixteen rows of gate, sixteen of up
                [p.weight.unflatten(0, (-1, 16)) for p in (mlp.gate_proj, mlp.up_proj)], dim=1
            ).flatten(0, 2)
            layers.append(
                kernels.Layer(
                    self._pack(torch.cat(qkv)),
                    self._pack(attention.o_proj.weight),
                    self._pack(both),
                    self._pack(mlp.down_proj.weight),
                    self._norm(layer.input_layernorm),
                    self._norm(layer.post_attention_layernorm),
                    self._norm(layer.pre_feedforward_layernorm),
                    self._norm(layer.post_feedforward_layernorm),
                    self._norm(attention.q_norm),
                    self._norm(attention.k_norm),
                    text.window(kind) is not None,
                )
            )
            for module in (attention, mlp):
                for linear in module.children():
                    linear.weight = None
        frequencies = {kind: self._keep(table) for kind, table in decoder.inverse_frequencies().items()}
        self._layers = (kernels.Layer * len(layers))(*layers)
        some = next(iter(frequencies.values()))
        self._model = kernels.Model(
            self._layers, len(layers), text.hidden_size, text.num_attention_heads, text.num_key_value_heads,
            text.head_dim, text.intermediate_size, text.sliding_window, text.rms_norm_eps,
            text.query_pre_attn_scalar**-0.5, self._norm(decoder.norm),
            frequencies.get(GLOBAL, some), frequencies.get(LOCAL, some),
            self._embedding,
        )  # fmt: skip
        decoder.embed_tokens.weight = None

    @property
    def weight_bytes(self) -> int:
        """Of the decoder, as packed."""
        return sum(tensor.nbytes for tensor in self._kept)

    # --- the runner (`seavlm.engine.runner.Runner`)

    def allocate(self, pages: dict[str, int]) -> None:
        """Keys and values in fp16. The system gives the memory when a page is first written."""
        text = self.config.text
        size = text.num_key_value_heads * BLOCK * text.head_dim
        self._pools = [np.empty((2, pages[kind], size), np.float16) for kind in text.layer_types]
        caches = [kernels.Cache(pool[0].ctypes.data, pool[1].ctypes.data) for pool in self._pools]
        self._caches = (kernels.Cache * len(caches))(*caches)

    def page_bytes(self, kind: str) -> int:
        return page_bytes(self.config, kind, 2)

    def copy_page(self, kind: str, source: int, target: int) -> None:
        for pool, own in zip(self._pools, self.config.text.layer_types, strict=True):
            if own == kind:
                pool[:, target] = pool[:, source]

    @torch.inference_mode()
    def encode(self, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
        assert self.vision is not None
        return [self.vision.encode_images(torch.from_numpy(one)[None])[0].numpy() for one in pixels]

    def forward(self, batch: Batch) -> np.ndarray:
        count = len(batch.ids)
        x = np.empty((count, self.config.text.hidden_size), np.float32)
        ids = batch.ids.copy()
        for first, embedding in batch.pictures:  # the placeholder's own id may have no row
            ids[first : first + len(embedding)] = 0
        self.lib.seavlm_embed(self._model, ids.ctypes.data, count, x.ctypes.data)
        for first, embedding in batch.pictures:
            x[first : first + len(embedding)] = embedding
        rows = np.ascontiguousarray(batch.rows, np.int32)
        wanted = np.ascontiguousarray(batch.wanted, np.int32)
        tables = [np.ascontiguousarray(batch.tables[kind], np.int32) for kind in (GLOBAL, LOCAL)]
        logits = np.empty((len(wanted), self._embedding.n), np.float32)  # V, up to the next multiple of 16
        with self._lock:
            self.lib.seavlm_forward(
                self._model, self._caches, tables[0].ctypes.data, tables[1].ctypes.data, tables[0].shape[1],
                x.ctypes.data, rows.ctypes.data, count, wanted.ctypes.data, len(wanted), logits.ctypes.data,
                self.threads,
            )  # fmt: skip
        return logits[:, : self.config.text.vocab_size]

    def _keep(self, tensor: Tensor) -> int:
        """The address of a tensor that lives as long as the model."""
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _norm(self, norm: Any) -> int:
        return self._keep(1.0 + norm.weight.detach().float())

    @torch.no_grad()
    def _pack(self, weight: Tensor) -> kernels.Matrix:
        rows, columns = weight.shape
        padded = -rows % 16
        source = nn.functional.pad(weight.float(), (0, 0, 0, padded)).contiguous()
        q = torch.empty(source.shape, dtype=torch.uint8)
        scale = torch.empty(len(source) * columns // 32, dtype=torch.float16)
        self.lib.seavlm_pack(
            source.data_ptr(), len(source), columns, q.data_ptr(), scale.data_ptr(), self.threads
        )
        return kernels.Matrix(self._keep(q), self._keep(scale), len(source), columns)
