"""Matrices as the CPU kernels read them: from numbers, or from a GGUF file's blocks as they are.

A `Packed` is a handful of arrays that can be written to a file and mapped again; decoder.cpp says how they
are laid out. No torch here.

    kind       bits a weight  what it holds
    EIGHT      8.5            scale * (u - 128): own int8, Q8_0
    FOUR       5              scale * u + least: own int4, Q4_0, Q4_K
    FIVE       6              scale * u + least: Q5_0, Q5_K
    SIX        7              scale * (u - 32), a scale for each 16: Q6_K

Q8_0, Q4_0 and Q5_0 keep every number exactly. The K kinds keep every code; their scales, fp16 times a 6- or
8-bit integer in the file, are rounded to fp16 (relative error 5e-4 at most).

Shapes: N rows (a multiple of 16), K columns (of 32).
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seavlm.engine import kernels
from seavlm.errors import SeavlmError
from seavlm.manifest import read_manifest

if TYPE_CHECKING:
    from torch import Tensor

    from seavlm.model.config import Gemma3Config
    from seavlm.text.tokenizer import Tokenizer
    from seavlm.weights.checkpoint import Checkpoint
    from seavlm.weights.gguf import GGUFCheckpoint

EIGHT, FOUR, FIVE, SIX = range(4)
LINES = {EIGHT: 8, FOUR: 4, FIVE: 5, SIX: 6}  # of 64 bytes, for 16 rows of 32 columns
BITS = {EIGHT: 8.5, FOUR: 5, FIVE: 6, SIX: 7}  # a weight, scales and all
ROWS_AT_ONCE = 2048
THREADS = 2  # waiting for memory mostly

# Codes uint8 [n, K], scale float [n, K / 32] (SIX: K / 16), least the same or None.
Codes = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclass(frozen=True)
class Packed:
    """A matrix [N, K]. Arrays that its kind does not have are empty."""

    kind: int
    n: int
    k: int
    q: np.ndarray  # uint8
    scale: np.ndarray  # float16
    least: np.ndarray  # float16

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in ("q", "scale", "least")}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def matrix(self) -> kernels.Matrix:
        """What the kernels take; it points into these arrays, which must outlive it."""
        return kernels.Matrix(
            *(array.ctypes.data for array in self.arrays.values()), self.n, self.k, self.kind
        )

    def tensors(self, prefix: str) -> dict[str, np.ndarray]:
        """To be stored, for example with safetensors."""
        about = np.array([self.kind, self.n, self.k], dtype=np.int32)
        held = {name: array for name, array in self.arrays.items() if array.size}
        return {f"{prefix}.{name}": array for name, array in {"about": about, **held}.items()}

    @classmethod
    def stored(cls, tensors: Mapping[str, np.ndarray], prefix: str) -> Packed:
        """Back from `tensors`, without a copy."""
        none = {"q": np.uint8, "scale": np.float16, "least": np.float16}
        arrays = {name: tensors.get(f"{prefix}.{name}", np.empty(0, kind)) for name, kind in none.items()}
        kind, n, k = (int(number) for number in tensors[f"{prefix}.about"])
        return cls(kind, n, k, *arrays.values())

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """These rows as numbers, float32 [len(ids), K]."""
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        out = np.empty((len(ids), self.k), np.float32)
        kernels.required().seavlm_rows(
            ctypes.byref(self.matrix()), ids.ctypes.data, len(ids), out.ctypes.data
        )
        return out


def pack_tensor(weight: Tensor | np.ndarray) -> Packed:
    """Float [n, k] to int8, each 32 of a row with an fp16 scale of their own; some rows at a time."""
    n, k = weight.shape

    def rows(start: int) -> np.ndarray:
        some = weight[start : start + ROWS_AT_ONCE]
        return some if isinstance(some, np.ndarray) else some.float().numpy()

    return pack(EIGHT, n, k, (round_int8(rows(i)) for i in _starts(n)))


def pack_gguf(checkpoint: GGUFCheckpoint, name: str, *, rounded: bool = False) -> Packed:
    """A tensor of a GGUF file, without going through floats where the kernels know its type. Types that they
    do not know are dequantised, some rows at a time, and rounded to int8; with `rounded` all are (Q8_0 is so
    already).

    The embedding gets the rows that the file lacks (see `seavlm.weights.gguf`), each the mean of the others.
    """
    n, k = checkpoint.shape(name)
    kind_name, blocks = checkpoint.blocks(name)
    kind, read = _READERS.get(kind_name, (EIGHT, None))
    if rounded and kind != EIGHT:
        kind, read = EIGHT, None
    starts = list(_starts(len(blocks)))
    parts = (
        read(blocks[i : i + ROWS_AT_ONCE]) if read else round_int8(checkpoint.rows(name, i, i + ROWS_AT_ONCE))
        for i in starts
    )
    if n == len(blocks):
        return pack(kind, n, k, parts)
    return pack(kind, n, k, _with_means(kind, n - len(blocks), parts))


def join(parts: Sequence[Packed]) -> list[Packed]:
    """One under the other; neighbours of one kind become one matrix."""
    joined: list[Packed] = []
    for part in parts:
        if joined and joined[-1].kind == part.kind:
            before = joined.pop()
            both = [
                np.concatenate(pair)
                for pair in zip(before.arrays.values(), part.arrays.values(), strict=True)
            ]
            part = Packed(part.kind, before.n + part.n, part.k, *both)
        joined.append(part)
    return joined


def interleave(gate: Packed, up: Packed) -> Packed:
    """Sixteen rows of gate, sixteen of up, and so on. Of two kinds, both are rounded to int8."""
    if gate.kind != up.kind:
        gate, up = (pack_tensor(one.rows(np.arange(one.n))) for one in (gate, up))
    blocks = gate.n // 16
    both = [
        np.stack([a.reshape(blocks, -1), b.reshape(blocks, -1)], axis=1).reshape(-1)
        for a, b in zip(gate.arrays.values(), up.arrays.values(), strict=True)
    ]
    return Packed(gate.kind, gate.n + up.n, gate.k, *both)


def _starts(rows: int) -> Iterable[int]:
    return range(0, rows, ROWS_AT_ONCE)


def pack(kind: int, rows: int, k: int, parts: Iterable[Codes]) -> Packed:
    """Parts of a multiple of 16 rows, but for the last."""
    lib, n = kernels.required(), rows + -rows % 16
    leasts = kind in (FOUR, FIVE)
    q = np.empty(n * k * LINES[kind] // 8, np.uint8)
    scale = np.empty(n * k // (16 if kind == SIX else 32), np.float16)
    least = np.empty(n * k // 32 if leasts else 0, np.float16)
    done = 0
    for codes, scales, lowest in parts:
        padded = -len(codes) % 16
        if padded:
            codes, scales = (np.pad(array, ((0, padded), (0, 0))) for array in (codes, scales))
            lowest = None if lowest is None else np.pad(lowest, ((0, padded), (0, 0)))
        codes, end = np.ascontiguousarray(codes), done + len(codes)
        lib.seavlm_arrange(
            codes.ctypes.data, len(codes), k, kind, q[done * k * LINES[kind] // 8 :].ctypes.data, THREADS
        )  # fmt: skip
        _lanes(scale.reshape(n, -1)[done:end], scales)
        if lowest is not None:
            _lanes(least.reshape(n, -1)[done:end], lowest)
        done = end
    return Packed(kind, n, k, q, scale, least)


def _lanes(out: np.ndarray, values: np.ndarray) -> None:
    """[n, g] -> [n / 16, g, 16]"""
    groups = values.shape[1]
    out.reshape(-1, groups, 16)[:] = values.reshape(-1, 16, groups).transpose(0, 2, 1)


def round_int8(weight: np.ndarray) -> Codes:
    weight = np.ascontiguousarray(weight, dtype=np.float32)
    n, k = weight.shape
    codes, scale = np.empty((n, k), np.uint8), np.empty((n, k // 32), np.float16)
    kernels.required().seavlm_round(weight.ctypes.data, n, k, codes.ctypes.data, scale.ctypes.data, THREADS)
    return codes, scale, None


def round_range(weight: np.ndarray, kind: int) -> Codes:
    """FOUR and FIVE: codes from the least to the greatest of each 32 of a row."""
    (n, k), most = weight.shape, 2 ** LINES[kind] - 1
    groups = weight.reshape(n, -1, 32)
    low, high = groups.min(axis=2), groups.max(axis=2)
    least, scale = low.astype(np.float16), ((high - low) / most).astype(np.float16)
    step = np.maximum(scale.astype(np.float32), 1e-12)[..., None]
    codes = np.clip(np.rint((groups - least.astype(np.float32)[..., None]) / step), 0, most)
    return codes.astype(np.uint8).reshape(n, k), scale, least


def _numbers(kind: int, codes: np.ndarray, scale: np.ndarray, least: np.ndarray | None) -> np.ndarray:
    n, k = codes.shape
    groups = codes.reshape(n, scale.shape[1], -1).astype(np.float32)
    if least is None:
        groups -= 32 if kind == SIX else 128
    groups *= scale.astype(np.float32)[..., None]
    if least is not None:
        groups += least.astype(np.float32)[..., None]
    return groups.reshape(n, k)


def _with_means(kind: int, more: int, parts: Iterable[Codes]) -> Iterator[Codes]:
    """The parts, and after them `more` rows that are the mean of all, in the same kind."""
    total, count, last = np.float64(0), 0, None
    for part in parts:
        if last is not None:
            yield last
        last = part
        numbers = _numbers(kind, *part)
        total, count = total + numbers.sum(axis=0, dtype=np.float64), count + len(numbers)
    mean = np.asarray(total / count, np.float32).reshape(1, -1)
    if kind in (FOUR, FIVE):
        found = round_range(mean, kind)
    else:
        groups, offset = mean.reshape(-1, 16 if kind == SIX else 32), 32 if kind == SIX else 128
        scale = (np.abs(groups).max(axis=1) / (offset - 1)).astype(np.float16)
        steps = np.rint(groups / np.maximum(scale.astype(np.float32), 1e-12)[:, None])
        codes = np.clip(steps + offset, 0, 2 ** LINES[kind] - 1).astype(np.uint8)
        found = codes.reshape(1, -1), scale, None
    assert last is not None
    means = (None if a is None else np.repeat(a.reshape(1, -1), more, axis=0) for a in found)
    yield tuple(  # type: ignore[misc]
        None if a is None or b is None else np.concatenate([a, b]) for a, b in zip(last, means, strict=True)
    )


# Readers of GGUF's blocks: uint8 [n, bytes of a row] -> Codes. The layouts are those of ggml-common.h.


def _halves(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.float16)


def _nibbles(raw: np.ndarray, chunk: int) -> np.ndarray:
    """[n, b, bytes] -> [n, b, 2 bytes]: of each `chunk` bytes the lower halves, then the upper ones."""
    chunks = raw.reshape(*raw.shape[:2], -1, 1, chunk)
    return np.concatenate([chunks & 15, chunks >> 4], axis=-2).reshape(*raw.shape[:2], -1)


def _q8_0(raw: np.ndarray) -> Codes:
    blocks = raw.reshape(len(raw), -1, 34)
    codes = np.maximum(blocks[..., 2:] ^ 128, 1)  # AVX2 cannot multiply by -128, which ggml never writes
    return codes.reshape(len(raw), -1), _halves(blocks[..., :2])[..., 0], None


def _q4_0(raw: np.ndarray) -> Codes:
    blocks = raw.reshape(len(raw), -1, 18)
    scale = _halves(blocks[..., :2])[..., 0]
    return _nibbles(blocks[..., 2:], 16).reshape(len(raw), -1), scale, scale * np.float16(-8)


def _q5_0(raw: np.ndarray) -> Codes:
    blocks = raw.reshape(len(raw), -1, 22)
    scale = _halves(blocks[..., :2])[..., 0]
    fifth = np.unpackbits(np.ascontiguousarray(blocks[..., 2:6]), axis=-1, bitorder="little")
    codes = _nibbles(blocks[..., 6:], 16) | fifth << 4
    return codes.reshape(len(raw), -1), scale, scale * np.float16(-16)


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and least [n, 8 b] of Q4_K and Q5_K blocks [n, b, ..]: 12 bytes hold eight of six bits each."""
    d = _halves(blocks[..., :4]).astype(np.float32)
    low, high, last = (blocks[..., i : i + 4] for i in (4, 8, 12))
    scale = np.concatenate([low & 63, last & 15 | low >> 6 << 4], axis=-1)
    least = np.concatenate([high & 63, last >> 4 | high >> 6 << 4], axis=-1)
    flat = len(blocks), -1
    return (
        (d[..., :1] * scale).astype(np.float16).reshape(flat),
        (-d[..., 1:] * least).astype(np.float16).reshape(flat),
    )


def _q4_k(raw: np.ndarray) -> Codes:
    blocks = raw.reshape(len(raw), -1, 144)
    return _nibbles(blocks[..., 16:], 32).reshape(len(raw), -1), *_k_scales(blocks)


def _q5_k(raw: np.ndarray) -> Codes:
    blocks = raw.reshape(len(raw), -1, 176)
    fifth = blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # [n, b, 8, 32]
    codes = _nibbles(blocks[..., 48:], 32) | fifth.reshape(*blocks.shape[:2], -1) << 4
    return codes.reshape(len(raw), -1), *_k_scales(blocks)


def _q6_k(raw: np.ndarray) -> Codes:
    blocks = raw.reshape(len(raw), -1, 210)
    upper = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
    upper = upper >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = _nibbles(blocks[..., :128], 64) | upper.reshape(*blocks.shape[:2], -1) << 4
    d = _halves(blocks[..., 208:]).astype(np.float32)
    scale = (d * blocks[..., 192:208].view(np.int8)).astype(np.float16)
    return codes.reshape(len(raw), -1), scale.reshape(len(raw), -1), None


_READERS = {
    "Q8_0": (EIGHT, _q8_0),
    "Q4_0": (FOUR, _q4_0),
    "Q4_K": (FOUR, _q4_k),
    "Q5_0": (FIVE, _q5_0),
    "Q5_K": (FIVE, _q5_k),
    "Q6_K": (SIX, _q6_k),
}


def kind_of(gguf_type: str) -> int:
    """How a GGUF type's blocks are held."""
    return _READERS[gguf_type][0] if gguf_type in _READERS else EIGHT


# --- whole models


def pack_decoder(checkpoint: Checkpoint, *, stored: bool = False) -> Iterator[tuple[str, np.ndarray]]:
    """A checkpoint's decoder as `Int8Runner` takes it, one tensor at a time: (name, array).

    stored: a GGUF file's blocks as they are; else every matrix is rounded to int8.
    """
    from seavlm.weights.gguf import GGUFCheckpoint

    def packed(name: str) -> Packed:
        if isinstance(checkpoint, GGUFCheckpoint):
            return pack_gguf(checkpoint, name, rounded=not stored)
        return pack_tensor(checkpoint.get(name))

    def norm(name: str) -> np.ndarray:
        return 1.0 + checkpoint.get(name).float().numpy()

    yield from packed("language_model.embed_tokens.weight").tensors("embedding").items()
    for number in range(checkpoint.config.text.num_hidden_layers):
        name, own = f"language_model.layers.{number}", f"layers.{number}"
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        for place, part in enumerate(join([packed(f"{attention}.{x}_proj.weight") for x in "qkv"])):
            yield from part.tensors(f"{own}.qkv.{place}").items()
        yield from packed(f"{attention}.o_proj.weight").tensors(f"{own}.o").items()
        both = interleave(packed(f"{mlp}.gate_proj.weight"), packed(f"{mlp}.up_proj.weight"))
        yield from both.tensors(f"{own}.gate_up").items()
        yield from packed(f"{mlp}.down_proj.weight").tensors(f"{own}.down").items()
        for kind in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield f"{own}.{kind}_norm", norm(f"{name}.{kind}_layernorm.weight")
        for kind in "qk":
            yield f"{own}.{kind}_norm", norm(f"{attention}.{kind}_norm.weight")
    yield "norm", norm("language_model.norm.weight")


METHOD = "seavlm"  # in config.json's quantization_config
SHARD_BYTES = 2 * 2**30


def save_quantized(
    source: Path,
    out: Path,
    how: str,
    *,
    small_head: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> int:
    """Write `source` (a directory or .gguf file) as a directory that loads at once, its weights mapped.

    It is a Hugging Face directory: packed weights, the tower's as they were, and the SHA-256 of every file
    in manifest.json.

    how: "int8" or "stored", as `seavlm.load` takes it. small_head: texts; the model reads them and goes on,
    and gets a head as `seavlm.engine.head` makes it. Returns the bytes of the weights. Whole or not at all.
    """
    from safetensors.numpy import save_file

    from seavlm.engine.int8 import library_for
    from seavlm.manifest import sha256_file, sha256_tree, write_json, write_manifest
    from seavlm.text.compact import write_compact
    from seavlm.text.tokenizer import Tokenizer
    from seavlm.weights.checkpoint import open_checkpoint, replacing_directory, write_configs

    checkpoint = open_checkpoint(source)
    config = checkpoint.config
    library_for(config)
    gguf = source.suffix == ".gguf"
    if how == "stored" and not gguf:
        raise SeavlmError(f"{source} holds plain weights", hint="Use int8; stored is for .gguf files.")
    with replacing_directory(out) as folder:
        write_configs(folder, config)
        tokenizer = Tokenizer.from_gguf(source) if gguf else Tokenizer.from_dir(source)
        tokenizer.save(folder)
        write_compact(folder)
        if not gguf and (source / "generation_config.json").is_file():
            shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        raw["quantization_config"] = {
            "quant_method": METHOD,
            "weights": how,
            "activations": "int8, groups of 32",
            "head": "turned, 8 to 4 bits" if small_head else "the embedding",
        }
        write_json(folder / "config.json", raw)
        total = number = size = 0
        held: dict[str, np.ndarray] = {}

        def flush() -> None:
            nonlocal number, size
            number += 1
            save_file(held, folder / f"decoder-{number:05d}.safetensors")
            held.clear()
            size = 0

        decoder: Iterable[tuple[str, np.ndarray]] = pack_decoder(checkpoint, stored=how == "stored")
        if small_head:
            decoder = with_small_head(checkpoint.config, dict(decoder), tokenizer, small_head, progress)
        for name, array in decoder:
            progress(name)
            held[name] = array
            total, size = total + array.nbytes, size + array.nbytes
            if size >= SHARD_BYTES:
                flush()
        if held:
            flush()
        if config.vision is not None:
            from safetensors.torch import save_file as save_torch

            names = [name for name in checkpoint.names() if not name.startswith("language_model.")]
            tensors = {name: checkpoint.get(name).contiguous() for name in names}
            total += sum(tensor.nbytes for tensor in tensors.values())
            save_torch(tensors, folder / "vision.safetensors")
        files = {file.name: sha256_file(file) for file in sorted(folder.iterdir())}
        write_manifest(
            folder,
            stage="quantize",
            recipe={"weights": how, "small_head": bool(small_head)},
            seed=0,
            inputs={"model": sha256_tree(source)},
            metrics={"bytes": total},
            extra={"files": files},
        )
    return total


def with_small_head(
    config: Gemma3Config,
    weights: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    texts: Sequence[str],
    progress: Callable[[str], None],
) -> Iterator[tuple[str, np.ndarray]]:
    """The weights, and after them those of a head as `seavlm.engine.head` makes it."""
    from seavlm.engine import head
    from seavlm.engine.int8 import Int8Runner

    yield from weights.items()
    moment = head.moment(Int8Runner(config, weights), tokenizer, texts, progress)
    yield from head.pack_head(Packed.stored(weights, "embedding"), moment)


def is_quantized(path: Path) -> bool:
    """`save_quantized` wrote this directory."""
    file = path / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return False
    return isinstance(raw, dict) and raw.get("quant_method") == METHOD


def map_weights(folder: Path) -> dict[str, np.ndarray]:
    """Name -> array of all decoder shards, mapped: nothing is read before it is used."""
    kinds = {"U8": np.uint8, "F16": np.float16, "F32": np.float32, "I32": np.int32}
    found: dict[str, np.ndarray] = {}
    for shard, entries in _shards(folder):
        try:
            data = np.memmap(shard, np.uint8, "r")
            for name, (entry, first, end) in entries.items():
                raw = data[first:end]
                if len(raw) != end - first:
                    raise ValueError(f"{name} is cut off")
                found[name] = np.frombuffer(raw, kinds[entry["dtype"]]).reshape(entry["shape"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SeavlmError(f"{shard} is damaged ({error})", hint="Quantise the model again.") from error
    return found


def _shards(folder: Path) -> Iterator[tuple[Path, dict[str, tuple[dict[str, Any], int, int]]]]:
    """Each decoder shard, and name -> (its entry, first byte, end)."""
    shards = sorted(folder.glob("decoder-*.safetensors"))
    wanted = [name for name in read_manifest(folder).get("files", ()) if name.startswith("decoder-")]
    if missing := set(wanted) - {shard.name for shard in shards} or (not shards and {"decoder-*"}):
        raise SeavlmError(f"{folder} has no {', '.join(sorted(missing))}", hint="Quantise the model again.")
    for shard in shards:
        try:
            with open(shard, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            yield (
                shard,
                {
                    name: (entry, *(8 + size + offset for offset in entry["data_offsets"]))
                    for name, entry in header.items()
                },
            )
        except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise SeavlmError(f"{shard} is damaged ({error})", hint="Quantise the model again.") from error


class StoredRows:
    """The rows of a mapped matrix, read from its file: touching a mapping would bring in a quarter of a
    megabyte around each row, and of an embedding that is not the head few rows are used."""

    def __init__(self, folder: Path, packed: Packed, prefix: str) -> None:
        self.packed = packed
        self.files: dict[str, tuple[int, int]] = {}  # array -> file, first byte
        for shard, entries in _shards(folder):
            for name, array in packed.arrays.items():
                if array.size and f"{prefix}.{name}" in entries:
                    self.files[name] = os.open(shard, os.O_RDONLY), entries[f"{prefix}.{name}"][1]

    def __del__(self) -> None:
        for file, _ in self.files.values():
            os.close(file)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """These rows as numbers, float32 [len(ids), K]."""
        blocks, places = np.unique(ids // 16, return_inverse=True)
        arrays = []
        for name, array in self.packed.arrays.items():
            size = array.nbytes * 16 // self.packed.n  # of a block of 16 rows
            file, begin = self.files.get(name, (-1, 0))
            some = np.empty((len(blocks), size), np.uint8)
            for place, block in enumerate(blocks.tolist() if size else ()):
                some[place] = np.frombuffer(os.pread(file, size, begin + block * size), np.uint8)
            arrays.append(some.reshape(-1).view(array.dtype))
        found = Packed(self.packed.kind, 16 * len(blocks), self.packed.k, *arrays)
        return found.rows(places.reshape(-1) * 16 + ids % 16)
