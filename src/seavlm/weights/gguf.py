"""Gemma 3 from a llama.cpp `.gguf` file: each tensor is dequantised to float32 when it is asked for.

What differs from the Hugging Face layout, and is undone here:

- RMSNorm weights are stored with 1 added.
- The head is the embedding, also where a file holds it a second time as `output.weight`.
- The vocabulary ends before <image_soft_token>. Rows are added up to the next multiple of 64 (262,144 ->
  262,208, what Gemma 3 has from 4B up). Each is the mean of the others: its logit is then the mean of all
  logits, so it is never the greedy choice, which a row of zeros can be.
- The config is spread over the metadata; what the format leaves out (the query scale) follows from the sizes.

File layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seavlm.errors import SeavlmError
from seavlm.model.config import Gemma3Config, TextConfig
from seavlm.weights import names as naming
from seavlm.weights.checkpoint import check_tensors

ROWS_AT_ONCE = 512  # what is dequantised in one go stays in the processor's cache
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class _Stored:
    """A tensor in the file: quantisation type, shape (rows first), and where its bytes begin."""

    kind: int
    shape: tuple[int, ...]
    begin: int


class GGUFCheckpoint:
    """A `.gguf` file of Gemma 3's decoder, mapped. `get` returns float32 whatever the file stores."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            try:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:
                raise SeavlmError(f"{path} is empty", hint="Copy or download it again.") from error
        metadata, stored = _read(path, self._data)
        self._stored = {naming.from_gguf(name): entry for name, entry in stored.items()}
        self._stored.pop(naming.HEAD, None)
        self._stored.pop("rope_freqs.weight", None)  # a table that follows from the config
        self.config = _config(path, metadata, self._stored)
        found = {name: entry.shape for name, entry in self._stored.items()}
        if naming.EMBEDDING in found:
            found[naming.EMBEDDING] = (self.config.text.vocab_size, *found[naming.EMBEDDING][1:])
        check_tensors(path, found, self.config)
        self._shapes = naming.shapes(self.config)
        self._last = "", torch.empty(0)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def get(self, name: str) -> Tensor:
        entry = self._stored[name]
        result = torch.empty(self._shapes[name])
        given = result[: entry.shape[0]]
        out = given.view(-1, entry.shape[-1]).numpy()
        for at in range(0, len(out), ROWS_AT_ONCE):
            out[at : at + ROWS_AT_ONCE] = self.rows(name, at, at + ROWS_AT_ONCE)
        if naming.is_text_norm(name):
            result -= 1
        if len(given) < len(result):
            result[len(given) :] = given.mean(dim=0)
        return result

    def read(self, name: str, start: int, stop: int) -> Tensor:
        kept, tensor = self._last
        if kept != name:  # pieces come in order: the tensor is taken out of its blocks once
            tensor = self.get(name)
            self._last = name, tensor
        return tensor.reshape(-1)[start:stop].clone()

    def blocks(self, name: str) -> tuple[str, np.ndarray]:
        """The type's name and the stored blocks, uint8 [rows, bytes of a row], mapped. Rows that only `shape`
        knows of (see above) are not there."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        entry = self._stored[name]
        kind = GGMLQuantizationType(entry.kind)
        block, nbytes = GGML_QUANT_SIZES[kind]
        rows, width = math.prod(entry.shape[:-1]), entry.shape[-1] // block * nbytes
        return kind.name, np.frombuffer(self._data, np.uint8, rows * width, entry.begin).reshape(rows, width)

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Some of the stored rows as float32 [last - first, columns]."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        kind, stored = self.blocks(name)
        return dequantize(stored[first:last], GGMLQuantizationType[kind])


def _config(path: Path, metadata: dict[str, Any], stored: dict[str, _Stored]) -> Gemma3Config:
    architecture = metadata.get("general.architecture")
    if architecture != "gemma3":
        raise SeavlmError(
            f"{path} holds {architecture!r}, not Gemma 3",
            hint="Give the decoder's file, not its mmproj."
            if architecture == "clip"
            else "Use another model.",
        )
    if metadata.get("split.count", 1) > 1:
        raise SeavlmError(
            f"{path} is one part of {metadata['split.count']}", hint="Join them: llama-gguf-split --merge."
        )

    def value(key: str, default: Any = None) -> Any:
        found = metadata.get(f"gemma3.{key}", default)
        if found is None:
            raise SeavlmError(
                f"{path} lacks gemma3.{key}", hint="Convert the model again with a newer llama.cpp."
            )
        return found

    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        if metadata.get(f"gemma3.{key}"):
            raise SeavlmError(f"{path} sets {key}, which Gemma 3 does not have")
    tokens: dict[str, int] = metadata.get("tokenizer.ggml.tokens", {})
    rows = stored[naming.EMBEDDING].shape[0] if naming.EMBEDDING in stored else len(tokens)
    image = tokens.get("<image_soft_token>", rows)
    width, heads, layers = value("embedding_length"), value("attention.head_count"), value("block_count")
    head_dim = value("attention.key_length", width // heads)
    text = TextConfig(
        vocab_size=rows if image < rows else math.ceil((rows + 1) / 64) * 64,
        hidden_size=width,
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=value("attention.head_count_kv", heads),
        head_dim=head_dim,
        # 27B divides by width / heads; every other size by the head's own dimension.
        query_pre_attn_scalar=width // heads if layers == 62 else head_dim,
        sliding_window=value("attention.sliding_window"),
        rope_theta=value("rope.freq_base", 1_000_000.0),
        rope_factor=value("rope.scaling.factor", 1.0),
        rope_local_theta=value("rope.freq_base_swa", 10_000.0),
        # stored as float32: 9.999999974752427e-07 is 1e-06
        rms_norm_eps=float(f"{value('attention.layer_norm_rms_epsilon', 1e-6):.6g}"),
        max_position_embeddings=value("context_length"),
    )
    eos = [metadata.get("tokenizer.ggml.eos_token_id", 1), tokens.get("<eos>"), tokens.get("<end_of_turn>")]
    return Gemma3Config(
        text=text,
        image_token_index=image,
        boi_token_index=tokens.get("<start_of_image>", Gemma3Config.boi_token_index),
        eoi_token_index=tokens.get("<end_of_image>", Gemma3Config.eoi_token_index),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id", 0),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id", 2),
        eos_token_ids=tuple(sorted({i for i in eos if i is not None})),
        dtype="float32",
    )


class _Cursor:
    """Reads GGUF's values from mapped bytes, one after the other; IndexError past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def skip(self, count: int) -> int:
        begin = self.at
        self.at += count
        if self.at > len(self.data):
            raise IndexError
        return begin

    def number(self, code: str) -> Any:
        return struct.unpack_from(code, self.data, self.skip(struct.calcsize(code)))[0]

    def string(self) -> str:
        begin = self.skip(self.number("<Q"))
        return self.data[begin : self.at].decode("utf-8", "replace")

    def value(self, kind: int, key: str) -> Any:
        """A value; of arrays only the tokens are kept, as token -> id, the others are passed over."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        inner, count = self.number("<I"), self.number("<Q")
        if key == "tokenizer.ggml.tokens":
            return {self.string(): i for i in range(count)}
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[inner]))
        else:
            for _ in range(count):
                self.value(inner, "")
        return None


def _read(path: Path, data: mmap.mmap) -> tuple[dict[str, Any], dict[str, _Stored]]:
    """Metadata and tensors of the file. `gguf.GGUFReader` would spend 10 s on views of each token."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if data[:4] != b"GGUF":
        raise SeavlmError(f"{path} is not a GGUF file", hint="Copy or download it again.")
    cursor = _Cursor(data)
    cursor.skip(4)
    metadata: dict[str, Any] = {}
    entries: dict[str, tuple[int, tuple[int, ...], int]] = {}
    try:
        if (version := cursor.number("<I")) not in (2, 3):
            raise SeavlmError(f"{path} is GGUF version {version}", hint="Known: 2 and 3, little endian.")
        num_tensors, num_values = cursor.number("<Q"), cursor.number("<Q")
        for _ in range(num_values):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.number("<I"), key)
        for _ in range(num_tensors):
            name = cursor.string()
            shape = tuple(cursor.number("<Q") for _ in range(cursor.number("<I")))[::-1]  # columns come first
            if not name.isprintable():
                raise SeavlmError(f"{path} holds a tensor called {name!r}", hint="Copy or download it again.")
            if name in entries:
                raise SeavlmError(f"{path} holds {name} twice", hint="Write the file again.")
            entries[name] = cursor.number("<I"), shape, cursor.number("<Q")
    except (IndexError, KeyError, struct.error, RecursionError) as error:
        raise SeavlmError(
            f"{path} is cut off or damaged in its header", hint="Copy or download it again."
        ) from error
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise SeavlmError(f"{path} has general.alignment {alignment!r}", hint="Copy or download it again.")
    begin = math.ceil(cursor.at / alignment) * alignment
    stored = {}
    for name, (kind, shape, offset) in entries.items():
        try:
            block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except ValueError:
            raise SeavlmError(
                f"{name} in {path} has unknown type {kind}", hint="Update the gguf package."
            ) from None
        if not shape or shape[-1] % block:
            raise SeavlmError(f"{name} in {path} has shape {list(shape)}, not in blocks of {block}")
        end = begin + offset + math.prod(shape) // block * nbytes
        if end > len(data):
            raise SeavlmError(
                f"{path} is cut off: {name} ends at byte {end:,}, the file at {len(data):,}",
                hint="Copy or download it again.",
            )
        stored[name] = _Stored(kind, shape, begin + offset)
    return metadata, stored
