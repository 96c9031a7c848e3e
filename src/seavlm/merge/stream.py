"""Merges checkpoints on disk, one tensor in memory at a time: theta = beta * regional + (1 - beta) * global.

No model is built and nothing is dropped: every name and shape of every parent must match, or the list of
those that do not is the error. Equal inputs give equal bits.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seavlm import manifest
from seavlm.errors import SeavlmError
from seavlm.merge.methods import check_weights, linear_fp32, widest
from seavlm.weights.checkpoint import Checkpoint, open_checkpoint, save_checkpoint

PIECE = 1 << 24  # numbers summed at a time


def merge_checkpoints(
    paths: Sequence[str | Path],
    weights: Sequence[float],
    out: str | Path,
    dtype: str | torch.dtype | None = None,
) -> dict[str, Any]:
    """Writes the weighted mean of the checkpoints `paths` to the directory `out`; returns its figures.

    weights: one for each parent, summing to 1; for [regional, global] give [beta, 1 - beta]. dtype: of the
    output ("float32", "bfloat16"); None takes the widest of the parents' dtypes. Tokenizer and
    generation files come from the last parent (the global one). `out` appears whole or not at all, with
    manifest.json inside. Figures: tensors, parameters, the mean and largest absolute rounding of the fp32
    sums to the output's dtype, and the mean absolute distance of the first parent from the last, to read the
    rounding against. Raises SeavlmError for configs, tokenizers, names or shapes that differ, and for NaN
    (with the tensor's name).
    """
    began = time.monotonic()
    places, out = [Path(path) for path in paths], Path(out)
    check_weights(weights, len(places))
    target = _dtype(dtype)
    parents = [open_checkpoint(place) for place in places]
    _same_config(places, parents)
    tokenizer_checked = _same_tokenizer(places)
    names = _same_tensors(places, parents)

    stored = target or widest([parent.dtype(name) for parent in parents for name in names])
    config = replace(parents[-1].config, dtype=str(stored).removeprefix("torch."))
    figures = {"elements": 0, "rounding_sum": 0.0, "rounding_max": 0.0, "distance_sum": 0.0}

    def merged() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            tensors = [parent.get(name) for parent in parents]
            for place, tensor in zip(places, tensors, strict=True):
                _no_nan(place, name, tensor)
            result = torch.empty(tensors[0].shape, dtype=stored)
            # The 27B's embedding has 1.4e9 numbers: the fp32 sums of a piece at a time are enough to hold.
            flat = zip(*(t.flatten().split(PIECE) for t in [result, *tensors]), strict=True)
            for piece, *parts in flat:
                total = linear_fp32(parts, weights)
                piece.copy_(total)  # the one rounding
                rounding = (piece.float() - total).abs()
                figures["elements"] += total.numel()
                figures["rounding_sum"] += float(rounding.sum(dtype=torch.float64))
                figures["rounding_max"] = max(figures["rounding_max"], float(rounding.max()))
                distance = (parts[0].float() - parts[-1].float()).abs()
                figures["distance_sum"] += float(distance.sum(dtype=torch.float64))
            if not bool(torch.isfinite(result).all()):
                raise SeavlmError(
                    f"{name}: the merged tensor is not finite in {config.dtype}",
                    hint="Merge to float32, or look at the parents.",
                )
            yield name, result

    partial = out.with_name(f"{out.name}.tmp-merge-{os.getpid()}")
    try:
        save_checkpoint(partial, config, merged(), copy_from=_tokenizer_home(places))
        elements = max(1, int(figures["elements"]))
        report = {
            "tensors": len(names),
            "parameters": int(figures["elements"]),
            "dtype": config.dtype,
            "rounding_mean": figures["rounding_sum"] / elements,
            "rounding_max": figures["rounding_max"],
            "parents_distance_mean": figures["distance_sum"] / elements,
            "tokenizer_checked": tokenizer_checked,
        }
        manifest.write_manifest(
            partial,
            stage="merge",
            recipe={
                "method": "linear",
                "parents": [str(place) for place in places],
                "weights": [float(w) for w in weights],
                "dtype": config.dtype,
            },
            seed=0,  # nothing is drawn
            inputs={f"parent_{i}": manifest.sha256_tree(place) for i, place in enumerate(places)},
            metrics=report,
            duration_s=round(time.monotonic() - began, 3),
        )
        _replace_directory(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise SeavlmError(f"cannot merge to dtype {dtype!r}", hint=f"Use {' or '.join(known)}.")
    return known[dtype]


def _same_config(places: list[Path], parents: list[Checkpoint]) -> None:
    """Equal shapes and ids; the dtype may differ."""
    first = _flat(parents[0].config.to_dict())
    for place, parent in zip(places[1:], parents[1:], strict=True):
        other = _flat(parent.config.to_dict())
        differing = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
        if differing:
            shown = ", ".join(f"{key} ({first.get(key)} and {other.get(key)})" for key in differing[:5])
            raise SeavlmError(
                f"the configs of {places[0]} and {place} differ: {shown}",
                hint="Only models of one architecture can be merged.",
            )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {} if prefix.endswith(("dtype.", "transformers_version.")) else {prefix[:-1]: value}
    return {k: v for key, part in value.items() for k, v in _flat(part, f"{prefix}{key}.").items()}


def _same_tokenizer(places: list[Path]) -> bool:
    """Equal vocabularies and special ids, read from tokenizer.json. False when fewer than two parents have
    one.
    """
    homes = [place for place in places if (place / "tokenizer.json").is_file()]
    if len(homes) < 2:
        return False
    first = _vocabulary(homes[0])
    for place in homes[1:]:
        other = _vocabulary(place)
        if len(first) != len(other):
            raise SeavlmError(
                f"the tokenizers of {homes[0]} and {place} have {len(first)} and {len(other)} tokens",
                hint="Row i of the embedding must mean the same token in each parent.",
            )
        differing = sorted(
            token for token in first.keys() | other.keys() if first.get(token) != other.get(token)
        )
        if differing:
            shown = ", ".join(f"{t!r} ({first.get(t)} and {other.get(t)})" for t in differing[:3])
            raise SeavlmError(
                f"the tokenizers of {homes[0]} and {place} disagree on {len(differing)} tokens: {shown}",
                hint="Row i of the embedding must mean the same token in each parent.",
            )
    return True


def _vocabulary(place: Path) -> dict[str, int]:
    try:
        content = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        return {**content["model"]["vocab"], **added}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SeavlmError(
            f"{place}/tokenizer.json cannot be read: {error!r}", hint="Copy it again."
        ) from error


def _tokenizer_home(places: list[Path]) -> Path | None:
    """Where the tokenizer is copied from: the last parent that has one (the global one comes last)."""
    homes = [place for place in places if (place / "tokenizer.json").is_file()]
    directories = [place for place in places if place.is_dir()]
    found = homes or directories
    return found[-1] if found else None


def _same_tensors(places: list[Path], parents: list[Checkpoint]) -> list[str]:
    """The tensors' names; SeavlmError with the whole list when a name or a shape is not in every parent."""
    problems = []
    held = [set(parent.names()) for parent in parents]
    for name in sorted(set().union(*held)):
        absent = [str(place) for place, names in zip(places, held, strict=True) if name not in names]
        if absent:
            problems.append(f"{name} (not in {', '.join(absent)})")
            continue
        shapes = [tuple(parent.shape(name)) for parent in parents]
        if len(set(shapes)) > 1:
            problems.append(f"{name} (shapes {' and '.join(map(str, shapes))})")
    if problems:
        raise SeavlmError(
            f"{len(problems)} tensors do not match between the parents: {'; '.join(problems)}",
            hint="Every tensor must be in each parent with one shape.",
        )
    return list(parents[-1].names())


def _no_nan(place: Path, name: str, tensor: Tensor) -> None:
    bad = int(torch.isnan(tensor).sum())
    if bad:
        raise SeavlmError(
            f"{name} in {place} holds {bad} NaN of {tensor.numel()} numbers",
            hint="That checkpoint is broken.",
        )


def _replace_directory(new: Path, place: Path) -> None:
    """Puts directory `new` at `place`; what was there goes only when the new one is in its place."""
    old = place.with_name(f"{place.name}.old-{os.getpid()}")
    if place.exists():
        os.replace(place, old)
    os.replace(new, place)
    shutil.rmtree(old, ignore_errors=True)
