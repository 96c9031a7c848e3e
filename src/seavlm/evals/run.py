"""Ask a model all questions, judge the replies, and write down everything.

A question that offers names is asked twice where the model can rank them. `choose` is the free reply to the
picture and the options, and may be none of these. `ranked` shows the picture without the options, and takes
of them what the model finds most likely to be the reply: what a classifier does that picks one of four
(lm-evaluation-harness: multiple_choice, in cloze form). It is in no average, which would count it twice.
No more is a question that is asked without its picture (`/blind`), which shows what can be guessed, and
whether the picture changes the language of the reply.

out/questions.parquet   every question, its raw reply and verdict: `rescore` needs no model
out/results.json        scores per task and language, their averages, what it took
out/table.md            the same for people
out/pictures.parquet    small copies of pictures whose questions went wrong (sha256, image), for a report
out/replies.jsonl       while the run lasts: what has been answered, so that a killed run goes on
"""

from __future__ import annotations

import io
import json
import os
import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from seavlm.errors import SeavlmError
from seavlm.evals.metrics import Judgement, Vocabulary, judge
from seavlm.evals.show import diagnosis, markdown
from seavlm.evals.stats import Z80, Z95, Bootstrap, Interval, bootstrap, clusters_needed, holm, student
from seavlm.evals.tasks import (
    BLIND,
    RANKED,
    Answerer,
    Question,
    Ranker,
    Reply,
    counted,
    fingerprint,
    pictures_of,
    with_chance,
    with_ranked,
)
from seavlm.image.decode import decode
from seavlm.text.language import GLOBAL_LANGUAGES, LANGUAGES, REGIONAL_LANGUAGES

SUITES = {"global": GLOBAL_LANGUAGES, "regional": REGIONAL_LANGUAGES}
KEPT, SIDE = 300, 256  # pictures, pixels

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
        ("kind", pa.string()),
        ("checks", pa.string()),
        ("reply", pa.string()),
        ("parsed", pa.string()),
        ("verdict", pa.string()),
        ("score", pa.float64()),
        ("language_ok", pa.bool_()),
        ("measures", pa.map_(pa.string(), pa.float64())),
        ("prompt_tokens", pa.int64()),
        ("new_tokens", pa.int64()),
        ("error", pa.string()),
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
    measures: dict[str, float] = field(default_factory=dict)  # means of chrf, cer, wer, rouge_l, false_call


@dataclass(frozen=True)
class Results:
    """Scores of one model on one set of questions. `records` has the rows of questions.parquet."""

    name: str
    suite: str  # SHA-256 of the questions
    cells: list[Cell]
    languages: dict[str, Cell]  # mean over the tasks
    tasks: dict[str, Cell]  # mean over the languages
    suites: dict[str, Cell]  # "global", "regional", "all": mean over task x language
    fidelity: dict[str, dict[str, Any]]  # language -> replies in it with and without the picture
    usage: dict[str, int]  # prompt_tokens and new_tokens of all replies, and questions without a reply
    seconds: float
    records: list[dict[str, Any]]
    about: dict[str, Any] = field(default_factory=dict)  # suite and version, model, settings, rows left out

    def to_dict(self) -> dict[str, Any]:
        """All but the records, for results.json."""
        fields = asdict(replace(self, records=[]))
        del fields["records"]
        return fields | {"diagnosis": diagnosis(self)}


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
    about: dict[str, Any] | None = None,
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
    if ranker is None and (unranked := [one for one in questions if one.reading == RANKED]):
        raise SeavlmError(
            f"{len(unranked)} questions want replies ranked by how likely they are, which {name} cannot do",
            hint="Leave out the tasks " + ", ".join(sorted({one.task for one in unranked})),
        )
    folder = Path(out) if out is not None else None
    key = f"{key}:{fingerprint(questions)}" if key else ""
    replies: dict[int, str] = {}
    journal: Journal | None = None
    if folder and key:
        replies = _finished(folder / "questions.parquet", key)
        if len(replies) < len(questions):
            journal = Journal(folder / "replies.jsonl", key)
            replies |= journal.read()

    # Alike prompts side by side: a batch is padded to its longest.
    todo = sorted(
        (index for index in range(len(questions)) if index not in replies),
        key=lambda index: (questions[index].task, questions[index].language, index),
    )
    with progress_bar(progress) as bar:
        row = bar.add_task(f"asking {name}", total=len(questions), completed=len(replies))
        for fresh in _replies(questions, todo, answerer, ranker, batch_size):
            replies |= fresh
            if journal:
                journal.add(fresh)
            bar.advance(row, len(fresh))

    results = score(
        questions,
        [replies[index] for index in range(len(questions))],
        name=name,
        resamples=resamples,
        seed=seed,
        seconds=time.monotonic() - started,
        about=about,
    )
    if folder:
        write(results, folder, key=key)
        _keep_pictures(questions, results.records, folder / "pictures.parquet")
        (folder / "replies.jsonl").unlink(missing_ok=True)
    return results


def _replies(
    questions: Sequence[Question],
    todo: Sequence[int],
    answerer: Answerer,
    ranker: Ranker | None,
    batch_size: int,
) -> Iterator[dict[int, str]]:
    """The replies to the questions of `todo`: batch by batch, or, of an endpoint, each as it comes."""
    each = getattr(answerer, "each", None)
    if each is not None:
        for position, reply in each([questions[index].messages for index in todo]):
            yield {todo[position]: reply}
        return
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        answers = _ask([questions[index] for index in batch], answerer, ranker)
        if len(answers) != len(batch):
            raise SeavlmError(f"the model gave {len(answers)} replies to {len(batch)} questions")
        yield dict(zip(batch, answers, strict=True))


def _ask(batch: Sequence[Question], answerer: Answerer, ranker: Ranker | None) -> list[str]:
    """The replies to a batch, whose questions of one task stand together."""
    replies: list[str] = []
    for ranked, group in groupby(batch, key=lambda question: question.reading == RANKED):
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
    about: dict[str, Any] | None = None,
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

    averaged = [cell for cell in cells if counted(cell[0])]
    suites = {
        suite: average("all", suite, [cell for cell in averaged if cell[1] in codes])
        for suite, codes in {**SUITES, "all": tuple(LANGUAGES)}.items()
        if any(cell[1] in codes for cell in averaged)
    }
    return Results(
        name=name,
        suite=fingerprint(questions),
        cells=list(cells.values()),
        languages={code: average("all", code, [c for c in averaged if c[1] == code]) for code in languages},
        tasks={task: average(task, "all", [c for c in cells if c[0] == task]) for task in tasks},
        suites=suites,
        fidelity=_fidelity(records, languages, resamples, seed),
        usage={
            "prompt_tokens": sum(record["prompt_tokens"] for record in records),
            "new_tokens": sum(record["new_tokens"] for record in records),
            "no_reply": sum(record["verdict"] == "no_reply" for record in records),
        },
        seconds=seconds,
        records=records,
        about=dict(about or {}),
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
    metadata = pq.read_schema(path).metadata or {}
    return score(
        questions,
        [_reply(row) for row in rows],
        name=metadata.get(b"seavlm_model", b"model").decode(),
        resamples=resamples,
        seed=seed,
        seconds=float(metadata.get(b"seavlm_seconds", b"0")),
        about=json.loads(metadata.get(b"seavlm_about", b"{}")),
    )


def rewrite(folder: Path, *, resamples: int = 1000, seed: int = 0) -> Results:
    """Judge the replies in `folder` again, and write what comes of it there. What was asked stays asked."""
    results = rescore(folder, resamples=resamples, seed=seed)
    key = (pq.read_schema(folder / "questions.parquet").metadata or {}).get(b"seavlm_key", b"").decode()
    write(results, folder, key=key)
    return results


def compare(a: Results, b: Results, *, resamples: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """a's score minus b's, paired by question, clustered by concept: for each language and each suite.

    Raises SeavlmError when the two were not asked the same questions.
    """
    if [record["id"] for record in a.records] != [record["id"] for record in b.records] or a.suite != b.suite:
        raise SeavlmError(
            f"{a.name} and {b.name} were not asked the same questions", hint="Evaluate both on one set"
        )
    draws, groups = _paired(a.records, b.records, resamples, seed)
    return {group: draws.difference(0, 1, cells) for group, cells in groups.items()}


def comparison(a: Results, b: Results, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """`compare` on the questions that both were asked, with tests.

    p of each difference; p for all languages at once (Holm); what could have been found; how many concepts
    would settle it. A language's difference is `significant` when its p for all of them is below 0.05: of
    eleven languages one differs at 5 % by mere chance in four runs of ten. Raises SeavlmError when the two
    have no question in common.
    """
    theirs = {_same(record): record for record in b.records}
    pairs = [(record, theirs[_same(record)]) for record in a.records if _same(record) in theirs]
    if not any(counted(record["task"]) for record, _ in pairs):
        raise SeavlmError(
            f"{a.name} and {b.name} have no question in common", hint="Evaluate both on one set"
        )
    draws, groups = _paired([one for one, _ in pairs], [other for _, other in pairs], resamples, seed)
    p = {group: draws.p_value(0, 1, cells, seed=seed) for group, cells in groups.items()}
    adjusted = holm({group: value for group, value in p.items() if group in LANGUAGES})
    found = {}
    for group, cells in groups.items():
        gap, error = draws.difference(0, 1, cells), draws.standard_error(0, 1, cells)
        concepts = draws.clusters(cells)
        found[group] = {
            **asdict(gap),
            "p": p[group],
            "p_holm": adjusted.get(group),
            "significant": adjusted.get(group, p[group]) < 0.05,
            "detectable": (Z95 + Z80) * error,
            "concepts": concepts,
            "concepts_needed": clusters_needed(gap.mean, error, concepts),
        }
    return {"a": a.name, "b": b.name, "questions": len(pairs), "groups": found}


def _same(record: dict[str, Any]) -> tuple[Any, ...]:
    """What two records have in common that are of one question."""
    asked = (record["id"], record["prompt"], *(tuple(record[key]) for key in ("image_sha256", "answers")))
    return (*asked, tuple(record["options"]), record["checks"])


def _paired(
    a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], resamples: int, seed: int
) -> tuple[Bootstrap, dict[str, list[tuple[str, str]]]]:
    """Draws of two models' records of the same questions, and the cells of each language and suite."""
    draws = _bootstrap([list(a), list(b)], resamples, seed)
    groups = {code: (code,) for code in LANGUAGES} | SUITES | {"all": tuple(LANGUAGES)}
    cells = {
        group: [cell for cell in draws.cells if cell[1] in codes and counted(cell[0])]
        for group, codes in groups.items()
    }
    return draws, {group: found for group, found in cells.items() if found}


def retention_change(a: dict[str, Any], b: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Bits per character of two retention.json, and a's minus b's with its 95 % interval, by language.

    Above nought: a foretells the text worse than b does. Lines are what varies (ratio estimator, Student's
    t), so the interval is wide, and says nothing of other texts.
    """
    found = {}
    for code in a:
        sizes, ours = np.array(a[code]["lines"]).T
        theirs = np.array(b[code]["lines"]).T[1]
        change = float((ours - theirs).sum() / sizes.sum())
        n = len(sizes)
        rest = (ours - theirs) - change * sizes
        error = float(np.sqrt(n / max(1, n - 1) * (rest**2).sum()) / sizes.sum())
        half = student(n - 1) * error
        found[code] = {
            "a": a[code]["bits_per_character"],
            "b": b[code]["bits_per_character"],
            "change": change,
            "low": change - half,
            "high": change + half,
        }
    return found


def write(results: Results, out: Path, *, key: str = "") -> None:
    """Write questions.parquet, results.json and table.md into `out`, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    about = json.dumps(results.about, ensure_ascii=False)
    kept = {"model": results.name, "key": key, "about": about, "seconds": str(results.seconds)}
    schema = _COLUMNS.with_metadata({f"seavlm_{name}": value for name, value in kept.items()})
    rows = pa.Table.from_pylist(results.records, schema=schema)
    put(out / "questions.parquet", lambda path: pq.write_table(rows, path, compression="zstd"))
    text = json.dumps(results.to_dict(), indent=1, ensure_ascii=False)
    put(out / "results.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    put(out / "table.md", lambda path: path.write_text(markdown(results), encoding="utf-8"))


def _keep_pictures(questions: Sequence[Question], records: Sequence[dict[str, Any]], path: Path) -> None:
    """At most KEPT pictures, made small, of the lowest scores: in turns from each task and language."""
    groups: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
    for index, record in enumerate(records):
        if record["image_sha256"] and record["score"] < 1:
            groups[record["task"], record["language"]].append((record["score"], index))
    turns = zip_longest(*(sorted(group) for group in groups.values()))
    kept: dict[str, bytes] = {}
    for _, index in (one for turn in turns for one in turn if one is not None):
        for name, picture in zip(questions[index].image_sha256, pictures_of(questions[index]), strict=False):
            if name not in kept and len(kept) < KEPT:
                kept[name] = _small(picture)
    table = pa.table({"sha256": list(kept), "image": pa.array(kept.values(), pa.binary())})
    put(path, lambda partial: pq.write_table(table, partial))


def _small(picture: bytes) -> bytes:
    image = decode(picture)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


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
        _means([record["measures"] for record in records]),
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
        _means([cell.measures for cell in cells]),
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
    measures: dict[str, float],
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
        measures=measures,
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean([float(value) for value in values]))


def _means(several: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over those that have it."""
    names = dict.fromkeys(name for figures in several for name in figures)
    return {name: _mean([figures[name] for figures in several if name in figures]) for name in names}


def _fidelity(
    records: Sequence[dict[str, Any]], languages: Sequence[str], resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """For questions asked with and without their picture: the share of replies in the language asked for.

    Of the pairs in which both replies show a language. `change` is with minus without, and its 95 % interval:
    below nought, the picture makes the model leave the language.
    """
    blind = {record["id"]: record for record in records if record["task"].endswith(BLIND)}
    found = {}
    for code in languages:
        pairs = [
            (record, blind[record["id"] + BLIND])
            for record in records
            if record["language"] == code and record["id"] + BLIND in blind
        ]
        told = [p for p in pairs if p[0]["language_ok"] is not None and p[1]["language_ok"] is not None]
        if told:
            values = np.array([[one["language_ok"] for one in pair] for pair in told], dtype=np.float64)
            concepts = [pair[0]["concept"] for pair in told]
            draws = bootstrap(values, concepts, [0] * len(told), resamples=resamples, seed=seed)
            change = draws.difference(0, 1)
            found[code] = {
                "n": len(told),
                "with_picture": float(values[:, 0].mean()),
                "without_picture": float(values[:, 1].mean()),
                "change": asdict(change),
            }
    return found


def _bootstrap(models: Sequence[list[dict[str, Any]]], resamples: int, seed: int) -> Bootstrap:
    """Draws of the scores of several models asked the same questions."""
    first = models[0]
    cells: list[Hashable] = [(record["task"], record["language"]) for record in first]
    right = [[record["score"] for record in records] for records in models]
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
    "kind",
    "checks",
)


def _record(question: Question, reply: str, judgement: Judgement) -> dict[str, Any]:
    asked = {key: getattr(question, key) for key in _ASKED}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asked.items()} | {
        "reply": str(reply),
        "parsed": judgement.parsed,
        "verdict": judgement.verdict,
        "score": judgement.score,
        "language_ok": judgement.language_ok,
        "measures": judgement.measures,
        **{key: getattr(reply, key, default) for key, default in _COST.items()},
    }


def _question(record: dict[str, Any]) -> Question:
    """The question of a row of questions.parquet; its pictures are known by their hashes only."""
    asked: dict[str, Any] = {
        key: tuple(record[key]) if isinstance(record[key], list) else record[key]
        for key in _ASKED
        if key in record  # files of earlier versions know no functions, kind and checks
    }
    return Question(**asked)


_COST: dict[str, Any] = {"prompt_tokens": 0, "new_tokens": 0, "error": ""}


def _reply(record: dict[str, Any]) -> Reply:
    return Reply(record["reply"], **{key: record.get(key, default) for key, default in _COST.items()})


def _finished(path: Path, key: str) -> dict[int, str]:
    """The replies of a run that was finished with the same key, else none."""
    if not path.exists() or (pq.read_schema(path).metadata or {}).get(b"seavlm_key") != key.encode():
        return {}
    known = pq.read_schema(path).names  # earlier versions kept no costs
    rows = pq.read_table(path, columns=[name for name in ("reply", *_COST) if name in known]).to_pylist()
    return {index: _reply(row) for index, row in enumerate(rows) if not row.get("error")}


class Journal:
    """The replies so far, a line each, under a first line that says whose they are."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key

    def read(self) -> dict[int, Reply]:
        """The replies of an earlier run with the same key; else start a new file."""
        replies: dict[int, Reply] = {}
        kept: list[str] = [json.dumps(self.key)]
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else []
        whole = lines[:-1]  # what follows the last line end was cut off in the middle of writing
        if whole and whole[0] == json.dumps(self.key):
            for line in whole[1:]:
                index, reply, *cost = json.loads(line)
                replies[index] = Reply(reply, *cost)
            kept = whole
        self.path.parent.mkdir(parents=True, exist_ok=True)
        put(self.path, lambda path: path.write_text("\n".join(kept) + "\n", encoding="utf-8"))
        return replies

    def add(self, replies: Mapping[int, str]) -> None:
        """One that failed is not kept: it is asked again."""
        lines = [
            json.dumps([index, reply, getattr(reply, "prompt_tokens", 0), getattr(reply, "new_tokens", 0)])
            for index, reply in replies.items()
            if not getattr(reply, "error", "")
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))


def progress_bar(enabled: bool) -> Progress:
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


def put(path: Path, write_to: Any) -> None:
    """Write beside `path`, then put it in its place."""
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        write_to(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
