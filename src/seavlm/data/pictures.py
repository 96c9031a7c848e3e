"""The built-in picture set: drawings in six art families, country flags, and their names in 11 languages.

    pictures = load_pictures()
    dog = pictures["1f415"]
    dog.names["lo"], pictures.image_bytes(dog, "twemoji")      # the Lao name, a 128 x 128 WebP on white

`load_pictures` reads the copy that ships with the package; `build` makes that copy anew from the public npm
packages listed in build_pictures.py.

One art family is one hand: the same concept drawn by another family is another picture of the same thing.
So a held-out family is an honest test: the model has seen the concept, never this drawing of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from seavlm.errors import SeavlmError, nearest
from seavlm.text.language import LANGUAGES

BUILTIN = Path(__file__).parent / "builtin"
SIZE = 128  # pixels, width and height of every drawing
FAMILIES = ("twemoji", "openmoji", "noto", "noto-v1", "emojione", "fluent-3d")
FLAG_FAMILIES = ("flag-icons", "twemoji")
HELD_OUT = "fluent-3d"  # the family nothing is trained on; flags have theirs, below
TRAINED_FLAGS, HELD_OUT_FLAGS = FLAG_FAMILIES


@dataclass(frozen=True)
class Concept:
    """A thing that every family draws. `key`: its code points, hexadecimal, joined by '-', without U+FE0F."""

    key: str
    emoji: str
    group: str  # Unicode's group and subgroup, as "animals-nature", "animal-mammal"
    subgroup: str
    names: dict[str, str]  # language code -> name


@dataclass(frozen=True)
class Flag:
    """A country or territory. `code`: ISO 3166-1 alpha-2 (or reserved there), lower case."""

    code: str
    names: dict[str, str]
    same_as: tuple[str, ...]  # codes of those whose flag is the same to the eye
    asked: bool  # False where the flag is really another country's, or the two families draw different ones


class Pictures:
    """The whole set in memory (some 20 MB): concepts and flags in a fixed order, drawings as WebP bytes."""

    def __init__(
        self,
        concepts: Sequence[Concept],
        drawings: dict[tuple[str, str], bytes],
        flags: Sequence[Flag],
        flag_drawings: dict[tuple[str, str], bytes],
    ) -> None:
        self.concepts = tuple(concepts)
        self.flags = tuple(flags)
        self.families = FAMILIES
        self.flag_families = FLAG_FAMILIES
        self._drawings = drawings
        self._flag_drawings = flag_drawings
        self._by_key = {concept.key: concept for concept in self.concepts}
        self._by_code = {flag.code: flag for flag in self.flags}

    def __getitem__(self, key: str) -> Concept:
        """The concept of a key. SeavlmError when there is none."""
        try:
            return self._by_key[key]
        except KeyError:
            raise SeavlmError(f"no concept {key!r} in the picture set" + nearest(key, self._by_key)) from None

    def flag(self, code: str) -> Flag:
        """The flag of a country's code. SeavlmError when there is none."""
        try:
            return self._by_code[code]
        except KeyError:
            raise SeavlmError(f"no flag {code!r} in the picture set" + nearest(code, self._by_code)) from None

    def image_bytes(self, concept: Concept | str, family: str) -> bytes:
        """The WebP bytes of a concept (or its key) as one family draws it, SIZE x SIZE on white."""
        key = concept if isinstance(concept, str) else concept.key
        try:
            return self._drawings[key, family]
        except KeyError:
            known = FAMILIES if key in self._by_key else self._by_key
            word = family if key in self._by_key else key
            raise SeavlmError(f"no drawing of {key!r} by family {family!r}" + nearest(word, known)) from None

    def flag_bytes(self, flag: Flag | str, family: str) -> bytes:
        """The WebP bytes of a country's flag (or its code), SIZE x SIZE on white."""
        code = flag if isinstance(flag, str) else flag.code
        try:
            return self._flag_drawings[code, family]
        except KeyError:
            raise SeavlmError(
                f"no flag {code!r} by family {family!r}" + nearest(family, FLAG_FAMILIES)
            ) from None

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Every group and subgroup name, sorted."""
        return tuple(sorted({c.group for c in self.concepts} | {c.subgroup for c in self.concepts}))

    def select(self, wanted: int | Iterable[str] | None) -> tuple[Concept, ...]:
        """Concepts by number, by names of groups, subgroups or keys, or all of them (None or "all").

        A number takes that many spread evenly over the set's order, which runs group by group.
        SeavlmError for an unknown name, with the nearest known ones, and for a number out of range.
        """
        if wanted is None or wanted == "all":
            return self.concepts
        if isinstance(wanted, int):
            total = len(self.concepts)
            if not 0 < wanted <= total:
                raise SeavlmError(f"{wanted} concepts wanted, the picture set has {total}")
            return tuple(self.concepts[i * total // wanted] for i in range(wanted))
        names = {wanted} if isinstance(wanted, str) else set(wanted)
        known = {*self.groups, *self._by_key}
        for name in sorted(names - known):
            raise SeavlmError(f"no concept, group or subgroup {name!r}" + nearest(name, known))
        return tuple(c for c in self.concepts if names & {c.key, c.group, c.subgroup})


@cache
def load_pictures(folder: Path = BUILTIN) -> Pictures:
    """The picture set that ships with the package, or one that `build` has written to `folder`."""
    import pyarrow.parquet as pq

    try:
        concept_rows = pq.read_table(folder / "pictures.parquet").to_pylist()
        flag_rows = pq.read_table(folder / "flags.parquet").to_pylist()
    except (OSError, ValueError) as error:
        raise SeavlmError(
            f"cannot read the picture set in {folder}: {error}", hint="Install seavlm again."
        ) from error
    concepts, drawings = [], {}
    for row in concept_rows:
        concepts.append(
            Concept(
                row["key"],
                row["emoji"],
                row["group"],
                row["subgroup"],
                {c: row[f"name_{c}"] for c in LANGUAGES},
            )
        )
        drawings.update({(row["key"], family): row[f"image_{family}"] for family in FAMILIES})
    flags, flag_drawings = [], {}
    for row in flag_rows:
        flags.append(
            Flag(row["code"], {c: row[f"name_{c}"] for c in LANGUAGES}, tuple(row["same_as"]), row["asked"])
        )
        flag_drawings.update({(row["code"], family): row[f"image_{family}"] for family in FLAG_FAMILIES})
    return Pictures(concepts, drawings, flags, flag_drawings)


def build(out: Path, packages: Path | None = None) -> dict[str, int]:
    """Make the set anew from its npm packages; see `seavlm.data.build_pictures.build`."""
    from seavlm.data import build_pictures

    return build_pictures.build(out, packages)
