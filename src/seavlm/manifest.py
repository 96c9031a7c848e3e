"""Every output says where it came from: a `manifest.json` beside it, and the hashes that tie it to its
inputs.

No torch here: the card and the command line read manifests without loading a model library.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from seavlm.errors import SeavlmError

T = TypeVar("T")
R = TypeVar("R")

MANIFEST = "manifest.json"
THREADS = min(4, os.cpu_count() or 1)  # that hash the files of a directory
PAPERS = (".md", ".png")
_PACKAGES = ("seavlm", "torch", "transformers", "tokenizers", "safetensors")


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces. SeavlmError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SeavlmError(f"cannot read {path}: {error.strerror}", hint="Check the path.") from error


def sha256_tree(directory: str | os.PathLike[str]) -> str:
    """One SHA-256 for a directory: over the sorted relative names and the hashes of the files under it.

    `manifest.json` files are left out (they hold times, which differ between two equal outputs), and papers
    (.md, .png), which a card puts beside a model without making it another. A path to a single file gives
    that file's hash, so that "the hash of an input" is one call for both. Weights of the hub's cache, and
    those that their own manifest has a hash of and that nobody has touched since, are not read again: of 54
    GB that takes minutes.
    """
    root = Path(directory)
    if root.is_file():
        return sha256_file(root)
    if not root.is_dir():
        raise SeavlmError(f"no such file or directory: {root}", hint="Check the path.")
    paths = sorted(root.rglob("*"), key=lambda p: p.relative_to(root).as_posix())
    files = [p for p in paths if p.is_file() and p.name != MANIFEST and p.suffix not in PAPERS]
    hashes = _known_hashes(root, files)
    left = [file for file in files if file not in hashes]
    parts = [beside(lambda some: {f: sha256_file(f) for f in some}, left[i::THREADS]) for i in range(THREADS)]
    for part in parts:
        hashes |= part.result()
    lines = (f"{file.relative_to(root).as_posix()}\0{hashes[file]}\n" for file in files)
    return sha256_bytes("".join(lines).encode())


def beside(function: Callable[[T], R], given: T) -> Future[R]:
    """function(given), in a thread that the end of the program does not wait for: an error or Ctrl-C must not
    wait until 54 GB are hashed."""
    future: Future[R] = Future()

    def work() -> None:
        try:
            future.set_result(function(given))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _known_hashes(root: Path, files: list[Path]) -> dict[Path, str]:
    """The SHA-256 of those files that need not be read for it.

    The hub's cache names a large file by its hash. Else: what the directory's own manifest says of a file
    whose inode has not changed (ctime, which no copy and no edit can set back) since that was written.
    """
    known: dict[Path, Any] = {}
    with contextlib.suppress(SeavlmError):
        outputs, written = read_manifest(root).get("outputs"), (root / MANIFEST).stat().st_ctime_ns
        if isinstance(outputs, dict):
            mine = [file for file in files if file.parent == root and file.stat().st_ctime_ns <= written]
            known |= {file: outputs.get(file.name) for file in mine}
    for file in files:
        blob = file.resolve()
        if blob.parent.name == "blobs" and blob.parents[1].name.startswith(("models--", "datasets--")):
            known[file] = blob.name
    return {f: h for f, h in known.items() if isinstance(h, str) and re.fullmatch(r"[0-9a-f]{64}", h)}


def write_manifest(
    directory: str | os.PathLike[str],
    *,
    stage: str,
    recipe: dict[str, Any],
    seed: int,
    inputs: dict[str, str],
    metrics: dict[str, Any],
    extra: dict[str, Any] | None = None,
    duration_s: float | None = None,
) -> Path:
    """Write `manifest.json` into `directory` (made if missing) and return its path.

    recipe: the resolved recipe of the stage; inputs: name -> SHA-256; metrics: the stage's figures; extra:
    further top-level keys, which may not replace the manifest's own; duration_s: seconds that the stage took.
    """
    manifest: dict[str, Any] = {
        "stage": stage,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "duration_s": duration_s,
        "seed": seed,
        "inputs": inputs,
        "recipe": recipe,
        "metrics": metrics,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version_of(name) for name in _PACKAGES},
    }
    for key, value in (extra or {}).items():
        if key in manifest and manifest[key] is not None:
            raise ValueError(f"extra key {key!r} would replace the manifest's own")
        manifest[key] = value
    path = Path(directory) / MANIFEST
    write_json(path, manifest)
    return path


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a stage's directory. SeavlmError when it is missing or broken."""
    path = Path(directory) / MANIFEST
    if not path.exists():
        raise SeavlmError(f"no {MANIFEST} in {directory}", hint="Run the stage that makes this directory.")
    manifest = read_json(path)
    if not isinstance(manifest.get("stage"), str):
        raise SeavlmError(f"{path} is not a manifest: it has no stage", hint="Run its stage again.")
    return manifest


def refuse_other(directory: str | os.PathLike[str], stage: str) -> None:
    """SeavlmError where `directory` is a file, or holds another stage's manifest, which would be lost."""
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise SeavlmError(f"{folder} is a file", hint="Choose a directory to write to.")
    try:
        held = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or one that tells nothing
        return
    made = held.get("stage") if isinstance(held, dict) else None
    if made != stage:
        what = f"what the stage {made!r} wrote" if made else "a build, or what seavlm did not make"
        raise SeavlmError(
            f"{folder} holds {what}, whose {MANIFEST} would be lost", hint="Give another --out."
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that seavlm has written. SeavlmError when it is missing or broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SeavlmError(f"{path} cannot be read: {error}", hint="Run its stage again.") from error
    if not isinstance(found, dict):
        raise SeavlmError(f"{path} is not what seavlm writes", hint="Run its stage again.")
    return found


def put(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make the file `path`, whole or not at all (temporary file, then rename). Its folder is made
    if missing."""
    if path.is_dir():
        raise SeavlmError(f"{path} is a folder", hint="Give the name of a file to write.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    put(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def version_of(package: str) -> str | None:
    """Of an installed package; None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def alone(lock: Path, told: str, hint: str = "Wait for it, or stop it.") -> Iterator[None]:
    """One process at a time holds the file `lock`; SeavlmError, with `told`, for another. The system lets go
    of it for a process that was killed. The file's folder is made if missing."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SeavlmError(told, hint=hint) from None
        yield
