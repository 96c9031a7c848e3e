"""Drawings to learn to see from: every emoji of seven art families, with transparency, most of them unnamed.

The built-in picture set holds what all six families draw and all eleven languages name. A vision tower can
learn from the rest too: flags, people, symbols, and two older families. The held-out family is not there.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from seavlm.data.build_pictures import PACKAGES, Package, key_of, read_json, unpacked
from seavlm.data.pictures import HELD_OUT, SIZE
from seavlm.errors import SeavlmError

ICON_SETS = {
    "noto-v1": PACKAGES["noto-v1"],
    "emojione": PACKAGES["emojione"],
    "emojione-v1": Package(
        "@iconify-json/emojione-v1", "1.2.3",
        "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
        "EmojiOne (version 1)", "CC-BY-SA-4.0", "https://github.com/joypixels/emojione-legacy",
        "drawings for distillation",
    ),
    "fxemoji": Package(
        "@iconify-json/fxemoji", "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Mozilla", "Apache-2.0", "https://github.com/mozilla/fxemoji",
        "drawings for distillation",
    ),
}  # fmt: skip
_FLAG = re.compile("1f1[ef]")  # two regional indicator letters
_SKIN_TONES = re.compile("1f3f[b-f]|skin|tone")


@dataclass(frozen=True)
class Drawings:
    """N drawings: `rgba` uint8 [N, SIZE, SIZE, 4]; `family` and `key` (a concept's, or its own) of each."""

    rgba: np.ndarray
    family: list[str]
    key: list[str]


def load_drawings(packages: Path | None = None) -> Drawings:
    """Render the drawings from their npm packages: those in the folder `packages`, else fetched by name.

    Some 11,400 drawings, 750 MB. Skin-tone variants are left out.
    """
    sources: dict[tuple[str, str], str | Path] = {}
    with tempfile.TemporaryDirectory(prefix="seavlm-npm-") as cache:
        for (family, key), source in _sources(packages, Path(cache)):
            if not _SKIN_TONES.search(key):
                sources.setdefault((family, key), source)
        rgba = np.stack([_render(source) for source in sources.values()])
    assert HELD_OUT not in {family for family, _ in sources}
    return Drawings(rgba, [family for family, _ in sources], [key for _, key in sources])


def _sources(packages: Path | None, cache: Path) -> Iterator[tuple[tuple[str, str], str | Path]]:
    """((family, key), SVG text or file)."""
    for path in sorted(unpacked(PACKAGES["twemoji"], packages, cache).glob("*.svg")):
        if not _FLAG.match(path.stem):  # held out, as fluent-3d is for the concepts
            yield ("twemoji", key_of(path.stem)), path
    for path in sorted((unpacked(PACKAGES["openmoji"], packages, cache) / "color" / "svg").glob("*.svg")):
        yield ("openmoji", key_of(path.stem)), path
    # Iconify names its drawings; noto's table says which code points a name stands for.
    noto = unpacked(PACKAGES["noto"], packages, cache)
    icons = read_json(noto / "icons.json")
    keys: dict[str, str] = {}
    for code_points, name in read_json(noto / "chars.json").items():
        keys.setdefault(name, key_of(code_points))
        yield ("noto", key_of(code_points)), _svg(icons, name)
    for family, package in ICON_SETS.items():
        icons = read_json(unpacked(package, packages, cache) / "icons.json")
        for name in [*icons["icons"], *icons.get("aliases", {})]:
            yield (family, keys.get(name, f"{family}/{name}")), _svg(icons, name)


def _svg(icons: dict, name: str) -> str:
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>'


def _render(source: str | Path) -> np.ndarray:
    """uint8 [SIZE, SIZE, 4]"""
    try:
        import resvg_py
    except ImportError as error:
        raise SeavlmError("resvg-py is not installed", hint="pip install resvg-py") from error
    svg = source if isinstance(source, str) else source.read_text(encoding="utf-8")
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
