"""Checkpoints: read one tensor at a time, written in one pass, never a whole model in memory.

Read: a Hugging Face directory (one safetensors file, or shards with an index) or a llama.cpp `.gguf` file.
Tensors have the canonical names of `weights.names`; all that the config calls for is there, in its shape, or
opening fails.
Written: a Hugging Face directory that transformers 5 loads, whole or not at all.

No pickle is ever read, and no code that comes with a checkpoint is ever run.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from seavlm.errors import SeavlmError
from seavlm.model.config import Gemma3Config
from seavlm.weights import names as naming

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
# What `copy_from` brings along, where it is there.
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TAGS = {dtype: tag for tag, dtype in _DTYPES.items()}
_COPY_AGAIN = "Copy or download it again."


class Checkpoint(Protocol):
    """A checkpoint opened for reading. Names are canonical."""

    path: Path
    config: Gemma3Config

    def names(self) -> list[str]:
        """The tensors' names, in the order of `weights.names.shapes`."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `get` returns: the stored one; float32 for a quantised GGUF tensor."""

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU. From safetensors a view of the mapped file: copy it before changing it."""


class FileCheckpoint(Checkpoint, Protocol):
    """One on disk, which also gives parts of a tensor."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of a tensor laid flat, in `dtype(name)`, in memory of their own."""


def open_checkpoint(path: str | os.PathLike[str]) -> FileCheckpoint:
    """Open a Hugging Face directory or a `.gguf` file; only headers are read.

    SeavlmError, with what to do, for anything that is not a whole Gemma 3: files, shards or tensors missing,
    cut off, doubled or of another shape than the config's; pickled weights; quantised safetensors; remote
    code.
    """
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        from seavlm.weights.gguf import GGUFCheckpoint

        return GGUFCheckpoint(path)
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.is_file():
        raise SeavlmError(f"{path} is not a model directory", hint="Give its directory, or a .gguf file.")
    raise SeavlmError(f"no such model: {path}", hint="Give a model directory or a .gguf file.")


# --- safetensors: reading


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: file, name in it, dtype and shape, and its first byte's place."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class SafetensorsCheckpoint:
    """A Hugging Face directory. Files are mapped: a tensor costs memory when its bytes are looked at."""

    def __init__(self, directory: Path) -> None:
        self.path = directory
        self._descriptors: dict[Path, int] = {}
        config = read_config(directory)
        stored = _stored_tensors(directory)
        self._head = stored.pop(naming.HEAD, None)
        check_tensors(directory, {name: entry.shape for name, entry in stored.items()}, config)
        widest = functools.reduce(torch.promote_types, {entry.dtype for entry in stored.values()})
        # What is there, whatever the config says.
        self.config = replace(config, dtype=str(widest).removeprefix("torch."))
        self._stored = {name: stored[name] for name in naming.shapes(config)}
        self._files: dict[Path, Any] = {}

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def get(self, name: str) -> Tensor:
        entry = self._entry(name)
        tensor = self._read(entry)
        if name == naming.EMBEDDING and self._head is not None:
            # Some writers store the tied head a second time. It is left out, once seen to be the same.
            head = self._head
            if head.shape != entry.shape or not torch.equal(self._read(head), tensor):
                raise _untied(head, entry)
            self._head = None
        return tensor

    def read(self, name: str, start: int, stop: int) -> Tensor:
        entry = self._entry(name)
        part = self._read_part(entry, start, stop)
        if name == naming.EMBEDDING and self._head is not None:
            same = self._head.shape == entry.shape and self._head.dtype == entry.dtype
            if not same or not torch.equal(self._read_part(self._head, start, stop), part):
                raise _untied(self._head, entry)
        return part

    def place(self, name: str) -> tuple[int, int] | None:
        """Where a tensor lies: an open file's descriptor and its first byte there. None for what `read` has
        more to do for: an embedding whose head was stored a second time."""
        if name == naming.EMBEDDING and self._head is not None:
            return None
        entry = self._entry(name)
        return self._descriptor(entry), entry.offset

    def _descriptor(self, entry: _Stored) -> int:
        try:
            if entry.file not in self._descriptors:
                opened = os.open(entry.file, os.O_RDONLY)
                # Another thread may have been quicker; then its descriptor is used.
                if self._descriptors.setdefault(entry.file, opened) != opened:
                    os.close(opened)
        except OSError as error:
            raise SeavlmError(f"cannot open {entry.file}: {error.strerror}", hint=_COPY_AGAIN) from error
        return self._descriptors[entry.file]

    def _read_part(self, entry: _Stored, start: int, stop: int) -> Tensor:
        """Read, not mapped: pages that were looked at would count as this process's memory until it ends."""
        result = torch.empty(stop - start, dtype=entry.dtype)
        view = result.view(torch.uint8).numpy().data
        offset = entry.offset + start * entry.dtype.itemsize
        descriptor = self._descriptor(entry)
        try:
            while view:
                done = os.preadv(descriptor, [view], offset)
                if not done:
                    raise OSError("the file has become shorter")
                view, offset = view[done:], offset + done
        except OSError as error:
            raise SeavlmError(
                f"cannot read {entry.name} from {entry.file}: {error}", hint=_COPY_AGAIN
            ) from error
        return result

    def close(self) -> None:
        """Let go of the files that `read` opened."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __del__(self) -> None:
        self.close()

    def _entry(self, name: str) -> _Stored:
        if name not in self._stored:
            raise SeavlmError(f"no tensor {name} in {self.path}")
        return self._stored[name]

    def _read(self, entry: _Stored) -> Tensor:
        try:
            if entry.file not in self._files:
                self._files[entry.file] = safe_open(entry.file, framework="pt")
            return self._files[entry.file].get_tensor(entry.name)
        except (SafetensorError, OSError) as error:
            raise SeavlmError(
                f"cannot read {entry.name} from {entry.file}: {error}", hint=_COPY_AGAIN
            ) from error


def _untied(head: _Stored, entry: _Stored) -> SeavlmError:
    return SeavlmError(
        f"{head.name} in {head.file} differs from {entry.name}; Gemma 3's head is its embedding",
        hint="Tie the weights in the program that wrote this checkpoint, and save it again.",
    )


def read_config(directory: Path) -> Gemma3Config:
    """The config of a Hugging Face directory, refused where it asks for more than plain Gemma 3."""
    path = directory / "config.json"
    raw = _read_json_object(path) if path.is_file() else {}
    if "auto_map" in raw:
        raise SeavlmError(
            f"{path} asks for code of its own (auto_map), and seavlm never runs code that comes with a model",
            hint="If the weights are plain Gemma 3, remove auto_map from config.json.",
        )
    if "quantization_config" in raw:
        quantization = raw["quantization_config"]
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise SeavlmError(
            f"{directory} holds weights quantised with {method!r}, which seavlm does not read",
            hint="Use the unquantised model, or its GGUF file.",
        )
    return Gemma3Config.from_dir(directory)


def _stored_tensors(directory: Path) -> dict[str, _Stored]:
    """Canonical name -> where it lies, for all tensors of a directory (the tied head among them)."""
    index, single = directory / INDEX, directory / SINGLE
    if index.is_file():
        weight_map = _read_index(index)
        if single.is_file() and SINGLE not in weight_map.values():
            raise SeavlmError(
                f"{directory} holds {SINGLE} and, by {INDEX}, other weights",
                hint="Remove those that are not the model's.",
            )
        files = {name: directory / name for name in sorted(set(weight_map.values()))}
        absent = [name for name, file in files.items() if not file.is_file()]
        if absent:
            raise SeavlmError(
                f"{directory} lacks {_some(absent)} of its {len(files)} shards",
                hint="Copy or download the missing files.",
            )
    elif single.is_file():
        weight_map, files = None, {SINGLE: single}
    else:
        message, hint = _no_weights(directory)
        raise SeavlmError(message, hint=hint)
    headers = {name: read_header(file) for name, file in files.items()}
    if weight_map is not None:
        lost = [f"{name} ({file})" for name, file in weight_map.items() if name not in headers[file]]
        if lost:
            raise SeavlmError(
                f"{index} promises tensors that their shards do not hold: {_some(lost)}",
                hint="Copy or download the shards again.",
            )
    result: dict[str, _Stored] = {}
    for file, header in headers.items():
        for name, (dtype, shape, offset) in header.items():
            canonical = naming.from_disk(name)
            if canonical is None:
                continue
            if canonical in result:
                other = result[canonical]
                raise SeavlmError(
                    f"{directory} holds a tensor twice: {other.name} in {other.file.name}, {name} in {file}",
                    hint="Keep one of them and write the checkpoint again.",
                )
            result[canonical] = _Stored(files[file], name, dtype, shape, offset)
    return result


def _read_index(path: Path) -> dict[str, str]:
    """The index's tensor name -> shard file, each a plain file name within the directory."""
    weight_map = _read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SeavlmError(f"{path} has no weight_map", hint=_COPY_AGAIN)
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\:]+\.safetensors", file):
            raise SeavlmError(
                f"{path} points {name} to {file!r}, which is not a safetensors file of its own directory",
                hint="Do not use this checkpoint unless you know who wrote it.",
            )
    return weight_map


def _no_weights(directory: Path) -> tuple[str, str]:
    pickles = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
    if pickles:
        return (
            f"{directory} holds only pickles ({_some(pickles)}), and to load a pickle is to run its code",
            "Save the model as safetensors where it was made (transformers: save_pretrained), "
            "or use its safetensors release.",
        )
    ggufs = sorted(file.name for file in directory.glob("*.gguf"))
    if ggufs:
        return f"{directory} holds no {SINGLE}", f"Give the file itself: {directory / ggufs[0]}"
    return (
        f"{directory} holds no {SINGLE} and no {INDEX}",
        "Is this a model directory, and was it copied whole?",
    )


def read_header(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    """Tensor name -> (dtype, shape, place of its first byte) of a safetensors file, checked against its size.

    Layout: 8 bytes of header length (little-endian), the header as JSON, then the tensors' bytes one after
    the other (https://github.com/huggingface/safetensors#format).
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise SeavlmError(
                f"{path} ({size:,} bytes) is cut off or not a safetensors file", hint=_COPY_AGAIN
            )
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_no_doubles)
        header.pop("__metadata__", None)
        entries = {
            name: (e["dtype"], tuple(map(int, e["shape"])), *map(int, e["data_offsets"]))
            for name, e in header.items()
        }
    except SeavlmError as error:
        raise SeavlmError(f"{path}: {error.message}", hint="Write the checkpoint again.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SeavlmError(f"{path} has a broken header ({error!r})", hint=_COPY_AGAIN) from error
    needed = 8 + length + max((end for *_, end in entries.values()), default=0)
    if size < needed:
        raise SeavlmError(
            f"{path} is cut off: its header speaks of {needed:,} bytes, it has {size:,}", hint=_COPY_AGAIN
        )
    result = {}
    for name, (tag, shape, begin, end) in entries.items():
        if naming.from_disk(name) is None:
            continue
        if not name.isprintable():
            raise SeavlmError(f"{path} holds a tensor called {name!r}", hint=_COPY_AGAIN)
        if tag not in _DTYPES:
            raise SeavlmError(
                f"{name} in {path} is stored as {tag}",
                hint=f"Known: {', '.join(_DTYPES)}. Use another release.",
            )
        if end - begin != math.prod(shape) * _DTYPES[tag].itemsize or min(begin, *shape, 0) < 0:
            raise SeavlmError(
                f"{name} in {path} has {end - begin:,} bytes, which is not {tag} of shape {list(shape)}",
                hint=_COPY_AGAIN,
            )
        result[name] = (_DTYPES[tag], shape, 8 + length + begin)
    spans = sorted((begin, end, repr(name)) for name, (*_, begin, end) in entries.items())
    spans = [(0, 0, "the header"), *spans, (size - 8 - length, size, "the end")]
    for (_, before, first), (begin, _, second) in itertools.pairwise(spans):
        if begin != before:  # as the format has it, and safetensors checks it
            raise SeavlmError(
                f"{path}: {second} is at byte {begin:,}, where {first} ends at {before:,}", hint=_COPY_AGAIN
            )
    return result


def check_tensors(path: Path, found: Mapping[str, tuple[int, ...]], config: Gemma3Config) -> None:
    """SeavlmError unless the tensors `found` (canonical name -> shape) are just what the config calls for."""
    wanted = naming.shapes(config)
    problems = _differences(wanted, found)
    if problems:
        raise SeavlmError(
            f"the tensors of {path} do not fit its config: {problems}",
            hint="Use the config.json that belongs to the weights, and all of their files.",
        )


def _differences(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    shapes = [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    listed = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return "; ".join(f"{len(those)} {what}: {_some(those)}" for what, those in listed if those)


def _some(items: list[str], most: int = 5) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise SeavlmError(f"the header names {next(k for k in keys if keys.count(k) > 1)} twice")
    return result


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SeavlmError(f"cannot read {path}: {error}", hint=_COPY_AGAIN) from error
    if not isinstance(value, dict):
        raise SeavlmError(f"{path} does not hold a JSON object", hint=_COPY_AGAIN)
    return value


# --- into a model


def load_into(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    names: Collection[str] | None = None,
) -> None:
    """Fill the parameters of `module` from `checkpoint`, one tensor at a time; with `names` only those.

    dtype, device: of the filled parameters; None keeps each parameter's own (the CPU for one on "meta"). A
    module built on "meta" gets its memory here. Strict: SeavlmError with the lists when names or shapes
    differ, for NaN or infinity in a tensor (with its name), and for float16, which Gemma 3's activations
    overflow. After an error the module may be filled in part.
    """
    parameters = dict(module.named_parameters())
    held = {name: checkpoint.shape(name) for name in checkpoint.names()}
    problems = _differences({name: tuple(p.shape) for name, p in parameters.items()}, held)
    if problems:
        raise SeavlmError(
            f"the tensors of {checkpoint.path} do not fit the model: {problems}",
            hint="Build the model from the checkpoint's own config.",
        )
    for name, old in parameters.items():
        if names is not None and name not in names:
            continue
        kind = dtype or old.dtype
        if kind == torch.float16:
            raise SeavlmError(
                "float16 overflows in Gemma 3: its activations exceed 65504, the largest float16 number",
                hint="Use bfloat16 or float32.",
            )
        place = torch.device(device) if device is not None else old.device
        place = torch.device("cpu") if place.type == "meta" else place
        found = checkpoint.get(name)
        tensor = found.to(kind)
        if not all_finite(tensor):
            raise SeavlmError(f"{name} in {checkpoint.path} holds NaN or infinity", hint=_COPY_AGAIN)
        if old.device == place and old.dtype == kind:
            with torch.no_grad():
                old.copy_(tensor)
        else:
            owner, _, leaf = name.rpartition(".")
            # A parameter owns its memory: never a view of the file, which a later write could change.
            own = tensor.to(place, copy=tensor is found, memory_format=torch.contiguous_format)
            setattr(module.get_submodule(owner), leaf, nn.Parameter(own, requires_grad=old.requires_grad))


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite, without a mask as large as the tensor."""
    if tensor.numel() == 0:
        return True
    low, high = tensor.aminmax()  # NaN anywhere makes both NaN
    return math.isfinite(low) and math.isfinite(high)


# --- writing


def save_checkpoint(
    out_dir: str | os.PathLike[str],
    config: Gemma3Config,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    copy_from: str | os.PathLike[str] | None = None,
) -> None:
    """Write a Hugging Face directory: config.json, weights, generation and (with a tower) processor configs.

    tensors: (canonical name, tensor) in any order, each written when it comes, at the place that the config
    has for it; so one is in memory at a time. All of them, each once, in the config's shape, finite; else
    SeavlmError.
    dtype: what they are stored as; None takes the config's. max_shard_bytes: 5e9 makes one file below 5 GB
    and shards with an index above. copy_from: directory to copy tokenizer files and generation_config.json
    from.

    The directory appears whole or not at all. One that exists already keeps its other files; its old weights
    go when the new ones are complete.
    """
    dtype = dtype or getattr(torch, config.dtype)
    if dtype not in _TAGS or dtype == torch.float16:
        raise SeavlmError(f"weights are not saved as {dtype}", hint="Use torch.bfloat16 or torch.float32.")
    config = replace(config, dtype=str(dtype).removeprefix("torch."))
    shards = plan_shards(naming.shapes(config), dtype, max_shard_bytes)
    with replacing_directory(Path(out_dir)) as folder:
        write_shards(folder, config, shards, tensors, dtype)
        write_configs(folder, config)
        if copy_from is not None:
            copy_companions(Path(copy_from), folder)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what `COPIED` names; put the chat template where transformers' processor looks for it."""
    for name in COPIED:
        if (source / name).is_file():
            (folder / name).unlink(missing_ok=True)
            shutil.copyfile(source / name, folder / name)
    tokenizer, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    if tokenizer.is_file() and not template.is_file():
        inside = _read_json_object(tokenizer).get("chat_template")
        if isinstance(inside, str):
            template.write_text(inside, encoding="utf-8")


def plan_shards(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: float
) -> dict[str, list[str]]:
    """File name -> names of its tensors, in order; a new file before one would pass `max_shard_bytes`."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if groups[-1] and size + nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def write_shards(
    folder: Path,
    config: Gemma3Config,
    shards: Mapping[str, list[str]],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    """Write the weight files that `shards` plans, with their index when there are several; tensors in any
    order.

    The config fixes every shape, so headers go first and each tensor's place is known before it comes.
    """
    shapes, vision = naming.shapes(config), config.vision is not None
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if total > free:
        raise SeavlmError(
            f"{folder.parent} has {free:,} bytes free, the weights need {total:,}", hint="Make room."
        )
    write_index(folder, shards, total, dtype, vision=vision)
    with contextlib.ExitStack() as stack:
        places: dict[str, tuple[int, int]] = {}  # name -> (file descriptor, offset)
        for file, group in shards.items():
            descriptor = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            stack.callback(os.close, descriptor)
            header, begins = header_of(group, shapes, dtype, vision=vision)
            write_at(descriptor, header, 0)
            places |= {name: (descriptor, begin) for name, begin in begins.items()}
        written: set[str] = set()
        for name, tensor in tensors:
            if name not in shapes:
                raise SeavlmError(f"{name} is not a tensor of this model", hint="Names must be canonical.")
            if name in written:
                raise SeavlmError(f"{name} was given twice")
            if tuple(tensor.shape) != shapes[name]:
                raise SeavlmError(
                    f"{name} has shape {list(tensor.shape)}, the config says {list(shapes[name])}"
                )
            stored = tensor.detach().to("cpu", dtype).contiguous()
            if not all_finite(stored):
                raise SeavlmError(
                    f"{name} holds NaN or infinity as {_TAGS[dtype]} and is not saved",
                    hint="Look at the training run or the model it came from.",
                )
            descriptor, offset = places[name]
            write_at(descriptor, stored.reshape(-1).view(torch.uint8).numpy(), offset)
            written.add(name)
        missing = [name for name in shapes if name not in written]
        if missing:
            raise SeavlmError(f"{len(missing)} tensors were not given: {_some(missing)}")


def header_of(
    group: list[str], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, *, vision: bool
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file with the tensors of `group`, and where each tensor begins."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, begins = 0, {}
    for name in group:
        begins[name], end = offset, offset + math.prod(shapes[name]) * dtype.itemsize
        entry = {"dtype": _TAGS[dtype], "shape": list(shapes[name]), "data_offsets": [offset, end]}
        header[naming.to_disk(name, vision=vision)] = entry
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    raw = len(text).to_bytes(8, "little") + text
    return raw, {name: len(raw) + begin for name, begin in begins.items()}


def write_index(
    folder: Path, shards: Mapping[str, list[str]], total: int, dtype: torch.dtype, *, vision: bool
) -> None:
    """The index of several shards (`total` bytes of tensors); nothing for a single file."""
    if list(shards) == [SINGLE]:
        return
    weight_map = {naming.to_disk(n, vision=vision): file for file, group in shards.items() for n in group}
    metadata = {"total_parameters": total // dtype.itemsize, "total_size": total}
    _write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def write_configs(folder: Path, config: Gemma3Config) -> None:
    """config.json, generation_config.json and, for models that see, the processor's two files."""
    _write_json(folder / "config.json", config.to_dict())
    _write_json(
        folder / GENERATION,
        {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": list(config.eos_token_ids),
            "pad_token_id": config.pad_token_id,
            "do_sample": True,  # Google's own settings for Gemma 3
            "temperature": 1.0,
            "top_k": 64,
            "top_p": 0.95,
        },
    )
    if config.vision is None:
        return
    size = config.vision.image_size
    image_processor = {
        "image_processor_type": "Gemma3ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_pan_and_scan": None,
        "pan_and_scan_min_crop_size": None,
        "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_ratio_to_activate": None,
        "image_seq_length": config.mm_tokens_per_image,
    }
    processor = {"processor_class": "Gemma3Processor"}
    _write_json(folder / "preprocessor_config.json", image_processor | processor)
    _write_json(
        folder / "processor_config.json", processor | {"image_seq_length": config.mm_tokens_per_image}
    )


@contextlib.contextmanager
def replacing_directory(out: Path) -> Iterator[Path]:
    """A new directory that takes the place of `out` when the block ends well, and is gone when it does not.

    Files of an existing `out` go along, except weights and their index, and those that the block writes anew.
    """
    out = out.absolute()
    partial = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    replaced = out.with_name(f"{out.name}.old-{os.getpid()}")
    if out.exists() and not out.is_dir():
        raise SeavlmError(f"{out} is a file", hint="Choose a directory to write to.")
    kept = list(out.iterdir()) if out.exists() else []
    if any(entry.is_dir() for entry in kept):
        raise SeavlmError(f"{out} holds other directories", hint="Choose a new or empty directory.")
    try:
        with disk_errors(out):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for entry in kept:
                if entry.name not in (SINGLE, INDEX) and not entry.match("model-*-of-*.safetensors"):
                    with contextlib.suppress(FileExistsError):
                        link_or_copy(entry, partial / entry.name)
            if out.exists():
                os.replace(out, replaced)
            os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not out.exists():  # the second rename failed
            os.replace(replaced, out)
        shutil.rmtree(replaced, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system has them, else a copy. FileExistsError when `target` is there."""
    try:
        os.link(source.resolve(), target)
    except FileExistsError:
        raise
    except OSError:
        with open(source, "rb") as reader, open(target, "xb") as writer:
            shutil.copyfileobj(reader, writer)


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """A full or read-only disk, as an error that users can act on."""
    known = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
    known |= {errno.EROFS: "the disk is read-only", errno.EFBIG: "a file may not be as large there"}
    known |= dict.fromkeys((errno.EACCES, errno.EPERM), "writing there is not permitted")
    known |= {errno.ENOTDIR: "a file is in the way", errno.ENAMETOOLONG: "the name is too long"}
    try:
        yield
    except OSError as error:
        if error.errno not in known:
            raise
        raise SeavlmError(
            f"cannot write {out}: {known[error.errno]}", hint="Make room, or choose another place."
        ) from error


def write_at(descriptor: int, data: Any, offset: int) -> None:
    """All of a buffer, from byte `offset` of an open file on."""
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)  # may write less than asked (2 GB at most on Linux)
        view, offset = view[done:], offset + done


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
