"""Questions about pictures, in eleven languages: drawn from the picture set, asked with native templates.

| task | picture | question | answer |
|---|---|---|---|
| name | one drawing | What is this? | its name |
| choose | one drawing | which of four names, half of the time of one subgroup? | that name |
| letter | one drawing | the same, to be answered with the letter alone | the native option letter |
| yesno | one drawing | is this "..."? | the language's yes or no |
| flag | a country's flag | whose flag is this? | the country's name |
| corner | a sheet of 2 x 2 drawings | what is at the top left (or another corner)? | that drawing's name |
| count | 1 to 6 copies of a drawing | how many? | a number; native digits where everyday print has them |
| tools | none | translate a word, work out a sum ... | calls of functions, or a text (`tools.py`) |

A sample is made in two steps. A `Draw` is the question without words: which concepts, whose drawing, which
place. `_row` then asks it in one language. Training draws anew for every sample; an evaluation asks each
draw in all its languages, so that languages are compared on the same pictures. Evaluation concepts are
split in two by a hash of their key: `dev` asks about a third of them (to choose a merge by), `eval` about
the others.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from PIL import Image, ImageChops

from seavlm.data.pictures import (
    FAMILIES,
    HELD_OUT_FLAGS,
    SIZE,
    TRAINED_FLAGS,
    Concept,
    Flag,
    Pictures,
)
from seavlm.data.tools import TASK as TOOLS
from seavlm.data.tools import Talks
from seavlm.errors import SeavlmError, nearest
from seavlm.text.language import LANGUAGES, to_native_digits

TEMPLATES = Path(__file__).with_name("templates.yaml")
TASKS = ("name", "choose", "letter", "yesno", "flag", "corner", "count")  # about pictures
ALL_TASKS = (*TASKS, TOOLS)
Split = Literal["train", "dev", "eval"]
Row = dict[str, Any]
MOST_COPIES = 6
DEV_SHARE = 3  # one concept in DEV_SHARE is asked about in `dev`, the rest in `eval`
PLAIN_SHEETS = 0.5  # share of sheets and rows of copies on pure white; the others have a light tint


@dataclass(frozen=True)
class Templates:
    """One language of templates.yaml."""

    questions: dict[str, list[str]]  # task -> its templates
    places: list[str]  # top left, top right, bottom left, bottom right
    yes: list[str]  # the reply, then other ways to say it
    no: list[str]
    native_digits: bool


@cache
def templates(language: str) -> Templates:
    """The question templates and set words of one language."""
    entry = yaml.safe_load(TEMPLATES.read_text(encoding="utf-8"))[language]
    return Templates(
        questions={task: entry[task] for task in TASKS},
        places=entry["places"],
        yes=entry["yes"],
        no=entry["no"],
        native_digits=entry.get("native_digits", False),
    )


@dataclass(frozen=True)
class Draw:
    """A question before it is put in words."""

    task: str
    target: str  # key of the concept (code of the flag) that is shown, or asked for
    family: str
    others: tuple[
        str, ...
    ]  # choose, letter: 3 wrong options; yesno: the wrong name, or none; corner: 3 more drawings
    place: int  # choose, letter: index of the right option; corner: of the corner; count: number of copies
    template: int  # which template, modulo the number that a language has
    art: int  # seed of the composed picture


def make_samples(
    pictures: Pictures,
    *,
    split: Split,
    tasks: Mapping[str, float],
    languages: Sequence[str],
    families: Sequence[str],
    concepts: Sequence[Concept] | int | Sequence[str] | None,
    n: int,
    seed: int,
    task_concepts: Mapping[str, int | Sequence[str] | None] | None = None,
) -> Iterator[Row]:
    """Sample rows (see seavlm.data.samples.SCHEMA), the same for the same arguments.

    tasks: task -> weight; families: art families to draw from (flags have their own: flag-icons for training,
    twemoji for dev and eval); concepts: concepts, or what `Pictures.select` takes; task_concepts:
    the same for single tasks, where they differ.

    split "train": n rows, tasks by weight, each task going evenly through all (concept, language) pairs.
    split "dev" or "eval": about n rows; every task asks the same number of draws (by its weight) in each of
    the languages, so n is rounded to a multiple of their number. Row ids are stable: the k-th question of a
    task does not depend on n, on the languages or on the other tasks.

    SeavlmError for unknown tasks, languages, families or concepts, and for fewer than four concepts.
    """
    _check(tasks, languages, families)
    own = {task: (task_concepts or {}).get(task, concepts) for task in tasks}
    worlds = {
        task: Talks(pictures, _concepts(pictures, wanted), split)
        if task == TOOLS
        else _World.of(pictures, _concepts(pictures, wanted), families, split)
        for task, wanted in own.items()
    }
    if split == "train":
        yield from _train(worlds, tasks, languages, n, seed)
    else:
        yield from _questions(worlds, tasks, languages, n, seed)


def corpus_texts(
    languages: Sequence[str] | None = None, concepts: int | Sequence[str] | None = None
) -> Iterator[str]:
    """Every text that questions and answers are made of, each piece in the places it can stand in.

    For trimming a vocabulary: the tokens of these texts are the tokens of any sample. Names come alone (an
    answer), as an option after each letter, and inside every template; numbers from 0 to 99 in both kinds
    of digits.
    """
    from seavlm.data.pictures import load_pictures

    pictures = load_pictures()
    chosen = pictures.select(concepts)
    for language in languages or tuple(LANGUAGES):
        words = templates(language)
        letters = LANGUAGES[language].option_letters
        yield from words.yes
        yield from words.no
        yield from letters
        yield from (str(number) for number in range(100))
        yield from (to_native_digits(str(number), language) for number in range(100))
        yield from words.questions["name"]
        yield from words.questions["flag"]
        yield from (t.format(place=place) for t in words.questions["corner"] for place in words.places)
        yield from (flag.names[language] for flag in pictures.flags)
        for concept in chosen:
            name = concept.names[language]
            yield name
            options = "\n".join(f"{letter}. {name}" for letter in letters)
            asked = (*words.questions["choose"], *words.questions["letter"])
            yield from (t.format(options=options) for t in asked)
            yield from (t.format(name=name) for t in (*words.questions["yesno"], *words.questions["count"]))


# --- what can be asked


@dataclass(frozen=True)
class _World:
    """What a split may show and ask: concepts and flags, by key, and how they stand to each other."""

    pictures: Pictures
    split: str
    families: tuple[str, ...]
    concepts: dict[str, Concept]
    targets: tuple[str, ...]  # keys that are asked about, in the set's order
    flags: dict[str, Flag]
    flag_targets: tuple[str, ...]
    subgroups: dict[str, tuple[str, ...]]

    @staticmethod
    def of(pictures: Pictures, chosen: Sequence[Concept], families: Sequence[str], split: str) -> _World:
        concepts = {concept.key: concept for concept in chosen}
        flags = {flag.code: flag for flag in pictures.flags if flag.asked}
        subgroups: dict[str, list[str]] = defaultdict(list)
        for concept in chosen:
            subgroups[concept.subgroup].append(concept.key)
        targets = tuple(key for key in concepts if split == "train" or split_of(key) == split)
        if len(chosen) < 4 or not targets:
            raise SeavlmError(
                f"{len(chosen)} concepts, {len(targets)} of them for {split}; at least 4 and 1 are needed",
                hint="Take more concepts.",
            )
        return _World(
            pictures,
            split,
            tuple(families),
            concepts,
            targets,
            flags,
            tuple(code for code in flags if split == "train" or split_of(code) == split),
            {name: tuple(keys) for name, keys in subgroups.items()},
        )


def split_of(key: str) -> str:
    """ "dev" or "eval": which evaluation asks about this concept or flag."""
    return "dev" if hashlib.sha256(key.encode()).digest()[0] % DEV_SHARE == 0 else "eval"


def _check(tasks: Mapping[str, float], languages: Sequence[str], families: Sequence[str]) -> None:
    for kind, given, known in (
        ("task", tasks, ALL_TASKS),
        ("language", languages, tuple(LANGUAGES)),
        ("art family", families, FAMILIES),
    ):
        for name in given:
            if name not in known:
                raise SeavlmError(
                    f"unknown {kind} {name!r}" + nearest(name, known), hint=f"Known: {', '.join(known)}."
                )
        if not given:
            raise SeavlmError(f"no {kind} given", hint=f"Known: {', '.join(known)}.")
    if min(tasks.values()) < 0 or sum(tasks.values()) <= 0:
        raise SeavlmError(f"task weights {dict(tasks)} must not be negative, and one must be positive")


def _concepts(
    pictures: Pictures, wanted: Sequence[Concept] | int | Sequence[str] | None
) -> tuple[Concept, ...]:
    if wanted is None or isinstance(wanted, (int, str)):
        return pictures.select(wanted)
    concepts = [one for one in wanted if isinstance(one, Concept)]
    names = [one for one in wanted if isinstance(one, str)]
    return (*concepts, *(pictures.select(names) if names else ()))


def _shares(tasks: Mapping[str, float], total: int) -> dict[str, int]:
    """`total` split by weight; what rounding leaves goes to the largest remainders."""
    weight = sum(tasks.values())
    exact = {task: total * share / weight for task, share in tasks.items()}
    counts = {task: int(share) for task, share in exact.items()}
    by_remainder = sorted(exact, key=lambda task: (counts[task] - exact[task], ALL_TASKS.index(task)))
    for task in by_remainder[: total - sum(counts.values())]:
        counts[task] += 1
    return counts


# --- drawing


def _train(
    worlds: Mapping[str, _World | Talks],
    tasks: Mapping[str, float],
    languages: Sequence[str],
    n: int,
    seed: int,
) -> Iterator[Row]:
    order = [task for task, count in _shares(tasks, n).items() for _ in range(count)]
    random.Random(f"{seed} train order").shuffle(order)
    decks = {task: _deck(worlds[task], task, languages, f"{seed} train {task}") for task in tasks}
    for index, task in enumerate(order):
        target, language = next(decks[task])
        world = worlds[task]
        if isinstance(world, Talks):
            yield world.row(target, language, f"{seed} train {index}", f"train-{index:07d}")
            continue
        draw = _draw(world, task, target, random.Random(f"{seed} train {index}"))
        yield _row(world, draw, _picture(world, draw), language, f"train-{index:07d}")


def _deck(world: _World | Talks, task: str, languages: Sequence[str], seed: str) -> Iterator[tuple[str, str]]:
    """(target, language) pairs without end: all of them in a new order, again and again."""
    rng = random.Random(seed)
    targets = world.flag_targets if isinstance(world, _World) and task == "flag" else world.targets
    pairs = [(target, language) for target in targets for language in languages]
    while True:
        rng.shuffle(pairs)
        yield from pairs


def _questions(
    worlds: Mapping[str, _World | Talks],
    tasks: Mapping[str, float],
    languages: Sequence[str],
    n: int,
    seed: int,
) -> Iterator[Row]:
    for task, count in _shares(tasks, max(1, round(n / len(languages)))).items():
        world = worlds[task]
        targets = _deck(world, task, ["all"], f"{seed} {world.split} {task}")
        for index in range(count):
            target, _ = next(targets)
            drawn, name = f"{seed} {world.split} {task} {index}", f"{world.split}-{task}-{index:05d}"
            if isinstance(world, Talks):
                yield from (world.row(target, code, drawn, f"{name}-{code}") for code in languages)
                continue
            draw = _draw(world, task, target, random.Random(drawn))
            picture = _picture(world, draw)
            for language in languages:
                yield _row(world, draw, picture, language, f"{name}-{language}")


def _draw(world: _World, task: str, target: str, rng: random.Random) -> Draw:
    if task == "flag":
        family = TRAINED_FLAGS if world.split == "train" else HELD_OUT_FLAGS
    else:
        family = rng.choice(world.families)
    others: tuple[str, ...] = ()
    if task in ("choose", "letter", "corner"):
        others = _others(world, target, 3, rng)
    elif task == "yesno" and rng.random() < 0.5:
        others = _others(world, target, 1, rng)
    place = rng.randint(1, MOST_COPIES) if task == "count" else rng.randrange(4)
    return Draw(task, target, family, others, place, rng.randrange(60), rng.getrandbits(32))


def _others(world: _World, target: str, count: int, rng: random.Random) -> tuple[str, ...]:
    """`count` other concepts, half of the time from the target's subgroup, all with names of their own."""
    near = [key for key in world.subgroups[world.concepts[target].subgroup] if key != target]
    rng.shuffle(near)
    pool = near if rng.random() < 0.5 else []
    everything = list(world.concepts)
    taken = [target]
    tries = 0
    while len(taken) <= count:
        key = pool.pop() if pool else rng.choice(everything)
        if key not in taken and not any(_share_a_name(world, key, other) for other in taken):
            taken.append(key)
        if (tries := tries + 1) > 1000:
            raise SeavlmError(f"cannot find {count} other concepts with names of their own beside {target}")
    return tuple(taken[1:])


def _share_a_name(world: _World, one: str, other: str) -> bool:
    a, b = world.concepts[one].names, world.concepts[other].names
    return any(a[language] == b[language] for language in a)


# --- asking


def _row(world: _World, draw: Draw, picture: bytes, language: str, row_id: str) -> Row:
    words = templates(language)
    texts = words.questions[draw.task]
    text = texts[draw.template % len(texts)]
    meta: dict[str, Any] = {
        "concept": draw.target,
        "family": draw.family,
        "template": draw.template % len(texts),
    }
    if draw.task == "flag":
        flag = world.flags[draw.target]
        meta["concept"] = f"flag-{flag.code}"
        names = [flag.names[language], *(world.pictures.flag(code).names[language] for code in flag.same_as)]
        known = [other.names[language] for other in world.pictures.flags]
        answer, *aliases = [spelling for name in names for spelling in _spellings(name, known)]
    else:
        name = world.concepts[draw.target].names[language]
        answer, *aliases = _spellings(name, (c.names[language] for c in world.pictures.concepts))
    if draw.task in ("choose", "letter"):
        keys = [*draw.others]
        keys.insert(draw.place, draw.target)
        letters = LANGUAGES[language].option_letters
        options = [world.concepts[key].names[language] for key in keys]
        text = text.format(options="\n".join(f"{a}. {b}" for a, b in zip(letters, options, strict=True)))
        answer, aliases = letters[draw.place] if draw.task == "letter" else options[draw.place], []
        meta |= {"options": options, "letters": list(letters)}
        if draw.task == "choose":  # the same without the options in sight
            bare = words.questions["name"]
            meta["bare"] = bare[draw.template % len(bare)]
    elif draw.task == "yesno":
        asked = draw.others[0] if draw.others else draw.target
        text = text.format(name=world.concepts[asked].names[language])
        answer, *aliases = words.no if draw.others else words.yes
        meta["asked"] = asked
    elif draw.task == "corner":
        text = text.format(place=words.places[draw.place])
        meta["place"] = ("top left", "top right", "bottom left", "bottom right")[draw.place]
    elif draw.task == "count":
        text = text.format(name=name)
        ascii_digits, native = str(draw.place), to_native_digits(str(draw.place), language)
        answer, other = (native, ascii_digits) if words.native_digits else (ascii_digits, native)
        aliases = [other] if other != answer else []
    meta |= {"answer": answer, "aliases": aliases}
    return {
        "id": row_id,
        "task": draw.task,
        "language": language,
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": text}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "images": [{"bytes": picture, "path": None}],
        "meta": json.dumps(meta, ensure_ascii=False),
    }


_REMARK = re.compile(r"\s*[(（][^)）]*[)）]")


def _spellings(name: str, names: Iterable[str]) -> list[str]:
    """A name, and the same without a remark in brackets: "Myanmar (Burma)", "Myanmar".

    Not so where another of `names` would come out the same: "刚果（金）", "刚果（布）".
    """
    short = _REMARK.sub("", name).strip()
    if short in ("", name) or any(
        _REMARK.sub("", other).strip() == short for other in names if other != name
    ):
        return [name]
    return [name, short]


# --- composing


def _picture(world: _World, draw: Draw) -> bytes:
    """WebP bytes, SIZE x SIZE. Single drawings are the shipped bytes themselves."""
    if draw.task == "flag":
        return world.pictures.flag_bytes(draw.target, draw.family)
    if draw.task == "corner":
        keys = [*draw.others]
        keys.insert(draw.place, draw.target)
        return _sheet(world.pictures, tuple(keys), draw.family, draw.art)
    if draw.task == "count":
        return _copies(world.pictures, draw.target, draw.family, draw.place, draw.art)
    return world.pictures.image_bytes(draw.target, draw.family)


def _sheet(pictures: Pictures, keys: tuple[str, ...], family: str, art: int) -> bytes:
    """Four drawings, half size, in the corners: top left, top right, bottom left, bottom right."""
    half = SIZE // 2
    canvas = Image.new("RGB", (SIZE, SIZE), "white")
    for index, key in enumerate(keys):
        drawing = _decoded(pictures, key, family).resize((half - 4, half - 4), Image.Resampling.LANCZOS)
        canvas.paste(drawing, (index % 2 * half + 2, index // 2 * half + 2))
    return _tinted_webp(canvas, random.Random(art))


def _copies(pictures: Pictures, key: str, family: str, count: int, art: int) -> bytes:
    """`count` copies on cells of a 3 x 3 grid, each a little displaced and none touching another."""
    rng = random.Random(art)
    cell = SIZE // 3
    size = rng.randint(cell - 8, cell - 2)
    drawing = _decoded(pictures, key, family).resize((size, size), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (SIZE, SIZE), "white")
    for place in rng.sample(range(9), count):
        left, top = (
            place % 3 * cell + rng.randint(0, cell - size),
            place // 3 * cell + rng.randint(0, cell - size),
        )
        canvas.paste(drawing, (left, top))
    return _tinted_webp(canvas, rng)


def _tinted_webp(canvas: Image.Image, rng: random.Random) -> bytes:
    if rng.random() >= PLAIN_SHEETS:
        tint = tuple(rng.randint(215, 255) for _ in range(3))
        canvas = ImageChops.multiply(canvas, Image.new("RGB", canvas.size, tint))
    buffer = io.BytesIO()
    canvas.save(buffer, "WEBP", quality=85, method=4)
    return buffer.getvalue()


def _decoded(pictures: Pictures, key: str, family: str) -> Image.Image:
    with Image.open(io.BytesIO(pictures.image_bytes(key, family))) as image:
        return image.convert("RGB")
