"""Intervals for scores over questions that are not independent.

The same drawing is asked about in eleven languages and several tasks, so its questions succeed and fail
together. What is resampled is therefore the concept, with all its questions (cluster bootstrap: Efron &
Tibshirani 1993, ch. 8; Cameron, Gelbach & Miller 2008). One set of resampled concepts serves all cells and
all models at once, which makes averages over cells and differences between models paired for free.

The draws give the variance; the interval is not their percentiles, which are too narrow for few concepts and
of no width where all answers are right or two models agree in everything:

- of a score: Wilson's interval for as many independent questions as would have that variance, with Student's
  t for the number of concepts (effective sample size: Korn & Graubard 1998; Wilson's for surveys: Kott & Carr
  1997);
- of a difference: Tango's (1998) where each concept is asked once; else Student's t, with half a question
  added that only one of two models gets right, once for each (Agresti & Min 2005).

benchmarks/coverage.py measures how often they hold the truth. `exact` is Clopper & Pearson's, for counts of
independent questions where 95 % is to be a promise and not an average.

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
        clusters = self._clusters(index)
        spread = self._variance(self.draws[:, index, model] @ weights / weights.sum(), clusters)
        asked = float(self.counts[:, index].sum())
        if self.binary and asked == clusters:  # independent questions: the binomial's own variance
            return wilson(mean * asked, asked, mean)
        if spread < 1e-12:  # all right, or all wrong: each concept counts as one question
            return wilson(mean * clusters, clusters, mean)
        n = mean * (1 - mean) / spread
        n = min(n, asked) if self.binary else n
        low_high = wilson(mean * n, n * (Z95 / student(clusters - 1)) ** 2, mean)
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
        shares = weights / weights.sum() / self.counts[:, index].sum(axis=0)
        asked = float(self.counts[:, index].sum())
        if self.binary and asked == clusters and np.allclose(shares, shares[0]):
            gains = (self.sums[:, index, a] - self.sums[:, index, b]).sum(axis=1)
            return tango(int((gains > 0).sum()), int((gains < 0).sum()), clusters, z)
        error = self.standard_error(a, b, cells)
        half = student(clusters - 1, z) * error
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
        shares = weights / weights.sum() / self.counts[:, index].sum(axis=0)
        found = (self.sums[:, index, a] - self.sums[:, index, b]) @ shares
        found = found[np.abs(found) > 1e-15]
        if len(found) <= 13:
            bits = np.arange(2 ** len(found))[:, None] >> np.arange(len(found)) & 1
            totals = (2.0 * bits - 1.0) @ found
            return float(np.mean(np.abs(totals) >= abs(found.sum()) - 1e-12))
        signs = np.random.default_rng(seed).integers(0, 2, (flips, len(found)), dtype=np.int8) * 2 - 1
        at_least = np.abs(signs @ found) >= abs(found.sum()) - 1e-12
        return float((at_least.sum() + 1) / (flips + 1))

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


def student(freedom: int, z: float = Z95) -> float:
    """Student's t where the normal distribution has z: 97.5 % (Cornish-Fisher expansion, Abramowitz & Stegun
    26.7.5).

    Off by less than 1 % from 5 degrees of freedom on; below, that of 3 is given, 3.18. Farther out than
    97.5 % so few tell nothing: infinity.
    """
    if freedom < 5:
        return {4: 2.7764}.get(freedom, 3.1824) if z <= Z95 else math.inf
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


def exact(successes: int, n: int) -> Interval:
    """Clopper & Pearson's interval (1934) for n independent questions: 95 % or more, whatever the truth.

    Its ends are where the tails of the binomial distribution are 2.5 % each, found by halving.
    """
    if n <= 0:
        return Interval(0.0, 0.0, 1.0)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    ways = logs[n] - logs - logs[::-1]

    def at_least(k: int, p: float) -> float:
        i = np.arange(k, n + 1)
        return float(np.exp(ways[k:] + i * math.log(p) + (n - i) * math.log1p(-p)).sum())

    def halved(k: int, tail: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if at_least(k, middle) < tail else (low, middle)
        return (low + high) / 2

    low = 0.0 if successes == 0 else halved(successes, 0.025)
    high = 1.0 if successes == n else halved(successes + 1, 0.975)
    return Interval(successes / n, low, high)


def holm(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """p-values for several comparisons at once (Holm 1979): below 0.05, and no false alarm in 95 of 100."""
    adjusted, largest = {}, 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def detectable(
    clusters: int, per_cluster: float = 1.0, *, differing: float = 0.2, correlation: float = 0.3
) -> float:
    """The smallest difference between two models that a run will find 80 times in 100, at 5 %.

    differing: the share of questions that just one of the two gets right; correlation: of the differences
    within a concept. 0.2 and 0.3 are what two fine-tunings of one model may have; a run tells the real ones
    (`Bootstrap.standard_error`).
    """
    design = 1 + (per_cluster - 1) * correlation
    return (student(clusters - 1) + Z80) * math.sqrt(differing * design / (clusters * per_cluster))


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


def _codes(names: Sequence[Hashable]) -> tuple[list[Any], NDArray[np.int64]]:
    """The distinct names in order of appearance, and each element's index among them."""
    index: dict[Hashable, int] = {}
    codes = [index.setdefault(name, len(index)) for name in names]
    return list(index), np.asarray(codes, dtype=np.int64)
