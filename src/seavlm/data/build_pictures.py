"""Makes the built-in picture set from public npm packages: `seavlm data pictures --out FOLDER`.

    packages -> which concepts all families draw and all languages name -> drawings, 128 x 128 on white
             -> without look-alikes -> pictures.parquet, flags.parquet, ATTRIBUTION.md, LICENSES/, build.json

The packages come through the npm client by name and version, and their archives' hashes are checked. Given
the same packages, the same versions of resvg and Pillow's libwebp give the same bytes.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from seavlm.data.pictures import FAMILIES, FLAG_FAMILIES, SIZE
from seavlm.errors import SeavlmError
from seavlm.manifest import sha256_file, write_json
from seavlm.text.language import LANGUAGES
from seavlm.text.normalize import normalize

WEBP_QUALITY = 85
# Root mean square difference of two drawings' 16 x 16 thumbnails (0..1) below which they are one drawing.
# Measured: copies 0 to 0.004; the most alike drawings of one concept by two hands (a white exclamation
# mark) from 0.022 on.
SAME_DRAWING = 0.005
SAME_FLAG = 0.042  # wider: Chad's and Romania's (0.04) and Indonesia's and Monaco's are one flag to the eye
# Territories that fly another's flag, in one of the two families at least: it is asked about as the other's.
FLIES_FLAG_OF = {
    "fr": "bl cp gf gp mf pm re wf yt",
    "no": "bv sj",
    "us": "um",
    "gb": "sh",
    "au": "hm",
    "nl": "bq",
    "io": "dg",
}
FLAGS_THAT_DIFFER = {"mq", "sy"}  # changed of late, and drawn new by flag-icons only
CLDR_CODES = {
    code: "fil" if code == "tl" else code for code in LANGUAGES
}  # CLDR files Tagalog under Filipino
# Concepts whose drawings do not agree on what they show.
DISAGREEING = {"1f52b": "a water pistol in new families, a gun in old ones"}


@dataclass(frozen=True)
class Package:
    """One npm package of the set: pinned by version and by the hash of its archive."""

    name: str
    version: str
    sha256: str
    author: str
    licence: str  # SPDX id of what is taken from it
    url: str
    what: str

    @property
    def folder(self) -> str:
        """What `npm pack` calls the archive, without `.tgz`."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}"


PACKAGES = {
    "twemoji": Package(
        "@twemoji/svg", "15.0.0",
        "1d2907557a422c7c4e3feca50ef915c39da1db3d76b4a4d7e73fb59bce4403c3",
        "Twitter, Inc. and other contributors; jdecked and contributors",
        "CC-BY-4.0", "https://github.com/jdecked/twemoji",
        "drawings of the family twemoji, and country flags",
    ),
    "openmoji": Package(
        "openmoji", "17.0.0",
        "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
        "Benedikt Groß, Daniel Utz and the OpenMoji contributors",
        "CC-BY-SA-4.0", "https://openmoji.org",
        "drawings of the family openmoji; Unicode's groups of the concepts",
    ),
    "noto": Package(
        "@iconify-json/noto", "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Google Inc.",
        "Apache-2.0", "https://github.com/googlefonts/noto-emoji",
        "drawings of the family noto",
    ),
    "noto-v1": Package(
        "@iconify-json/noto-v1", "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Google Inc.",
        "Apache-2.0", "https://github.com/googlefonts/noto-emoji",
        "drawings of the family noto-v1 (Noto Emoji's first design)",
    ),
    "emojione": Package(
        "@iconify-json/emojione", "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "EmojiOne (version 2, continued as EmojiTwo)",
        "CC-BY-4.0", "https://github.com/EmojiTwo/emojitwo",
        "drawings of the family emojione",
    ),
    "fluent-3d": Package(
        "@lobehub/fluent-emoji-3d", "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "Microsoft Corporation",
        "MIT", "https://github.com/microsoft/fluentui-emoji",
        "drawings of the family fluent-3d",
    ),
    "flag-icons": Package(
        "flag-icons", "7.5.0",
        "c0b80bf0e08006a60f56621d6bc49f8c7131f4d1fef6737a165a673431f4b518",
        "Panayiotis Lipiridis",
        "MIT", "https://github.com/lipis/flag-icons",
        "drawings of the country flags",
    ),
    "annotations": Package(
        "cldr-annotations-full", "48.2.0",
        "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
        "Unicode, Inc.",
        "Unicode-3.0", "https://cldr.unicode.org",
        "names of the concepts in 11 languages",
    ),
    "annotations-derived": Package(
        "cldr-annotations-derived-full", "48.2.0",
        "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e",
        "Unicode, Inc.",
        "Unicode-3.0", "https://cldr.unicode.org",
        "names of concepts drawn with joined code points",
    ),
    "localenames": Package(
        "cldr-localenames-full", "48.2.0",
        "7f2ac7fd3b5d90f56ad127f9ed5ae67b58b3e556818f55530b9f47bb81bcde57",
        "Unicode, Inc.",
        "Unicode-3.0", "https://cldr.unicode.org",
        "names of the countries in 11 languages",
    ),
    "licences": Package(
        "spdx-license-list", "6.12.0",
        "54cc8d13086187333ca1457c8edaa06d9a412144f076aa7f7c1b59c4f3b0a1ef",
        "Sindre Sorhus", "CC0-1.0", "https://github.com/sindresorhus/spdx-license-list",
        "texts of the licences",
    ),
}  # fmt: skip


def build(out: Path, packages: Path | None = None) -> dict[str, int]:
    """Write the picture set to the folder `out`, whole or not at all, and return its counts.

    packages: a folder that holds the packages as npm names them, unpacked (`<name>-<version>/package`) or as
    archives (`<name>-<version>.tgz`); those missing there (all, when None) are fetched with `npm pack`.
    SeavlmError when npm is missing, fails, or an archive is not the pinned one.
    """
    out = Path(out)
    with tempfile.TemporaryDirectory(prefix="seavlm-npm-") as cache:
        folders = {name: unpacked(package, packages, Path(cache)) for name, package in PACKAGES.items()}
        concepts, counts = _concepts(folders)
        flags = _flags(folders, counts)
        licences = _licences(folders)
    partial = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "LICENSES").mkdir(parents=True)
    try:
        _write_table(partial / "pictures.parquet", concepts)
        _write_table(partial / "flags.parquet", flags)
        for name, text in licences.items():
            (partial / "LICENSES" / f"{name}.txt").write_text(text, encoding="utf-8")
        (partial / "ATTRIBUTION.md").write_text(_attribution(), encoding="utf-8")
        write_json(partial / "build.json", {"counts": counts, "size": SIZE, "webp_quality": WEBP_QUALITY})
        shutil.rmtree(out, ignore_errors=True)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return counts


# --- packages


def unpacked(package: Package, packages: Path | None, cache: Path) -> Path:
    """The folder of an unpacked package: the one at hand, or a fresh one from the registry."""
    if packages is not None and (packages / package.folder / "package").is_dir():
        return packages / package.folder / "package"
    archive = packages / f"{package.folder}.tgz" if packages is not None else cache / f"{package.folder}.tgz"
    if not archive.is_file():
        archive = _npm_pack(package, cache)
    if (found := sha256_file(archive)) != package.sha256:
        raise SeavlmError(f"{package.name}@{package.version} has SHA-256 {found}, expected {package.sha256}")
    with tarfile.open(archive) as tar:
        tar.extractall(cache / package.folder, filter="data")
    return cache / package.folder / "package"


def _npm_pack(package: Package, folder: Path) -> Path:
    """The package's archive, fetched by the npm client."""
    npm = shutil.which("npm")
    if npm is None:
        raise SeavlmError(
            f"npm is not installed, so {package.name} cannot be fetched",
            hint="Install Node.js, or give the folder of the unpacked packages.",
        )
    command = [
        npm,
        "pack",
        f"{package.name}@{package.version}",
        "--pack-destination",
        str(folder),
        "--silent",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archive = folder / f"{package.folder}.tgz"
    if done.returncode or not archive.is_file():
        raise SeavlmError(
            f"npm could not fetch {package.name}@{package.version}: {' '.join(done.stderr.split())[-200:]}",
            hint="Check the connection to the npm registry.",
        )
    return archive


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# --- names


def key_of(code_points: str) -> str:
    """'0023-FE0F-20E3' -> '23-20e3': lower case, no leading zeros, no variation selector 16."""
    points = (point.lstrip("0") for point in code_points.lower().split("-"))
    return "-".join(point for point in points if point != "fe0f")


def key_of_emoji(emoji: str) -> str:
    return key_of("-".join(f"{ord(letter):x}" for letter in emoji))


def _concept_names(folders: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """key -> language -> name, for what CLDR names in every language."""
    names: dict[str, dict[str, str]] = defaultdict(dict)
    for code, cldr in CLDR_CODES.items():
        for package, part in (("annotations", "annotations"), ("annotations-derived", "annotationsDerived")):
            entries = read_json(folders[package] / part / cldr / "annotations.json")[part]["annotations"]
            for emoji, entry in entries.items():
                if entry.get("tts"):
                    names[key_of_emoji(emoji)][code] = _clean(entry["tts"][0])
    return {key: named for key, named in names.items() if len(named) == len(LANGUAGES)}


def _country_names(folders: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """ISO code (lower case) -> language -> name; CLDR's short form where it has one ("Hong Kong")."""
    names: dict[str, dict[str, str]] = defaultdict(dict)
    for code, cldr in CLDR_CODES.items():
        main = read_json(folders["localenames"] / "main" / cldr / "territories.json")["main"]
        territories = main[cldr]["localeDisplayNames"]["territories"]
        for territory in territories:
            if re.fullmatch("[A-Z]{2}", territory):
                name = territories.get(f"{territory}-alt-short", territories[territory])
                names[territory.lower()][code] = _clean(name)
    return {country: named for country, named in names.items() if len(named) == len(LANGUAGES)}


def _clean(name: str) -> str:
    return " ".join(normalize(name).split())


# --- drawings


def _slug(name: str) -> str:
    """An English name as the Iconify packages spell it: 'Person’s foot' -> 'persons-foot'."""
    plain = re.sub("[’'“”&.]", "", name.lower())
    for letter, ascii_letter in zip("ñéôãçåí", "neoacai", strict=True):
        plain = plain.replace(letter, ascii_letter)
    return re.sub("[^a-z0-9]+", "-", plain).strip("-")


def _concepts(folders: Mapping[str, Path]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of pictures.parquet, in Unicode's order, and the counts on the way there."""
    names = _concept_names(folders)
    files = {
        "twemoji": {key_of(p.stem): p for p in folders["twemoji"].glob("*.svg")},
        "openmoji": {key_of(p.stem): p for p in (folders["openmoji"] / "color" / "svg").glob("*.svg")},
        "fluent-3d": {key_of(p.stem): p for p in (folders["fluent-3d"] / "assets").glob("*.webp")},
    }
    iconify = {
        family: read_json(folders[family] / "icons.json") for family in ("noto", "noto-v1", "emojione")
    }
    noto_keys: dict[str, list[str]] = defaultdict(list)  # the slugs that noto knows a key by
    for code_points, slug in read_json(folders["noto"] / "chars.json").items():
        noto_keys[key_of(code_points)].append(slug)
    noto_aliases: dict[str, list[str]] = defaultdict(list)
    for alias, entry in iconify["noto"]["aliases"].items():
        noto_aliases[entry["parent"]].append(alias)

    # Iconify names drawings by the English name of their time: try today's, OpenMoji's and noto's.
    claims: dict[str, dict[str, dict[str, bool]]] = {family: defaultdict(dict) for family in iconify}
    described = {}
    for entry in read_json(folders["openmoji"] / "data" / "openmoji.json"):
        key = key_of(entry["hexcode"])
        if key not in names or entry["skintone"] or entry["group"] in ("component", "extras-openmoji"):
            continue
        described[key] = entry
        slugs = [_slug(names[key]["en"]), _slug(entry["annotation"]), *noto_keys[key]]
        slugs += [alias for slug in slugs for alias in noto_aliases[slug]]
        for family, icons in iconify.items():
            own = noto_keys[key] if family == "noto" else slugs
            slug = next((s for s in own if s in icons["icons"] or s in icons["aliases"]), None)
            if slug is not None:
                icon = icons["aliases"].get(slug, {}).get("parent", slug)
                claims[family][icon][key] = icon == slug
    # A drawing that two concepts claim belongs to the one whose own name it bears, not an alias's.
    icon_of: dict[str, dict[str, str]] = {family: {} for family in iconify}
    for family, icon_claims in claims.items():
        for icon, claimants in icon_claims.items():
            owners = [key for key, own in claimants.items() if own] if len(claimants) > 1 else list(claimants)
            if len(owners) == 1:
                icon_of[family][owners[0]] = icon

    counts = {"named in 11 languages": len(described)}
    for family in FAMILIES:
        counts[f"of those drawn by {family}"] = len(
            set(described) & set(files.get(family, icon_of.get(family, {})))
        )
    keys = [
        key
        for key in described
        if all(key in files[f] for f in files) and all(key in icon_of[f] for f in icon_of)
    ]
    counts["drawn by all six"] = len(keys)
    keys = [key for key in keys if key not in DISAGREEING]
    counts["left out: families disagree"] = counts["drawn by all six"] - len(keys)

    drawings: dict[tuple[str, str], Image.Image] = {}
    for key in keys:
        for family in FAMILIES:
            if family == "fluent-3d":
                drawings[key, family] = _raster(files[family][key])
            elif family in files:
                drawings[key, family] = _vector(files[family][key].read_text(encoding="utf-8"))
            else:
                drawings[key, family] = _vector(_iconify_svg(iconify[family], icon_of[family][key]))
    kept = _without_look_alikes(keys, drawings, {key: names[key]["en"] for key in keys}, counts)
    rows = []
    for key in kept:
        entry = described[key]
        row = {"key": key, "emoji": entry["emoji"], "group": entry["group"], "subgroup": entry["subgroups"]}
        row |= {f"name_{code}": name for code, name in names[key].items()}
        row |= {f"image_{family}": _webp(drawings[key, family]) for family in FAMILIES}
        rows.append(row)
    counts["concepts"] = len(rows)
    return rows, counts


def _iconify_svg(icons: Mapping[str, Any], icon: str) -> str:
    entry = icons["icons"][icon]
    width, height = entry.get("width", icons["width"]), entry.get("height", icons["height"])
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{entry["body"]}</svg>'


def _vector(svg: str) -> Image.Image:
    """An SVG drawing on a white SIZE x SIZE canvas."""
    try:
        import resvg_py
    except ImportError as error:
        raise SeavlmError("resvg-py is not installed", hint="pip install resvg-py") from error

    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, background="#ffffff", skip_system_fonts=True)
    return _on_white(Image.open(io.BytesIO(bytes(png))))


def _raster(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return _on_white(image)


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, SIZE x SIZE: transparency over white, the longer side scaled to SIZE, centred."""
    rgba = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    scale = SIZE / max(flat.size)
    size = (round(flat.width * scale), round(flat.height * scale))
    if size != flat.size:
        flat = flat.resize(size, Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (SIZE, SIZE), "white")
    canvas.paste(flat, ((SIZE - size[0]) // 2, (SIZE - size[1]) // 2))
    return canvas


def _webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=WEBP_QUALITY, method=6)
    return buffer.getvalue()


# --- look-alikes


def _thumbnail(image: Image.Image) -> np.ndarray:
    """16 x 16 x 3 floats in 0..1: enough to see that two drawings are the same one."""
    return np.asarray(image.resize((16, 16), Image.Resampling.BOX), dtype=np.float32) / 255


def _alike(a: np.ndarray, b: np.ndarray, limit: float = SAME_DRAWING) -> bool:
    return float(np.sqrt(np.mean((a - b) ** 2))) < limit


def _without_look_alikes(
    keys: list[str],
    drawings: Mapping[tuple[str, str], Image.Image],
    english: Mapping[str, str],
    counts: dict[str, int],
) -> list[str]:
    """`keys` without those that a family draws just as another concept, or that two families draw alike.

    The first kind has no right answer; the second would let a trained drawing into another family. Of two
    concepts with one drawing, the one with the shorter English name stays ('family', not 'family: man, ...').
    """
    thumbnails = {at: _thumbnail(image) for at, image in drawings.items()}
    gone = set()
    for family in FAMILIES:
        stack = np.stack([thumbnails[key, family].ravel() for key in keys])
        for i, key in enumerate(keys):
            distances = np.sqrt(np.mean((stack[i + 1 :] - stack[i]) ** 2, axis=1))
            for j in np.flatnonzero(distances < SAME_DRAWING):
                gone.add(max(key, keys[i + 1 + int(j)], key=lambda k: len(english[k])))
    counts["left out: drawn as another concept"] = len(gone)
    copied = {
        key
        for key in keys
        for i, one in enumerate(FAMILIES)
        for other in FAMILIES[i + 1 :]
        if key not in gone and _alike(thumbnails[key, one], thumbnails[key, other])
    }
    counts["left out: two families draw it alike"] = len(copied)
    return [key for key in keys if key not in gone | copied]


# --- flags


def _flags(folders: Mapping[str, Path], counts: dict[str, int]) -> list[dict[str, Any]]:
    """Rows of flags.parquet, by ISO code."""
    names = _country_names(folders)
    drawings: dict[str, dict[str, Image.Image]] = {}
    for path in sorted((folders["flag-icons"] / "flags" / "4x3").glob("*.svg")):
        code = path.stem
        other = folders["twemoji"] / (
            "-".join(f"{0x1F1E6 + ord(letter) - ord('a'):x}" for letter in code) + ".svg"
        )
        if code in names and other.is_file():
            drawings[code] = {
                "flag-icons": _vector(path.read_text(encoding="utf-8")),
                "twemoji": _vector(other.read_text(encoding="utf-8")),
            }
    thumbnails = {
        (code, f): _thumbnail(image) for code, images in drawings.items() for f, image in images.items()
    }
    rows = []
    for code, images in drawings.items():
        same = [
            other
            for other in drawings
            if other != code
            and any(_alike(thumbnails[code, f], thumbnails[other, f], SAME_FLAG) for f in FLAG_FAMILIES)
        ]
        asked = code not in FLAGS_THAT_DIFFER | {c for codes in FLIES_FLAG_OF.values() for c in codes.split()}
        row: dict[str, Any] = {"code": code, "same_as": same, "asked": asked}
        row |= {f"name_{language}": name for language, name in names[code].items()}
        row |= {f"image_{family}": _webp(images[family]) for family in FLAG_FAMILIES}
        rows.append(row)
    counts["flags"] = len(rows)
    counts["flags asked about"] = sum(row["asked"] for row in rows)
    return rows


# --- what is written


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows)
    images = [name for name in table.column_names if name.startswith("image_")]
    # Pictures are compressed already and all differ: dictionary and zstd only for the words.
    words = [name for name in table.column_names if name not in images]
    compression = {name: "NONE" for name in images} | {name: "ZSTD" for name in words}
    pq.write_table(table, path, compression=compression, use_dictionary=False, write_statistics=False)


def _licences(folders: Mapping[str, Path]) -> dict[str, str]:
    """File stem -> text: the licence of each package as it ships it, else the SPDX text with its holder."""
    texts = {}
    for name, package in PACKAGES.items():
        if name == "licences":
            continue
        own = next(iter(sorted(folders[name].glob("LICENSE*"))), None)
        if own is not None:
            text = own.read_text(encoding="utf-8")
        else:
            entry = read_json(folders["licences"] / "licenses" / f"{package.licence}.json")
            text = entry["licenseText"].replace(
                "Copyright (c) <year> <copyright holders>", f"Copyright (c) {package.author}"
            )
        texts[f"{name}-{package.licence}"] = text.rstrip() + "\n"
    return texts


def _attribution() -> str:
    """ATTRIBUTION.md: who made what, under which licence, and what was changed."""
    lines = [
        "# Where the pictures and names come from",
        "",
        "The picture set is made by `seavlm data pictures` from these packages of the npm registry. The",
        f"drawings were rendered (SVG) or scaled to {SIZE} x {SIZE} pixels, put on white and saved as lossy",
        f"WebP (quality {WEBP_QUALITY}); nothing else was changed in them. The names were brought to Unicode",
        "NFC, and invisible characters were removed. Each licence's text is in `LICENSES/`. No author",
        "endorses this use.",
        "",
        "The drawings of OpenMoji, and adaptations of them, are under CC BY-SA 4.0: pictures composed of",
        "them (sheets, rows of copies) carry that licence.",
        "",
        "| what | author | package | licence | source |",
        "|---|---|---|---|---|",
    ]
    for package in PACKAGES.values():
        lines.append(
            f"| {package.what} | {package.author} | `{package.name}` {package.version} | {package.licence} "
            f"| <{package.url}> |"
        )
    return "\n".join(lines) + "\n"
