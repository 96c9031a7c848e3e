"""A tuned model as its base and a difference: kept in a fraction of the space, used at any beta.

    make_delta(base, tuned, out)                    exact: gives the tuned model back bit for bit
    make_delta(base, tuned, out, lossy="int8")      differences in int8, a scale for each row
    make_delta(base, tuned, out, lossy="rank 16")   matrices as a product of two thin ones
    open_delta(out)                                 on its base, a checkpoint: a parent of any merge
    out@0.3                                         a model reference: loaded at that beta, nothing written

A delta's folder holds delta.json (what lies where, and of which base), delta.bin, and the tuned model's
config and tokenizer.
Exact differences are taken between the bits, ordered as the numbers are, so that numbers a few roundings
apart differ by a small whole number; these go through a Huffman code, a byte's place at a time. Every piece
carries the CRC of the base's bytes and of what it holds: another base, or a damaged file, is told at once.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import weakref
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seavlm import manifest
from seavlm.carbon import Meter
from seavlm.errors import SeavlmError
from seavlm.merge import plan as planning
from seavlm.merge.methods import widest
from seavlm.merge.stream import PIECE, SHARD, WORKERS, ahead, run
from seavlm.model.config import Gemma3Config
from seavlm.weights import names as naming
from seavlm.weights.checkpoint import (
    FileCheckpoint,
    check_tensors,
    copy_companions,
    disk_errors,
    open_checkpoint,
    replacing_directory,
)
from seavlm.weights.refs import DELTA as INDEX
from seavlm.weights.refs import resolve

DATA = "delta.bin"
VERSION = 2
CHUNK = PIECE  # numbers in a piece: as many whole rows as `stream` reads at a time
_COPY_AGAIN = "Copy the delta again."


def make_delta(
    base: str | Path, tuned: str | Path, out: str | Path, *, lossy: str | None = None
) -> dict[str, Any]:
    """Writes the difference of two models (references) to the folder `out`; its figures.

    The delta remembers its base: by name, or by its path from `out`.
    lossy: None, "int8" or "rank N". Figures: bytes, share of the tuned model's bytes, and for lossy forms
    the relative error |D' - D| / |D| of the differences D (Frobenius, over all), and the worst tensor's. A
    tensor that the base lacks or has in another width is kept whole. SeavlmError for NaN or infinity.
    """
    began = time.monotonic()
    rank = _rank(lossy)
    below, above = resolve(base), resolve(tuned)
    if above.is_file():
        raise SeavlmError(f"{above} holds rounded weights", hint="Give the tuned model's directory.")
    _not_over((below, above), Path(out))
    manifest.refuse_other(out, "delta")
    old, new = open_checkpoint(below), open_checkpoint(above)
    entries: dict[str, Any] = {}
    error, size = {"all": 0.0}, {"all": 0.0}
    with Meter() as meter, replacing_directory(Path(out)) as folder, disk_errors(Path(out)):
        with open(folder / DATA, "wb") as data, ThreadPoolExecutor(WORKERS) as pool:

            def jobs() -> Iterator[tuple[str, int, int]]:
                for name in new.names():
                    shape = new.shape(name)
                    yield from ((name, start, stop) for start, stop in _bounds(name, shape, rank))

            def submit(job: tuple[str, int, int]) -> Future[tuple[str, list[_Part], float, float]]:
                return pool.submit(_encode, old, new, *job, lossy, rank)

            for name, parts, wrong, whole in ahead(submit, jobs(), 2 * WORKERS):
                shape, kind = list(new.shape(name)), str(new.dtype(name)).removeprefix("torch.")
                entry = entries.setdefault(name, {"shape": shape, "dtype": kind, "pieces": []})
                for piece, blobs in parts:
                    piece["at"], piece["bytes"] = data.tell(), [len(blob) for blob in blobs]
                    for blob in blobs:
                        data.write(blob)
                    if piece["form"] == "right":
                        entry["right"] = piece
                    else:
                        entry["pieces"].append(piece)
                for key in ("all", name):
                    error[key], size[key] = error.get(key, 0.0) + wrong, size.get(key, 0.0) + whole
        shutil.copyfile(above / "config.json", folder / "config.json")
        copy_companions(above, folder)
        written = (folder / DATA).stat().st_size
        plain = sum(math.prod(new.shape(n)) * new.dtype(n).itemsize for n in new.names())
        figures: dict[str, Any] = {"tensors": len(entries), "bytes": written, "share": written / plain}
        if lossy:
            relative = {n: math.sqrt(error[n] / size[n]) for n in error if size[n] > 0}
            figures["relative_error"] = relative.pop("all", 0.0)
            figures["worst_tensor"] = max(relative, key=relative.__getitem__, default="")
            figures["worst_error"] = relative.get(figures["worst_tensor"], 0.0)
        index = {
            "version": VERSION,
            "form": lossy or "exact",
            "base": _remembered(base, below, Path(out)),
            "tensors": entries,
            "figures": figures,
        }
        manifest.write_json(folder / INDEX, index)
        manifest.write_manifest(
            folder,
            stage="delta",
            recipe={"base": str(base), "tuned": str(tuned), "lossy": lossy},
            seed=0,
            inputs={"base": manifest.sha256_tree(below), "tuned": manifest.sha256_tree(above)},
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
    found = Delta(Path(delta), open_checkpoint(resolve(base)))
    _not_over((found.path, found.base.path), Path(out))
    return run(delta_plan(found, beta=beta, dtype=dtype), Path(out), shard_bytes=SHARD)


def delta_plan(delta: Delta, *, beta: float, dtype: str | None = None) -> planning.Plan:
    """The plan of a delta at a beta; `stream.Merged(plan)` is that model without a copy on disk."""
    if not 0 <= beta <= 1:
        raise SeavlmError(f"beta is {beta:g}", hint="A share is between 0 and 1.")
    kind = dtype or delta.config.dtype
    if beta == 1.0:
        return planning.weighted_mean([delta.path], [delta], [1.0], kind)
    places, parents = [delta.path, delta.base.path], [delta, delta.base]
    return planning.weighted_mean(places, parents, [beta, 1 - beta], kind)


def open_delta(path: Path) -> Delta:
    """A delta on the base that it remembers. SeavlmError, with what to do, where that is not there."""
    remembered: Any = _read_index(path).get("base")
    hint = f"Say where it is: seavlm delta base {path} MODEL"
    try:
        if "name" in remembered:
            place = resolve(str(remembered["name"]))
        else:
            place = Path(os.path.normpath(path.resolve() / remembered["path"]))
            place = resolve(place if place.exists() else Path(remembered["absolute"]))
        base = open_checkpoint(place)
    except SeavlmError as error:
        raise SeavlmError(f"the base of {path} cannot be opened: {error.message}", hint=hint) from None
    except (TypeError, KeyError):
        raise SeavlmError(f"{path} does not say which base it has", hint=hint) from None
    return Delta(path, base)


def set_base(delta: str | Path, base: str | Path) -> None:
    """From now on the delta finds its base at the reference `base`. SeavlmError if that is another model."""
    path, place = Path(delta), resolve(base)
    found = Delta(path, open_checkpoint(place))
    for name in found.names():
        found.read(name, 0, 1)  # the first piece of each; loading looks at the others
    manifest.write_json(path / INDEX, _read_index(path) | {"base": _remembered(base, place, path)})


def _remembered(given: str | Path, place: Path, delta: Path) -> dict[str, str]:
    """How a delta finds its base again: by name, the hub's with its commit; by path, first from the delta's
    own folder, so that both may move together."""
    asked = Path(given).expanduser()
    if asked in (place, *place.parents):
        place = place.resolve()
        return {"path": os.path.relpath(place, delta.resolve()), "absolute": str(place)}
    commit = f"@{place.name}" if place.parent.name == "snapshots" else ""
    return {"name": str(given).partition("@")[0] + commit}


def _not_over(models: tuple[Path, ...], out: Path) -> None:
    if any(model.resolve() == out.resolve() for model in models):
        raise SeavlmError(f"{out} is needed and would be replaced", hint="Choose another place.")


class Delta:
    """The tuned model of a delta's folder, on its base: a `FileCheckpoint`. Lossy ones read as float32."""

    def __init__(self, path: Path, base: FileCheckpoint) -> None:
        self.path, self.base = path, base
        index = _read_index(path)
        try:
            self._file = os.open(path / DATA, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
        except OSError as error:
            raise SeavlmError(f"cannot read {path / DATA}: {error.strerror}", hint=_COPY_AGAIN) from None
        self._entries, self.form = _checked(path, index, os.fstat(self._file).st_size)
        config = Gemma3Config.from_dir(path)
        check_tensors(path, {name: tuple(e["shape"]) for name, e in self._entries.items()}, config)
        self._names = list(naming.shapes(config))
        stored = widest([_DTYPES[entry["dtype"]] for entry in self._entries.values()])
        # What the tuned model's files held, whatever its config said.
        self.config = replace(config, dtype=str(stored).removeprefix("torch."))
        self._last: tuple[dict[str, Any] | None, Tensor] = None, torch.empty(0)

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self.form != "exact" else _DTYPES[self._entries[name]["dtype"]]

    def get(self, name: str) -> Tensor:
        shape = self.shape(name)
        return self.read(name, 0, math.prod(shape)).reshape(shape)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        result = torch.empty(stop - start, dtype=self.dtype(name))
        for piece in self._entries[name]["pieces"]:
            first, last = piece["start"], piece["stop"]
            if first < stop and start < last:
                kept, part = self._last
                if kept is not piece:
                    part = self._decode(name, piece)
                if stop < last:  # the rest of it may be asked for next
                    self._last = piece, part
                low, high = max(start, first), min(stop, last)
                result[low - start : high - start] = part[low - first : high - first]
        return result

    def _decode(self, name: str, piece: dict[str, Any]) -> Tensor:
        entry = self._entries[name]
        stored, shape = _DTYPES[entry["dtype"]], entry["shape"]
        below = _base_part(self.base, name, shape, piece["start"], piece["stop"], stored)
        if _crc(below) != piece["base_crc"]:
            raise SeavlmError(
                f"{name} of {self.base.path} is not what {self.path} was made from",
                hint=f"Name the base that it has: seavlm delta base {self.path} MODEL",
            )
        try:
            blobs = self._blobs(piece)
            if piece["form"] == "exact":
                result = _from_planes(blobs, below)
                if _crc(result) != piece["crc"]:
                    raise ValueError("another checksum")
                return result
            if piece["form"] == "int8":
                scales = _floats(blobs[0])
                numbers = torch.frombuffer(bytearray(_inflated(blobs[1], len(below))), dtype=torch.int8)
                change = numbers.reshape(len(scales), shape[-1]).float() * scales[:, None]
            else:
                right = _floats(self._blobs(entry["right"])[0]).reshape(-1, shape[-1])
                change = _floats(blobs[0]).reshape(-1, len(right)) @ right
            return below.float() + change.reshape(-1)
        except (zlib.error, ValueError, RuntimeError) as error:
            raise SeavlmError(f"{name} in {self.path} is damaged ({error})", hint=_COPY_AGAIN) from None

    def _blobs(self, piece: dict[str, Any]) -> list[bytes]:
        """The stored parts of a piece; of lossy ones, whose numbers have no sum of their own, checked."""
        raw = os.pread(self._file, sum(piece["bytes"]), piece["at"])
        if piece["form"] != "exact" and zlib.crc32(raw) != piece["crc"]:
            raise ValueError("another checksum")
        ends = np.cumsum(piece["bytes"])
        return [raw[end - size : end] for size, end in zip(piece["bytes"], ends, strict=True)]


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        version = index["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"its {INDEX} cannot be read"
        raise SeavlmError(f"{path} is not a delta: {why}", hint="seavlm delta make writes one.") from None
    if version != VERSION:
        raise SeavlmError(f"{path} is a delta of version {version}", hint="Use the seavlm that wrote it.")
    return dict(index)


def _checked(path: Path, index: dict[str, Any], size: int) -> tuple[dict[str, Any], str]:
    """(name -> entry, form), once every piece is seen to be there, in a file of `size` bytes."""

    def held(piece: dict[str, Any]) -> bool:
        numbers = [piece["at"], piece["crc"], *piece["bytes"]]
        sound = all(type(number) is int and number >= 0 for number in numbers)
        return sound and piece["at"] + sum(piece["bytes"]) <= size

    try:
        for name, entry in index["tensors"].items():
            end, width, item = 0, entry["shape"][-1], _DTYPES[entry["dtype"]].itemsize
            for piece in entry["pieces"]:
                parts = {"exact": item, "int8": 2, "rank": 1}[piece["form"]]
                whole = held(piece) and len(piece["bytes"]) == parts and type(piece["base_crc"]) is int
                whole = whole and piece["start"] == end < piece["stop"]
                if not whole or (piece["form"] != "exact" and (piece["stop"] - end) % width):
                    raise ValueError(f"a piece of {name}")
                if piece["form"] == "rank" and not (
                    held(entry["right"]) and entry["right"]["form"] == "right"
                ):
                    raise ValueError(f"the right side of {name}")
                end = piece["stop"]
            if end != math.prod(entry["shape"]):
                raise ValueError(f"the end of {name}")
        return index["tensors"], str(index["form"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise SeavlmError(f"{path / INDEX} is damaged, or {DATA} is ({error!r})", hint=_COPY_AGAIN) from None


# --- the pieces

_Part = tuple[dict[str, Any], list[bytes]]  # a piece's entry in the index, and its bytes
_DTYPES = {"float64": torch.float64, "float32": torch.float32}
_DTYPES |= {"float16": torch.float16, "bfloat16": torch.bfloat16}


def _rank(lossy: str | None) -> int:
    if lossy in (None, "int8"):
        return 0
    word, _, number = str(lossy).partition(" ")
    if word != "rank" or not number.isdecimal() or int(number) < 1:
        raise SeavlmError(f"lossy is {lossy!r}", hint='Use "int8" or "rank 16".')
    return int(number)


def _thin(name: str, shape: tuple[int, ...], rank: int) -> bool:
    """Whether a tensor is kept as a product: a matrix, not the embedding, and worth it."""
    return bool(rank) and len(shape) == 2 and name != naming.EMBEDDING and 2 * rank < min(shape)


def _bounds(name: str, shape: tuple[int, ...], rank: int) -> Iterator[tuple[int, int]]:
    """Pieces of whole rows; a matrix that becomes a product is encoded in one."""
    total = math.prod(shape)
    return _rows(total, shape[-1], total if _thin(name, shape, rank) else CHUNK)


def _rows(total: int, columns: int, most: int) -> Iterator[tuple[int, int]]:
    size = max(1, most // columns) * columns
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
) -> tuple[str, list[_Part], float, float]:
    """(name, the pieces, squared error, squared size of the difference) of a part of a tensor."""
    shape = new.shape(name)
    tuned = new.read(name, start, stop)
    if not bool(torch.isfinite(tuned).all()):
        raise SeavlmError(f"{name} in {new.path} holds NaN or infinity", hint="That checkpoint is broken.")
    below = _base_part(old, name, shape, start, stop, tuned.dtype)

    def piece(form: str, first: int, last: int, crc: int) -> dict[str, Any]:
        inside = below[first - start : last - start]
        return {"start": first, "stop": last, "form": form, "base_crc": _crc(inside), "crc": crc}

    if lossy is None or len(shape) < 2:
        exact = piece("exact", start, stop, _crc(tuned)), _to_planes(tuned, below)
        return name, [exact], 0.0, 0.0
    change = (tuned.float() - below.float()).reshape(-1, shape[-1])
    parts: list[_Part] = []
    if _thin(name, shape, rank):
        left, right = _product(change, rank)
        found, packed = left @ right, _bytes(right)
        parts.append(({"form": "right", "crc": zlib.crc32(packed)}, [packed]))
        for first, last in _rows(stop, shape[-1], CHUNK):  # so that a part of it can be read
            packed = _bytes(left[first // shape[-1] : last // shape[-1]])
            parts.append((piece("rank", first, last, zlib.crc32(packed)), [packed]))
    else:
        scales = change.abs().amax(1).div(127).clamp(min=1e-30)
        numbers = (change / scales[:, None]).round().to(torch.int8)
        found, blobs = numbers.float() * scales[:, None], [_bytes(scales), _huffman(_bytes(numbers))]
        parts.append((piece("int8", start, stop, zlib.crc32(b"".join(blobs))), blobs))
    wrong, whole = (float(x.double().square().sum()) for x in (found - change, change))
    return name, parts, wrong, whole


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
    return bits ^ (_negative(bits) | _top(kind))


def _top(kind: np.dtype[Any]) -> Any:
    return kind.type(1 << (8 * kind.itemsize - 1))


def _negative(bits: np.ndarray) -> np.ndarray:
    """All bits set where the highest is."""
    return (bits.view(f"<i{bits.itemsize}") >> (8 * bits.itemsize - 1)).view(bits.dtype)


def _to_planes(tuned: Tensor, base: Tensor) -> list[bytes]:
    """The difference of the ordered bits, folded (0, -1, 1, -2, ...), compressed a byte's place at a time."""
    change = _ordered(tuned) - _ordered(base)  # wraps around, and so does the way back
    folded = (change << 1) ^ _negative(change)
    planes = folded.view(np.uint8).reshape(-1, change.itemsize)
    return [_huffman(np.ascontiguousarray(planes[:, i]).tobytes()) for i in range(change.itemsize)]


def _from_planes(blobs: list[bytes], base: Tensor) -> Tensor:
    planes = np.empty((len(base), len(blobs)), dtype=np.uint8)
    for place, blob in enumerate(blobs):
        planes[:, place] = np.frombuffer(_inflated(blob, len(base)), dtype=np.uint8)
    kind = np.dtype(f"<u{base.element_size()}")
    change = planes.view(kind).reshape(-1)
    odd = kind.type(0) - (change & kind.type(1))
    change >>= kind.type(1)
    change ^= odd
    change += _ordered(base)
    change ^= ~_negative(change) | _top(kind)
    return torch.from_numpy(change.view(np.uint8)).view(base.dtype)


def _huffman(raw: bytes) -> bytes:
    """zlib without its search for repeats, which numbers do not have: several times faster, as small."""
    coder = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
    packed = coder.compress(raw) + coder.flush()
    return packed if raw.strip(b"\0") else zlib.compress(raw, 1)


def _inflated(blob: bytes, size: int) -> bytes:
    """What `_huffman` packed, of `size` bytes: more is not unpacked, whatever the file holds."""
    coder = zlib.decompressobj()
    raw = coder.decompress(blob, size + 1)
    if len(raw) != size or not coder.eof:
        raise ValueError("another length")
    return raw


def _floats(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.float32)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(tensor.view(torch.uint8).numpy().data)
