"""Gemma 3 with its decoder in int8, on the CPU: what `seavlm.model.gemma3.Gemma3` is to the engine, faster.

Weights are rounded to int8, each 32 of a row with a scale of their own, and so are activations as they come;
sums, norms, softmax and the residual stream are fp32 (kernels/decoder.cpp). The vision tower and projector
stay as they were.

Shapes: B batch, T tokens, R rows (tokens that are no padding), V vocabulary rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from seavlm.engine import kernels
from seavlm.engine.quantize import Packed, pack_tensor
from seavlm.errors import SeavlmError
from seavlm.model.attention import PADDING, make_layout
from seavlm.model.config import GLOBAL, LOCAL, Gemma3Config
from seavlm.model.gemma3 import Gemma3, check_ids, check_images

BLOCK = 64  # positions in a block of the cache
CHUNK = 512  # rows in one pass over the weights; more only where a picture would be cut


class Int8Gemma3(nn.Module):
    """Takes over a loaded `Gemma3`; the decoder's fp32 weights are given up matrix by matrix.

    screened: the head in two planes, faster where few logits are wanted (`top` of 1) and slower for all.
    Raises SeavlmError when the kernels were not built, or for sizes that they do not take.
    """

    def __init__(self, model: Gemma3, threads: int | None = None, *, screened: bool = False) -> None:
        super().__init__()
        lib = kernels.library()
        if lib is None:
            raise SeavlmError(
                "int8 needs the compiled kernels, and this package was built without a C++ compiler",
                hint="Install one (Debian: apt install g++) and run: python -m seavlm.engine.kernels",
            )
        self.lib, self.config = lib, model.config
        self.device, self.dtype = torch.device("cpu"), torch.float32
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
        self.encode_images = model.encode_images
        if model.config.vision is not None:  # registered, so that parameters() and device find them
            self.vision_tower, self.multi_modal_projector = model.vision_tower, model.multi_modal_projector
        self._kept: list[Tensor] = []  # what the structures point at
        self._packed: list[Packed] = []
        decoder: Any = model.language_model
        self._embedding = self._pack(decoder.embed_tokens.weight, screened)
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
        return sum(t.nbytes for t in self._kept) + sum(p.nbytes for p in self._packed)

    def new_cache(self, batch_size: int, max_len: int) -> Int8Cache:
        return Int8Cache(self.config, batch_size, max_len)

    def forward(
        self,
        input_ids: Tensor,
        *,
        image_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Int8Cache | None = None,
        logits_mask: Tensor | None = None,
        last_only: bool = False,
        top: int = 0,
    ) -> Tensor:
        """As `Gemma3.forward`, logits in fp32. Padding is not computed. With `top`, logits below that many
        largest of a row may be -inf: they are then not computed."""
        check_images(self.config, image_embeds)
        check_ids(self.config, input_ids, 0 if image_embeds is None else len(image_embeds))
        batch, tokens = input_ids.shape
        is_image = None if image_embeds is None else input_ids == self.config.image_token_index
        cache = cache or self.new_cache(batch, tokens)
        so_far: Any = cache  # of which the layout wants the length and the next positions only
        layout = make_layout(input_ids, attention_mask=attention_mask, is_image=is_image, cache=so_far)
        wanted = torch.ones_like(input_ids, dtype=torch.bool) if logits_mask is None else logits_mask.bool()
        if last_only:
            wanted = torch.zeros_like(wanted)
            wanted[:, -1] = True
        real = layout.segments != PADDING
        ids = input_ids[real]
        rows = torch.stack(
            [real.nonzero()[:, 0], layout.positions[real], layout.reach[real]], dim=1
        ).int()  # [R, 3]
        cache.extend(layout.positions, real)

        x = torch.empty(len(ids), self.config.text.hidden_size)
        picture = torch.zeros_like(ids, dtype=torch.bool) if is_image is None else is_image[real]
        text_ids = ids.masked_fill(picture, 0).contiguous()
        self.lib.seavlm_embed(self._model, text_ids.data_ptr(), len(ids), x.data_ptr())
        if image_embeds is not None:
            x[picture] = image_embeds.float().flatten(0, 1)

        chosen = wanted[real]
        logits = torch.empty(int(chosen.sum()), self._embedding.n)  # V, up to the next multiple of 16
        # Rows that pad the matrix may be among the largest.
        tops = torch.full((len(logits),), top and top + self._embedding.n - self.config.text.vocab_size).int()
        self.exact = torch.empty(len(logits), dtype=torch.int32)  # logits computed in full, of each row
        done = 0
        with self._lock:
            for first, last in _chunks(rows):
                some = chosen[first:last].nonzero()[:, 0].int()
                part = rows[first:last].contiguous()
                self.lib.seavlm_forward(
                    self._model, cache.layers, x[first:last].data_ptr(), part.data_ptr(), last - first,
                    some.data_ptr(), tops[done:].data_ptr(), len(some), logits[done:].data_ptr(),
                    self.exact[done:].data_ptr(), self.threads,
                )  # fmt: skip
                done += len(some)
        logits = logits[:, : self.config.text.vocab_size]
        if logits_mask is not None:
            return logits
        if last_only:
            return logits[:, None]
        whole = torch.zeros(batch, tokens, self.config.text.vocab_size)
        whole[real] = logits
        return whole

    def _keep(self, tensor: Tensor) -> int:
        """The address of a tensor that lives as long as the model."""
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _norm(self, norm: Any) -> int:
        return self._keep(1.0 + norm.weight.detach().float())

    @torch.no_grad()
    def _pack(self, weight: Tensor, screened: bool = False) -> kernels.Matrix:
        packed = pack_tensor(weight.float().numpy(), screened=screened)
        self._packed.append(packed)
        return packed.matrix()


def _chunks(rows: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of about CHUNK rows; a cut never goes through a picture (a row that sees beyond itself)."""
    count, start = len(rows), 0
    open_ = (rows[:, 2] > rows[:, 1]).tolist()  # True: the next row belongs to the same picture
    while start < count:
        end = min(start + CHUNK, count)
        while end < count and open_[end - 1]:
            end += 1
        yield start, end
        start = end


class Int8Cache:
    """Keys and values in fp16, in blocks of 64 positions: all of them on global layers, on local ones a ring
    that holds the window and one chunk. See `seavlm.engine.cache.KVCache` for the interface.
    """

    def __init__(self, config: Gemma3Config, batch_size: int, max_len: int) -> None:
        self.config, self.batch_size, self.max_len = config, batch_size, max_len
        text = config.text
        every = -(-max_len // BLOCK)
        longest = CHUNK + config.mm_tokens_per_image
        self._k, self._v, layers = [], [], []
        for kind in text.layer_types:
            window = text.window(kind)
            blocks = every if window is None else min(every, -(-(window + longest) // BLOCK) + 1)
            shape = (batch_size, text.num_key_value_heads, blocks, BLOCK * text.head_dim)
            self._k.append(torch.empty(shape, dtype=torch.float16))
            self._v.append(torch.empty(shape, dtype=torch.float16))
            layers.append(kernels.Cache(self._k[-1].data_ptr(), self._v[-1].data_ptr(), blocks))
        self.layers = (kernels.Cache * len(layers))(*layers)
        self.length = 0
        self._next = torch.zeros(batch_size, dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._k, *self._v))

    def next_positions(self) -> Tensor:
        return self._next

    def extend(self, positions: Tensor, real: Tensor) -> None:
        if len(positions) != self.batch_size:
            raise SeavlmError(f"{len(positions)} rows for a KV cache of {self.batch_size}")
        after = torch.maximum(self._next, (positions + 1).masked_fill(~real, 0).amax(dim=1))
        if int(after.max()) > self.max_len:
            raise SeavlmError(
                f"the KV cache holds {self.max_len} tokens, and {int(after.max())} are needed",
                hint="Make it longer, or the conversation shorter.",
            )
        self._next = after
        self.length += positions.shape[1]

    def fork(self, rows: Tensor, more: int) -> Int8Cache:
        """A new cache with room for `more` tokens after these; its row i goes on from this one's rows[i]."""
        new = Int8Cache(self.config, len(rows), self.max_len + more)
        for old, copy in zip((*self._k, *self._v), (*new._k, *new._v), strict=True):
            # As many blocks, or old has one for each position and has not begun again from the first.
            copy[:, :, : old.shape[2]] = old[rows]
        new.length, new._next = self.length, self._next[rows]
        return new
