"""From a data set's own rows to samples that `tasks.question_of` reads: one function a data set.

Each takes rows as the Parquet or JSONL file has them, and the options of its task in the suite's file.
Nothing is fetched: the data sets have licences of their own, and whoever evaluates has downloaded them. A row
that cannot be asked (another language, a hidden answer, no picture) is a `Skipped` with the reason.

| adapter | columns it reads |
|---|---|
| cvqa | image, ID, Subset, Question, Translated Question, Options, Translated Options, Label, Category |
| marvl | id, language, concept, hypothesis, label, left_img, right_img |
| xm3600 | image_id, image, captions; the language is the file's name up to its first "-" or "." |
| worldcuisines | qa_id, food_id, lang, image (or image_path), question, options, mcq_answer_index, answer |
| mtvqa | id, image, qa_pairs (a list written as text), lang |
| seavl | id, image, caption, caption_native_lang, native_lang ("Indonesian (ind)") |
| seahelm | id, label, prompts [{text, question, choice1 ...}], prompt_templates, metadata.language |
| samples | our own: id, task, language, messages, images, meta |

Options of a task in a suite: `english` (cvqa, seavl) asks in English, `open` (worldcuisines) without options;
seahelm takes `kind` (letter, short, caption), `template`, `letters`, `language` where its rows have none.

CVQA's public file hides its answers (Label -1); what is asked then is nothing, and it says so.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from seavlm.data.tasks import templates
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
    """The rows of a task's files, and where they came from."""

    rows: Iterator[tuple[Path, Row]]
    options: dict[str, Any] = field(default_factory=dict)


def language_code(name: Any) -> str | None:
    """The code of "th", "THA", "Filipino", "Indonesian (ind)", "id_formal"; None for none of the eleven."""
    text = str(name).strip().lower()
    inner = re.search(r"\((\w+)\)", text)
    for one in (text, text.split("_")[0], text.split("(")[0].strip(), inner[1] if inner else ""):
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


def picture_bytes(value: Any, folder: Path) -> bytes | None:
    """The encoded picture of an Image column ({bytes, path}), of bytes, or of a path beside the file."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, str) and value:
        path = (folder / value).resolve()
        if path.is_relative_to(folder.resolve()) and path.is_file():
            return path.read_bytes()
    return None


def _cvqa(source: Source) -> Iterator[Row | Skipped]:
    english = bool(source.options.get("english"))
    for path, row in source.rows:
        language = "en" if english else language_code(_subset(row["Subset"]))
        picture = picture_bytes(row["image"], path.parent)
        options = row["Translated Options" if english else "Options"]
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
    for path, row in source.rows:
        language = language_code(row.get("language") or _file_language(path))
        pictures = [picture_bytes(row[side], path.parent) for side in ("left_img", "right_img")]
        found = [picture for picture in pictures if picture]
        if language is None:
            yield Skipped("another language")
            continue
        if len(found) < 2:
            yield Skipped("no picture")
            continue
        words = templates(language)
        truth = row["label"] if isinstance(row["label"], bool) else str(row["label"]).lower() in ("true", "1")
        yield sample(
            f"marvl-{language}-{row['id']}",
            source.options["name"],
            language,
            prompt(language, "pair").format(text=row["hypothesis"].strip(), yes=words.yes[0], no=words.no[0]),
            found,
            kind="yesno",
            answer=(words.yes if truth else words.no)[0],
            concept=f"{language}-{row.get('concept') or row['id']}",
        )


def _file_language(path: Path) -> str:
    return re.split(r"[-.]", path.name)[0]


def _xm3600(source: Source) -> Iterator[Row | Skipped]:
    for path, row in source.rows:
        language = language_code(row.get("language") or _file_language(path))
        yield _caption(source, path, row, str(row["image_id"]), language, list(row["captions"]))


def _seavl(source: Source) -> Iterator[Row | Skipped]:
    for path, row in source.rows:
        if source.options.get("english"):
            yield _caption(source, path, row, str(row["id"]), "en", [row["caption"]])
        else:
            language = language_code(row["native_lang"])
            yield _caption(source, path, row, str(row["id"]), language, [row["caption_native_lang"]])


def _caption(
    source: Source, path: Path, row: Row, name: str, language: str | None, captions: Sequence[str | None]
) -> Row | Skipped:
    picture = picture_bytes(row["image"], path.parent)
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


def _worldcuisines(source: Source) -> Iterator[Row | Skipped]:
    open_ended = bool(source.options.get("open"))
    for path, row in source.rows:
        language = language_code(row["lang"])
        picture = picture_bytes(row.get("image") or row.get("image_path"), path.parent)
        if language is None:
            yield Skipped("another language")
        elif picture is None:
            yield Skipped("no picture")
        else:
            about: dict[str, Any] = {
                "pictures": [picture],
                "concept": str(row.get("food_id") or row["qa_id"]),
            }
            name = f"worldcuisines-{row['qa_id']}-{row['lang']}"
            task, question = source.options["name"], row["question"]
            if open_ended:
                asked = f"{question}\n{prompt(language, 'short')}"
                yield sample(name, task, language, asked, kind="short", answer=str(row["answer"]), **about)
            else:
                right = int(row["mcq_answer_index"])
                yield multiple_choice(name, task, language, question, row["options"], right, **about)


def _mtvqa(source: Source) -> Iterator[Row | Skipped]:
    for path, row in source.rows:
        language = language_code(row["lang"])
        picture = picture_bytes(row["image"], path.parent)
        if language is None or picture is None:
            yield Skipped("another language" if picture else "no picture")
            continue
        pairs = row["qa_pairs"]
        try:
            pairs = ast.literal_eval(pairs) if isinstance(pairs, str) else pairs
        except (ValueError, SyntaxError):
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


def _seahelm(source: Source) -> Iterator[Row | Skipped]:
    """kind in the suite's file: letter (default), short, caption (translations and summaries are graded)."""
    task, kind = source.options["name"], source.options.get("kind", "letter")
    for _, row in source.rows:
        said = (row.get("metadata") or {}).get("language")
        language = language_code(said or source.options.get("language"))
        if language is None:
            yield Skipped("another language")
            continue
        fields = dict((row.get("prompts") or [{}])[0])
        template = (row.get("prompt_templates") or [source.options.get("template")])[0]
        choices = [fields[key] for key in sorted(fields) if re.fullmatch(r"choice\d+", key)]
        name, label = f"{task}-{language}-{row['id']}", str(row["label"]).strip()
        concept = str(row["id"])
        if kind == "letter" and choices and not template:
            text = "\n\n".join(str(fields[key]) for key in ("text", "question") if fields.get(key))
            right = _option_index(label, len(choices))
            yield multiple_choice(name, task, language, text, choices, right, concept=concept)
            continue
        if template is None:
            yield Skipped("no template")
            continue
        text = _filled(template, fields)
        if kind == "letter":  # the options are in the text already, under Latin letters
            letters = list(source.options.get("letters") or "ABCDE"[: max(2, len(choices))])
            if label not in letters:
                yield Skipped("the label is no option")
                continue
            options = choices or letters
            meta = {"options": options, "letters": letters, "answer": options[letters.index(label)]}
            yield sample(name, task, language, text, kind=kind, concept=concept, **meta)
        else:
            yield sample(name, task, language, text, kind=kind, concept=concept, answer=label)


def _filled(template: str, fields: dict[str, Any]) -> str:
    """The template with its {fields}; those that are not known ({fewshot_examples}) are empty."""
    return re.sub(r"\{(\w+)\}", lambda found: str(fields.get(found[1], "")), template)


def _option_index(label: str, size: int) -> int:
    return int(label) if label.isdecimal() and int(label) < size else "ABCDEFGHIJ".index(label.upper()[:1])


def _samples(source: Source) -> Iterator[Row | Skipped]:
    for _, row in source.rows:
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
    "seahelm": _seahelm,
    "samples": _samples,
}
