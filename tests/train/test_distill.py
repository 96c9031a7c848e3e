"""Distillation: targets that say what, not who drew it; views stay pictures; a stopped run goes on."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from seavlm.data.drawings import Drawings
from seavlm.data.pictures import HELD_OUT, load_pictures
from seavlm.model.config import VisionConfig
from seavlm.recipe import Distill
from seavlm.train import distill as room

TINY = VisionConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=112,
    patch_size=28,
)


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    """Twenty fruits and mammals by five hands, white made transparent."""
    pictures = load_pictures()
    concepts = pictures.select(["food-fruit"])[:10] + pictures.select(["animal-mammal"])[:10]
    rgba, family, key = [], [], []
    for name in pictures.families:
        if name == HELD_OUT:
            continue
        for concept in concepts:
            image = np.array(Image.open(io.BytesIO(pictures.image_bytes(concept, name))).convert("RGBA"))
            image[..., 3] = np.where(image[..., :3].min(axis=2) > 250, 0, 255)
            rgba.append(image)
            family.append(name)
            key.append(concept.key)
    return Drawings(np.stack(rgba), family, key)


@pytest.fixture(scope="module")
def features(drawings: Drawings) -> torch.Tensor:
    return room.teacher_features(drawings, Console(quiet=True))


def test_targets_say_what_is_drawn_not_by_whom(drawings: Drawings, features: torch.Tensor) -> None:
    keys = list(dict.fromkeys(drawings.key))
    label = torch.tensor([keys.index(key) for key in drawings.key])
    # The prototypes come from four hands; the fifth hand's drawings must find theirs.
    unseen = torch.tensor([name == "emojione" for name in drawings.family])
    target, prototypes = room.targets(features, torch.where(unseen, -1, label), ["x"] * len(label), 16)
    assert torch.allclose(target.norm(dim=1), torch.ones(len(target)), atol=1e-4)
    right = (target[unseen] @ prototypes.T).argmax(dim=1) == label[unseen]
    assert right.float().mean() > 0.7  # chance: 0.05


def test_a_view_is_another_picture_of_the_same_size(drawings: Drawings) -> None:
    torch.manual_seed(0)
    rgba = torch.from_numpy(drawings.rgba[:8])
    first, second = room.augment(rgba, 112), room.augment(rgba, 112)
    assert first.shape == (8, 3, 112, 112)
    assert first.min() >= -1 and first.max() <= 1 and first.isfinite().all()
    assert (first - second).abs().mean() > 0.05
    torch.manual_seed(0)
    assert torch.equal(first, room.augment(rgba, 112))


def test_the_student_learns_and_a_stopped_run_goes_on(
    drawings: Drawings, features: torch.Tensor, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "teacher_features", lambda *_: features)
    keys = list(dict.fromkeys(drawings.key))
    cfg = Distill(steps=60, batch_size=16, patches_kept=8, target_size=16, save_every=30)

    class Killed(Exception):
        pass

    real, count = room.student_loss, 0

    def dies_at_40(*args):
        nonlocal count
        count += 1
        if count == 40:
            raise Killed
        return real(*args)

    monkeypatch.setattr(room, "student_loss", dies_at_40)
    with pytest.raises(Killed):
        room.distill(cfg, TINY, drawings, keys, [], tmp_path, seed=0, progress=False)
    losses = []
    monkeypatch.setattr(room, "student_loss", lambda *args: losses.append(real(*args)) or losses[-1])
    tower, _ = room.distill(cfg, TINY, drawings, keys, [], tmp_path, seed=0, progress=False)
    assert len(losses) == 30  # from the checkpoint at step 30, not from the start
    assert all(p.isfinite().all() for p in tower.parameters())

    # Pictures of one concept are seen more alike than pictures of two.
    with torch.no_grad():
        seen = room.see(tower, room.on_white(torch.from_numpy(drawings.rgba), 112) * 2 - 1, 16)
    seen = torch.nn.functional.normalize(seen - seen.mean(dim=0), dim=1)
    same = torch.tensor([[a == b for a in drawings.key] for b in drawings.key]) & ~torch.eye(len(seen)).bool()
    cosines = seen @ seen.T
    assert cosines[same].mean() > cosines[~same].mean() + 0.1
