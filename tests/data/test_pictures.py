"""The shipped picture set: complete, clean, honest about its held-out family, licensed."""

import io
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seavlm.data.build_pictures import PACKAGES, SAME_DRAWING
from seavlm.data.pictures import BUILTIN, FAMILIES, FLAG_FAMILIES, HELD_OUT, SIZE, Pictures, load_pictures
from seavlm.errors import SeavlmError
from seavlm.text.language import LANGUAGES, script_of
from seavlm.text.normalize import normalize


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return load_pictures()


@pytest.fixture(scope="module")
def drawn(pictures: Pictures) -> dict[str, np.ndarray]:
    """family -> float32 [concepts, 16 * 16 * 3] in 0..1: every drawing decoded and made small."""
    return {
        family: np.stack([_thumbnail(pictures.image_bytes(c, family)) for c in pictures.concepts])
        for family in FAMILIES
    }


def _thumbnail(webp: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(webp)) as image:
        assert (image.format, image.mode, image.size) == ("WEBP", "RGB", (SIZE, SIZE))
        small = image.resize((16, 16), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).ravel() / 255


def test_counts(pictures: Pictures) -> None:
    assert len(pictures.concepts) == len({c.key for c in pictures.concepts}) == 1093
    assert len(pictures.flags) == len({f.code for f in pictures.flags}) == 255
    counts = json.loads((BUILTIN / "build.json").read_text())["counts"]
    left_out = sum(count for name, count in counts.items() if name.startswith("left out"))
    assert counts["drawn by all six"] - left_out == counts["concepts"] == len(pictures.concepts)


def test_every_drawing_is_there_and_shows_something(drawn: dict[str, np.ndarray]) -> None:
    for family, thumbnails in drawn.items():
        assert thumbnails.shape == (1093, 16 * 16 * 3)
        assert thumbnails.std(axis=1).min() > 0.005, family  # not blank, not even the white square
        corner = thumbnails[:, :3].min(axis=1)
        assert np.mean(corner > 0.95) > 0.6, family  # on white


def test_no_held_out_drawing_was_trained_on(drawn: dict[str, np.ndarray]) -> None:
    for family in FAMILIES:
        if family != HELD_OUT:
            distance = np.sqrt(((drawn[family] - drawn[HELD_OUT]) ** 2).mean(axis=1))
            assert distance.min() > 3 * SAME_DRAWING, family


def test_no_family_draws_two_concepts_alike(drawn: dict[str, np.ndarray]) -> None:
    for family, thumbnails in drawn.items():
        square = (thumbnails**2).sum(axis=1)
        distance = (square[:, None] + square[None] - 2 * thumbnails @ thumbnails.T) / thumbnails.shape[1]
        np.fill_diagonal(distance, 1)
        assert np.sqrt(distance.clip(0).min()) > 0.8 * SAME_DRAWING, family  # lossy WebP moves it a little


def test_names_are_clean_and_their_own(pictures: Pictures) -> None:
    for code, language in LANGUAGES.items():
        for things in (pictures.concepts, pictures.flags):
            names = [thing.names[code] for thing in things]
            assert len(set(names)) == len(names), code
            assert all(normalize(name) == name == name.strip() != "" for name in names)
            invisible = [n for n in names if any(unicodedata.category(x) in ("Cc", "Cf", "Co") for x in n)]
            assert invisible == []
            assert np.mean([script_of(name) == language.script for name in names]) > 0.98, code


def test_names_known_by_heart(pictures: Pictures) -> None:
    elephant = pictures["1f418"]
    assert (elephant.group, elephant.subgroup) == ("animals-nature", "animal-mammal")
    assert elephant.names == {
        "my": "ဆင်", "en": "elephant", "id": "gajah", "km": "ដំរី", "lo": "ຊ້າງ", "ms": "gajah", "zh": "大象",
        "tl": "elepante", "ta": "யானை", "th": "ช้าง", "vi": "voi",
    }  # fmt: skip
    assert pictures.flag("th").names["lo"] == "ໄທ"


def test_flags_say_which_look_the_same(pictures: Pictures) -> None:
    assert "mc" in pictures.flag("id").same_as
    assert "td" in pictures.flag("ro").same_as
    assert pictures.flag("sg").same_as == ()
    for flag in pictures.flags:
        assert all(flag.code in pictures.flag(other).same_as for other in flag.same_as)
        for family in FLAG_FAMILIES:
            _thumbnail(pictures.flag_bytes(flag, family))
    assert [f.code for f in pictures.flags if f.code in ("fr", "re", "yt") and f.asked] == ["fr"]


def test_select(pictures: Pictures) -> None:
    assert pictures.select(None) == pictures.select("all") == pictures.concepts
    assert len({c.key for c in pictures.select(200)}) == 200
    assert len({c.group for c in pictures.select(200)}) >= 8  # of 9: spread over the set
    food = pictures.select(["food-drink"])
    assert len(food) > 80 and {c.group for c in food} == {"food-drink"}
    assert [c.names["en"] for c in pictures.select(["1f418", "1f435"])] == ["monkey face", "elephant"]
    with pytest.raises(SeavlmError, match=r"'animal-mamal'.*animal-mammal"):
        pictures.select(["animal-mamal"])
    for number in (0, 1094):
        with pytest.raises(SeavlmError, match=f"{number} concepts wanted, the picture set has 1093"):
            pictures.select(number)


def test_what_is_not_there_is_named(pictures: Pictures) -> None:
    with pytest.raises(SeavlmError, match=r"'fluent3d'.*fluent-3d"):
        pictures.image_bytes("1f418", "fluent3d")
    with pytest.raises(SeavlmError, match="no concept '1f41'"):
        pictures["1f41"]
    with pytest.raises(SeavlmError, match="no flag 'xx'"):
        pictures.flag("xx")
    with pytest.raises(SeavlmError, match="no flag 'th' by family 'noto'"):
        pictures.flag_bytes("th", "noto")


def test_a_missing_or_broken_set_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SeavlmError, match="cannot read the picture set"):
        load_pictures(tmp_path / "none")
    (tmp_path / "pictures.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(SeavlmError, match="cannot read the picture set") as error:
        load_pictures(tmp_path)
    assert "\n" not in str(error.value)


def test_size_licences_and_attribution() -> None:
    assert sum(path.stat().st_size for path in BUILTIN.rglob("*") if path.is_file()) < 25e6
    attribution = (BUILTIN / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "128 x 128" in attribution and "WebP" in attribution  # the changes made
    for name, package in PACKAGES.items():
        row = next(line for line in attribution.splitlines() if f"`{package.name}` {package.version}" in line)
        assert package.author in row and package.licence in row and package.url in row
        if name != "licences":
            text = (BUILTIN / "LICENSES" / f"{name}-{package.licence}.txt").read_text(encoding="utf-8")
            assert len(text) > 1000 and not re.search("<year>|<copyright", text)
    assert "Attribution-ShareAlike 4.0" in (BUILTIN / "LICENSES" / "openmoji-CC-BY-SA-4.0.txt").read_text()
