"""The cache of tower features: exact, shared, and whole after a kill at any byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seavlm.errors import SeavlmError
from seavlm.train.features import Features

SHAPE = (4, 6)
PICTURES = {f"{i:064x}": bytes([i]) for i in range(10)}


def value(picture: bytes, view: int) -> torch.Tensor:
    return torch.full(SHAPE, picture[0] + view / 8)


def fill(features: Features, wanted: list[tuple[str, int]], batch: int = 3) -> int:
    return features.fill(
        wanted,
        lambda keys: ((key, PICTURES[key]) for key in PICTURES if key in set(keys)),
        lambda pairs: torch.stack([value(*pair) for pair in pairs]),
        batch=batch,
    )


ALL = [(key, view) for key in PICTURES for view in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    features = Features(tmp_path, SHAPE, dtype)
    assert fill(features, ALL) == 20
    assert fill(features, ALL) == 0
    got = features.get(ALL[::-3])
    wanted = torch.stack([value(PICTURES[key], view) for key, view in ALL[::-3]]).to(dtype)
    assert got.dtype == dtype and torch.equal(got, wanted)
    again = Features(tmp_path, SHAPE, dtype)
    assert len(again) == 20 and torch.equal(again.get(ALL), features.get(ALL))


def test_a_later_run_adds_only_what_is_missing(tmp_path: Path) -> None:
    fill(Features(tmp_path, SHAPE, torch.float32), ALL[:5])
    assert fill(Features(tmp_path, SHAPE, torch.float32), ALL) == 15


@pytest.mark.parametrize("cut_data", [0, 1, 100, 96 * 3])
@pytest.mark.parametrize("cut_index", [0, 1, 30, 66, 67])
def test_killed_at_any_byte(tmp_path: Path, cut_data: int, cut_index: int) -> None:
    fill(Features(tmp_path, SHAPE, torch.float32), ALL[:6])
    for name, cut in (("pooled.bin", cut_data), ("index.txt", cut_index)):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])
    features = Features(tmp_path, SHAPE, torch.float32)
    fill(features, ALL)
    wanted = torch.stack([value(PICTURES[key], view) for key, view in ALL])
    assert torch.equal(features.get(ALL), wanted)


def test_a_picture_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(SeavlmError, match="1 pictures"):
        fill(Features(tmp_path, SHAPE, torch.float32), [*ALL, ("f" * 64, 0)])
