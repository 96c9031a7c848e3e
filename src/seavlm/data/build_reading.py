"""Makes the pictures of text that the suite `reading` asks about.

    python -m seavlm.data.build_reading FONTS OUT

FONTS is a folder with the fonts of FILES, under OFL-1.1 (Debian: fonts-noto-core, fonts-noto-cjk; looked for
below it, too); OUT a Parquet file. Pillow must have been built with Raqm, which shapes Burmese, Khmer, Lao,
Tamil and Thai. The file ships with seavlm, so that everybody reads the same pixels.
"""

from __future__ import annotations

import io
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import regex
from PIL import Image, ImageDraw, ImageFont, features

from seavlm.data.pictures import load_pictures
from seavlm.errors import SeavlmError
from seavlm.text.language import LANGUAGES, to_native_digits
from seavlm.text.normalize import normalize

FILES = {  # script -> two hands, and the face within a collection
    "Mymr": (("NotoSansMyanmar-Regular.ttf", 0), ("NotoSerifMyanmar-Regular.ttf", 0)),
    "Latn": (("NotoSans-Regular.ttf", 0), ("NotoSerif-Regular.ttf", 0)),
    "Khmr": (("NotoSansKhmer-Regular.ttf", 0), ("NotoSerifKhmer-Regular.ttf", 0)),
    "Laoo": (("NotoSansLao-Regular.ttf", 0), ("NotoSerifLao-Regular.ttf", 0)),
    "Hans": (("NotoSansCJK-Regular.ttc", 2), ("NotoSerifCJK-Regular.ttc", 2)),
    "Taml": (("NotoSansTamil-Regular.ttf", 0), ("NotoSerifTamil-Regular.ttf", 0)),
    "Thai": (("NotoSansThai-Regular.ttf", 0), ("NotoSerifThai-Regular.ttf", 0)),
}
WORDS, NUMBERS, PHRASES = 16, 4, 4  # of each language
SIDE, MARGIN = 256, 12  # pixels
LARGEST, SMALLEST = 64, 18  # pixels of a font
DECLARATION = Path(__file__).parents[1] / "engine" / "udhr.json"


def rows(fonts: Path) -> Iterator[dict[str, Any]]:
    """id, language, kind, concept, text, image: a lossless WebP of black on white, SIDE x SIDE."""
    if not features.check("raqm"):
        raise SeavlmError("this Pillow cannot shape text", hint="Install one with Raqm.")
    concepts = load_pictures().select(["animals-nature", "food-drink", "objects", "travel-places"])
    chance = random.Random("reading")
    twice = regex.compile(r"(\p{M})\1")  # a mark typed twice, which fonts draw on a dotted circle
    shown = [c for c in concepts if all(len(n) <= 24 and not twice.search(n) for n in c.names.values())]
    shown = chance.sample(shown, WORDS)
    numbers = [str(chance.randint(1000, 99999)) for _ in range(NUMBERS)]
    declaration = json.loads(DECLARATION.read_text(encoding="utf-8"))
    for code, language in LANGUAGES.items():
        texts = [("word", concept.key, concept.names[code]) for concept in shown]
        texts += [("number", f"number-{n}", to_native_digits(n, code)) for n in numbers]
        texts += [("phrase", f"phrase-{code}-{i}", text) for i, text in enumerate(phrases(declaration[code]))]
        for index, (kind, concept, text) in enumerate(texts):
            latin = kind == "number" and language.digits[0] == "0"
            file, face = FILES["Latn" if latin else language.script][index % 2]
            yield {
                "id": f"{code}-{index:02d}",
                "language": code,
                "kind": kind,
                "concept": concept,
                "text": normalize(text),
                "image": draw(normalize(text), _find(fonts, file), face),
            }


def phrases(text: str) -> list[str]:
    """Pieces of the text that fit a picture: between its marks, else two words, else a dozen letters."""
    words = text.split()
    letters = regex.findall(r"\X", max(words, key=len))
    found: dict[str, None] = {}
    for pieces in (
        regex.split(r"[\s\p{P}]{2,}|[,;:.\n၊။៖។、，。；：]+", text),
        (" ".join(words[i : i + 2]) for i in range(0, len(words), 2)),
        ("".join(letters[i : i + 12]) for i in range(0, len(letters), 12)),
    ):
        if len(found) < PHRASES:
            found |= dict.fromkeys(piece.strip() for piece in pieces if _fits(piece.strip()))
    fitting = list(found)
    return [fitting[i * len(fitting) // PHRASES] for i in range(PHRASES)]


def _fits(piece: str) -> bool:
    sizes = [len(regex.findall(r"\X", word)) for word in (piece, *piece.split())]
    return 6 <= sizes[0] <= 26 and max(sizes[1:]) <= 16


def draw(text: str, font: Path, face: int) -> bytes:
    """The text in the middle, as large as it fits on at most three lines."""
    for size in range(LARGEST, SMALLEST - 1, -2):
        loaded = ImageFont.truetype(str(font), size, index=face, layout_engine=ImageFont.Layout.RAQM)
        lines = _lines(text, loaded)
        height = round(size * 1.7)
        if lines and len(lines) * height <= SIDE - 2 * MARGIN:
            break
    else:
        raise SeavlmError(f"{text!r} does not fit a picture of {SIDE} pixels")
    image = Image.new("L", (SIDE, SIDE), 255)
    canvas = ImageDraw.Draw(image)
    top = (SIDE - len(lines) * height) / 2
    for index, line in enumerate(lines):
        canvas.text((SIDE / 2, top + (index + 0.5) * height), line, font=loaded, fill=0, anchor="mm")
    buffer = io.BytesIO()
    image = image.point([level // 17 * 17 for level in range(256)])  # 16 greys: a third smaller
    image.convert("RGB").save(buffer, "WEBP", lossless=True, quality=100, method=4)
    return buffer.getvalue()


def _lines(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """The text broken at spaces, else between letters where it is Han; [] where a line is too wide."""
    room = SIDE - 2 * MARGIN
    units = list(text) if regex.search(r"\p{Han}", text) else text.split(" ")
    glue = "" if regex.search(r"\p{Han}", text) else " "
    lines = [units[0]]
    for unit in units[1:]:
        longer = lines[-1] + glue + unit
        if font.getlength(longer) <= room:
            lines[-1] = longer
        else:
            lines.append(unit)
    return lines if len(lines) <= 3 and all(font.getlength(line) <= room for line in lines) else []


def _find(fonts: Path, name: str) -> Path:
    found = sorted(fonts.rglob(name))
    if not found:
        raise SeavlmError(
            f"there is no {name} below {fonts}", hint="Install fonts-noto-core and fonts-noto-cjk."
        )
    return found[0]


def build(fonts: Path, out: Path) -> int:
    """Write OUT, and return the number of pictures."""
    table = pa.Table.from_pylist(list(rows(fonts)))
    pq.write_table(table, out, compression="zstd", write_statistics=False)
    return table.num_rows


if __name__ == "__main__":
    print(f"{build(Path(sys.argv[1]), Path(sys.argv[2]))} pictures")
