"""Intervals for scores over questions that are not independent.

The same drawing is asked about in eleven languages and several tasks, so its questions succeed and fail
together. What is resampled is therefore the concept, with all its questions (cluster bootstrap: Efron &
Tibshirani 1993, ch. 8; Cameron, Gelbach & Miller 2008). One set of resampled concepts serves all cells and
all models at once, which makes averages over cells and differences between models paired for free.

The draws give the variance; the interval is not their percentiles, which are too narrow for few concepts and
of no width where all answers are right or two models agree in everything:

- of a score: the exact one of the binomial (`exact`) where each concept is asked once and all weigh alike,
  and where all answers are right or all wrong, each concept then being one question; else Wilson's for as
  many independent questions as would have that variance, with Student's t for the number of concepts
  (effective sample size: Korn & Graubard 1998; Wilson's for surveys: Kott & Carr 1997);
- of a difference: Tango's (1998) where each concept is asked once; else Student's t, with half a question
  added that only one of two models gets right, once for each (Agresti & Min 2005).

Of one concept nothing follows, and the intervals say so. benchmarks/coverage.py measures how often they hold
the truth.

Legend: N questions, M models, C clusters (concepts), K cells (task x language), R resamples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Cells = Mapping[Hashable, float] | Iterable[Hashable] | None
Z95 = 1.959963984540054
"""The 97.5 % point of the normal distribution."""
Z80 = 0.8416212335729143
"""The 80 % point: the power that is planned for."""
CHUNK = 4_000_000
"""Numbers at once, of many draws."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Bootstrap:
    """Means of every cell, and of the same cells in every resample. `cells[k]` names column k."""

    cells: list[Any]
    counts: Array  # [C, K] questions
    sums: Array  # [C, K, M] right ones
    draws: Array  # [R, K, M]
    binary: bool = True  # every answer is right or wrong; else they have grades

    def interval(self, cells: Cells = None, model: int = 0) -> Interval:
        """95 % interval of one model's mean over `cells`: all of them, those given, or by weights given."""
        index, weights = self._weights(cells)
        mean = self._mean(index, weights, model)
        effective = self._effective(index, weights)
        if self.binary and self._independent(index, weights):
            return exact(round(mean * effective), round(effective))
        spread = self._variance(self.draws[:, index, model] @ weights / weights.sum(), self._clusters(index))
        if spread < 1e-12 and mean in (0.0, 1.0):
            return exact(round(mean * (whole := max(1, int(effective + 1e-9)))), whole)
        spread += self._unseen(index, weights, model)
        n = mean * (1 - mean) / max(spread, 1e-12)
        n = min(n, float(self.counts[:, index].sum())) if self.binary else n
        low_high = wilson(mean * n, n * (Z95 / student(effective - 1)) ** 2, mean)
        return Interval(mean, low_high.low, low_high.high)

    def difference(self, a: int, b: int, cells: Cells = None, *, z: float = Z95) -> Interval:
        """Interval of model a's mean minus model b's, paired on the resampled concepts.

        z: the normal distribution's point on either side; 95 % unless more is asked for, such as by several
        looks at one experiment.
        """
        index, weights = self._weights(cells)
        mean = self._mean(index, weights, a) - self._mean(index, weights, b)
        if a == b:
            return Interval(0.0, 0.0, 0.0)
        clusters = self._clusters(index)
        if self.binary and self._independent(index, weights):
            gains = (self.sums[:, index, a] - self.sums[:, index, b]).sum(axis=1)
            return tango(int((gains > 0).sum()), int((gains < 0).sum()), clusters, z)
        half = student(self._effective(index, weights) - 1, z) * self.standard_error(a, b, cells)
        centre = mean * clusters / (clusters + 2)
        return Interval(mean, max(-1.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))

    def standard_error(self, a: int, b: int, cells: Cells = None) -> float:
        """Of the difference between models a and b."""
        index, weights = self._weights(cells)
        weights = weights / weights.sum()
        clusters = self._clusters(index)
        apart = (self.draws[:, index, a] - self.draws[:, index, b]) @ weights
        spread = self._variance(apart, clusters)
        # What one question moves a concept's share of the mean by.
        one = clusters * float((weights**2 / self.counts[:, index].sum(axis=0)).sum())
        return math.sqrt(clusters**2 * spread + one**2) / (clusters + 2)

    def p_value(self, a: int, b: int, cells: Cells = None, *, flips: int = 10_000, seed: int = 0) -> float:
        """How likely so large a difference is between two models that are the same (two-sided).

        Sign flips: were they the same, each concept's difference could as well have been the other way round.
        All flips of up to 13 concepts, else `flips` random ones.
        """
        index, weights = self._weights(cells)
        shares = self._shares(index, weights)
        found = (self.sums[:, index, a] - self.sums[:, index, b]) @ shares
        found = found[np.abs(found) > 1e-15]
        if len(found) <= 13:
            bits = np.arange(2 ** len(found))[:, None] >> np.arange(len(found)) & 1
            totals = (2.0 * bits - 1.0) @ found
            return float(np.mean(np.abs(totals) >= abs(found.sum()) - 1e-12))
        signs = np.random.default_rng(seed).integers(0, 2, (flips, len(found)), dtype=np.int8) * 2 - 1
        parts = np.array_split(signs, max(1, signs.size // CHUNK))  # as floats they take eight times as much
        totals = np.concatenate([part @ found for part in parts])
        return float(((np.abs(totals) >= abs(found.sum()) - 1e-12).sum() + 1) / (flips + 1))

    def wins(self, cells: Cells = None) -> Array:
        """[M]: in which share of the resamples each model has the best mean (the first of equals wins)."""
        index, weights = self._weights(cells)
        best = np.einsum("rkm,k->rm", self.draws[:, index], weights).argmax(axis=1)
        return np.bincount(best, minlength=self.sums.shape[2]) / len(best)

    def clusters(self, cells: Cells = None) -> int:
        """How many concepts the cells ask about."""
        return self._clusters(self._weights(cells)[0])

    def _weights(self, cells: Cells) -> tuple[list[int], Array]:
        wanted = self.cells if cells is None else cells
        given = wanted if isinstance(wanted, Mapping) else dict.fromkeys(wanted, 1.0)
        index = [k for k, cell in enumerate(self.cells) if cell in given]
        weights = np.array([given[self.cells[k]] for k in index])
        return index, weights

    def _mean(self, index: list[int], weights: Array, model: int) -> float:
        rates = self.sums[:, index, model].sum(axis=0) / self.counts[:, index].sum(axis=0)
        return float(rates @ weights / weights.sum())

    @staticmethod
    def _variance(draws: Array, clusters: int) -> float:
        """Of a mean: resamples spread sqrt(C / (C - 1)) less than the population they stand for."""
        return float(draws.var()) * clusters / max(1, clusters - 1)

    def _clusters(self, index: list[int]) -> int:
        return int((self.counts[:, index].sum(axis=1) > 0).sum())

    def _shares(self, index: list[int], weights: Array) -> Array:
        """What one question of each cell is of the mean."""
        return weights / weights.sum() / self.counts[:, index].sum(axis=0)

    def _independent(self, index: list[int], weights: Array) -> bool:
        """Whether each concept is asked once, and all questions weigh alike."""
        shares = self._shares(index, weights)
        return float(self.counts[:, index].sum()) == self._clusters(index) and np.allclose(shares, shares[0])

    def _effective(self, index: list[int], weights: Array) -> float:
        """How many concepts of equal weight those of the cells are worth (Kish 1965)."""
        return float(1 / ((self.counts[:, index] @ self._shares(index, weights)) ** 2).sum())

    def _unseen(self, index: list[int], weights: Array, model: int) -> float:
        """The variance of a mean that resamples cannot show: of its cells that are all right or all wrong.

        As if in each of them two concepts more had been asked about, and answered as well as the cells are.
        """
        concepts = (self.counts[:, index] > 0).sum(axis=0)
        rates = self.sums[:, index, model].sum(axis=0) / self.counts[:, index].sum(axis=0)
        same = (rates < 1e-9) | (rates > 1 - 1e-9)
        rates = (rates * concepts + 2 * self._mean(index, weights, model)) / (concepts + 2)
        return float(((weights / weights.sum()) ** 2 * rates * (1 - rates) / concepts * same).sum())


def bootstrap(
    values: Array,
    clusters: Sequence[Hashable],
    cells: Sequence[Hashable],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Bootstrap:
    """Cell means of `values` [N] or [N, M], and their cluster-bootstrap draws.

    clusters, cells: for each question its cluster and its cell. A resample in which a cell got no question
    keeps that cell's estimate.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    cluster_names, cluster_index = _codes(clusters)
    cell_names, cell_index = _codes(cells)
    C, K, M = len(cluster_names), len(cell_names), values.shape[1]
    counts = np.zeros((C, K))
    sums = np.zeros((C, K, M))
    np.add.at(counts, (cluster_index, cell_index), 1.0)
    np.add.at(sums, (cluster_index, cell_index), values)

    means = sums.sum(axis=0) / counts.sum(axis=0)[:, None]  # [K, M]
    weights = resample_weights(C, resamples, seed)  # [R, C]
    drawn = weights @ counts  # [R, K]
    totals = (weights @ sums.reshape(C, K * M)).reshape(resamples, K, M)
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = totals / drawn[:, :, None]
    draws = np.where(drawn[:, :, None] > 0, draws, means)
    return Bootstrap(cell_names, counts, sums, draws, binary=bool(np.isin(values, (0.0, 1.0)).all()))


@functools.lru_cache(maxsize=4)
def resample_weights(clusters: int, resamples: int, seed: int) -> Array:
    """[R, C]: how often each cluster is drawn when `clusters` of them are drawn with replacement."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples).astype(np.float64)


def student(freedom: float, z: float = Z95) -> float:
    """Student's t where the normal distribution has z: 97.5 %; infinite for no degree of freedom.

    From 5 on the Cornish-Fisher expansion (Abramowitz & Stegun 26.7.5), off by less than 1 %. Of one and two,
    those of two and three are given: what is added to an interval against a spread of nought has widened it
    already, and with these it covers 95 % (benchmarks/coverage.py). Farther out than 97.5 % so few tell
    nothing: infinity.
    """
    freedom += 1e-9  # 4.999... is five that was divided
    if freedom < 5:
        return (math.inf, 4.3027, 3.1824, 3.1824, 2.7764)[max(0, int(freedom))] if z <= Z95 else math.inf
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def wilson(successes: float, n: float, mean: float | None = None) -> Interval:
    """Wilson's score interval (1927), for `n` independent questions. Never empty, never outside 0..1."""
    if n <= 0:
        return Interval(0.0, 0.0, 1.0)
    p = successes / n if mean is None else mean
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def tango(only_a: int, only_b: int, n: int, z: float = Z95) -> Interval:
    """The score interval for a difference of paired shares (Tango 1998), for n independent questions.

    only_a, only_b: how many just the one, and just the other, got right. The ends are the differences at
    which the test just does not reject, found by halving.
    """
    mean = (only_a - only_b) / n

    def score(gap: float) -> float:
        b = (2 * n - only_a + only_b) * gap - only_a - only_b
        q = (math.sqrt(max(0.0, b * b + 8 * n * only_b * gap * (1 - gap))) - b) / (4 * n)
        spread = n * (2 * q + gap * (1 - gap))
        return (only_a - only_b - n * gap) / math.sqrt(max(1e-300, spread))

    def halved(low: float, high: float, wanted: float) -> float:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > wanted else (low, middle)
        return (low + high) / 2

    return Interval(mean, halved(-1.0, mean, z), halved(mean, 1.0, -z))


@functools.lru_cache(maxsize=4096)
def exact(successes: int, n: int) -> Interval:
    """The exact interval of a count among n independent questions, with mid-p (Lancaster 1961).

    Its ends are where the tails of the binomial distribution are 2.5 % each, the count itself being half in
    either; found by halving. Clopper & Pearson's (1934) has the count wholly in both and holds the truth 98
    times in 100 and more where questions are few; Wilson's, near 0 and 1, 85 times only (Berry & Armitage
    1995; benchmarks/coverage.py).
    """
    if n <= 0:
        return Interval(0.0, 0.0, 1.0)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    ways, k = logs[n] - logs - logs[::-1], np.arange(n + 1)

    def beyond(p: float) -> float:
        chance = np.exp(ways[successes:] + k[successes:] * math.log(p) + (n - k[successes:]) * math.log1p(-p))
        return float(chance.sum() - chance[0] / 2)

    def halved(tail: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if beyond(middle) < tail else (low, middle)
        return (low + high) / 2

    low = 0.0 if successes == 0 else halved(0.025)
    return Interval(successes / n, low, 1.0 if successes == n else halved(0.975))


def holm(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """p-values for several comparisons at once (Holm 1979): below 0.05, and no false alarm in 95 of 100."""
    adjusted, largest = {}, 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def detectable(
    shares: Sequence[float] | Array,
    clusters: Sequence[Hashable],
    *,
    differing: float = 0.2,
    correlation: float = 0.3,
) -> float:
    """The smallest difference between two models that a run will find 80 times in 100, at 5 %.

    shares: of each question, what it is of the mean; they sum to 1. differing: the share of questions that
    just one of the two gets right; correlation: of the differences within a concept. 0.2 and 0.3 are what two
    fine-tunings of one model may have; a run tells the real ones (`Bootstrap.standard_error`).
    """
    weights = np.asarray(shares, dtype=np.float64)
    _, codes = _codes(clusters)
    alone, together = float((weights**2).sum()), float((np.bincount(codes, weights) ** 2).sum())
    error = math.sqrt(differing * ((1 - correlation) * alone + correlation * together))
    return min(1.0, (student(1 / together - 1) + Z80) * error)


def clusters_needed(difference: float, standard_error: float, clusters: int, z: float = Z95) -> int:
    """How many concepts would settle a difference of this size 80 times in 100, seen on `clusters` with this
    error: `Bootstrap.standard_error`, which is that of the interval's centre, C / (C + 2) of the difference.
    z: as in `Bootstrap.difference`.
    """
    if difference == 0:
        return 0
    unit = clusters * (standard_error * (1 + 2 / clusters) / abs(difference)) ** 2
    first = math.ceil(unit * (z + Z80) ** 2)
    return math.ceil(unit * (student(max(first, 6) - 1, z) + Z80) ** 2)  # the interval will be Student's


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in one figure without losing in the other, from left to right."""
    kept: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept[::-1]


def _codes(names: Sequence[Hashable]) -> tuple[list[Any], NDArray[np.int64]]:
    """The distinct names in order of appearance, and each element's index among them."""
    index: dict[Hashable, int] = {}
    codes = [index.setdefault(name, len(index)) for name in names]
    return list(index), np.asarray(codes, dtype=np.int64)
