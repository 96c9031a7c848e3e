"""Making the picture set: on small packages of the same layout, and (slow) from the registry itself."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seavlm.data import build_pictures
from seavlm.data.build_pictures import CLDR_CODES, FLAGS_THAT_DIFFER, PACKAGES, build
from seavlm.data.pictures import BUILTIN, FAMILIES, SIZE, load_pictures
from seavlm.errors import SeavlmError
from seavlm.manifest import sha256_file

# key, emoji, OpenMoji's English, CLDR's English
THINGS = [
    ("1f418", "🐘", "elephant", "elephant"),
    ("1f916", "🤖", "robot", "robot"),
    ("1f997", "🦗", "cricket", "cricket"),
    ("1f3cf", "🏏", "cricket game", "cricket game"),
    ("1f52b", "🔫", "water pistol", "water pistol"),
    ("1f46a", "👪", "family", "family"),
    ("1f468-200d-1f468-200d-1f466", "👨‍👨‍👦", "family: man, man, boy", "family: man, man, boy"),
    ("2764-fe0f", "❤️", "red heart", "red heart"),
]


def svg(seed: str) -> str:
    """Three squares whose places and colours follow from `seed`."""
    digest = hashlib.sha256(seed.encode()).digest()
    squares = (
        f'<rect x="{a % 40}" y="{b % 40}" width="24" height="24" fill="#{c:02x}{d:02x}80"/>'
        for a, b, c, d in zip(*[iter(digest[:12])] * 4, strict=True)
    )
    body = "".join(squares)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">{body}</svg>'


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Eight things and two flags, in packages laid out as the real ones."""
    folders = {name: tmp_path / package.folder / "package" for name, package in PACKAGES.items()}

    def write(package: str, name: str, content: object) -> None:
        path = folders[package] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        path.write_text(text, encoding="utf-8")

    (folders["fluent-3d"] / "assets").mkdir(parents=True)
    for key, _, _, _ in THINGS:
        write("twemoji", f"{key}.svg", svg(f"twemoji {key}"))
        write("openmoji", f"color/svg/{key.upper()}.svg", svg(f"openmoji {key}"))
        image = Image.new("RGBA", (256, 256))  # transparent, a disc of the key's own colour in the middle
        colour = (*hashlib.sha256(key.encode()).digest()[:3], 255)
        image.paste(Image.new("RGBA", (100 + 2 * len(key), 100), colour), (60, 60))
        image.save(folders["fluent-3d"] / "assets" / f"{key}.webp", lossless=True)
    described = [
        {"hexcode": key.upper(), "emoji": emoji, "annotation": name, "skintone": "",
         "group": "animals-nature", "subgroups": "animal-mammal"}
        for key, emoji, name, _ in THINGS
    ]  # fmt: skip
    write("openmoji", "data/openmoji.json", described)

    def icons(family: str, names: dict[str, str], aliases: dict[str, str]) -> None:
        entry = {
            "width": 64,
            "height": 64,
            "icons": {name: {"body": svg(f"{family} {seed}")} for name, seed in names.items()},
            "aliases": {alias: {"parent": parent} for alias, parent in aliases.items()},
        }
        write(family, "icons.json", entry)

    plain = {name: key for key, _, _, name in THINGS}
    slugs = {name.replace(": ", "-").replace(", ", "-").replace(" ", "-"): key for name, key in plain.items()}
    icons("noto", {**slugs, "family-man-man-boy": "1f46a"}, {"robot-face": "robot"})  # one drawing for both
    write("noto", "chars.json", {slug_key(key): slug for slug, key in slugs.items()})
    old = {slug: key for slug, key in slugs.items() if slug not in ("cricket", "robot")}
    icons("noto-v1", old | {"robot-face": "1f916"}, {"cricket": "cricket-game"})  # the insect came later
    icons("emojione", old | {"robot-face": "1f916"}, {"cricket": "cricket-game"})

    for code, cldr in CLDR_CODES.items():
        entries = {emoji: {"tts": [f"{name}\u200b {code}"]} for _, emoji, _, name in THINGS}
        entries = {emoji.replace("\ufe0f", ""): entry for emoji, entry in entries.items()}
        write(
            "annotations", f"annotations/{cldr}/annotations.json", {"annotations": {"annotations": entries}}
        )
        derived = {"annotationsDerived": {"annotations": {}}}
        write("annotations-derived", f"annotationsDerived/{cldr}/annotations.json", derived)
        countries = {"LA": "Laos", "HK": "Hong Kong SAR China", "HK-alt-short": "Hong Kong", "001": "world"}
        main = {"main": {cldr: {"localeDisplayNames": {"territories": countries}}}}
        write("localenames", f"main/{cldr}/territories.json", main)
    english = json.loads((folders["annotations"] / "annotations/en/annotations.json").read_text())
    for _, emoji, _, name in THINGS:
        english["annotations"]["annotations"][emoji.replace("\ufe0f", "")]["tts"] = [name]
    write("annotations", "annotations/en/annotations.json", english)
    for code, pair in {"la": "1f1f1-1f1e6", "hk": "1f1ed-1f1f0", "arab": "x"}.items():
        write("flag-icons", f"flags/4x3/{code}.svg", svg(f"flag {code}"))
        write("twemoji", f"{pair}.svg", svg(f"twemoji flag {code}"))
    for licence in {package.licence for package in PACKAGES.values()}:
        entry = {"licenseText": f"{licence}\nCopyright (c) <year> <copyright holders>\n"}
        write("licences", f"licenses/{licence}.json", entry)
    write("openmoji", "LICENSE.txt", "its own text")
    return tmp_path


def slug_key(key: str) -> str:
    return key.replace("-fe0f", "")


def test_small_packages(packages: Path, tmp_path: Path) -> None:
    counts = build(tmp_path / "out", packages)
    made = load_pictures(tmp_path / "out")
    # The insect has no drawing of its own in the old families (an alias leads to the game), pistols disagree,
    # and one of the two families is drawn as the other.
    assert [c.names["en"] for c in made.concepts] == [
        "elephant",
        "robot",
        "cricket game",
        "family",
        "red heart",
    ]
    assert counts["named in 11 languages"] == 8
    assert counts["drawn by all six"] == 7
    assert counts["left out: families disagree"] == counts["left out: drawn as another concept"] == 1
    heart = made["2764"]
    assert (heart.emoji, heart.names["tl"]) == ("❤️", "red heart tl")  # U+200B is gone
    assert [(f.code, f.names["en"], f.asked) for f in made.flags] == [
        ("hk", "Hong Kong", True),
        ("la", "Laos", True),
    ]
    assert (tmp_path / "out" / "LICENSES" / "openmoji-CC-BY-SA-4.0.txt").read_text() == "its own text\n"
    fluent = (tmp_path / "out" / "LICENSES" / "fluent-3d-MIT.txt").read_text()
    assert "Copyright (c) Microsoft Corporation" in fluent
    for family in FAMILIES:
        with Image.open(io.BytesIO(made.image_bytes("1f418", family))) as image:
            assert (image.mode, image.size) == ("RGB", (SIZE, SIZE))
            assert min(image.getpixel((SIZE - 1, SIZE - 1))) > 245  # transparency became white


def test_equal_packages_give_equal_bytes(packages: Path, tmp_path: Path) -> None:
    build(tmp_path / "a", packages)
    build(tmp_path / "b", packages)
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(names) > 10
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_a_drawing_of_two_families_is_left_out(packages: Path, tmp_path: Path) -> None:
    """What twemoji and openmoji draw alike would be trained on twice, or let into a held-out family."""
    twemoji = packages / PACKAGES["twemoji"].folder / "package" / "1f418.svg"
    openmoji = packages / PACKAGES["openmoji"].folder / "package" / "color" / "svg" / "1F418.svg"
    openmoji.write_text(twemoji.read_text())
    counts = build(tmp_path / "out", packages)
    assert counts["left out: two families draw it alike"] == 1
    assert "elephant" not in [c.names["en"] for c in load_pictures(tmp_path / "out").concepts]


def test_flags_drawn_differently_are_not_asked() -> None:
    made = load_pictures()
    assert not any(made.flag(code).asked for code in FLAGS_THAT_DIFFER)


def _archive(folder: Path, package: str, content: bytes) -> Path:
    path = folder / f"{PACKAGES[package].folder}.tgz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("package/LICENSE")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return path


def test_an_archive_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    _archive(tmp_path, "twemoji", b"something else")
    with pytest.raises(
        SeavlmError, match=r"@twemoji/svg@15\.0\.0 has SHA-256 [0-9a-f]{64}, expected 1d29075"
    ):
        build(tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_pinned_archive_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _archive(tmp_path, "twemoji", b"the text")
    package = replace(PACKAGES["twemoji"], sha256=sha256_file(path))
    unpacked = build_pictures.unpacked(package, tmp_path, tmp_path / "cache")
    assert (unpacked / "LICENSE").read_bytes() == b"the text"


@pytest.mark.parametrize(
    ("npm", "message"),
    [
        (None, "npm is not installed, so @twemoji/svg cannot be fetched"),
        (
            "#!/bin/sh\necho 'code ENOTFOUND\nno network' >&2\nexit 1\n",
            "npm could not fetch .*ENOTFOUND no network",
        ),
    ],
)
def test_without_npm_or_network_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, npm: str | None, message: str
) -> None:
    (tmp_path / "bin").mkdir()
    if npm is not None:
        (tmp_path / "bin" / "npm").write_text(npm)
        (tmp_path / "bin" / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin" if npm else str(tmp_path / "bin"))
    with pytest.raises(SeavlmError, match=message) as error:
        build(tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_shipped_set_is_what_the_registry_gives(tmp_path: Path) -> None:
    """Downloads some 130 MB. The same pixels to a shade: another libwebp or resvg may round otherwise."""
    build(tmp_path / "out")
    fresh, shipped = load_pictures(tmp_path / "out"), load_pictures(BUILTIN)
    assert fresh.concepts == shipped.concepts and fresh.flags == shipped.flags

    def difference(one: Callable[..., bytes], other: Callable[..., bytes], *at: str) -> float:
        a, b = (np.asarray(Image.open(io.BytesIO(get(*at))), dtype=np.float32) for get in (one, other))
        return float(np.abs(a - b).mean())

    for concept in shipped.concepts[::10]:
        for family in FAMILIES:
            assert difference(fresh.image_bytes, shipped.image_bytes, concept.key, family) < 2
