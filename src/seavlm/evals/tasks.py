"""Questions for a model, read from the rows of an `eval.parquet`.

A row is a training sample of the same task (`messages`, `images`, `meta`), so a question is its messages up
to the last user turn, with every picture put in the place of its image part. The pictures go in as the bytes
that the file holds: nothing is re-encoded on the way to the model. A data set's pictures are more than fits
into memory: a question holds the place of its own (`Pictures`), and reads them when it is asked.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from seavlm.errors import SeavlmError, nearest
from seavlm.text.language import LANGUAGES, to_ascii_digits

Messages = list[dict[str, Any]]
Answerer = Callable[[list[Messages]], Sequence[str]]
"""A batch of conversations in, one reply each out, in the same order. An engine or an HTTP endpoint, either
will do. A reply may be a `Reply`, which knows what it cost.
"""
Ranker = Callable[[list[Messages], list[tuple[str, ...]]], list[str]]
"""The same, but each reply is the one of that conversation's options which the model finds most likely."""
RANKED = "ranked"
"""The task of a `choose` question that is asked once more of a `Ranker`, without its options in sight."""
GRADED = ("caption", "answer", "summary", "translation")
"""Kinds whose replies are neither right nor wrong, but more or less like what people wrote."""
OPEN = ("read", "short", "checks", "calls", *GRADED)
"""Kinds of question that guessing does not answer."""
BLIND = "/blind"
"""What ends the task of a question that is asked once more without its pictures."""


class Reply(str):
    """A reply's text, with the tokens it took, and with what went wrong where there is none.

    finish: "length" where it was cut at the most tokens it might have, "content_filter" where what it runs
    behind kept something back; nothing where the model ended it.
    """

    prompt_tokens: int
    new_tokens: int
    error: str
    finish: str

    def __new__(
        cls, text: str, prompt_tokens: int = 0, new_tokens: int = 0, error: str = "", finish: str = ""
    ) -> Reply:
        self = super().__new__(cls, text)
        self.prompt_tokens, self.new_tokens, self.error, self.finish = (
            prompt_tokens, new_tokens, error, finish,
        )  # fmt: skip
        return self


class Picture:
    """An encoded picture in a `Pictures`."""

    def __init__(self, pictures: Pictures, start: int, size: int) -> None:
        self.pictures, self.start, self.size = pictures, start, size

    def read(self) -> bytes:
        with self.pictures.lock:
            self.pictures.file.seek(self.start)
            return self.pictures.file.read(self.size)


class Pictures:
    """Encoded pictures, each once: in memory while they are few, then in a file in the folder for temporary
    files (TMPDIR), which is gone when the process is."""

    memory = 64 << 20  # bytes

    def __init__(self) -> None:
        self.file = tempfile.SpooledTemporaryFile(max_size=self.memory)  # noqa: SIM115 (it outlives this)
        self.lock = threading.Lock()
        self.known: dict[bytes, Picture] = {}
        self.end = 0

    def keep(self, data: bytes) -> Picture:
        digest = hashlib.sha256(data).digest()
        if digest not in self.known:
            with self.lock:
                self.file.seek(self.end)
                self.file.write(data)
            self.known[digest] = Picture(self, self.end, len(data))
            self.end += len(data)
        return self.known[digest]


@dataclass(frozen=True)
class Question:
    """One question with all that is needed to judge a reply to it.

    `answers` are the accepted texts (the first one is shown); for a multiple-choice question they are among
    `options`. `concept` is the cluster of the statistics: the same drawing is asked about in many languages
    and tasks, so these answers rise and fall together. `chance` is what a guess without the picture scores;
    None means that `with_chance` derives it from the other questions of the task. `context` is the text of
    the turns before the last one, as JSON [[role, text], ...]; empty where there are none. `bare` is the
    question without its options in sight, for a `Ranker`. `kind` is how a reply is read (`metrics`), where
    that is not the task's own name; `checks` is what a reply must fulfil, as JSON (`formats`).
    """

    id: str
    task: str
    language: str
    concept: str
    prompt: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    letters: tuple[str, ...] = ()
    family: str = ""
    chance: float | None = None
    image_sha256: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()  # that are offered
    kind: str = ""
    checks: str = ""
    context: str = ""
    bare: str = field(default="", compare=False)
    messages: Messages = field(default_factory=list, repr=False, compare=False)

    @property
    def reading(self) -> str:
        """How a reply is read: the kind, or the task that is its own kind."""
        return self.kind or self.task.removesuffix(BLIND)

    @property
    def counted(self) -> bool:
        return counted(self.task)

    def conversation(self) -> Messages:
        """The messages, with the pictures themselves."""

        def read(part: Any) -> Any:
            return {**part, "image": part["image"].read()} if isinstance(part.get("image"), Picture) else part

        return [
            turn
            if isinstance(turn["content"], str)
            else {**turn, "content": list(map(read, turn["content"]))}
            for turn in self.messages
        ]


def counted(task: str) -> bool:
    """Whether a task is in the averages: not where it asks the questions of another once more."""
    return task != RANKED and not task.endswith(BLIND)


def question_of(row: dict[str, Any], pictures: Pictures | None = None) -> Question:
    """The question in one row of an `eval.parquet`. pictures: where to keep its own; else it holds them.

    Raises SeavlmError when the row cannot be asked: no user turn, no answer, a language that is not one of
    the eleven, or image parts and images that differ in number.
    """
    name = str(row.get("id", "?"))
    language = str(row.get("language", ""))
    if language not in LANGUAGES:
        raise SeavlmError(
            f"question {name}: unknown language {language!r}", hint=f"Use one of {' '.join(LANGUAGES)}"
        )
    meta = _meta(row.get("meta"), name)
    turns = list(row["messages"])
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or turns[-1]["role"] != "user":
        raise SeavlmError(f"question {name}: no user turn to answer", hint="Write the data again")

    encoded = [image["bytes"] if isinstance(image, dict) else image for image in row.get("images") or []]
    messages, used, texts = _fill(turns, [pictures.keep(one) for one in encoded] if pictures else encoded)
    if used != len(encoded):
        raise SeavlmError(
            f"question {name}: {used} image parts for {len(encoded)} images", hint="Write the data again"
        )

    options = tuple(str(option) for option in meta.get("options") or ())
    answers = _answers(meta, options)
    checks = meta.get("checks") or ({"defaults": meta["defaults"]} if meta.get("defaults") else None)
    if not answers and not meta.get("checks"):
        raise SeavlmError(f"question {name}: no answer in its meta", hint='meta needs {"answer": ...}')
    return Question(
        id=name,
        task=str(row["task"]),
        language=language,
        concept=str(meta.get("concept") or name),
        prompt=texts[-1],
        answers=answers,
        options=options,
        letters=tuple(meta.get("letters") or LANGUAGES[language].option_letters[: len(options)]),
        family=str(meta.get("family") or ""),
        chance=float(meta["chance"]) if meta.get("chance") is not None else None,
        functions=tuple(meta.get("functions") or ()),
        kind=str(meta.get("kind") or ""),
        checks=json.dumps(checks, ensure_ascii=False) if checks else "",
        context=json.dumps(
            [[turn["role"], text] for turn, text in zip(turns[:-1], texts, strict=False)], ensure_ascii=False
        )
        if len(turns) > 1
        else "",
        bare=str(meta.get("bare") or ""),
        image_sha256=tuple(hashlib.sha256(picture).hexdigest() for picture in encoded),
        messages=messages,
    )


def known_languages(codes: Iterable[str] | None) -> set[str] | None:
    """The codes that were asked for; SeavlmError for one that is none of the eleven."""
    if codes is None:
        return None
    for code in (codes := set(codes)):
        if code not in LANGUAGES:
            raise SeavlmError(
                f"unknown language {code!r}",
                hint=f"Known: {' '.join(LANGUAGES)}. --language may be given often.",
            )
    return codes


def known_tasks(asked: Iterable[str], seen: Iterable[str], what: str) -> None:
    """SeavlmError for a task that `what` has not."""
    for name in sorted(set(asked) - set(seen)):
        hint = f"It has {', '.join(sorted(seen))}.{nearest(name, sorted(seen))} --task may be given often."
        raise SeavlmError(f"{what} has no task {name!r}", hint=hint)


def load_questions(
    path: Path | str,
    *,
    tasks: Iterable[str] | None = None,
    languages: Iterable[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Question]:
    """The questions of an `eval.parquet`, in the file's order.

    `tasks` and `languages` keep only those; `limit` keeps at most so many questions of each task and
    language, drawn by concept, so that the languages are asked about the same ones.
    """
    wanted_tasks = set(tasks) if tasks is not None else None
    wanted_languages = known_languages(languages)
    seen: set[str] = set()
    questions, pictures = [], Pictures()
    try:
        with pq.ParquetFile(path) as file:
            for row in (row for batch in file.iter_batches(batch_size=64) for row in batch.to_pylist()):
                seen.add(row["task"])
                if (wanted_tasks is None or row["task"] in wanted_tasks) and (
                    wanted_languages is None or row["language"] in wanted_languages
                ):
                    questions.append(question_of(row, pictures))
    except (OSError, ValueError) as error:
        raise SeavlmError(
            f"cannot read questions from {path}: {error}", hint="Run `seavlm data` first"
        ) from error
    if wanted_tasks is not None:
        known_tasks(wanted_tasks, seen, str(path))
    questions = with_chance(questions)  # of guessing among all, not among the few that a limit leaves
    if limit is not None:
        questions = limited(questions, limit, seed)
    if not questions:
        raise SeavlmError(
            f"no questions left in {path}", hint="Check the tasks, the languages and the limit asked for"
        )
    return questions


def with_chance(questions: Sequence[Question]) -> list[Question]:
    """The questions with every `chance` known.

    One over the number of options where options are offered, one half for yes or no, nought for what is
    written freely (`OPEN`), else one over the number of different concepts (for `count`: different answers)
    that the task asks for.
    """
    targets: dict[str, set[str]] = defaultdict(set)
    for question in questions:
        number = question.reading == "count"
        targets[question.task].add(to_ascii_digits(question.answers[0]) if number else question.concept)
    return [
        question
        if question.chance is not None
        else replace(question, chance=_chance(question, len(targets[question.task])))
        for question in questions
    ]


def with_ranked(questions: Sequence[Question]) -> list[Question]:
    """The questions, and those that have a `bare` form once more in it, to be answered by a `Ranker`."""
    again = [
        replace(
            question,
            id=f"{question.id}/{RANKED}",
            task=RANKED,
            prompt=f"<image>\n{question.bare}",
            messages=[*question.messages[:-1], _in_words(question.messages[-1], question.bare)],
        )
        for question in questions
        if question.bare and question.options
    ]
    return [*questions, *again]


def with_blind(questions: Sequence[Question]) -> list[Question]:
    """The questions, and those with pictures once more without: what can be guessed, and in which language.

    A picture may make a model answer in another language than it is asked in; the difference between the two
    tells.
    """
    again = [
        replace(
            question,
            id=question.id + BLIND,
            task=question.task + BLIND,
            kind=question.reading,
            prompt=_no_marks(question.prompt),
            context=_no_marks_in(question.context),
            messages=[_without_pictures(turn) for turn in question.messages],
            image_sha256=(),
            bare="",
        )
        for question in questions
        if question.image_sha256 and question.counted
    ]
    return [*questions, *again]


def pictures_of(question: Question) -> list[bytes]:
    """The encoded pictures of a question that has not been asked in another process; else none."""
    parts = (part for turn in question.conversation() for part in turn["content"] if part["type"] == "image")
    return [part["image"] for part in parts if isinstance(part["image"], bytes)]


def fingerprint(questions: Iterable[Question]) -> str:
    """A SHA-256 of what is asked: the ids, prompts and what comes before them, pictures, accepted answers."""
    digest = hashlib.sha256()
    for question in questions:
        parts = [question.id, question.prompt, question.image_sha256, question.answers, question.options]
        parts += [part for part in (question.kind, question.checks, question.context) if part]
        digest.update(json.dumps(parts, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _chance(question: Question, targets: int) -> float:
    if question.options and question.reading in ("choose", "letter", RANKED):
        return 1 / len(question.options)
    if question.reading in OPEN:
        return 0.0
    return 0.5 if question.reading == "yesno" else 1 / targets


def _meta(meta: Any, name: str) -> dict[str, Any]:
    try:
        parsed = json.loads(meta) if isinstance(meta, str) else meta
    except ValueError as error:
        raise SeavlmError(f"question {name}: its meta is not JSON", hint="Write the data again") from error
    return parsed if isinstance(parsed, dict) else {}


def _answers(meta: dict[str, Any], options: tuple[str, ...]) -> tuple[str, ...]:
    """The accepted texts. An answer given as a letter or an index is replaced by the option it stands for."""
    answer = meta.get("answer")
    given = [str(one) for one in (answer if isinstance(answer, list) else [answer]) if one is not None]
    letters = [str(letter) for letter in meta.get("letters") or ()]
    if options:
        given = [
            options[letters.index(one)] if one in letters and one not in options else one for one in given
        ]
    return tuple(given + [str(alias) for alias in meta.get("aliases") or ()])


def _fill(turns: Sequence[dict[str, Any]], pictures: Sequence[Any]) -> tuple[Messages, int, list[str]]:
    """The turns with the pictures in their parts, the number of parts, and the turns as plain texts."""
    messages: Messages = []
    used = 0
    texts: list[str] = []
    for turn in turns:
        content = turn["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        parts: list[dict[str, Any]] = []
        words: list[str] = []
        for part in content:
            if part["type"] == "image":
                parts.append({"type": "image", "image": pictures[used] if used < len(pictures) else None})
                words.append("<image>")
                used += 1
            else:
                parts.append({"type": "text", "text": part["text"]})
                words.append(part["text"])
        messages.append({"role": turn["role"], "content": parts})
        texts.append("\n".join(words))
    return messages, used, texts


def _no_marks(prompt: str) -> str:
    """A turn's text without the marks of its pictures."""
    return "\n".join(line for line in prompt.split("\n") if line != "<image>")


def _no_marks_in(context: str) -> str:
    turns = [[role, _no_marks(text)] for role, text in json.loads(context or "[]")]
    return json.dumps(turns, ensure_ascii=False) if turns else ""


def _in_words(turn: dict[str, Any], text: str) -> dict[str, Any]:
    """The turn with its pictures, and `text` for all its texts."""
    pictures = [part for part in turn["content"] if part["type"] == "image"]
    return {**turn, "content": [*pictures, {"type": "text", "text": text}]}


def _without_pictures(turn: dict[str, Any]) -> dict[str, Any]:
    return {**turn, "content": [part for part in turn["content"] if part["type"] != "image"]}


def limited(questions: list[Question], limit: int, seed: int) -> list[Question]:
    """At most `limit` of each task and language. Concepts come in an order that does not depend on what else
    is asked: runs of a suite and of a part of it have their questions in common."""
    order = {q.concept: hashlib.sha256(f"{seed} {q.concept}".encode()).digest() for q in questions}
    taken: dict[tuple[str, str], int] = defaultdict(int)
    kept: set[int] = set()
    for index in sorted(range(len(questions)), key=lambda i: (order[questions[i].concept], i)):
        cell = (questions[index].task, questions[index].language)
        if taken[cell] < limit:
            taken[cell] += 1
            kept.add(index)
    return [question for index, question in enumerate(questions) if index in kept]
