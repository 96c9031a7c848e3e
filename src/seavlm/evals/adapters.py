"""From a data set's own rows to samples that `tasks.question_of` reads: one function a data set.

Each takes rows as the published Parquet or JSONL files have them, and the options of its task in the suite's
file. Nothing is fetched and nothing of them ships: the data sets have licences of their own (the suites say
which), and whoever evaluates has downloaded them. A row that cannot be asked (another language, a hidden
answer, no picture) is a `Skipped` with the reason; a file without the columns is an error that names them.

| adapter | columns it reads | seen in |
|---|---|---|
| cvqa | image, ID, Subset, Question, Options, Label, Category; Translated ... | card of afaji/cvqa |
| marvl | id, language, concept, hypothesis, hypo_en, label, left_img, right_img | SEA-HELM, vision/marvl |
| xm3600 | image_id, image, captions; the language is the file's name up to "-" | card of floschne/xm3600 |
| worldcuisines | qa_id, food_id, lang, prompt_type, image_path (or image), question, options, | SEA-HELM, |
| | mcq_answer_index, answer; pictures: images.tar.gz, unpacked in the folder | vision/world_cuisine |
| mtvqa | id, image, qa_pairs (a list written as text), lang | card of ByteDance/MTVQA |
| seavl | id, image, caption, caption_native_lang, native_lang ("Myanmar (mm)") | card of SEACrowd/sea-vl |
| samples | our own: id, task, language, messages, images, meta | |

SEA-HELM's text tasks: `seahelm.py`. Options of a task in a suite: `english` (cvqa, marvl, seavl) asks in
English, `open` (worldcuisines) without options.

What the authors score, and what is scored here: accuracy (CVQA, MaRVL, WorldCuisines): the same; that an
answer occurs in the reply (MTVQA, scripts/acc.py; WorldCuisines' open questions, evaluation/score, where an
answer in any language will do): measure `contains`, while the score wants a short reply; CIDEr (XM3600): chrF
and ROUGE-L. Balanced accuracy over the letters, which SEA-HELM reports: measure `balanced`.
"""

from __future__ import annotations

import ast
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from seavlm.data.tasks import templates
from seavlm.errors import SeavlmError
from seavlm.text.language import LANGUAGES

Row = dict[str, Any]
PROMPTS = Path(__file__).parent / "suites" / "prompts.yaml"
CODES = {  # other names of the eleven: ISO 639-3, CLDR's, and what data sets write
    **{language.english_name.lower(): code for code, language in LANGUAGES.items()},
    **{code: code for code in LANGUAGES},
    "mya": "my", "myanmar": "my", "eng": "en", "ind": "id", "khm": "km", "lao": "lo", "msa": "ms",
    "zsm": "ms", "bahasa melayu": "ms", "bahasa indonesia": "id", "zho": "zh", "cmn": "zh",
    "chinese": "zh", "fil": "tl", "filipino": "tl", "tgl": "tl", "tam": "ta", "tha": "th", "vie": "vi",
}  # fmt: skip


@dataclass(frozen=True)
class Skipped:
    """A row that is not asked."""

    reason: str


@dataclass(frozen=True)
class Source:
    """A task's files, in order, below `folder` (which pictures may be named from)."""

    paths: tuple[Path, ...]
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)

    def rows(self) -> Iterator[tuple[Path, Row]]:
        """(file, row) of all of them. SeavlmError for a file that cannot be read or has other columns."""
        for path in self.paths:
            try:
                for row in _lines(path) if path.suffix == ".jsonl" else _groups(path):
                    self._check(path, row)
                    yield path, row
            except (OSError, ValueError) as error:
                raise SeavlmError(f"cannot read {path}: {' '.join(str(error).split())}") from error

    def _check(self, path: Path, row: Row) -> None:
        adapter = self.options.get("adapter", "")
        names = [name.split("|") for name in COLUMNS.get(adapter, ())]
        if missing := [" or ".join(name) for name in names if not any(one in row for one in name)]:
            raise SeavlmError(
                f"{path} is no file of {adapter}: it has no column {', '.join(missing)}",
                hint=f"It has {', '.join(row)}. Check --data, and the task's files in the suite.",
            )


def _lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("a line is no JSON object")
                yield row


def _groups(path: Path) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=64):
            yield from batch.to_pylist()


def language_code(name: Any) -> str | None:
    """The code of "th", "THA", "Filipino", "Indonesian (ind)", "id_formal", "zh-s"; None for none of them."""
    text = str(name).strip().lower()
    inner = re.search(r"\((\w+)\)", text)
    for one in (text, re.split("[_-]", text)[0], text.split("(")[0].strip(), inner[1] if inner else ""):
        if one in CODES:
            return CODES[one]
    return None


@cache
def prompt(language: str, name: str) -> str:
    """A sentence of suites/prompts.yaml."""
    return _prompts()[language][name]


@cache
def _prompts() -> dict[str, dict[str, str]]:
    return yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))


def sample(
    name: str,
    task: str,
    language: str,
    text: str,
    pictures: Sequence[bytes] = (),
    *,
    system: str = "",
    **meta: Any,
) -> Row:
    """A question as a row of samples: the pictures, then the text."""
    parts = [{"type": "image", "text": None} for _ in pictures] + [{"type": "text", "text": text}]
    turns = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    return {
        "id": name,
        "task": task,
        "language": language,
        "messages": [*turns, {"role": "user", "content": parts}],
        "images": [{"bytes": picture, "path": None} for picture in pictures],
        "meta": meta,
    }


def multiple_choice(
    name: str, task: str, language: str, question: str, options: Sequence[str], right: int, **more: Any
) -> Row:
    """A question, its options a line each under the language's own letters."""
    options = [" ".join(str(option).split()) for option in options]
    alphabet = LANGUAGES[language].option_letters
    letters = list((alphabet if len(options) <= len(alphabet) else "ABCDEFGHIJ")[: len(options)])
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
    meta: dict[str, Any] = {
        "kind": "letter",
        "options": options,
        "letters": letters,
        "answer": options[right],
    }
    return sample(name, task, language, f"{question}\n{listed}", **meta, **more)


def picture_bytes(value: Any, path: Path, folder: Path) -> bytes | None:
    """The encoded picture of an Image column ({bytes, path}), of bytes, or of a path within `folder`: from
    the row's file `path` on upwards, since some name it from there and some from the data set's root."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, str) and value:
        root = folder.resolve()
        for place in path.resolve().parents:
            if not place.is_relative_to(root):
                break
            found = (place / value).resolve()
            if found.is_relative_to(root) and found.is_file():
                return found.read_bytes()
    return None


def listed(value: Any) -> list[Any]:
    """A list, or one that is written as text; ValueError for what is none."""
    try:
        found = ast.literal_eval(value) if isinstance(value, str) else value
    except SyntaxError:
        found = None
    if not isinstance(found, list | tuple):
        raise ValueError(f"{value!r} is no list")
    return list(found)


def _cvqa(source: Source) -> Iterator[Row | Skipped]:
    english = bool(source.options.get("english"))
    for path, row in source.rows():
        language = "en" if english else language_code(_subset(row["Subset"]))
        picture = picture_bytes(row["image"], path, source.folder)
        options = listed(row["Translated Options" if english else "Options"])
        if language is None:
            yield Skipped("another language")
        elif picture is None:
            yield Skipped("no picture")
        elif not 0 <= int(row["Label"]) < len(options):
            yield Skipped("the answer is hidden (Label -1)")
        else:
            yield multiple_choice(
                f"cvqa-{row['ID']}{'-en' if english else ''}",
                source.options["name"],
                language,
                row["Translated Question" if english else "Question"],
                options,
                int(row["Label"]),
                pictures=[picture],
                concept=str(row["ID"]).rsplit("_", 1)[0],  # several questions may be about one picture
                family=str(row.get("Category") or ""),
            )


def _subset(text: Any) -> str:
    """The language of "('Indonesian', 'Indonesia')"."""
    try:
        return str(ast.literal_eval(text)[0]) if isinstance(text, str) else str(text[0])
    except (ValueError, SyntaxError, IndexError, TypeError):
        return str(text)


def _marvl(source: Source) -> Iterator[Row | Skipped]:
    english = bool(source.options.get("english"))
    for path, row in source.rows():
        spoken = language_code(row["language"]) if row.get("language") else file_language(path)
        language = "en" if english else spoken
        pictures = [picture_bytes(row[side], path, source.folder) for side in ("left_img", "right_img")]
        found = [picture for picture in pictures if picture]
        if language is None:
            yield Skipped("another language")
            continue
        if len(found) < 2:
            yield Skipped("no picture")
            continue
        words, said = templates(language), row["hypo_en" if english else "hypothesis"]
        truth = row["label"] if isinstance(row["label"], bool) else str(row["label"]).lower() in ("true", "1")
        yield sample(
            f"marvl-{spoken}-{row['id']}{'-en' if english else ''}",
            source.options["name"],
            language,
            prompt(language, "pair").format(text=said.strip(), yes=words.yes[0], no=words.no[0]),
            found,
            kind="yesno",
            answer=(words.yes if truth else words.no)[0],
            concept=f"{spoken}-{row.get('concept') or row['id']}",
        )


def file_language(path: Path) -> str | None:
    """The language of "fil-00000-of-00001.parquet", "id_single/eval-0.parquet", "tl_paws.jsonl"."""
    return language_code(re.split(r"[-.]", path.name)[0]) or language_code(path.parent.name)


def _xm3600(source: Source) -> Iterator[Row | Skipped]:
    for path, row in source.rows():
        language = language_code(row["language"]) if row.get("language") else file_language(path)
        yield _caption(source, path, row, str(row["image_id"]), language, list(row["captions"]))


def _seavl(source: Source) -> Iterator[Row | Skipped]:
    for path, row in source.rows():
        if source.options.get("english"):
            yield _caption(source, path, row, str(row["id"]), "en", [row["caption"]])
        else:
            language = language_code(row["native_lang"])
            yield _caption(source, path, row, str(row["id"]), language, [row["caption_native_lang"]])


def _caption(
    source: Source, path: Path, row: Row, name: str, language: str | None, captions: Sequence[str | None]
) -> Row | Skipped:
    picture = picture_bytes(row["image"], path, source.folder)
    written = [caption.strip() for caption in captions if caption and caption.strip()]
    if language is None:
        return Skipped("another language")
    if picture is None or not written:
        return Skipped("no caption" if picture else "no picture")
    task = source.options["name"]
    return sample(
        f"{task}-{language}-{name}",
        task,
        language,
        prompt(language, "caption"),
        [picture],
        kind="caption",
        answer=written,
        concept=name,
    )


SETTINGS = {"1": "no-context", "2": "location", "3": "contextualized", "4": "adversarial"}
"""WorldCuisines' prompt_type: how its authors report it; the third tells of the dish, the fourth misleads."""


def _worldcuisines(source: Source) -> Iterator[Row | Skipped]:
    open_ended = bool(source.options.get("open"))
    accepted: dict[str, list[str]] = defaultdict(list)
    if open_ended:  # in whichever language a reply names the dish
        for _, row in source.rows():
            if (answer := str(row["answer"])) not in accepted[str(row["qa_id"])]:
                accepted[str(row["qa_id"])].append(answer)
    for path, row in source.rows():
        language = language_code(row["lang"])
        if language is None:
            yield Skipped("another language")
            continue
        picture = picture_bytes(row.get("image") or row.get("image_path"), path, source.folder)
        if picture is None:
            yield Skipped("no picture")
            continue
        about: dict[str, Any] = {
            "pictures": [picture],
            "concept": str(row.get("food_id") or row["qa_id"]),
            "family": SETTINGS.get(str(row.get("prompt_type")), ""),
        }
        name = f"worldcuisines-{row['qa_id']}-{row['lang']}"
        task, question = source.options["name"], row["question"]
        if open_ended:
            asked, own = f"{question}\n{prompt(language, 'short')}", str(row["answer"])
            answers = [own, *(one for one in accepted[str(row["qa_id"])] if one != own)]
            yield sample(name, task, language, asked, kind="short", answer=answers, **about)
        else:
            right = int(row["mcq_answer_index"])
            yield multiple_choice(name, task, language, question, listed(row["options"]), right, **about)


def _mtvqa(source: Source) -> Iterator[Row | Skipped]:
    for path, row in source.rows():
        language = language_code(row["lang"])
        picture = picture_bytes(row["image"], path, source.folder)
        if language is None or picture is None:
            yield Skipped("another language" if picture else "no picture")
            continue
        try:
            pairs = listed(row["qa_pairs"])
        except ValueError:
            yield Skipped("qa_pairs cannot be read")
            continue
        for index, pair in enumerate(pairs):
            yield sample(
                f"mtvqa-{row['id']}-{index}",
                source.options["name"],
                language,
                f"{pair['question']}\n{prompt(language, 'short')}",
                [picture],
                kind="short",
                answer=str(pair["answer"]),
                concept=str(row["id"]),
            )


def _samples(source: Source) -> Iterator[Row | Skipped]:
    for _, row in source.rows():
        meta = row.get("meta") or {}
        meta = json.loads(meta) if isinstance(meta, str) else meta
        yield {**row, "task": row.get("task") or source.options["name"], "meta": meta}


ADAPTERS: dict[str, Callable[[Source], Iterator[Row | Skipped]]] = {
    "cvqa": _cvqa,
    "marvl": _marvl,
    "xm3600": _xm3600,
    "seavl": _seavl,
    "worldcuisines": _worldcuisines,
    "mtvqa": _mtvqa,
    "samples": _samples,
}
COLUMNS: dict[str, tuple[str, ...]] = {  # what a row must have; "a|b": one of them
    "cvqa": ("image", "ID", "Subset", "Question", "Options", "Label"),
    "marvl": ("id", "hypothesis", "label", "left_img", "right_img"),
    "xm3600": ("image_id", "image", "captions"),
    "seavl": ("id", "image", "caption", "caption_native_lang", "native_lang"),
    "worldcuisines": (
        "qa_id",
        "lang",
        "image|image_path",
        "question",
        "options",
        "mcq_answer_index",
        "answer",
    ),
    "mtvqa": ("id", "image", "qa_pairs", "lang"),
    "seahelm": ("prompts",),
    "samples": ("id", "language", "messages"),
}
