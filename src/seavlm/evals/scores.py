"""Scores of replies: by task and language, their averages, and what differs between two models.

A question that offers names is asked twice where the model can rank them. `choose` is the free reply to the
picture and the options, and may be none of these. `ranked` shows the picture without the options, and takes
of them what the model finds most likely to be the reply: what a classifier does that picks one of four
(lm-evaluation-harness: multiple_choice, in cloze form). It is in no average, which would count it twice.
No more is a question that is asked without its picture (`/blind`), which shows what can be guessed, and
whether the picture changes the language of the reply.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from seavlm.errors import SeavlmError
from seavlm.evals.metrics import Judgement, Vocabulary, judge
from seavlm.evals.show import diagnosis
from seavlm.evals.stats import (
    Z80,
    Z95,
    Bootstrap,
    Interval,
    bootstrap,
    clusters_needed,
    detectable,
    holm,
    student,
)
from seavlm.evals.tasks import BLIND, RANKED, Question, Reply, counted, fingerprint, with_chance
from seavlm.text.language import GLOBAL_LANGUAGES, LANGUAGES, REGIONAL_LANGUAGES

SUITES = {"global": GLOBAL_LANGUAGES, "regional": REGIONAL_LANGUAGES}


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
    measures: dict[str, float] = field(default_factory=dict)  # means of chrf, cer, false_call, ...


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
    usage: dict[str, int]  # tokens of all replies, and how many came to nothing: see `_usage`
    seconds: float
    records: list[dict[str, Any]]
    about: dict[str, Any] = field(default_factory=dict)  # suite and version, model, settings, rows left out

    def to_dict(self) -> dict[str, Any]:
        """All but the records, for results.json."""
        fields = asdict(replace(self, records=[]))
        del fields["records"]
        spent = {"cost": cost(self.about["price"], self.usage)} if self.about.get("price") else {}
        return fields | spent | {"diagnosis": diagnosis(self)}


def cost(price: str, used: dict[str, int]) -> float:
    """Of the tokens read and written, at "IN,OUT" a million. SeavlmError for what is no price."""
    try:
        read, written = (float(part) for part in price.split(","))
    except ValueError:
        raise SeavlmError(f"{price!r} is no price", hint="Give two numbers: --price 0.5,1.5") from None
    return (used["prompt_tokens"] * read + used["new_tokens"] * written) / 1e6


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
    records = [record_of(*one) for one in zip(questions, replies, verdicts, strict=True)]
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
        return _average(task, language, [vars(cells[member]) for member in chosen], draws.interval(chosen))

    means = {group: average("all", group, members) for group, members in _groups(cells).items()}
    return Results(
        name=name,
        suite=fingerprint(questions),
        cells=list(cells.values()),
        languages={code: mean for code, mean in means.items() if code in LANGUAGES},
        tasks={task: average(task, "all", [c for c in cells if c[0] == task]) for task in tasks},
        suites={suite: mean for suite, mean in means.items() if suite not in LANGUAGES},
        fidelity=_fidelity(records, languages, resamples, seed),
        usage=_usage(records),
        seconds=seconds,
        records=records,
        about=dict(about or {}),
    )


def _usage(records: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What was read and written; questions without a reply; replies that were cut, that are empty because
    they were cut, that were kept back, and of which nobody told what they took."""
    cut = [record for record in records if record["finish"] == "length"]
    free = [
        one for one in records if RANKED not in (one["task"], one["kind"]) and one["verdict"] != "no_reply"
    ]
    return {
        "prompt_tokens": sum(record["prompt_tokens"] for record in records),
        "new_tokens": sum(record["new_tokens"] for record in records),
        "no_reply": sum(record["verdict"] == "no_reply" for record in records),
        "cut": len(cut),
        "cut_empty": sum(not record["reply"].strip() for record in cut),
        "withheld": sum(record["finish"] == "content_filter" for record in records),
        "uncounted": sum(not record["prompt_tokens"] for record in free),
    }


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
    return (*asked, tuple(record["options"]), record["checks"], record.get("context", ""))


def _paired(
    a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], resamples: int, seed: int
) -> tuple[Bootstrap, dict[str, list[tuple[str, str]]]]:
    """Draws of two models' records of the same questions, and the cells of each language and suite."""
    draws = _bootstrap([list(a), list(b)], resamples, seed)
    return draws, _groups(draws.cells)


def _groups(cells: Iterable[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """The cells (task, language) that each language's and each suite's mean is of, where there are any."""
    groups = {code: (code,) for code in LANGUAGES} | SUITES | {"all": tuple(LANGUAGES)}
    known = [cell for cell in cells if counted(cell[0])]
    found = {group: [cell for cell in known if cell[1] in codes] for group, codes in groups.items()}
    return {group: members for group, members in found.items() if members}


def planned(questions: Sequence[Question]) -> dict[str, float]:
    """Before anything is asked: the smallest difference between two models that will be found, for each
    language and each suite (`stats.detectable`)."""
    sizes = Counter((question.task, question.language) for question in questions)
    least = {}
    for group, cells in _groups(sizes).items():
        members = set(cells)
        asked = [one for one in questions if (one.task, one.language) in members]
        shares = [1 / len(cells) / sizes[one.task, one.language] for one in asked]
        least[group] = detectable(shares, [one.concept for one in asked])
    return least


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
        half = student(max(1, n - 1)) * error
        found[code] = {
            "a": a[code]["bits_per_character"],
            "b": b[code]["bits_per_character"],
            "change": change,
            "low": change - half,
            "high": change + half,
        }
    return found


# --- cells and their intervals


def _cell(task: str, language: str, records: list[dict[str, Any]], interval: Interval) -> Cell:
    parts = [
        {
            "n": 1,
            "wrong_answer": record["verdict"] == "wrong_answer",
            "wrong_format": record["verdict"] == "wrong_format",
            **{key: record[key] for key in ("language_ok", "chance", "measures")},
        }
        for record in records
    ]
    return _average(task, language, parts, interval)


def _average(task: str, language: str, parts: Sequence[dict[str, Any]], interval: Interval) -> Cell:
    """The mean of parts that weigh alike: questions, or the cells of a task or a language."""
    shown = [part["language_ok"] for part in parts if part["language_ok"] is not None]
    chance = _mean([part["chance"] for part in parts])
    return Cell(
        task=task,
        language=language,
        n=sum(part["n"] for part in parts),
        accuracy=interval.mean,
        low=interval.low,
        high=interval.high,
        wrong_answer=_mean([part["wrong_answer"] for part in parts]),
        wrong_format=_mean([part["wrong_format"] for part in parts]),
        language_ok=_mean(shown) if shown else None,
        chance=chance,
        normalised=(interval.mean - chance) / (1 - chance) if chance < 1 else 0.0,
        below_chance=interval.high < chance,
        measures=_means([part["measures"] for part in parts]),
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


# --- records: a question, its reply and verdict, as questions.parquet has them


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
    "context",
)


def record_of(question: Question, reply: str, judgement: Judgement) -> dict[str, Any]:
    asked = {key: getattr(question, key) for key in _ASKED}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asked.items()} | {
        "reply": str(reply),
        "parsed": judgement.parsed,
        "verdict": judgement.verdict,
        "score": judgement.score,
        "language_ok": judgement.language_ok,
        "measures": judgement.measures,
        **{key: getattr(reply, key, default) for key, default in COST.items()},
    }


def question_in(record: dict[str, Any]) -> Question:
    """The question of a row of questions.parquet; its pictures are known by their hashes only."""
    asked: dict[str, Any] = {
        key: tuple(record[key]) if isinstance(record[key], list) else record[key]
        for key in _ASKED
        if key in record  # files of earlier versions know no functions, kind and checks
    }
    return Question(**asked)


COST: dict[str, Any] = {"prompt_tokens": 0, "new_tokens": 0, "error": "", "finish": ""}


def reply_in(record: dict[str, Any]) -> Reply:
    return Reply(record["reply"], **{key: record.get(key, default) for key, default in COST.items()})
