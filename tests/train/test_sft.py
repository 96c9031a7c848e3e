"""The loop: packing and accumulation change nothing, killed runs go on bit for bit, broken losses stop it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from seavlm import manifest
from seavlm.data.samples import write_samples
from seavlm.errors import SeavlmError
from seavlm.image.decode import decode
from seavlm.image.preprocess import preprocess
from seavlm.model.config import Gemma3Config
from seavlm.model.gemma3 import Gemma3
from seavlm.text.chat import encode_chat
from seavlm.train import batches, sft
from seavlm.train.batches import MicroBatch, Samples, chosen, micro_batches, tokenise, tokenise_cached, usable
from seavlm.train.features import read_pictures, view_pixels
from seavlm.train.memory import training_memory
from seavlm.weights.checkpoint import load_into, open_checkpoint


def open_model(place: Path) -> Gemma3:
    source = open_checkpoint(place)
    model = Gemma3(source.config, dtype=torch.float32)
    load_into(model, source, dtype=torch.float32)
    return model


def curve(out: Path) -> list[tuple[int, float, float]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"], line["grad_norm"]) for line in map(json.loads, lines)]


def plain_loss(model: Gemma3, world, rows: list[int]) -> tuple[torch.Tensor, int]:
    """Each sample alone, straight from its messages: no packing, no caches, torch's own cross-entropy."""
    tokenizer, total, valid = world.tokenizer, torch.zeros(()), 0
    assert model.config.vision is not None
    for index in rows:
        row = world.rows[index]
        encoded = encode_chat(
            tokenizer, row["messages"], mm_tokens_per_image=world.mm_tokens, add_generation_prompt=False
        )
        ids = torch.tensor([encoded.input_ids])
        pixels = [decode(image["bytes"]) for image in row["images"]]
        size = model.config.vision.image_size
        logits = model(ids, pixel_values=torch.from_numpy(preprocess(pixels, size)) if pixels else None)[0]
        learn = torch.tensor(encoded.assistant_mask)[1:]
        total = total + F.cross_entropy(logits[:-1][learn], ids[0, 1:][learn], reduction="sum")
        valid += int(learn.sum())
    return total / valid, valid


def packed_loss(
    model: Gemma3, samples: Samples, rows: list[int], world, *, max_seq_len: int, micro_rows: int
) -> tuple[torch.Tensor, list]:
    pictures = {
        key: image["bytes"]
        for row in world.rows
        for image in row["images"]
        for key in [manifest.sha256_bytes(image["bytes"])]
    }
    passes = list(
        micro_batches(
            samples, [(0, i) for i in rows], max_seq_len=max_seq_len, micro_rows=micro_rows, pad_id=0
        )
    )
    valid = sum(len(micro.targets) for micro in passes)
    device = torch.device("cpu")
    losses = [sft.forward_loss(model, micro, samples, None, pictures, device) / valid for micro in passes]
    return torch.stack(losses).sum(), passes


@pytest.mark.parametrize(("max_seq_len", "micro_rows"), [(160, 1), (160, 3), (400, 8)])
def test_packed_loss_and_gradients_equal_unpacked(world, max_seq_len: int, micro_rows: int) -> None:
    """Samples with no, one and two pictures packed together, in any number of passes: as each one alone."""
    samples = tokenise(world.data, world.tokenizer, world.mm_tokens)
    rows = list(range(15))
    model = open_model(world.base)
    wanted, valid = plain_loss(model, world, rows)
    wanted.backward()
    reference = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    got, passes = packed_loss(model, samples, rows, world, max_seq_len=max_seq_len, micro_rows=micro_rows)
    got.backward()
    assert sum(len(micro.targets) for micro in passes) == valid
    assert max(int(micro.segment_ids.max()) for micro in passes) >= 1  # some row does hold several samples
    if micro_rows == 1:
        assert len(passes) > 1  # several passes, one step: gradient accumulation
    assert got.item() == pytest.approx(wanted.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        scale = reference[name].abs().max()
        assert (parameter.grad - reference[name]).abs().max() <= 1e-5 * scale + 1e-8, name


def test_tokens_kept_by_a_version_with_other_arrays_are_made_anew(
    world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept() -> Samples:
        return tokenise_cached(world.data, world.tokenizer, world.mm_tokens, key="k", folder=tmp_path)

    with monkeypatch.context() as older:  # as before samples had tasks
        older.setattr(batches, "fields", lambda cls: [f for f in fields(cls) if f.name != "tasks"])
        kept()
    assert kept().tasks.tolist() == [row["task"] for row in world.rows]
    assert len(list(tmp_path.glob("tokens-*.npz"))) == 2


def test_only_replies_are_learned(world) -> None:
    samples = tokenise(world.data, world.tokenizer, world.mm_tokens)
    (micro,) = micro_batches(samples, [(0, 3)], max_seq_len=400, micro_rows=1, pad_id=0)
    text = world.tokenizer.decode(micro.targets.tolist(), skip_special=False)
    assert text == world.rows[3]["messages"][1]["content"][0]["text"] + "<end_of_turn>"


def test_order_is_a_new_permutation_each_epoch() -> None:
    stream = [pair for step in range(7) for pair in chosen(10, step, 4, 25, seed=1)]
    assert len(stream) == 25
    assert sorted(i for epoch, i in stream if epoch == 0) == list(range(10))
    first, second = ([i for epoch, i in stream if epoch == e] for e in (0, 1))
    assert sorted(second) == list(range(10)) and first != second
    assert stream != [pair for step in range(7) for pair in chosen(10, step, 4, 25, seed=2)]


def test_learning_rate(world) -> None:
    cfg = world.settings(lr=1.0, warmup_ratio=0.1)
    rates = [sft.learning_rate(cfg, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and rates[99] == pytest.approx(1 / 90)
    cosine = world.settings(lr=1.0, warmup_ratio=0.0, schedule="cosine", min_lr_ratio=0.1)
    assert sft.learning_rate(cosine, 50, 100) == pytest.approx(0.55)


def test_run_learns_and_writes_all(world, tmp_path: Path) -> None:
    cfg = world.settings(steps=25, image_views=3)
    metrics = sft.run(cfg, base=world.base, data=world.data, out=tmp_path, seed=0, progress=False)
    losses = [loss for _, loss, _ in curve(tmp_path)]
    assert losses[-1] < 0.5 * losses[0]
    written = manifest.read_manifest(tmp_path)
    assert written["metrics"]["carbon"]["kg_co2e"] > 0
    assert written["inputs"]["data"] == manifest.sha256_file(world.data)
    assert metrics["samples_seen"] == 25 * 8 and metrics["parameters_trained"] < metrics["parameters"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    # The frozen tower is the base's, the projector and the decoder are not.
    before, after = open_checkpoint(world.base), open_checkpoint(tmp_path / "model")
    for name in before.names():
        assert torch.equal(before.get(name), after.get(name)) == name.startswith("vision_tower."), name
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".pt", ".pth", ".pkl", ".bin.index")]


def test_first_step_is_one_adamw_step_on_the_plain_loss(world, tmp_path: Path) -> None:
    """Accumulation over several passes gives the update of one big batch, written down by hand."""
    cfg = world.settings(steps=1, lr=1e-2, warmup_ratio=0.0, weight_decay=0.1, batch_size=10, micro_rows=1)
    sft.run(cfg, base=world.base, data=world.data, out=tmp_path, seed=5, progress=False)
    model = open_model(world.base)
    rows = [i for _, i in chosen(40, 0, 10, 10, seed=5)]
    loss, _ = plain_loss(model, world, rows)
    trained = {n: p for n, p in model.named_parameters() if not n.startswith("vision_tower.")}
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
    result = open_checkpoint(tmp_path / "model")
    ((_, logged, logged_norm),) = curve(tmp_path)
    assert logged == pytest.approx(loss.item(), rel=1e-5)
    assert logged_norm == pytest.approx(norm.item(), rel=1e-4)
    for name, p in trained.items():
        decay = 0.1 if p.ndim >= 2 else 0.0
        # Adam's first step is g / (|g| + eps): its size hardly depends on g, so compare where g is not noise.
        wanted = p.detach() * (1 - 1e-2 * decay) - 1e-2 * p.grad / (p.grad.abs() + cfg.eps)
        sure = p.grad.abs() > 1e-6
        torch.testing.assert_close(result.get(name)[sure], wanted[sure], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2, "dtype": "bfloat16", "save_dtype": "bfloat16"}])
def test_recomputed_layers_change_nothing_but_memory(world, tmp_path: Path, changes: dict) -> None:
    for recompute in (True, False):
        cfg = world.settings(recompute=recompute, **changes)
        sft.run(cfg, base=world.base, data=world.data, out=tmp_path / str(recompute), seed=0, progress=False)
    assert curve(tmp_path / "True") == curve(tmp_path / "False")
    long = {"rows": 1, "tokens": 512, "images": 0, "dtype": "bfloat16", "lora_rank": 2}
    kept, again = (
        training_memory(Gemma3Config.named("270m"), **long, recompute=r).activations for r in (False, True)
    )
    assert again < kept / 5


def test_cached_features_equal_pixels(world, tmp_path: Path) -> None:
    """The same losses whether the frozen tower runs once a picture or at every step; augmented views too."""
    curves = {}
    for cached in (True, False):
        out = tmp_path / str(cached)
        cfg = world.settings(cache_images=cached, image_views=3)
        sft.run(cfg, base=world.base, data=world.data, out=out, seed=0, progress=False)
        curves[cached] = [loss for _, loss, _ in curve(out)]
    np.testing.assert_allclose(curves[True], curves[False], rtol=2e-5)
    one_view = world.settings(image_views=1)
    sft.run(one_view, base=world.base, data=world.data, out=tmp_path / "one", seed=0, progress=False)
    assert not np.allclose([loss for _, loss, _ in curve(tmp_path / "one")], curves[True], rtol=1e-3)


def test_another_picture_is_blended_in_by_task(world, tmp_path: Path) -> None:
    """The same with cached features as by hand; nothing for tasks that are not listed."""
    samples = tokenise(world.data, world.tokenizer, world.mm_tokens)
    batch = [(0, i) for i in range(8)]

    def passes(blend: dict[str, float]) -> list[MicroBatch]:
        return list(
            micro_batches(samples, batch, max_seq_len=160, micro_rows=4, pad_id=0, blend=blend, seed=1)
        )

    for plain, blended in zip(passes({"flag": 1.0}), passes({"name": 0.5}), strict=True):
        assert not plain.shares.any()
        assert (blended.shares > 0).all() and (blended.shares <= 0.5).all()
        pictures = dict(read_pictures(world.data, samples.image_keys.tolist()))
        model = open_model(world.base)
        losses = [
            sft.forward_loss(model, m, samples, None, pictures, torch.device("cpu")) for m in (plain, blended)
        ]
        key = samples.image_keys
        mixed = torch.stack(
            [
                (1 - w) * view_pixels(pictures[key[i]], 0, 28) + w * view_pixels(pictures[key[j]], 0, 28)
                for i, j, w in zip(blended.images, blended.others, blended.shares.tolist(), strict=True)
            ]
        )
        logits = model(
            blended.input_ids,
            pixel_values=mixed,
            position_ids=blended.position_ids,
            segment_ids=blended.segment_ids,
            logits_mask=blended.logits_mask,
        )
        by_hand = F.cross_entropy(logits, blended.targets, reduction="sum")
        assert torch.allclose(losses[1], by_hand, rtol=1e-5) and not torch.allclose(losses[0], losses[1])
    cfg = {"steps": 2, "blend": {"name": 1.0}}
    sft.run(world.settings(**cfg), base=world.base, data=world.data, out=tmp_path, seed=0, progress=False)


def test_shared_image_cache_serves_the_next_run(
    world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = world.settings(steps=2, image_cache_dir=str(tmp_path / "shared"))
    sft.run(cfg, base=world.base, data=world.data, out=tmp_path / "a", seed=0, progress=False)

    def towerless(self: Gemma3, pixel_values: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the tower ran again")

    monkeypatch.setattr(Gemma3, "pool_images", towerless)
    sft.run(cfg, base=world.base, data=world.data, out=tmp_path / "b", seed=0, progress=False)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


def test_everything_trains_when_nothing_is_frozen(world, tmp_path: Path) -> None:
    cfg = world.settings(steps=2, freeze=[])
    metrics = sft.run(cfg, base=world.base, data=world.data, out=tmp_path, seed=0, progress=False)
    assert metrics["parameters_trained"] == metrics["parameters"]
    before, after = open_checkpoint(world.base), open_checkpoint(tmp_path / "model")
    assert all(not torch.equal(before.get(name), after.get(name)) for name in before.names())


def test_bfloat16_stays_near_float32(world, tmp_path: Path) -> None:
    curves = []
    for dtype in ("float32", "bfloat16"):
        cfg = world.settings(steps=8, dtype=dtype)
        sft.run(cfg, base=world.base, data=world.data, out=tmp_path / dtype, seed=0, progress=False)
        curves.append([loss for _, loss, _ in curve(tmp_path / dtype)])
    np.testing.assert_allclose(curves[1], curves[0], rtol=0.03)
    assert curves[0] != curves[1]


RUN = """
import json, sys
from pathlib import Path
from seavlm.recipe import Train
from seavlm.train import batches, sft
base, data, out, cfg = sys.argv[1:]
sft.run(Train(**json.loads(cfg)), base=Path(base), data=Path(data), out=Path(out), seed=7, progress=False)
"""


@pytest.mark.parametrize("given", [{}, {"optimizer": "muon"}, {"lora_rank": 3}], ids=str)
def test_killed_twice_equals_uninterrupted(world, tmp_path: Path, given: dict[str, Any]) -> None:
    """SIGKILL in the middle of the run, twice; in the end the curve and the weights are the same bits."""
    cfg = world.settings(steps=60, save_every=4, keep_last=2, image_views=2, **given)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    sft.run(cfg, base=world.base, data=world.data, out=whole, seed=7, progress=False)

    command = [
        sys.executable,
        "-c",
        RUN,
        str(world.base),
        str(world.data),
        str(killed),
        cfg.model_dump_json(),
    ]
    log = killed / "metrics.jsonl"
    reached = []
    for at_least in (9, 29):
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text().count("\n") >= at_least):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        reached.append(log.read_text().count("\n"))
        assert at_least <= reached[-1] < 60  # in the middle
    assert not (killed / "manifest.json").exists() and not (killed / "model").exists()
    subprocess.run(command, check=True)

    assert curve(killed) == curve(whole) and len(curve(whole)) == 60
    a, b = open_checkpoint(whole / "model"), open_checkpoint(killed / "model")
    assert all(torch.equal(a.get(name), b.get(name)) for name in a.names())
    (folder,) = (killed / "checkpoints").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000056", "step-00000060"]


def test_other_settings_do_not_resume(world, tmp_path: Path) -> None:
    sft.run(world.settings(steps=4), base=world.base, data=world.data, out=tmp_path, seed=0, progress=False)
    first = curve(tmp_path)
    sft.run(world.settings(steps=4), base=world.base, data=world.data, out=tmp_path, seed=1, progress=False)
    assert len(curve(tmp_path)) == 4 and curve(tmp_path) != first
    shutil.rmtree(tmp_path / "model")
    sft.run(world.settings(steps=4), base=world.base, data=world.data, out=tmp_path, seed=0, progress=False)
    assert (tmp_path / "model" / "config.json").exists()  # the finished run's checkpoint gives its model back


def test_non_finite_loss_names_the_samples(world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = sft.forward_loss, []

    def broken(model, micro, *rest):
        loss = real(model, micro, *rest)
        if "sample-013" in micro.sample_ids:
            seen.append(micro.sample_ids)
            return loss * float("nan")
        return loss

    monkeypatch.setattr(sft, "forward_loss", broken)
    cfg = world.settings(steps=12, save_every=1, micro_rows=1)
    with pytest.raises(SeavlmError) as error:
        sft.run(cfg, base=world.base, data=world.data, out=tmp_path, seed=0, progress=False)
    (ids,) = seen
    assert all(name in str(error.value) for name in ids) and len(ids) < 8  # that pass, not the whole step
    assert "\n" not in str(error.value)
    assert not (tmp_path / "manifest.json").exists() and not (tmp_path / "model").exists()
    broken_step = len(curve(tmp_path)) + 1
    assert f"step {broken_step}" in str(error.value)
    monkeypatch.setattr(sft, "forward_loss", real)  # and the last checkpoint is good to go on from
    sft.run(cfg, base=world.base, data=world.data, out=tmp_path, seed=0, progress=False)
    assert len(curve(tmp_path)) == 12


def test_data_that_cannot_be_used(world, tmp_path: Path) -> None:
    def run(data: Path, **changes) -> None:
        sft.run(
            world.settings(**changes),
            base=world.base,
            data=data,
            out=tmp_path / "out",
            seed=0,
            progress=False,
        )

    with pytest.raises(SeavlmError, match="no training samples at"):
        run(tmp_path / "nothing.parquet")
    with pytest.raises(SeavlmError, match=r"none of the 40 samples.*40 are longer"):
        run(world.data, max_seq_len=8)
    with pytest.raises(SeavlmError, match="vision_tower"):
        run(world.data, freeze=["vison_tower"])
    with pytest.raises(SeavlmError, match="nothing to train"):
        run(world.data, freeze=["vision_tower", "multi_modal_projector", "language_model"])
    with pytest.raises(SeavlmError, match="region"):
        run(world.data, region="atlantis", watts=None)
    row = {**world.rows[0], "images": []}
    write_samples(tmp_path / "odd.parquet", [row])
    with pytest.raises(SeavlmError, match="sample-000 has 0 images for 1 image part"):
        run(tmp_path / "odd.parquet")
    assert not (tmp_path / "out" / "model").exists()


def test_long_samples_are_left_out_and_counted(world) -> None:
    samples = tokenise(world.data, world.tokenizer, world.mm_tokens)
    limit = int(np.median(samples.lengths()))
    keep, left_out = usable(samples, limit)
    assert 0 < len(keep) < 40
    assert left_out == {"longer than max_seq_len": 40 - len(keep)}
    assert samples.lengths()[keep].max() <= limit
