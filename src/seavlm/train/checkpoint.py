"""Training checkpoints: safetensors and JSON, nothing pickled, never half-written.

    checkpoints/step-00000120/
        model.safetensors        the trained parameters, fp32 (frozen ones are the base's)
        optimizer.safetensors    "<parameter>|exp_avg", "<parameter>|step" and what else the optimizers keep
        state.json               step, the run's fingerprint, seconds and joules so far, torch's random state

A checkpoint is written beside its place, flushed to the disk and renamed: a directory named step-* is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seavlm.errors import SeavlmError
from seavlm.train.optim import Moments


def write_atomic(path: Path, text: str) -> None:
    """Replaces `path` with `text` in one step: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save(
    folder: Path,
    *,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    moments: Moments,
    state: dict[str, Any],
    keep_last: int,
) -> Path:
    """Writes `folder`/step-<step>, then removes all but the `keep_last` newest. Returns the new directory."""
    place = folder / f"step-{step:08d}"
    temporary = folder / f"tmp-{os.getpid()}-{place.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)

    save_file(
        {name: p.detach().contiguous() for name, p in parameters.items()}, temporary / "model.safetensors"
    )
    remembered: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in moments[parameter].items():
            remembered[f"{name}|{key}"] = value.detach().contiguous()
    save_file(remembered, temporary / "optimizer.safetensors")
    random_state = bytes(torch.get_rng_state().tolist()).hex()
    record = {**state, "step": step, "torch_rng": random_state}
    (temporary / "state.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    for file in temporary.iterdir():
        _flush(file)
    if place.exists():  # the same step of an earlier attempt
        shutil.rmtree(place)
    os.replace(temporary, place)
    _flush(folder)
    for old in steps(folder)[:-keep_last] if keep_last > 0 else []:
        shutil.rmtree(folder / f"step-{old:08d}", ignore_errors=True)
    return place


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, ascending. Leftovers of killed writers are not among them."""
    return sorted(
        int(p.name.removeprefix("step-")) for p in folder.glob("step-*") if (p / "state.json").exists()
    )


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None. Removes what killed writers left behind."""
    for leftover in folder.glob("tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    found = steps(folder)
    return folder / f"step-{found[-1]:08d}" if found else None


def load(place: Path, *, parameters: Mapping[str, nn.Parameter], moments: Moments) -> dict[str, Any]:
    """Puts a checkpoint's parameters, moments and random state back, bit for bit; returns its state.

    Raises SeavlmError when a file is broken or its tensors are not those of `parameters`.
    """
    remedy = f"Remove {place} to go on from the checkpoint before it."
    try:
        record = json.loads((place / "state.json").read_text(encoding="utf-8"))
        weights = load_file(place / "model.safetensors")
        remembered = load_file(place / "optimizer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise SeavlmError(f"checkpoint {place} cannot be read: {error}", hint=remedy) from error
    if weights.keys() != parameters.keys():
        differing = sorted(weights.keys() ^ parameters.keys())
        raise SeavlmError(
            f"checkpoint {place} holds other parameters than this run trains ({', '.join(differing[:5])})",
            hint=remedy,
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if weights[name].shape != parameter.shape:
                shapes = f"{tuple(weights[name].shape)} and {tuple(parameter.shape)}"
                raise SeavlmError(f"checkpoint {place}: {name} has the shapes {shapes}", hint=remedy)
            parameter.copy_(weights[name])
    for name, parameter in parameters.items():
        entries = {
            key.rsplit("|", 1)[1]: value for key, value in remembered.items() if key.rsplit("|", 1)[0] == name
        }
        if entries:
            moments[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in entries.items()
            }
    random_state = bytes.fromhex(record.pop("torch_rng"))
    torch.set_rng_state(torch.frombuffer(bytearray(random_state), dtype=torch.uint8))
    return record


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot flush a directory
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
