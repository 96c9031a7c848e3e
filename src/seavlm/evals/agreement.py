"""How far two opinions of the same replies agree: the automatic score's, and a judge's.

Right or wrong: the share in which they agree, and Cohen's (1960) kappa, which is 0 where they agree as often
as two would who know nothing of each other, and 1 where they always do. It says nothing where one of them
calls all replies the same: None. Grades: Spearman's (1904) rank correlation, with mean ranks for ties.

Questions on one concept rise and fall together, so concepts are resampled (`stats`). Kappa is a share of
agreement on another scale, (agreement - by chance) / (1 - by chance), so its interval is Wilson's for as many
independent questions as would make a kappa vary as the resamples do, on that scale; of a rank correlation it
is that of Fisher's z, with Student's t. tests/evals/test_judge.py measures how often they hold the truth.

Legend: N replies, C clusters (concepts), R resamples.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from seavlm.evals.similarity import graphemes
from seavlm.evals.stats import CHUNK, Z95, Array, resample_weights, student, wilson

GRADES = 4
"""The best grade; 0 is the worst."""
WORST, EXAMPLES = 5, 3
"""Cells shown in which the two disagree most, and examples of each."""


@dataclass(frozen=True)
class Opinion:
    """What a judge says of a reply: whether it is right or, where replies are graded, 0 to 4; and why."""

    reason: str
    right: bool | None = None
    grade: int | None = None

    @property
    def score(self) -> float:
        """0..1."""
        return float(bool(self.right)) if self.grade is None else self.grade / GRADES


Pair = tuple[Mapping[str, Any], Opinion]  # a row of questions.parquet, and what a judge says of it


def summary(pairs: Sequence[Pair], *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Agreement by cell, task, language and for all: of verdicts, and of grades where replies have them.

    For results of a judge's: `verdicts` and `grades` (each with cells, tasks, languages and all, or empty),
    `disagreements` (the cells in which the two are furthest apart, with examples), `length`.
    """
    verdicts = [pair for pair in pairs if pair[1].grade is None]
    grades = [pair for pair in pairs if pair[1].grade is not None]
    return {
        "verdicts": _levels(verdicts, _verdicts, resamples, seed),
        "grades": _levels(grades, _grades, resamples, seed),
        "disagreements": _disagreements(verdicts, "verdicts") + _disagreements(grades, "grades"),
        "length": {name: _length(group) for name, group in (("verdicts", verdicts), ("grades", grades))},
    }


def _levels(pairs: Sequence[Pair], figures: Any, resamples: int, seed: int) -> dict[str, Any]:
    if not pairs:
        return {}

    def by(*keys: str) -> dict[tuple[str, ...], list[Pair]]:
        groups: dict[tuple[str, ...], list[Pair]] = {}
        for pair in pairs:
            groups.setdefault(tuple(pair[0][key] for key in keys), []).append(pair)
        return groups

    return {
        "cells": [
            {"task": task, "language": code, **figures(group, resamples, seed)}
            for (task, code), group in by("task", "language").items()
        ],
        "tasks": {task: figures(group, resamples, seed) for (task,), group in by("task").items()},
        "languages": {code: figures(group, resamples, seed) for (code,), group in by("language").items()},
        "all": figures(pairs, resamples, seed),
    }


def _verdicts(pairs: Sequence[Pair], resamples: int, seed: int) -> dict[str, Any]:
    automatic = [record["verdict"] == "correct" for record, _ in pairs]
    judged = [bool(opinion.right) for _, opinion in pairs]
    table: dict[str, dict[str, int]] = {}
    for record, opinion in pairs:
        row = table.setdefault(record["verdict"], {"right": 0, "wrong": 0})
        row["right" if opinion.right else "wrong"] += 1
    found = kappa(automatic, judged, [record["concept"] for record, _ in pairs], resamples, seed)
    return {
        "n": len(pairs),
        "automatic": _mean(automatic),
        "judge": _mean(judged),
        "agreement": _mean([a == b for a, b in zip(automatic, judged, strict=True)]),
        "kappa": found,
        "confusion": table,
    }


def _grades(pairs: Sequence[Pair], resamples: int, seed: int) -> dict[str, Any]:
    given = [opinion.score for _, opinion in pairs]
    concepts = [record["concept"] for record, _ in pairs]
    figures = {
        name: [
            (place, record["measures"][name])
            for place, (record, _) in enumerate(pairs)
            if name in record["measures"]
        ]
        for name in dict.fromkeys(name for record, _ in pairs for name in record["measures"])
    }
    sign = {"cer": -1.0, "wer": -1.0}  # of errors, fewer are better
    return {
        "n": len(pairs),
        "automatic": _mean([record["score"] for record, _ in pairs]),
        "judge": _mean(given),
        "spearman": rank_correlation(
            [record["score"] for record, _ in pairs], given, concepts, resamples, seed
        ),
        "measures": {
            name: rank_correlation(
                [sign.get(name, 1.0) * value for _, value in known],
                [given[place] for place, _ in known],
                [concepts[place] for place, _ in known],
                resamples,
                seed,
            )
            for name, known in figures.items()
        },
    }


# --- kappa


def kappa(
    a: Sequence[bool],
    b: Sequence[bool],
    concepts: Sequence[Hashable],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, float] | None:
    """Cohen's kappa of two verdicts [N], and its 95 % interval; None where either is the same for all."""
    names = list(dict.fromkeys(concepts))
    index = {name: place for place, name in enumerate(names)}
    counts = np.zeros((len(names), 4))  # both right, only a, only b, neither
    for one, other, concept in zip(a, b, concepts, strict=True):
        counts[index[concept], 2 * (not one) + (not other)] += 1
    total, C = counts.sum(axis=0), len(names)
    agreed, chance = _agreed(total)
    if min(total[0] + total[1], total[2] + total[3], total[0] + total[2], total[1] + total[3]) == 0:
        return None
    po, pe = float(agreed), float(chance)
    drawn, by_chance = _agreed(resample_weights(C, resamples, seed) @ counts)
    known = by_chance < 1 - 1e-12
    draws = (drawn[known] - by_chance[known]) / (1 - by_chance[known])
    spread = float(draws.var()) * (1 - pe) ** 2 * C / max(1, C - 1) if known.any() else 0.0
    if spread < 1e-12:  # they always agree, or never: each concept counts as one question
        ends = wilson(po * C, C, po)
    else:
        n = min(po * (1 - po) / spread, float(total.sum()))
        ends = wilson(po * n, n * (Z95 / student(C - 1)) ** 2, po)
    value, low, high = ((share - pe) / (1 - pe) for share in (po, ends.low, ends.high))
    return {"value": value, "low": max(-1.0, low), "high": min(1.0, high)}


def _agreed(counts: Array) -> tuple[Array, Array]:
    """[..., 4] -> the share in which both agree, and in which they would by chance."""
    n = counts.sum(axis=-1)
    a, b = ((counts[..., 0] + counts[..., place]) / n for place in (1, 2))
    return (counts[..., 0] + counts[..., 3]) / n, a * b + (1 - a) * (1 - b)


# --- ranks


def rank_correlation(
    x: Sequence[float],
    y: Sequence[float],
    concepts: Sequence[Hashable],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, float] | None:
    """Spearman's rank correlation of two figures [N], and its 95 % interval; None where one is constant."""
    value = float(spearman(x, y, np.ones((1, len(x))))[0])
    if not np.isfinite(value):
        return None
    names = list(dict.fromkeys(concepts))
    place = {name: index for index, name in enumerate(names)}
    of = np.array([place[concept] for concept in concepts])
    weights, C = resample_weights(len(names), resamples, seed), len(names)
    rows = max(1, CHUNK // len(x))
    parts = [spearman(x, y, weights[at : at + rows][:, of]) for at in range(0, resamples, rows)]
    draws = np.concatenate(parts)
    z = np.arctanh(np.clip(draws[np.isfinite(draws)], -0.9999, 0.9999))
    centre, spread = value, float(z.var()) * C / max(1, C - 1)
    if (
        abs(value) > 1 - 1e-9
    ):  # resamples do not vary: as if one concept more said nothing, with Fisher's (1915)
        centre, spread = value * C / (C + 1), 1 / max(1.0, C - 3)  # variance for independent ones
    half = student(C - 1) * spread**0.5
    middle = float(np.arctanh(np.clip(centre, -0.9999, 0.9999)))
    low, high = float(np.tanh(middle - half)), float(np.tanh(middle + half))
    return {"value": value, "low": min(low, value), "high": max(high, value)}


def spearman(x: Sequence[float], y: Sequence[float], weights: Array) -> Array:
    """[R]: Spearman's correlation with each reply taken weights [R, N] times; NaN where one is constant."""
    total = weights.sum(axis=1, keepdims=True)
    one, other = (_ranks(np.asarray(values, dtype=np.float64), weights) for values in (x, y))
    one, other = (ranks - (weights * ranks).sum(axis=1, keepdims=True) / total for ranks in (one, other))
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt((weights * one**2).sum(axis=1) * (weights * other**2).sum(axis=1))
        found: Array = np.where(scale > 1e-9, (weights * one * other).sum(axis=1) / scale, np.nan)
    return np.clip(found, -1.0, 1.0)


def _ranks(values: Array, weights: Array) -> Array:
    """[R, N]: the mean rank of each value, where equal ones share theirs."""
    _, groups = np.unique(values, return_inverse=True)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    sizes = np.add.reduceat(weights[:, order], starts, axis=1)
    middles: Array = np.cumsum(sizes, axis=1) - (sizes - 1) / 2
    return middles[:, groups]


# --- where they are apart


def _disagreements(pairs: Sequence[Pair], kind: str) -> list[dict[str, Any]]:
    """The cells furthest apart, by the lower end of an interval: of few questions little is sure.

    `apart`: the share of other verdicts; of grades, how far the ranks of both are apart as a share of all.
    """
    apart: dict[tuple[str, str], list[tuple[float, Pair]]] = {}
    ranks = _places([record["score"] for record, _ in pairs]), _places([o.score for _, o in pairs])
    for pair, one, other in zip(pairs, *ranks, strict=True):
        gap = (
            abs(one - other)
            if pair[1].grade is not None
            else float(bool(pair[1].right) != (pair[0]["verdict"] == "correct"))
        )
        apart.setdefault((pair[0]["task"], pair[0]["language"]), []).append((gap, pair))
    found = []
    for (task, code), group in apart.items():
        share, n = _mean([gap for gap, _ in group]), len({pair[0]["concept"] for _, pair in group})
        if share > 0:
            shown = [_example(pair) for pair in _telling(group)]
            row = {"task": task, "language": code, "kind": kind, "n": len(group), "apart": share}
            row["examples"] = shown
            found.append((wilson(share * n, n).low, row))
    return [row for _, row in sorted(found, key=lambda one: -one[0])[:WORST]]


def _places(scores: Sequence[float]) -> list[float]:
    """Ranks as shares of all, 0..1."""
    if not scores:
        return []
    return [float(rank) for rank in _ranks(np.asarray(scores), np.ones((1, len(scores))))[0] / len(scores)]


def _telling(group: Sequence[tuple[float, Pair]]) -> list[Pair]:
    """The replies furthest apart; of those that are, in turns one that the judge likes more and one less."""
    ordered = sorted((one for one in group if one[0] > 0), key=lambda one: (-one[0], one[1][0]["id"]))
    more = [pair for _, pair in ordered if pair[1].score > pair[0]["score"]]
    less = [pair for _, pair in ordered if pair[1].score <= pair[0]["score"]]
    turns = [pair for both in zip(more, less, strict=False) for pair in both]
    rest = more[len(less) :] or less[len(more) :]
    return (turns + rest)[:EXAMPLES]


def _example(pair: Pair) -> dict[str, Any]:
    record, opinion = pair
    judged = (
        ("right" if opinion.right else "wrong") if opinion.grade is None else f"{opinion.grade} of {GRADES}"
    )
    return {
        **{key: record[key] for key in ("id", "task", "language", "reply", "verdict", "score")},
        "prompt": record["prompt"].replace("<image>\n", ""),
        "answers": list(record["answers"] or ()),
        "checks": record.get("checks") or "",
        "judge": judged,
        "reason": opinion.reason,
    }


def _length(pairs: Sequence[Pair]) -> dict[str, float | None]:
    """How the two scores go with the length of a reply (Spearman): a judge that likes words shows here."""
    if not pairs:
        return {}
    lengths = [float(len(graphemes(record["reply"]))) for record, _ in pairs]
    once = np.ones((1, len(pairs)))
    scores = {"automatic": [r["score"] for r, _ in pairs], "judge": [o.score for _, o in pairs]}
    found = {name: float(spearman(lengths, values, once)[0]) for name, values in scores.items()}
    return {name: value if np.isfinite(value) else None for name, value in found.items()}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean([float(value) for value in values]))
