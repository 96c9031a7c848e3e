"""Manifests: hashes that depend on content alone, files that are whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from seavlm import __version__, manifest
from seavlm.errors import SeavlmError


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


FILES = {"a.txt": "one", "b/c.txt": "two", "b.txt": ""}


def test_file_hash_is_sha256(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(data)
    assert manifest.sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    assert manifest.sha256_file(tmp_path / "x") == manifest.sha256_bytes(data)
    assert manifest.sha256_tree(tmp_path / "x") == manifest.sha256_bytes(data)


def test_tree_hash_follows_names_and_content_only(tmp_path: Path) -> None:
    first = write(tmp_path / "1", FILES)
    second = write(tmp_path / "2", dict(reversed(FILES.items())))
    same = manifest.sha256_tree(first)
    assert manifest.sha256_tree(second) == same
    write(second, {"manifest.json": "{}", "b/manifest.json": "{}", "README.md": "card", "sweep.png": ""})
    assert manifest.sha256_tree(second) == same
    changes = [{"a.txt": "One"}, {"b/d.txt": ""}]
    for i, change in enumerate(changes):
        assert manifest.sha256_tree(write(tmp_path / f"c{i}", FILES | change)) != same
    renamed = {("z.txt" if name == "a.txt" else name): text for name, text in FILES.items()}
    assert manifest.sha256_tree(write(tmp_path / "r", renamed)) != same


def test_what_is_known_is_not_read_again(tmp_path: Path) -> None:
    """A recorded hash stands for its file until that is touched; a blob of the hub's cache is its name."""
    folder = write(tmp_path / "model", {"model.safetensors": "weights", "config.json": "{}"})
    plain = manifest.sha256_tree(folder)

    def record(digest: str) -> str:
        outputs = {"outputs": {"model.safetensors": digest}}
        manifest.write_manifest(
            folder, stage="merge", recipe={}, seed=0, inputs={}, metrics={}, extra=outputs
        )
        return manifest.sha256_tree(folder)

    assert record(manifest.sha256_bytes(b"weights")) == plain
    assert record("0" * 64) != plain  # so it was taken from the manifest
    assert record("no hash") == plain
    record("0" * 64)
    file = folder / "model.safetensors"
    before = file.stat()
    file.write_text("weightz", encoding="utf-8")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy may set it
    changed = manifest.sha256_tree(folder)
    (folder / "manifest.json").unlink()
    assert changed == manifest.sha256_tree(folder) != plain

    cache = write(tmp_path / "models--org--name", {f"blobs/{'a' * 64}": "weights", "blobs/short": "{}"})
    snapshot = cache / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{'a' * 64}")
    (snapshot / "config.json").symlink_to("../../blobs/short")
    lines = f"config.json\0{manifest.sha256_bytes(b'{}')}\nmodel.safetensors\0{'a' * 64}\n"
    assert manifest.sha256_tree(snapshot) == manifest.sha256_bytes(lines.encode())


def test_missing_input_is_named(tmp_path: Path) -> None:
    for function in (manifest.sha256_file, manifest.sha256_tree):
        with pytest.raises(SeavlmError, match="nothing-here"):
            function(tmp_path / "nothing-here")


def test_written_and_read_back(tmp_path: Path) -> None:
    path = manifest.write_manifest(
        tmp_path / "out",
        stage="train",
        recipe={"lr": 1e-4, "ភាសា": "km"},
        seed=7,
        inputs={"data": "ab" * 32},
        metrics={"loss": 1.5},
        extra={"note": "x"},
        duration_s=2.5,
    )
    read = manifest.read_manifest(tmp_path / "out")
    assert path == tmp_path / "out" / "manifest.json" and json.loads(path.read_text("utf-8")) == read
    assert read["stage"] == "train" and read["seed"] == 7 and read["duration_s"] == 2.5
    assert read["recipe"] == {"lr": 1e-4, "ភាសា": "km"} and read["inputs"] == {"data": "ab" * 32}
    assert read["metrics"] == {"loss": 1.5} and read["note"] == "x"
    assert read["versions"]["seavlm"] == __version__ and read["versions"]["torch"]
    assert read["created"].endswith("+00:00")
    assert [p.name for p in path.parent.iterdir()] == ["manifest.json"]


def test_failed_writing_keeps_the_old_one(tmp_path: Path) -> None:
    def write_one(metrics: dict) -> None:
        manifest.write_manifest(tmp_path, stage="s", recipe={}, seed=0, inputs={}, metrics=metrics)

    write_one({"loss": 1.0})
    before = (tmp_path / "manifest.json").read_bytes()
    for bad in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_one({"loss": bad})
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_extra_may_not_replace(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed"):
        manifest.write_manifest(
            tmp_path, stage="s", recipe={}, seed=1, inputs={}, metrics={}, extra={"seed": 2}
        )


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"stage": 3}'])
def test_broken_manifest(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(SeavlmError) as error:
        manifest.read_manifest(tmp_path)
    assert "manifest" in str(error.value) and error.value.hint and "\n" not in str(error.value)


def test_no_torch_is_imported() -> None:
    code = "import sys, seavlm.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
