"""Deltas: exact ones bit for bit, lossy ones with the error they say, all of them parents like any other."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seavlm import manifest
from seavlm.errors import SeavlmError
from seavlm.merge import delta as deltas
from seavlm.merge import stream
from seavlm.merge.delta import apply_delta, delta_plan, make_delta, open_delta
from seavlm.merge.stream import Merged, merge_checkpoints
from seavlm.model.config import Gemma3Config, TextConfig
from seavlm.weights import names as naming
from seavlm.weights.checkpoint import open_checkpoint, save_checkpoint

TEXT = TextConfig(
    vocab_size=70,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    query_pre_attn_scalar=8,
    max_position_embeddings=64,
)


def write(
    place: Path, seed: int, *, near: Path | None = None, dtype: str = "bfloat16", rows: int = 70
) -> Path:
    """Random weights; near: those of another model, each moved a little."""
    config = Gemma3Config(text=replace(TEXT, vocab_size=rows), dtype=dtype)
    draw = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(s, generator=draw) for n, s in naming.shapes(config).items()}
    if near is not None:
        old = open_checkpoint(near)
        for name, noise in tensors.items():
            noise *= 0.01
            noise[: old.shape(name)[0]] += old.get(name)
    save_checkpoint(place, config, tensors.items())
    return place


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    return write(root / "base", 1), write(root / "tuned", 2, near=root / "base")


def bytes_of(place: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(place.glob("*.safetensors")))


def test_exact(pair: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    base, tuned = pair
    figures = make_delta(base, tuned, tmp_path / "delta")
    assert figures["share"] < 0.75
    apply_delta(base, tmp_path / "delta", tmp_path / "whole")
    assert bytes_of(tmp_path / "whole") == bytes_of(tuned)
    monkeypatch.setattr(stream, "PIECE", 100)  # pieces that are not the delta's
    for beta in (0.0, 0.3):
        apply_delta(base, tmp_path / "delta", tmp_path / "part", beta=beta)
        merge_checkpoints([tuned, base], [beta, 1 - beta], tmp_path / "merged")
        assert bytes_of(tmp_path / "part") == bytes_of(tmp_path / "merged")
        merged = open_checkpoint(tmp_path / "merged")
        made = Merged(delta_plan(open_delta(tmp_path / "delta"), beta=beta))
        assert all(torch.equal(made.get(name), merged.get(name)) for name in merged.names())


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_any_bits(tmp_path: Path, dtypes: tuple[str, str]) -> None:
    """Unlike numbers, signed zeros, other dtypes, rows that the base has not: still bit for bit."""
    base, tuned = (
        write(tmp_path / "base", 1, dtype=dtypes[0]),
        write(tmp_path / "t", 2, dtype=dtypes[1], rows=75),
    )
    checkpoint = open_checkpoint(tuned)
    tensors = {n: checkpoint.get(n).clone() for n in checkpoint.names()}
    tensors["language_model.norm.weight"][:4] = torch.tensor([-0.0, 0.0, 1e-40, -3e38])
    save_checkpoint(tuned, checkpoint.config, tensors.items())
    make_delta(base, tuned, tmp_path / "delta")
    apply_delta(base, tmp_path / "delta", tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tuned)


@pytest.mark.parametrize("lossy, most", [("int8", 0.02), ("rank 12", 0.9)])
def test_lossy(pair: tuple[Path, Path], tmp_path: Path, lossy: str, most: float) -> None:
    base, tuned = pair
    figures = make_delta(base, tuned, tmp_path / "delta", lossy=lossy)
    below, above = open_checkpoint(base), open_checkpoint(tuned)
    change = wrong = 0.0
    made = Merged(delta_plan(open_delta(tmp_path / "delta"), beta=1.0, dtype="float32"))
    for name in made.names():
        tensor = made.get(name)
        old, new = below.get(name).double(), above.get(name).double()
        if tensor.ndim > 1:
            change += float((new - old).square().sum())
            wrong += float((tensor.double() - new).square().sum())
        else:
            assert torch.equal(tensor, new.float())
    assert figures["relative_error"] == pytest.approx((wrong / change) ** 0.5, rel=1e-3)
    assert figures["relative_error"] <= figures["worst_error"] < most


def test_rank_finds_a_thin_difference(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = pair
    below = open_checkpoint(base)
    draw = torch.Generator().manual_seed(3)
    tensors = {}
    for name in below.names():
        tensor = below.get(name).float()
        if tensor.ndim == 2:
            thin = torch.randn(len(tensor), 2, generator=draw) @ torch.randn(
                2, tensor.shape[1], generator=draw
            )
            tensor = tensor + 0.01 * thin
        tensors[name] = tensor
    save_checkpoint(tmp_path / "tuned", replace(below.config, dtype="float32"), tensors.items())
    figures = make_delta(base, tmp_path / "tuned", tmp_path / "delta", lossy="rank 4")
    index = json.loads((tmp_path / "delta" / "delta.json").read_text())["tensors"]
    forms = {name: entry["pieces"][0]["form"] for name, entry in index.items()}
    assert forms["language_model.layers.0.mlp.up_proj.weight"] == "rank"
    assert forms[naming.EMBEDDING] == "int8" and forms["language_model.norm.weight"] == "exact"
    assert figures["relative_error"] < 0.01


def test_other_base_and_damage_are_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    make_delta(base, tuned, tmp_path / "delta")
    with pytest.raises(SeavlmError, match=r"is not what .* was made from"):
        apply_delta(tuned, tmp_path / "delta", tmp_path / "out")
    raw = bytearray((tmp_path / "delta" / "delta.bin").read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    (tmp_path / "delta" / "delta.bin").write_bytes(raw)
    with pytest.raises(SeavlmError, match="damaged"):
        apply_delta(base, tmp_path / "delta", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    shutil.rmtree(tmp_path / "delta")
    with pytest.raises(SeavlmError, match="not a delta"):
        apply_delta(base, tmp_path / "delta", tmp_path / "out")
    with pytest.raises(SeavlmError, match="lossy"):
        make_delta(base, tuned, tmp_path / "delta", lossy="rank x")


def damaged(delta: Path, change: Callable[[dict], object]) -> None:
    """Changes the index in place."""
    index = json.loads((delta / "delta.json").read_text())
    change(index)
    (delta / "delta.json").write_text(json.dumps(index))


NORM = "language_model.norm.weight"


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda index: index.update(version=1), "version 1"),
        (lambda index: index.pop("version"), "not a delta"),
        (lambda index: index.pop("base"), "does not say which base"),
        (lambda index: index.update(base={"name": "nowhere"}), "cannot be opened: unknown model"),
        (lambda index: index.update(tensors=[]), "damaged"),
        (lambda index: index["tensors"].pop(NORM), "do not fit its config"),
        (lambda index: index["tensors"][NORM].update(shape=[33]), "damaged"),
        (lambda index: index["tensors"][NORM].update(dtype="load"), "damaged"),
        (lambda index: index["tensors"][NORM].update(pieces=[]), "damaged"),
        (lambda index: index["tensors"][NORM]["pieces"][0].update(start=1), "damaged"),
        (lambda index: index["tensors"][NORM]["pieces"][0].update(at=-1), "damaged"),
        (lambda index: index["tensors"][NORM]["pieces"][0].update(at=10**9), "damaged"),
        (lambda index: index["tensors"][NORM]["pieces"][0].update(form="new"), "damaged"),
        (lambda index: index["tensors"][NORM]["pieces"][0]["bytes"].pop(), "damaged"),
    ],
)
def test_a_damaged_index_is_told(pair, tmp_path: Path, change: Callable[[dict], object], told: str) -> None:
    make_delta(*pair, tmp_path / "delta")
    damaged(tmp_path / "delta", change)
    with pytest.raises(SeavlmError, match=told) as caught:
        open_delta(tmp_path / "delta")
    assert caught.value.hint


@pytest.mark.parametrize("lossy", [None, "int8", "rank 4"])
def test_every_byte_counts(pair: tuple[Path, Path], tmp_path: Path, lossy: str | None) -> None:
    """A bit of any blob, also where no code would notice; a file cut off, or gone."""
    make_delta(*pair, tmp_path / "delta", lossy=lossy)
    file = tmp_path / "delta" / "delta.bin"
    raw, entries = file.read_bytes(), json.loads((tmp_path / "delta" / "delta.json").read_text())["tensors"]
    name = "language_model.layers.0.mlp.up_proj.weight"
    for piece in [*entries[name]["pieces"], *([entries[name]["right"]] if "right" in entries[name] else [])]:
        for at in (piece["at"], piece["at"] + piece["bytes"][0] // 2, piece["at"] + sum(piece["bytes"]) - 1):
            file.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
            with pytest.raises(SeavlmError, match="is damaged"):
                open_delta(tmp_path / "delta").get(name)
    file.write_bytes(raw[:-1])
    with pytest.raises(SeavlmError, match="damaged"):
        open_delta(tmp_path / "delta")
    file.unlink()
    with pytest.raises(SeavlmError, match="cannot read"):
        open_delta(tmp_path / "delta")


def test_more_than_a_piece_is_not_unpacked(pair: tuple[Path, Path], tmp_path: Path) -> None:
    make_delta(*pair, tmp_path / "delta")
    bomb = zlib.compress(bytes(10**8))
    place = (tmp_path / "delta" / "delta.bin").stat().st_size
    with (tmp_path / "delta" / "delta.bin").open("ab") as file:
        file.write(bomb * 2)
    sizes = [len(bomb)] * 2
    damaged(tmp_path / "delta", lambda i: i["tensors"][NORM]["pieces"][0].update(at=place, bytes=sizes))
    with pytest.raises(SeavlmError, match="another length"):
        open_delta(tmp_path / "delta").get(NORM)


@pytest.mark.parametrize("lossy", [None, "int8", "rank 4"])
def test_pieces_are_taken_out_once(pair, tmp_path: Path, monkeypatch, lossy: str | None) -> None:
    """By a merge in memory; parts of them, by several threads and in any order, are those of the whole."""
    for module, name in ((deltas, "CHUNK"), (stream, "PIECE")):
        monkeypatch.setattr(module, name, 200)
    make_delta(*pair, tmp_path / "delta", lossy=lossy)
    delta, taken = open_delta(tmp_path / "delta"), []
    decode = delta._decode
    monkeypatch.setattr(delta, "_decode", lambda name, piece: taken.append(piece) or decode(name, piece))
    made = Merged(delta_plan(delta, beta=0.5))
    for name in made.names():
        made.get(name)
    assert len(taken) == sum(len(entry["pieces"]) for entry in delta._entries.values())
    name = "language_model.layers.0.mlp.up_proj.weight"
    whole = delta.get(name).reshape(-1)
    assert whole.dtype == delta.dtype(name) and delta.get(NORM).dtype == delta.dtype(NORM)
    spans = [(i, min(i + 77, len(whole))) for i in range(0, len(whole), 31)] * 3
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda span: delta.read(name, *span), spans))
    assert all(torch.equal(part, whole[slice(*span)]) for part, span in zip(parts, spans, strict=True))
    parts[0].zero_()  # in memory of its own
    assert torch.equal(delta.read(name, 0, len(whole)), whole)
    apply_delta(pair[0], tmp_path / "delta", tmp_path / "out", beta=0.5)
    written = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(made.get(name), written.get(name)) for name in written.names())


def test_the_files_count_not_the_config(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A config may name another dtype than the weights have."""
    shutil.copytree(pair[1], tmp_path / "tuned")
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    make_delta(pair[0], tmp_path / "tuned", tmp_path / "delta")
    apply_delta(pair[0], tmp_path / "delta", tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(pair[1])


def test_what_is_no_share_is_refused(cli, pair: tuple[Path, Path], tmp_path: Path) -> None:
    make_delta(*pair, tmp_path / "delta")
    for beta in (float("nan"), float("inf"), -0.1, 1.1):
        with pytest.raises(SeavlmError, match="beta is"):
            delta_plan(open_delta(tmp_path / "delta"), beta=beta)
    done = cli("delta", "apply", pair[0], tmp_path / "delta", "--beta", "nan", "--out", tmp_path / "out")
    assert done.code == 2 and not (tmp_path / "out").exists()
    with pytest.raises(SeavlmError, match="lossy"):
        make_delta(*pair, tmp_path / "no", lossy="rank ²")


def test_the_folder_of_another_stage_is_left_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    manifest.write_manifest(tmp_path / "run", stage="eval", recipe={}, seed=0, inputs={}, metrics={})
    with pytest.raises(SeavlmError, match="what the stage 'eval' wrote"):
        make_delta(*pair, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["manifest.json"]
    make_delta(*pair, tmp_path / "delta")
    make_delta(*pair, tmp_path / "delta", lossy="int8")  # one delta gives way to another


def test_same_delta_same_bytes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_delta(*pair, tmp_path / name, lossy="rank 4")
    assert (tmp_path / "a" / deltas.DATA).read_bytes() == (tmp_path / "b" / deltas.DATA).read_bytes()


def test_the_commands(cli, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    assert "exact" in cli("delta", "make", base, tuned, "--out", tmp_path / "delta").out
    done = cli("delta", "apply", base, tmp_path / "delta", "--beta", 0.5, "--out", tmp_path / "out")
    assert done.code == 0 and "bfloat16" in done.out
