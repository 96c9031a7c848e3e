"""Ask a model all questions, judge the replies, and write down everything.

A question that offers names is asked twice where the model can rank them. `choose` is the free reply to the
picture and the options, and may be none of these. `ranked` shows the picture without the options, and takes
of them what the model finds most likely to be the reply: what a classifier does that picks one of four
(lm-evaluation-harness: multiple_choice, in cloze form). It is in no average, which would count it twice.

out/questions.parquet   every question, its raw reply and verdict: `rescore` needs no model
out/results.json        scores per task and language, and their averages
out/table.md            the same for people
out/replies.jsonl       while the run lasts: what has been answered, so that a killed run goes on
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from seavlm.errors import SeavlmError
from seavlm.evals.metrics import Judgement, Vocabulary, judge
from seavlm.evals.stats import Bootstrap, Interval, bootstrap
from seavlm.evals.tasks import RANKED, Answerer, Question, Ranker, fingerprint, with_chance, with_ranked
from seavlm.text.language import GLOBAL_LANGUAGES, LANGUAGES, REGIONAL_LANGUAGES

SUITES = {"global": GLOBAL_LANGUAGES, "regional": REGIONAL_LANGUAGES}
FORMAT_ALARM = 0.10
"""A cell with more replies than this in the wrong format is marked: it measures the format, not the
knowledge.
"""

_COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("language", pa.string()),
        ("concept", pa.string()),
        ("family", pa.string()),
        ("prompt", pa.string()),
        ("image_sha256", pa.list_(pa.string())),
        ("answers", pa.list_(pa.string())),
        ("options", pa.list_(pa.string())),
        ("letters", pa.list_(pa.string())),
        ("functions", pa.list_(pa.string())),
        ("chance", pa.float64()),
        ("reply", pa.string()),
        ("parsed", pa.string()),
        ("verdict", pa.string()),
        ("language_ok", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Cell:
    """The score of one task in one language (or of an average, where `task` or `language` is "all")."""

    task: str
    language: str
    n: int
    accuracy: float
    low: float
    high: float
    wrong_answer: float
    wrong_format: float
    language_ok: float | None  # of the replies that show a language; None when none does
    chance: float
    normalised: float  # (accuracy - chance) / (1 - chance): 0 is guessing, 1 is perfect
    below_chance: bool  # the whole interval lies below chance: worse than not looking


@dataclass(frozen=True)
class Results:
    """Scores of one model on one set of questions. `records` has the rows of questions.parquet."""

    name: str
    suite: str  # SHA-256 of the questions
    cells: list[Cell]
    languages: dict[str, Cell]  # mean over the tasks
    tasks: dict[str, Cell]  # mean over the languages
    suites: dict[str, Cell]  # "global", "regional", "all": mean over task x language
    seconds: float
    records: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """All but the records, for results.json."""
        fields = asdict(replace(self, records=[]))
        del fields["records"]
        return fields


def evaluate(
    answerer: Answerer,
    questions: Sequence[Question],
    out: Path | str | None = None,
    *,
    name: str = "model",
    key: str = "",
    batch_size: int = 64,
    ranker: Ranker | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Results:
    """Ask `answerer` all `questions` and score its replies; with `out`, write them there.

    key: what decides the replies (a hash of the model's files, the settings they are asked with). With a key
    and `out`, the replies are kept as they come: a run that was killed goes on where it stopped, and one that
    was finished is only scored again, as long as key and questions are the same. Raises SeavlmError when the
    answerer returns another number of replies than it was asked for.
    """
    if not questions:
        raise SeavlmError(
            "there are no questions to ask", hint="Check the tasks and languages of the evaluation"
        )
    started = time.monotonic()
    questions = with_chance(with_ranked(questions) if ranker else questions)
    folder = Path(out) if out is not None else None
    key = f"{key}:{fingerprint(questions)}" if key else ""
    replies: dict[int, str] = {}
    journal: _Journal | None = None
    if folder and key:
        replies = _finished(folder / "questions.parquet", key)
        if not replies:
            journal = _Journal(folder / "replies.jsonl", key)
            replies = journal.read()

    # Alike prompts side by side: a batch is padded to its longest.
    todo = sorted(
        (index for index in range(len(questions)) if index not in replies),
        key=lambda index: (questions[index].task, questions[index].language, index),
    )
    with _progress_bar(progress) as bar:
        row = bar.add_task(f"asking {name}", total=len(questions), completed=len(replies))
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            answers = _ask([questions[index] for index in batch], answerer, ranker)
            if len(answers) != len(batch):
                raise SeavlmError(f"the model gave {len(answers)} replies to {len(batch)} questions")
            fresh = dict(zip(batch, answers, strict=True))
            replies |= fresh
            if journal:
                journal.add(fresh)
            bar.advance(row, len(batch))

    results = score(
        questions,
        [replies[index] for index in range(len(questions))],
        name=name,
        resamples=resamples,
        seed=seed,
        seconds=time.monotonic() - started,
    )
    if folder:
        write(results, folder, key=key)
        (folder / "replies.jsonl").unlink(missing_ok=True)
    return results


def _ask(batch: Sequence[Question], answerer: Answerer, ranker: Ranker | None) -> list[str]:
    """The replies to a batch, whose questions of one task stand together."""
    replies: list[str] = []
    for ranked, group in groupby(batch, key=lambda question: question.task == RANKED):
        asked = list(group)
        messages = [question.messages for question in asked]
        if ranked and ranker:
            replies += ranker(messages, [question.options for question in asked])
        else:
            replies += answerer(messages)
    return replies


def score(
    questions: Sequence[Question],
    replies: Sequence[str],
    *,
    name: str = "model",
    resamples: int = 1000,
    seed: int = 0,
    seconds: float = 0.0,
) -> Results:
    """Judge one reply a question and add up."""
    questions = with_chance(questions)
    vocabulary = Vocabulary.of(questions)
    verdicts = [
        judge(question, reply, vocabulary) for question, reply in zip(questions, replies, strict=True)
    ]
    records = [_record(*one) for one in zip(questions, replies, verdicts, strict=True)]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["task"], record["language"]].append(record)
    tasks = list(dict.fromkeys(task for task, _ in groups))
    languages = [code for code in LANGUAGES if any(language == code for _, language in groups)]
    ordered = [(task, code) for task in tasks for code in languages if (task, code) in groups]
    draws = _bootstrap([records], resamples, seed)
    cells = {cell: _cell(*cell, groups[cell], draws.interval([cell])) for cell in ordered}

    def average(task: str, language: str, members: Iterable[tuple[str, str]]) -> Cell:
        chosen = list(members)
        return _average(task, language, [cells[member] for member in chosen], draws.interval(chosen))

    counted = [cell for cell in cells if cell[0] != RANKED]
    suites = {
        suite: average("all", suite, [cell for cell in counted if cell[1] in codes])
        for suite, codes in {**SUITES, "all": tuple(LANGUAGES)}.items()
        if any(cell[1] in codes for cell in counted)
    }
    return Results(
        name=name,
        suite=fingerprint(questions),
        cells=list(cells.values()),
        languages={code: average("all", code, [c for c in counted if c[1] == code]) for code in languages},
        tasks={task: average(task, "all", [c for c in cells if c[0] == task]) for task in tasks},
        suites=suites,
        seconds=seconds,
        records=records,
    )


def rescore(path: Path | str, *, resamples: int = 1000, seed: int = 0) -> Results:
    """Judge the replies of a questions.parquet (or of the directory that holds it) again, without asking."""
    path = Path(path)
    path = path / "questions.parquet" if path.is_dir() else path
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise SeavlmError(f"cannot read {path}: {error}", hint="Run `seavlm eval` first") from error
    questions = [_question(row) for row in rows]
    name = (pq.read_schema(path).metadata or {}).get(b"seavlm_model", b"model").decode()
    return score(questions, [row["reply"] for row in rows], name=name, resamples=resamples, seed=seed)


def compare(a: Results, b: Results, *, resamples: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """a's accuracy minus b's, paired by question, clustered by concept: for each language and each suite.

    Raises SeavlmError when the two were not asked the same questions.
    """
    if [record["id"] for record in a.records] != [record["id"] for record in b.records] or a.suite != b.suite:
        raise SeavlmError(
            f"{a.name} and {b.name} were not asked the same questions", hint="Evaluate both on one set"
        )
    draws = _bootstrap([a.records, b.records], resamples, seed)
    groups = {code: (code,) for code in a.languages} | {
        suite: SUITES.get(suite, tuple(LANGUAGES)) for suite in a.suites
    }
    return {
        group: draws.difference(0, 1, [c for c in draws.cells if c[1] in codes and c[0] != RANKED])
        for group, codes in groups.items()
    }


def write(results: Results, out: Path, *, key: str = "") -> None:
    """Write questions.parquet, results.json and table.md into `out`, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    schema = _COLUMNS.with_metadata({"seavlm_model": results.name, "seavlm_key": key})
    rows = pa.Table.from_pylist(results.records, schema=schema)
    _replace(out / "questions.parquet", lambda path: pq.write_table(rows, path, compression="zstd"))
    text = json.dumps(results.to_dict(), indent=1, ensure_ascii=False)
    _replace(out / "results.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    _replace(out / "table.md", lambda path: path.write_text(markdown(results), encoding="utf-8"))


def markdown(results: Results) -> str:
    """The scores as a Markdown table: languages down, tasks across."""
    tasks = list(results.tasks)
    lines = [
        f"# {results.name}",
        "",
        "Accuracy in %, with its 95 % interval (questions resampled by concept). "
        f"`!` below chance, `f` more than {FORMAT_ALARM:.0%} of the replies in the wrong format.",
        "",
        "| language | " + " | ".join(tasks) + " | mean | wrong format | wrong answer | right language |",
        "|---|" + "---:|" * (len(tasks) + 4),
    ]
    for label, row in _rows(results):
        lines.append(f"| {label} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def table(results: Results) -> Table:
    """The same for the terminal, within 100 columns for six tasks: after each score, how far the farther end
    of its interval is.
    """
    grid = Table(title=f"{results.name}: accuracy %, ± at 95 %", title_justify="left", box=SIMPLE)
    grid.add_column("language", no_wrap=True)
    for head in (*results.tasks, "mean"):
        grid.add_column(head, justify="right", no_wrap=True)
    for head in ("wrong\nformat", "right\nlang."):
        grid.add_column(head, justify="right", no_wrap=True, style="dim")
    cells = {(cell.task, cell.language): cell for cell in results.cells}
    for code, mean in results.languages.items():
        row = [_short(cells.get((task, code))) for task in results.tasks]
        grid.add_row(LANGUAGES[code].english_name, *row, _short(mean), *_percents(mean))
    grid.add_section()
    for suite, mean in results.suites.items():
        across = [_short(results.tasks[task]) if suite == "all" else Text() for task in results.tasks]
        grid.add_row(suite, *across, _short(mean), *_percents(mean), style="bold")
    grid.caption = "red !: worse than guessing; yellow f: many replies in the wrong format"
    grid.caption_justify = "left"
    return grid


def _short(cell: Cell | None) -> Text:
    if cell is None:
        return Text()
    colour = {"!": "red", "f": "yellow"}.get(_mark(cell), "")
    reach = max(cell.high - cell.accuracy, cell.accuracy - cell.low)
    return Text(f"{cell.accuracy * 100:.0f} ±{reach * 100:.0f}{_mark(cell)}", style=colour)


def _percents(cell: Cell) -> tuple[str, str]:
    return f"{cell.wrong_format:.0%}", "-" if cell.language_ok is None else f"{cell.language_ok:.0%}"


def _mark(cell: Cell) -> str:
    return "!" if cell.below_chance else "f" if cell.wrong_format > FORMAT_ALARM else ""


def _rows(results: Results) -> Iterable[tuple[str, list[str]]]:
    """A label and the texts of a line, for each language, suite and the mean of each task."""
    cells = {(cell.task, cell.language): cell for cell in results.cells}
    for code, mean in results.languages.items():
        row = [_show(cells.get((task, code))) for task in results.tasks]
        yield f"{code} {LANGUAGES[code].english_name}", row + _tail(mean)
    for suite, mean in results.suites.items():
        across = [_show(results.tasks[task]) if suite == "all" else "" for task in results.tasks]
        yield suite, across + _tail(mean)


def _tail(mean: Cell) -> list[str]:
    language = "-" if mean.language_ok is None else f"{mean.language_ok:.1%}"
    return [_show(mean), f"{mean.wrong_format:.1%}", f"{mean.wrong_answer:.1%}", language]


def _show(cell: Cell | None) -> str:
    if cell is None:
        return ""
    interval = f"[{cell.low * 100:.0f}-{cell.high * 100:.0f}]"
    return f"{cell.accuracy * 100:.1f} {interval} {_mark(cell)}".strip()


def _cell(task: str, language: str, records: list[dict[str, Any]], interval: Interval) -> Cell:
    shown = [record["language_ok"] for record in records if record["language_ok"] is not None]
    return _finish(
        task,
        language,
        len(records),
        interval,
        _mean([record["verdict"] == "wrong_answer" for record in records]),
        _mean([record["verdict"] == "wrong_format" for record in records]),
        _mean(shown) if shown else None,
        _mean([record["chance"] for record in records]),
    )


def _average(task: str, language: str, cells: list[Cell], interval: Interval) -> Cell:
    shown = [cell.language_ok for cell in cells if cell.language_ok is not None]
    return _finish(
        task,
        language,
        sum(cell.n for cell in cells),
        interval,
        _mean([cell.wrong_answer for cell in cells]),
        _mean([cell.wrong_format for cell in cells]),
        _mean(shown) if shown else None,
        _mean([cell.chance for cell in cells]),
    )


def _finish(
    task: str,
    language: str,
    n: int,
    interval: Interval,
    wrong_answer: float,
    wrong_format: float,
    language_ok: float | None,
    chance: float,
) -> Cell:
    return Cell(
        task=task,
        language=language,
        n=n,
        accuracy=interval.mean,
        low=interval.low,
        high=interval.high,
        wrong_answer=wrong_answer,
        wrong_format=wrong_format,
        language_ok=language_ok,
        chance=chance,
        normalised=(interval.mean - chance) / (1 - chance) if chance < 1 else 0.0,
        below_chance=interval.high < chance,
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean([float(value) for value in values]))


def _bootstrap(models: Sequence[list[dict[str, Any]]], resamples: int, seed: int) -> Bootstrap:
    """Draws of the accuracy of several models asked the same questions."""
    first = models[0]
    cells: list[Hashable] = [(record["task"], record["language"]) for record in first]
    right = [[record["verdict"] == "correct" for record in records] for records in models]
    values = np.array(right, dtype=np.float64).T
    return bootstrap(values, [record["concept"] for record in first], cells, resamples=resamples, seed=seed)


_ASKED = (
    "id",
    "task",
    "language",
    "concept",
    "family",
    "prompt",
    "image_sha256",
    "answers",
    "options",
    "letters",
    "functions",
    "chance",
)


def _record(question: Question, reply: str, judgement: Judgement) -> dict[str, Any]:
    asked = {key: getattr(question, key) for key in _ASKED}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asked.items()} | {
        "reply": reply,
        **asdict(judgement),
    }


def _question(record: dict[str, Any]) -> Question:
    """The question of a row of questions.parquet; its pictures are known by their hashes only."""
    asked: dict[str, Any] = {
        key: tuple(record[key]) if isinstance(record[key], list) else record[key]
        for key in _ASKED
        if key in record  # `functions` is not in older files
    }
    return Question(**asked)


def _finished(path: Path, key: str) -> dict[int, str]:
    """The replies of a run that was finished with the same key, else none."""
    if not path.exists() or (pq.read_schema(path).metadata or {}).get(b"seavlm_key") != key.encode():
        return {}
    return dict(enumerate(pq.read_table(path, columns=["reply"])["reply"].to_pylist()))


class _Journal:
    """The replies so far, a line each, under a first line that says whose they are."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key

    def read(self) -> dict[int, str]:
        """The replies of an earlier run with the same key; else start a new file."""
        replies: dict[int, str] = {}
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else []
        whole = lines[:-1]  # what follows the last line end was cut off in the middle of writing
        if whole and whole[0] == json.dumps(self.key):
            for line in whole[1:]:
                index, reply = json.loads(line)
                replies[index] = reply
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [json.dumps(self.key), *(json.dumps(item) for item in replies.items())]
        _replace(self.path, lambda path: path.write_text("\n".join(kept) + "\n", encoding="utf-8"))
        return replies

    def add(self, replies: dict[int, str]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(item) + "\n" for item in replies.items()))


def _progress_bar(enabled: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not enabled,
    )


def _replace(path: Path, write_to: Any) -> None:
    """Write beside `path`, then put it in its place."""
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        write_to(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
