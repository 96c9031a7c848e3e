"""Drawings to learn to see from: an icon becomes the picture it says; the held-out art is not among them."""

from __future__ import annotations

import numpy as np
import pytest

from seavlm.data.drawings import SIZE, _render, _svg, load_drawings
from seavlm.data.pictures import HELD_OUT, load_pictures

ICONS = {
    "width": 10,
    "height": 10,
    "icons": {"square": {"body": '<path fill="#f00" d="M20 20h5v10h-5z"/>', "left": 20, "top": 20}},
    "aliases": {"box": {"parent": "square"}},
}


def test_an_icon_is_rendered_inside_its_own_box_and_keeps_transparency() -> None:
    for name in ("square", "box"):
        rgba = _render(_svg(ICONS, name))
        assert rgba.shape == (SIZE, SIZE, 4) and rgba.dtype == np.uint8
        left, right = rgba[:, : SIZE // 2 - 4], rgba[:, SIZE // 2 + 4 :]
        assert (left == (255, 0, 0, 255)).all() and not right[..., 3].any()


@pytest.mark.slow
def test_the_real_packages_give_every_trained_family_and_no_held_out_drawing() -> None:
    drawings = load_drawings()
    families = {"twemoji", "openmoji", "noto", "noto-v1", "emojione", "emojione-v1", "fxemoji"}
    assert set(drawings.family) == families and HELD_OUT not in families
    assert len(drawings.key) == len(drawings.family) == len(drawings.rgba) > 11_000
    named = {concept.key for concept in load_pictures().concepts}
    assert named <= set(drawings.key)
    flags = [key for family, key in zip(drawings.family, drawings.key, strict=True) if family == "twemoji"]
    assert not any(key.startswith(("1f1e", "1f1f")) for key in flags)  # twemoji's flags are held out
