"""How often the intervals of evaluations hold the truth: `python benchmarks/coverage.py [RUNS]`.

Answers are drawn from a world whose truth is known, scored as an evaluation scores them, and counted: of the
intervals for a score, how many hold it; of those for the difference of two models asked the same questions,
how many hold that. Writes coverage.json beside this file.

With ten questions, two models differ in about two: the interval for their difference is wider than it need
be, as nothing tells how much.

Where each concept is asked once, a truth p is drawn anew for each run within 0.05 (near the ends: within
half the way to the end): for a single p, the coverage of any interval jumps with the number of questions, as
only whole questions can be right. `least` is the worst case over 21 such p for the exact interval, which is
held to 95 % there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seavlm.evals.stats import bootstrap, exact

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
)


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
    many, _ = draw(world, rng, 400_000 // world.asked + 1)
    means = many.mean(axis=(0, 1))
    gap = float(means[0] - means[1]) if world.hard else world.gain
    clusters = np.repeat(np.arange(world.concepts), world.asked).tolist()
    score = difference = 0
    widths = []
    for _ in range(runs):
        right, truth = draw(world, rng)
        boot = bootstrap(right.reshape(-1, 2), clusters, [0] * len(clusters), resamples=RESAMPLES, seed=7)
        one, two = boot.interval(), boot.difference(0, 1)
        score += bool(one.low <= (means[0] if truth is None else truth) <= one.high)
        difference += bool(two.low <= gap <= two.high)
        widths.append((one.high - one.low, two.high - two.low))
    return {
        "world": world.name,
        "concepts": world.concepts,
        "questions": world.concepts * world.asked,
        "score": round(score / runs, 4),
        "difference": round(difference / runs, 4),
        "score_width": round(float(np.mean(widths, axis=0)[0]), 4),
        "difference_width": round(float(np.mean(widths, axis=0)[1]), 4),
    }


def least_exact(n: int) -> float:
    """The worst coverage of the exact interval of n questions, over 21 truths; summed, not simulated."""
    intervals = [exact(k, n) for k in range(n + 1)]
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(n + 1)
    chance: Callable[[float], np.ndarray] = lambda p: np.exp(  # noqa: E731
        logs[n] - logs - logs[::-1] + k * np.log(p) + (n - k) * np.log1p(-p)
    )
    return min(
        float(
            sum(
                mass for mass, found in zip(chance(p), intervals, strict=True) if found.low <= p <= found.high
            )
        )
        for p in np.linspace(0.01, 0.99, 21)
    )


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    rows = []
    for world in WORLDS:
        rows.append(coverage(world, runs))
        print(rows[-1], flush=True)
    found = {
        "runs": runs,
        "worlds": rows,
        "least_exact": {n: round(least_exact(n), 4) for n in (10, 30, 100)},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
