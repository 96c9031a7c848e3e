"""Merging on disk: exact, strict about names, shapes and vocabularies, atomic, one tensor at a time."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from seavlm import manifest
from seavlm.engine import kernels
from seavlm.errors import SeavlmError
from seavlm.merge import stream
from seavlm.merge.methods import combine
from seavlm.merge.stream import merge_checkpoints
from seavlm.model.config import Gemma3Config, TextConfig
from seavlm.model.gemma3 import Gemma3
from seavlm.weights import names as naming
from seavlm.weights.checkpoint import (
    open_checkpoint,
    plan_shards,
    read_header,
    save_checkpoint,
    write_configs,
)

CONFIG = Gemma3Config(
    text=TextConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=64,
    ),
    dtype="bfloat16",
)


def write_parent(
    place: Path, seed: int, config: Gemma3Config = CONFIG, dtype=torch.bfloat16, tokens=40
) -> Path:
    torch.manual_seed(seed)
    model = Gemma3(config, dtype=torch.float32)
    save_checkpoint(place, config, ((n, p.detach()) for n, p in model.named_parameters()), dtype=dtype)
    vocab = {f"t{i}": i for i in range(tokens)}
    added = [{"id": 0, "content": "t0", "special": True}]
    (place / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {"vocab": vocab}}))
    (place / "generation_config.json").write_text(json.dumps({"temperature": seed}))
    return place


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("parents")
    return write_parent(root / "regional", 1), write_parent(root / "global", 2)


def weights(place: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(place.glob("*.safetensors")))


def put_number(place: Path, name: str, value: float) -> None:
    """Overwrites the first number of a stored bf16 tensor."""
    (file,) = place.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    (key,) = [key for key in header if key.endswith(name)]
    at = 8 + size + header[key]["data_offsets"][0]
    raw[at : at + 2] = torch.tensor([value]).bfloat16().view(torch.uint8).numpy().tobytes()
    file.write_bytes(raw)


def test_theta(parents: tuple[Path, Path], tmp_path: Path) -> None:
    report = merge_checkpoints(parents, [0.1, 0.9], tmp_path / "out")
    regional, world, merged = (open_checkpoint(p) for p in (*parents, tmp_path / "out"))
    worst = total = 0.0
    for name in merged.names():
        exact = regional.get(name).float() * torch.tensor(0.1) + world.get(name).float() * torch.tensor(0.9)
        assert merged.dtype(name) == torch.bfloat16
        assert torch.equal(merged.get(name), exact.bfloat16()), name
        error = (merged.get(name).float() - exact).abs()
        worst, total = max(worst, error.max().item()), total + error.double().sum().item()
    count = sum(merged.get(name).numel() for name in merged.names())
    assert report["parameters"] == count and report["tensors"] == len(merged.names())
    assert report["rounding_max"] == worst > 0
    assert report["rounding_mean"] == pytest.approx(total / count)
    assert report["parents_distance_mean"] > 10 * report["rounding_mean"]


def builds() -> list[str]:
    """Those that are here and that this processor runs."""
    usable = list(kernels.ISAS)[list(kernels.ISAS).index(kernels.best()) :]
    return [isa for isa in usable if kernels.path_of(isa).exists()]


@pytest.mark.parametrize("isa", builds())
def test_the_kernel_gives_the_same_bits(isa: str) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(10_003, generator=g).mul(3).bfloat16() for _ in range(2))
    a[:4], b[:4] = torch.tensor([0.0, -0.0, 1e-40, 300]), torch.tensor([-0.0, -0.0, -1e-40, 1])
    for beta in (0.1, 0.5, 0.7):
        total = combine([a, b], [beta, 1 - beta])
        wanted, figures, out = total.bfloat16(), np.zeros(3), torch.empty_like(a)
        mean = kernels.mean_of(kernels.c.CDLL(str(kernels.path_of(isa))))
        mean(a.data_ptr(), b.data_ptr(), beta, 1 - beta, out.data_ptr(), len(a), figures.ctypes.data)
        assert torch.equal(out.view(torch.int16), wanted.view(torch.int16))
        lost = (wanted.float() - total).abs()
        apart = (a.float() - b.float()).abs()
        known = [float(x) for x in (lost.double().sum(), lost.max(), apart.double().sum())]
        assert figures.tolist() == pytest.approx(known, rel=1e-5)
    a[7] = float("nan")
    mean(a.data_ptr(), b.data_ptr(), 0.5, 0.5, out.data_ptr(), len(a), figures.ctypes.data)
    assert np.isnan(figures[0])


def test_equal_inputs_equal_bits_and_parents_reproduced(parents: tuple[Path, Path], tmp_path: Path) -> None:
    for i in range(2):
        merge_checkpoints(parents, [0.3, 0.7], tmp_path / f"same{i}")
    assert weights(tmp_path / "same0") == weights(tmp_path / "same1")
    for beta, parent in ((1.0, parents[0]), (0.0, parents[1])):
        merge_checkpoints(parents, [beta, 1 - beta], tmp_path / f"{beta}")
        assert weights(tmp_path / f"{beta}") == weights(parent)


def test_manifest_and_copied_files(parents: tuple[Path, Path], tmp_path: Path) -> None:
    merge_checkpoints(parents, [0.2, 0.8], tmp_path / "out")
    written = manifest.read_manifest(tmp_path / "out")
    assert written["stage"] == "merge" and written["recipe"]["weights"] == [0.2, 0.8]
    assert written["inputs"]["parent_1"] == manifest.sha256_tree(parents[1])
    assert written["metrics"]["tokenizer_checked"] is True
    # Tokenizer and generation settings are the last parent's, the global one's.
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_text() == (parents[1] / name).read_text()


def test_dtypes(parents: tuple[Path, Path], tmp_path: Path) -> None:
    wide = write_parent(tmp_path / "wide", 3, dtype=torch.float32)
    merge_checkpoints([wide, parents[1]], [0.5, 0.5], tmp_path / "a")
    assert open_checkpoint(tmp_path / "a").config.dtype == "float32"
    report = merge_checkpoints([wide, parents[1]], [0.5, 0.5], tmp_path / "b", dtype="bfloat16")
    assert open_checkpoint(tmp_path / "b").config.dtype == "bfloat16" and report["dtype"] == "bfloat16"
    with pytest.raises(SeavlmError, match="float16"):
        merge_checkpoints(parents, [0.5, 0.5], tmp_path / "c", dtype="float16")


def test_a_few_pieces_at_a_time(parents: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    """However slowly the pieces are hashed, the readers are only a few of them ahead."""
    monkeypatch.setattr(stream, "PIECE", 64)
    read, hashed, ahead = set(), 0, []
    real_read, real_add = stream._read, stream.Figures.add

    def noted_read(plan, step, start, stop):
        read.add((step.name, start))
        return real_read(plan, step, start, stop)

    def noted_add(mine, other) -> None:
        nonlocal hashed
        time.sleep(1e-4)
        real_add(mine, other)
        hashed += 1
        ahead.append(len(read) - hashed)

    monkeypatch.setattr(stream, "_read", noted_read)
    monkeypatch.setattr(stream.Figures, "add", noted_add)
    merge_checkpoints(parents, [0.5, 0.5], tmp_path / "out")
    assert hashed > 50 and max(ahead) <= 2 * stream.WORKERS + 1


def refused(match: str, paths: list[Path], out: Path, beta: float = 0.5) -> str:
    before = sorted(out.parent.iterdir())
    with pytest.raises(SeavlmError, match=match) as error:
        merge_checkpoints(paths, [beta, 1 - beta], out)
    assert sorted(out.parent.iterdir()) == before  # nothing half-written, nothing left over
    assert "\n" not in str(error.value)
    return str(error.value)


def test_nan_is_refused_with_its_tensor(parents: tuple[Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(parents[0], broken)
    put_number(broken, "layers.1.mlp.up_proj.weight", float("nan"))
    message = refused("NaN", [broken, parents[1]], tmp_path / "out")
    assert "language_model.layers.1.mlp.up_proj.weight" in message and str(broken) in message
    refused("NaN", [broken, parents[1]], tmp_path / "out", beta=0.0)  # also where its weight is nothing


def test_a_failed_merge_leaves_the_old_output(parents: tuple[Path, Path], tmp_path: Path) -> None:
    merge_checkpoints(parents, [0.4, 0.6], tmp_path / "out")
    before = weights(tmp_path / "out")
    broken = tmp_path / "broken"
    shutil.copytree(parents[0], broken)
    put_number(broken, "model.norm.weight", float("nan"))
    refused("NaN", [broken, parents[1]], tmp_path / "out")
    assert weights(tmp_path / "out") == before
    merge_checkpoints(parents, [0.6, 0.4], tmp_path / "out")
    assert weights(tmp_path / "out") != before


def test_other_architecture(parents: tuple[Path, Path], tmp_path: Path) -> None:
    text = replace(CONFIG.text, num_hidden_layers=3, layer_types=())
    other = write_parent(tmp_path / "other", 1, replace(CONFIG, text=text))
    assert "num_hidden_layers (3 and 2)" in refused("differ", [other, parents[1]], tmp_path / "out")


def test_other_tokenizer(parents: tuple[Path, Path], tmp_path: Path) -> None:
    longer = write_parent(tmp_path / "longer", 1, tokens=41)
    assert "41 and 40 tokens" in refused("tokenizers", [longer, parents[1]], tmp_path / "out")
    swapped = write_parent(tmp_path / "swapped", 1)
    content = json.loads((swapped / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"t7": 8, "t8": 7}
    (swapped / "tokenizer.json").write_text(json.dumps(content))
    message = refused("disagree on 2 tokens", [swapped, parents[1]], tmp_path / "out")
    assert "'t7' (8 and 7)" in message


def test_names_and_shapes_must_match(parents: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    """Whatever a reader lets through, every difference is in the error's list."""
    real = stream.open_checkpoint

    class Odd:
        def __init__(self, place: Path) -> None:
            self.inner = real(place)
            self.odd = place == parents[0]

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def names(self):
            names = list(self.inner.names())
            return [*names[:-2], "extra.weight"] if self.odd else names

        def shape(self, name):
            shape = self.inner.shape(name)
            return (*shape[:-1], shape[-1] + 1) if self.odd and name.endswith("norm.weight") else shape

    names = list(real(parents[1]).names())
    monkeypatch.setattr(stream, "open_checkpoint", Odd)
    message = refused("tensors do not match", list(parents), tmp_path / "out")
    expected = {*names[-2:], "extra.weight", *(n for n in names[:-2] if n.endswith("norm.weight"))}
    assert message.startswith(f"{len(expected)} tensors")
    assert all(name in message for name in expected)
    assert "(16,) and (17,)" in message or "(17,) and (16,)" in message


def test_weights_must_sum_to_one(parents: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SeavlmError, match="sum to 1"):
        merge_checkpoints(parents, [0.5, 0.6], tmp_path / "out")
    with pytest.raises(SeavlmError, match="1 weights for 2 parents"):
        merge_checkpoints(parents, [1.0], tmp_path / "out")


def test_sharded_parent_merges_like_a_single_file(
    parents: tuple[Path, Path], tmp_path: Path, monkeypatch
) -> None:
    source = open_checkpoint(parents[0])
    sharded = tmp_path / "sharded"
    tensors = ((name, source.get(name)) for name in source.names())
    save_checkpoint(sharded, source.config, tensors, max_shard_bytes=4000, copy_from=parents[0])
    assert len(list(sharded.glob("*.safetensors"))) > 1
    merge_checkpoints([sharded, parents[1]], [0.3, 0.7], tmp_path / "a")
    monkeypatch.setattr(stream, "PIECE", 7)  # and the pieces in which the sums are made do not matter
    merge_checkpoints(parents, [0.3, 0.7], tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert all(file.exists() and read_header(file) for file in (tmp_path / "a").glob("*.safetensors"))


STOPS = """
import sys, time
from seavlm.merge import stream
real, files = stream.manifest.write_json, 0
def stopping(*given):
    global files
    real(*given)
    files += 1
    if files == 3:
        time.sleep(100)
stream.manifest.write_json = stopping
raw = {"regional": sys.argv[1], "global": sys.argv[2], "beta": 0.3}
stream.merge_recipe(raw, sys.argv[3], shard_bytes=1000)
"""


def test_killed_and_begun_again(parents: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    """SIGKILL in the middle: nothing at the place, finished files are kept, the bits are the same."""
    raw = {"regional": str(parents[0]), "global": str(parents[1]), "beta": 0.3}
    stream.merge_recipe(raw, tmp_path / "straight", shard_bytes=1000)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = subprocess.Popen([sys.executable, "-c", STOPS, *map(str, (*parents, out))])
    deadline = time.monotonic() + 60
    while len(list(partial.glob("*.safetensors"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    with pytest.raises(SeavlmError, match="another merge"):
        stream.merge_recipe(raw, out, shard_bytes=1000)
    process.kill()
    process.wait()
    assert not out.exists()
    noted = json.loads((partial / stream.JOURNAL).read_text())["files"]
    damaged = partial / next(iter(noted))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    report = stream.merge_recipe(raw, out, shard_bytes=1000)
    assert report["files_kept"] == len(noted) - 1 >= 1
    assert weights(out) == weights(tmp_path / "straight") and not partial.exists()
    outputs = manifest.read_manifest(out)["outputs"]
    assert outputs == {name: manifest.sha256_file(out / name) for name in outputs} and len(outputs) > 3
    again = manifest.read_manifest(tmp_path / "straight")["metrics"]
    assert again.pop("carbon")["kwh"] > 0
    assert {**report, "files_kept": 0} == again


def test_other_inputs_begin_anew(parents: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    real = stream._finish
    monkeypatch.setattr(stream, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(parents, [0.2, 0.8], tmp_path / "out")
    monkeypatch.setattr(stream, "_finish", real)
    assert merge_checkpoints(parents, [0.3, 0.7], tmp_path / "out")["files_kept"] == 0
    merge_checkpoints(parents, [0.3, 0.7], tmp_path / "straight")
    assert weights(tmp_path / "out") == weights(tmp_path / "straight")


def test_full_disk_and_shortened_parent(parents: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    real = stream.write_at

    def full(descriptor, data, offset) -> None:
        if offset > 2000:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "PIECE", 64)
        patch.setattr(stream, "write_at", full)
        patch.setattr(kernels, "mean_of_files", lambda: None)
        refused("disk is full", list(parents), tmp_path / "out")
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(stream.shutil, "disk_usage", lambda _: usage._replace(free=100))
        refused("100 bytes free", list(parents), tmp_path / "out")
    short = tmp_path / "short"
    shutil.copytree(parents[0], short)
    file = short / "model.safetensors"
    opened = stream.open_checkpoint(short)  # cut off after it was opened
    os.truncate(file, file.stat().st_size - 50)
    monkeypatch.setattr(
        stream, "open_checkpoint", lambda place: opened if place == short else open_checkpoint(place)
    )
    refused("become shorter", [short, parents[1]], tmp_path / "out")
    monkeypatch.undo()
    refused("cut off", [short, parents[1]], tmp_path / "out")


def test_a_file_that_may_not_grow(parents: tuple[Path, Path], tmp_path: Path) -> None:
    """The kernel writes itself: its failure is told as any other, and nothing stays."""
    code = (
        "import resource, sys; from seavlm.merge import stream\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))\n"
        "stream.merge_checkpoints(sys.argv[1:3], [0.5, 0.5], sys.argv[3], 'bfloat16')"
    )
    for parent, name in zip(parents, ("a", "b"), strict=True):
        merge_checkpoints([parent], [1.0], tmp_path / name, "bfloat16")
    places = [str(tmp_path / name) for name in ("a", "b", "out")]
    done = subprocess.run([sys.executable, "-c", code, *places], capture_output=True, text=True)
    assert "SeavlmError: cannot write" in done.stderr and sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("isa", builds()[:1])
def test_two_files_are_merged_as_their_numbers_are(
    isa: str, parents: tuple[Path, Path], tmp_path: Path, monkeypatch
) -> None:
    """By the kernel that reads and writes itself, by the one for numbers, and by torch: the same bits."""
    for parent, name in zip(parents, ("a", "b"), strict=True):
        merge_checkpoints([parent], [1.0], tmp_path / name, "bfloat16")
    bf16 = [tmp_path / "a", tmp_path / "b"]
    used, real = [], kernels.mean_of_files()
    monkeypatch.setattr(
        kernels, "mean_of_files", lambda: lambda *given: used.append(real(*given)) or used[-1]
    )
    first = merge_checkpoints(bf16, [0.3, 0.7], tmp_path / "files")
    assert used and all(used)
    monkeypatch.setattr(kernels, "mean_of_files", lambda: None)
    second = merge_checkpoints(bf16, [0.3, 0.7], tmp_path / "numbers")
    monkeypatch.setattr(kernels, "mean", lambda: None)
    third = merge_checkpoints(bf16, [0.3, 0.7], tmp_path / "torch")
    assert weights(tmp_path / "files") == weights(tmp_path / "numbers") == weights(tmp_path / "torch")
    for key in ("rounding_mean", "rounding_max", "parents_distance_mean", "parameters"):
        assert second[key] == pytest.approx(first[key], rel=1e-5) == third[key]


def test_an_extra_tensor(parents: tuple[Path, Path], tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(parents[0], odd)
    stored = load_file(odd / "model.safetensors")
    save_file({**stored, "model.layers.0.extra.weight": torch.zeros(3)}, odd / "model.safetensors")
    assert "layers.0.extra.weight" in refused("unexpected", [odd, parents[1]], tmp_path / "out")


def test_missing_tensors(parents: tuple[Path, Path], tmp_path: Path) -> None:
    """Each is named, and a merge is refused whichever parent lacks it."""
    less = tmp_path / "less"
    shutil.copytree(parents[0], less)
    stored = load_file(less / "model.safetensors")
    gone = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    save_file({n: t for n, t in stored.items() if n not in gone}, less / "model.safetensors")
    for pair in ([less, parents[1]], [parents[1], less]):
        message = refused("missing", pair, tmp_path / "out")
        assert all(name.removeprefix("model.") in message for name in gone)


def everything(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_places_that_may_not_be_written(parents: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "full" / "inner").mkdir(parents=True)
    for name in ("file", "taken.partial/download", "other/model.safetensors", "app/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "link").symlink_to(parents[0])
    before = everything(tmp_path) | everything(parents[0].parent)
    for out, match in (
        (parents[1], "parents"),
        (tmp_path / "link", "parents"),
        (parents[1] / "merged", "one in the other"),
        (parents[1].parent, "one in the other"),
        (tmp_path / "full", "other directories"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "out", "a file is in the way"),
        (tmp_path / ("x" * 250), "name is too long"),
        (tmp_path / "taken", "not of an unfinished merge"),
        (tmp_path / "other", "no merge made .model.safetensors"),
        (tmp_path / "app", "no merge made .config.json"),
        (Path("/proc"), "mounted|other directories"),
    ):
        with pytest.raises(SeavlmError, match=match):
            merge_checkpoints(parents, [0.5, 0.5], out)
    assert everything(tmp_path) | everything(parents[0].parent) == before


def test_an_unknown_region_leaves_nothing(parents: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SEAVLM_REGION", "atlantis")
    with pytest.raises(SeavlmError, match="atlantis"):
        merge_checkpoints(parents, [0.5, 0.5], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_users_keep_beside_a_merge_stays(parents: tuple[Path, Path], tmp_path: Path) -> None:
    """Also where the place is a link to another."""
    (tmp_path / "real").mkdir()
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "real")
    (out / "thesis.txt").write_text("mine")
    (out / "broken").symlink_to("nowhere")
    for beta in (0.2, 0.4):
        merge_checkpoints(parents, [beta, 1 - beta], out)
        assert out.is_symlink() and (out / "broken").is_symlink()
        assert (out / "thesis.txt").read_text() == "mine"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "real"]
        assert manifest.read_manifest(out)["recipe"]["weights"] == [beta, 1 - beta]
    assert not {stream.JOURNAL, stream.LOCK} & {path.name for path in out.iterdir()}


def test_an_error_does_not_wait_for_the_hashes(parents: tuple[Path, Path], tmp_path: Path) -> None:
    """Nor do folders stay that were made for the output."""
    broken = tmp_path / "broken"
    shutil.copytree(parents[0], broken)
    put_number(broken, "model.norm.weight", float("nan"))
    with open(broken / "optimizer.pt", "wb") as file:
        file.truncate(1 << 40)  # a hole, with a quarter of an hour of hashing in it
    command = [sys.executable, "-m", "seavlm.cli", "merge", str(broken), str(parents[1]), "--beta", "0.5"]
    out = tmp_path / "new" / "deep" / "out"
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "1 are NaN" in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_parent_that_changes_is_noticed(parents: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(parents[0], mine)
    real = stream._write_all

    def then_touched(*given):
        written = real(*given)
        os.utime(mine / "model.safetensors", ns=(0, 0))
        return written

    monkeypatch.setattr(stream, "_write_all", then_touched)
    refused("changed while", [mine, parents[1]], tmp_path / "out")


def test_infinity_is_named(parents: tuple[Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(parents[0], broken)
    put_number(broken, "model.norm.weight", float("inf"))
    assert "norm.weight" in refused("1 infinite", [broken, parents[1]], tmp_path / "out")


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, method: str) -> None:
    """A merge of 40 MB tensors holds pieces of them, not them, nor does it leave the heap full of holes."""
    text = replace(
        CONFIG.text,
        vocab_size=160_000,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=1,
        layer_types=(),
    )
    config = replace(CONFIG, text=text)
    for seed, name in enumerate(("a", "b")):
        draw = torch.Generator().manual_seed(seed)
        drawn = ((n, torch.randn(s, generator=draw)) for n, s in naming.shapes(config).items())
        save_checkpoint(tmp_path / name, config, drawn)
    code = (
        "import sys; from seavlm.merge import stream\n"
        "def peak(): return int(next(x for x in open('/proc/self/status') if 'VmHWM' in x).split()[1])\n"
        "stream.WORKERS, stream.PIECE = 2, 1 << 16; before = peak()\n"
        "parts = {'parameters': {'weight': 0.5, 'density': 0.3}} if sys.argv[4] == 'ties' else {}\n"
        "models = [{'model': sys.argv[2], **parts}]\n"
        "ties = {'merge_method': 'ties', 'base_model': sys.argv[1], 'models': models}\n"
        "short = {'regional': sys.argv[1], 'global': sys.argv[2], 'beta': 0.5}\n"
        "stream.merge_recipe(ties if parts else short, sys.argv[3]); print(peak() - before)"
    )
    places = [*(str(tmp_path / name) for name in ("a", "b", "out")), method]
    done = subprocess.run([sys.executable, "-c", code, *places], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30_000  # KB; a parent's embedding alone has 40,000


def with_holes(place: Path, config: Gemma3Config) -> Path:
    """Shards of a model's true size, whose headers alone take room on the disk."""
    place.mkdir()
    write_configs(place, config)
    shapes = naming.shapes(config)
    shards = plan_shards(shapes, torch.bfloat16, 5e9)
    index = {}
    for file, names in shards.items():
        header: dict[str, object] = {}
        end = 0
        for name in names:
            begin, end = end, end + 2 * math.prod(shapes[name])
            stored = naming.to_disk(name, vision=True)
            header[stored] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
            index[stored] = file
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with open(place / file, "wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            out.truncate(8 + len(raw) + end)
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return place


def test_54_gigabytes_are_planned(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of Gemma 3 27B's size: what will be read and written, in which memory, and if there is room."""
    config = Gemma3Config.named("27b")
    models = [with_holes(tmp_path / name, config) for name in "ab"]
    command = ("merge", *models, "--beta", "0.1", "--dry-run", "--out", tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda _: usage._replace(free=int(60e9)))
    done = cli(*command)
    assert done.code == 0 and "1247 tensors, 27,432,406,640 parameters, bfloat16" in done.out
    assert "109.73 GB from 2 models" in done.out and "54.86 GB in 12 files" in done.out
    memory = re.search(r"memory: +(\d+\.\d+) GB .*largest tensor has 2\.82 GB", done.out)
    assert memory and float(memory[1]) < 0.2
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda _: usage._replace(free=int(40e9)))
    short = cli(*command)
    assert short.code == 2 and "40.00 GB are free" in short.out and "too little room" in short.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
