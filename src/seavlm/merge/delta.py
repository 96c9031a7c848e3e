"""A tuned model as its base and a difference: kept in a fraction of the space, used at any beta.

    make_delta(base, tuned, out)                    exact: gives the tuned model back bit for bit
    make_delta(base, tuned, out, lossy="int8")      differences in int8, a scale for each row
    make_delta(base, tuned, out, lossy="rank 16")   matrices as a product of two thin ones
    Delta(out, open_checkpoint(base))               a checkpoint like any other: a parent of any merge

A delta's folder holds delta.json (what lies where), delta.bin, and the tuned model's config and tokenizer.
Exact differences are taken between the bits, ordered as the numbers are, so that numbers a few roundings
apart differ by a small whole number; these go through a Huffman code, a byte's place at a time. Every piece
carries the CRC of the base's bytes and of the tuned ones: another base, or a damaged file, is told at once.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seavlm import manifest
from seavlm.carbon import Meter
from seavlm.errors import SeavlmError
from seavlm.merge import plan as planning
from seavlm.merge.stream import SHARD, WORKERS, ahead, run
from seavlm.model.config import Gemma3Config
from seavlm.weights import names as naming
from seavlm.weights.checkpoint import (
    FileCheckpoint,
    copy_companions,
    disk_errors,
    open_checkpoint,
    replacing_directory,
)

INDEX, DATA = "delta.json", "delta.bin"
VERSION = 1
CHUNK = 1 << 20  # numbers in a piece


def is_delta(place: Path) -> bool:
    return (place / INDEX).is_file()


def make_delta(
    base: str | Path, tuned: str | Path, out: str | Path, *, lossy: str | None = None
) -> dict[str, Any]:
    """Writes the difference of two models to the folder `out`; its figures.

    lossy: None, "int8" or "rank N". Figures: bytes, share of the tuned model's bytes, and for lossy forms
    the relative error |D' - D| / |D| of the differences D (Frobenius, over all), and the worst tensor's. A
    tensor that the base lacks or has in another width is kept whole. SeavlmError for NaN or infinity.
    """
    began, meter = time.monotonic(), Meter().start()
    rank = _rank(lossy)
    old, new = open_checkpoint(base), open_checkpoint(tuned)
    entries: dict[str, Any] = {}
    error, size = {"all": 0.0}, {"all": 0.0}
    with replacing_directory(Path(out)) as folder, disk_errors(Path(out)):
        with open(folder / DATA, "wb") as data, ThreadPoolExecutor(WORKERS) as pool:

            def jobs() -> Iterator[tuple[str, int, int]]:
                for name in new.names():
                    shape = new.shape(name)
                    yield from ((name, start, stop) for start, stop in _bounds(name, shape, rank))

            def submit(
                job: tuple[str, int, int],
            ) -> Future[tuple[str, dict[str, Any], list[bytes], float, float]]:
                return pool.submit(_encode, old, new, *job, lossy, rank)

            for name, piece, blobs, wrong, whole in ahead(submit, jobs(), 2 * WORKERS):
                piece["at"], piece["bytes"] = data.tell(), [len(blob) for blob in blobs]
                for blob in blobs:
                    data.write(blob)
                shape, kind = list(new.shape(name)), str(new.dtype(name)).removeprefix("torch.")
                entries.setdefault(name, {"shape": shape, "dtype": kind, "pieces": []})["pieces"].append(
                    piece
                )
                for key in ("all", name):
                    error[key], size[key] = error.get(key, 0.0) + wrong, size.get(key, 0.0) + whole
        shutil.copyfile(Path(tuned) / "config.json", folder / "config.json")
        copy_companions(Path(tuned), folder)
        written = (folder / DATA).stat().st_size
        plain = sum(math.prod(new.shape(n)) * new.dtype(n).itemsize for n in new.names())
        figures: dict[str, Any] = {"tensors": len(entries), "bytes": written, "share": written / plain}
        if lossy:
            relative = {n: math.sqrt(error[n] / size[n]) for n in error if size[n] > 0}
            figures["relative_error"] = relative.pop("all", 0.0)
            figures["worst_tensor"] = max(relative, key=relative.__getitem__, default="")
            figures["worst_error"] = relative.get(figures["worst_tensor"], 0.0)
        index = {"version": VERSION, "form": lossy or "exact", "tensors": entries, "figures": figures}
        manifest.write_json(folder / INDEX, index)
        manifest.write_manifest(
            folder,
            stage="delta",
            recipe={"base": str(base), "tuned": str(tuned), "lossy": lossy},
            seed=0,
            inputs={"base": manifest.sha256_tree(base), "tuned": manifest.sha256_tree(tuned)},
            metrics=figures | {"carbon": meter.report()},
            extra={"outputs": {DATA: manifest.sha256_file(folder / DATA)}},
            duration_s=round(time.monotonic() - began, 3),
        )
    return figures


def apply_delta(
    base: str | Path, delta: str | Path, out: str | Path, *, beta: float = 1.0, dtype: str | None = None
) -> dict[str, Any]:
    """Writes beta * tuned + (1 - beta) * base to `out`, as `merge_checkpoints` would; its figures.

    Of an exact delta the bits are those of a merge with the tuned model itself, and at beta 1 those of the
    tuned model. dtype None: the tuned model's.
    """
    return run(delta_plan(base, delta, beta=beta, dtype=dtype), Path(out), shard_bytes=SHARD)


def delta_plan(
    base: str | Path, delta: str | Path, *, beta: float, dtype: str | None = None
) -> planning.Plan:
    """The plan of a delta at a beta; `stream.tensors(plan)` yields that model without a copy on disk."""
    below = open_checkpoint(base)
    tuned = Delta(Path(delta), below)
    kind = dtype or tuned.config.dtype
    if beta == 1.0:
        return planning.weighted_mean([Path(delta)], [tuned], [1.0], kind)
    return planning.weighted_mean([Path(delta), Path(base)], [tuned, below], [beta, 1 - beta], kind)


class Delta:
    """The tuned model of a delta's folder, on its base: a `FileCheckpoint`. Lossy ones read as float32."""

    def __init__(self, path: Path, base: FileCheckpoint) -> None:
        self.path, self._base = path, base
        try:
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))
            self._entries: dict[str, Any] = index["tensors"]
            self.form, version = index["form"], index["version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SeavlmError(
                f"{path} is not a delta ({error!r})", hint="seavlm delta make writes one."
            ) from None
        if version != VERSION:
            raise SeavlmError(f"{path} is a delta of version {version}", hint="Use the seavlm that wrote it.")
        self.config = Gemma3Config.from_dir(path)
        wanted = naming.shapes(self.config)
        if {n: tuple(e["shape"]) for n, e in self._entries.items()} != wanted:
            raise SeavlmError(f"the tensors of {path} do not fit its config", hint="Copy it again.")
        self._names = list(wanted)
        self._file = os.open(path / DATA, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self.form != "exact" else getattr(torch, self._entries[name]["dtype"])

    def get(self, name: str) -> Tensor:
        shape = self.shape(name)
        return self.read(name, 0, math.prod(shape)).reshape(shape)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        parts = []
        for piece in self._entries[name]["pieces"]:
            first, last = piece["start"], piece["stop"]
            if first < stop and start < last:
                part = self._decode(name, piece)
                parts.append(part[max(start - first, 0) : stop - first])
        return torch.cat(parts) if parts else torch.empty(0, dtype=self.dtype(name))

    def _decode(self, name: str, piece: dict[str, Any]) -> Tensor:
        entry = self._entries[name]
        stored, shape = getattr(torch, entry["dtype"]), entry["shape"]
        below = _base_part(self._base, name, shape, piece["start"], piece["stop"], stored)
        if _crc(below) != piece["base_crc"]:
            raise SeavlmError(
                f"{name} of {self._base.path} is not what {self.path} was made from",
                hint="Give its own base.",
            )
        raw = os.pread(self._file, sum(piece["bytes"]), piece["at"])
        blobs = [
            raw[end - size : end] for size, end in zip(piece["bytes"], np.cumsum(piece["bytes"]), strict=True)
        ]
        try:
            if piece["form"] == "exact":
                result = _from_planes(blobs, below)
                if _crc(result) != piece["crc"]:
                    raise ValueError("another checksum")
                return result
            rows = len(below) // shape[-1]
            if piece["form"] == "int8":
                scales = torch.frombuffer(bytearray(blobs[0]), dtype=torch.float32)
                numbers = torch.frombuffer(bytearray(zlib.decompress(blobs[1])), dtype=torch.int8)
                change = numbers.reshape(rows, -1).float() * scales[:, None]
            else:
                left, right = (torch.frombuffer(bytearray(b), dtype=torch.float32) for b in blobs)
                rank = len(left) // rows
                change = left.reshape(rows, rank) @ right.reshape(rank, -1)
        except (zlib.error, ValueError, RuntimeError) as error:
            raise SeavlmError(
                f"{name} in {self.path} is damaged ({error})", hint="Copy the delta again."
            ) from None
        return below.float() + change.reshape(-1)


# --- the pieces


def _rank(lossy: str | None) -> int:
    if lossy in (None, "int8"):
        return 0
    word, _, number = str(lossy).partition(" ")
    if word != "rank" or not number.isdigit() or int(number) < 1:
        raise SeavlmError(f"lossy is {lossy!r}", hint='Use "int8" or "rank 16".')
    return int(number)


def _thin(name: str, shape: tuple[int, ...], rank: int) -> bool:
    """Whether a tensor is kept as a product: a matrix, not the embedding, and worth it."""
    return bool(rank) and len(shape) == 2 and name != naming.EMBEDDING and 2 * rank < min(shape)


def _bounds(name: str, shape: tuple[int, ...], rank: int) -> Iterator[tuple[int, int]]:
    """Pieces of whole rows; a matrix that becomes a product is one piece."""
    total, columns = math.prod(shape), shape[-1]
    size = total if _thin(name, shape, rank) else max(1, CHUNK // columns) * columns
    for start in range(0, total, size):
        yield start, min(start + size, total)


def _base_part(
    base: FileCheckpoint,
    name: str,
    shape: list[int] | tuple[int, ...],
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:
    """The base's numbers in the tuned model's dtype; zeros for rows or tensors it has not."""
    result = torch.zeros(stop - start, dtype=dtype)
    if name in base.names() and tuple(base.shape(name)[1:]) == tuple(shape[1:]):
        end = min(stop, math.prod(base.shape(name)))
        if end > start:
            result[: end - start] = base.read(name, start, end).to(dtype)
    return result


def _encode(
    old: FileCheckpoint, new: FileCheckpoint, name: str, start: int, stop: int, lossy: str | None, rank: int
) -> tuple[str, dict[str, Any], list[bytes], float, float]:
    """(name, index entry, bytes, squared error, squared size of the difference) of one piece."""
    shape = new.shape(name)
    tuned = new.read(name, start, stop)
    if not bool(torch.isfinite(tuned).all()):
        raise SeavlmError(f"{name} in {new.path} holds NaN or infinity", hint="That checkpoint is broken.")
    below = _base_part(old, name, shape, start, stop, tuned.dtype)
    piece = {"start": start, "stop": stop, "form": "exact", "base_crc": _crc(below), "crc": _crc(tuned)}
    if lossy is None or len(shape) < 2:
        return name, piece, _to_planes(tuned, below), 0.0, 0.0
    change = (tuned.float() - below.float()).reshape(-1, shape[-1])
    if _thin(name, shape, rank):
        left, right = _product(change, rank)
        found, blobs = left @ right, [_bytes(left.contiguous()), _bytes(right)]
    else:
        scales = change.abs().amax(1).div(127).clamp(min=1e-30)
        numbers = (change / scales[:, None]).round().to(torch.int8)
        found, blobs = numbers.float() * scales[:, None], [_bytes(scales), _huffman(_bytes(numbers))]
    piece["form"] = "rank" if _thin(name, shape, rank) else "int8"
    wrong, whole = (float(x.double().square().sum()) for x in (found - change, change))
    return name, piece, blobs, wrong, whole


def _product(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two thin matrices whose product is near `matrix` [m, n]: [m, rank], [rank, n].

    Randomised range finder with power steps (Halko, Martinsson and Tropp 2011, algorithm 4.4).
    """
    draw = torch.Generator().manual_seed(0)
    found = matrix @ torch.randn(matrix.shape[1], min(rank + 8, *matrix.shape), generator=draw)
    for _ in range(3):
        found = torch.linalg.qr(found).Q
        found = matrix @ torch.linalg.qr(matrix.T @ found).Q
    basis = torch.linalg.qr(found).Q
    u, s, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ (u[:, :rank] * s[:rank])).contiguous(), right[:rank].contiguous()


def _ordered(tensor: Tensor) -> np.ndarray:
    """The bits as whole numbers that are ordered as the floats are (-0 just below 0), unsigned."""
    kind = np.dtype(f"<u{tensor.element_size()}")
    bits = tensor.contiguous().view(torch.uint8).numpy().view(kind)
    top = kind.type(1 << (8 * kind.itemsize - 1))
    return np.where(bits & top, ~bits, bits | top).astype(kind)


def _to_planes(tuned: Tensor, base: Tensor) -> list[bytes]:
    """The difference of the ordered bits, folded (0, -1, 1, -2, ...), compressed a byte's place at a time."""
    change = _ordered(tuned) - _ordered(base)  # wraps around, and so does the way back
    signed = change.view(f"<i{change.itemsize}")
    folded = ((signed << 1) ^ (signed >> (8 * change.itemsize - 1))).view(change.dtype)
    planes = folded.view(np.uint8).reshape(-1, change.itemsize)
    return [_huffman(np.ascontiguousarray(planes[:, i]).tobytes()) for i in range(change.itemsize)]


def _from_planes(blobs: list[bytes], base: Tensor) -> Tensor:
    planes = np.stack([np.frombuffer(zlib.decompress(blob), dtype=np.uint8) for blob in blobs], axis=1)
    kind = np.dtype(f"<u{base.element_size()}")
    folded = np.ascontiguousarray(planes).view(kind).reshape(-1)
    change = (folded >> kind.type(1)) ^ (kind.type(0) - (folded & kind.type(1)))
    ordered = _ordered(base) + change
    top = kind.type(1 << (8 * kind.itemsize - 1))
    bits = np.where(ordered & top, ordered ^ top, ~ordered).astype(kind)
    return torch.from_numpy(bits.view(np.uint8)).view(base.dtype)


def _huffman(raw: bytes) -> bytes:
    """zlib without its search for repeats, which numbers do not have: several times faster, as small."""
    coder = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
    packed = coder.compress(raw) + coder.flush()
    return packed if any(raw) else zlib.compress(raw, 1)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(tensor.view(torch.uint8).numpy().data)
