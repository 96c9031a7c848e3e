"""How often the intervals of evaluations hold the truth: `python benchmarks/coverage.py [RUNS]`.

Answers are drawn from a world whose truth is known, scored as an evaluation scores them, and counted: of the
intervals for a score, how many hold it; of those for the difference of two models asked the same questions,
how many hold that. Writes coverage.json beside this file.

With ten questions, two models differ in about two: the interval for their difference is wider than it need
be, as nothing tells how much. So it is for an average of unlike tasks one of which has twelve.

Where each concept is asked once, a truth p is drawn anew for each run within 0.05 (near the ends: within
half the way to the end): for a single p, the coverage of any interval jumps with the number of questions, as
only whole questions can be right. `counts` are summed over 500 such p from 0.002 to 0.998, not simulated:
mean and worst case of the exact interval, and of Wilson's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seavlm.evals.stats import Interval, bootstrap, exact, wilson

RESAMPLES = 500


@dataclass(frozen=True)
class World:
    """C concepts, asked about m times each by two models. They differ in how hard they are: Beta(a, b)."""

    name: str
    concepts: int
    asked: int
    hard: tuple[float, float] | None = None  # None: all alike, p = centre
    centre: float = 0.5
    gain: float = 0.0  # what the first model has on the second
    luck: float = 0.0  # spread of a model's own luck with a concept
    alike: float = 0.6  # share of questions that the two models answer by the same toss
    parts: tuple[World, ...] = ()  # an average of these, each a task of its own concepts

    @property
    def tasks(self) -> tuple[World, ...]:
        return self.parts or (self,)


WORLDS = (
    World("ten questions", 10, 1, centre=0.5),
    World("twenty questions", 20, 1, centre=0.7, alike=0.3),
    World("forty questions", 40, 1, centre=0.6, gain=0.05),
    World("two hundred questions", 200, 1, centre=0.5, gain=0.03),
    World("near one", 100, 1, centre=0.95),
    World("near nought", 150, 1, centre=0.04),
    World("twelve concepts in eleven languages", 12, 11, (2, 1), luck=0.08),
    World("forty concepts in eleven languages", 40, 11, (2, 1), gain=0.03, luck=0.08),
    World("a hundred concepts in eleven languages", 100, 11, (2, 1), gain=-0.02, luck=0.08),
    World("concepts known or not at all", 60, 11, (0.2, 0.1)),
    World("near one, clustered", 60, 11, (19, 0.8), luck=0.02),
    World("near nought, clustered", 100, 4, (0.4, 9), luck=0.02),
    World("three concepts in eleven languages", 3, 11, (2, 1), luck=0.08),
    World("average: two data sets of unlike size", 0, 1, parts=(
        World("", 200, 1, centre=0.85), World("", 12, 1, centre=0.35),
    )),
    World("average: one large task, two small ones near the ends", 0, 1, parts=(
        World("", 400, 1, centre=0.5), World("", 12, 1, centre=0.95), World("", 12, 1, centre=0.05),
    )),
    World(
        "average: eleven tasks of three questions, near nought", 0, 1,
        parts=(World("", 3, 1, centre=0.06),) * 11,
    ),
    World("average: clustered, and a small task", 0, 1, parts=(
        World("", 40, 11, (2, 1), luck=0.08), World("", 12, 1, centre=0.9),
    )),
)  # fmt: skip


def draw(
    world: World, rng: np.random.Generator, concepts: int | None = None
) -> tuple[np.ndarray, float | None]:
    """Right or wrong [C, m, 2], and the first model's true score where it is drawn too."""
    C = concepts or world.concepts
    truth = None
    if world.hard:
        p = rng.beta(*world.hard, size=(C, 1, 1))
    else:
        reach = min(0.05, world.centre / 2, (1 - world.centre) / 2)
        truth = rng.uniform(world.centre - reach, world.centre + reach)
        p = np.full((C, 1, 1), truth)
    chance = p + rng.normal(0, world.luck, (C, 1, 2)) + np.array([world.gain, 0.0])
    common, own = rng.random((C, world.asked, 1)), rng.random((C, world.asked, 2))
    toss = np.where(rng.random((C, world.asked, 1)) < world.alike, common, own)
    return (toss < np.clip(chance, 0, 1)).astype(float), None if truth is None else truth + world.gain


def coverage(world: World, runs: int, seed: int = 1) -> dict[str, float | str | int]:
    """Shares of the intervals that hold the truth, and their mean width."""
    rng = np.random.default_rng(seed)
    means = []  # of each task whose truth is not drawn
    for task in world.tasks:
        many, _ = draw(task, rng, 400_000 // task.asked + 1)
        means.append(many.mean(axis=(0, 1)))
    gap = np.mean([m[0] - m[1] if t.hard else t.gain for t, m in zip(world.tasks, means, strict=True)])
    asked = [
        (k, c) for k, task in enumerate(world.tasks) for c in range(task.concepts) for _ in range(task.asked)
    ]
    score = difference = 0
    widths = []
    for _ in range(runs):
        drawn = [draw(task, rng) for task in world.tasks]
        truth = np.mean([m[0] if p is None else p for (_, p), m in zip(drawn, means, strict=True)])
        right = np.concatenate([found.reshape(-1, 2) for found, _ in drawn])
        boot = bootstrap(right, asked, [task for task, _ in asked], resamples=RESAMPLES, seed=7)
        one, two = boot.interval(), boot.difference(0, 1)
        score += bool(one.low <= truth <= one.high)
        difference += bool(two.low <= gap <= two.high)
        widths.append((one.high - one.low, two.high - two.low))
    return {
        "world": world.name,
        "concepts": sum(task.concepts for task in world.tasks),
        "questions": len(asked),
        "score": round(score / runs, 4),
        "difference": round(difference / runs, 4),
        "score_width": round(float(np.mean(widths, axis=0)[0]), 4),
        "difference_width": round(float(np.mean(widths, axis=0)[1]), 4),
    }


def of_counts(n: int, interval: Callable[[int, int], Interval]) -> dict[str, float]:
    """Mean and worst coverage of an interval for a count among n, over 500 truths."""
    intervals = [interval(k, n) for k in range(n + 1)]
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k, held = np.arange(n + 1), []
    for p in np.linspace(0.002, 0.998, 500):
        chances = np.exp(logs[n] - logs - logs[::-1] + k * np.log(p) + (n - k) * np.log1p(-p))
        held.append(chances @ np.array([one.low <= p <= one.high for one in intervals]))
    return {"mean": round(float(np.mean(held)), 4), "least": round(float(np.min(held)), 4)}


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    rows = []
    for world in WORLDS:
        rows.append(coverage(world, runs))
        print(rows[-1], flush=True)
    found = {
        "runs": runs,
        "worlds": rows,
        "counts": {
            n: {"exact": of_counts(n, exact), "wilson": of_counts(n, wilson)} for n in (5, 10, 20, 40, 100)
        },
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
