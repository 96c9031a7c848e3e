"""Intervals for scores over questions that are not independent.

The same drawing is asked about in eleven languages and several tasks, so its questions succeed and fail
together. What is resampled is therefore the concept, with all its questions (cluster bootstrap: Efron &
Tibshirani 1993, ch. 8; Cameron, Gelbach & Miller 2008). One set of resampled concepts serves all cells and
all models at once, which makes averages over cells and differences between models paired for free.

Legend: N questions, M models, C clusters (concepts), K cells (task x language), R resamples.
"""

from __future__ import annotations

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
MIN_CLUSTERS = 30
MIN_EACH = 5
"""Below so many clusters, or so many successes or failures, a bootstrap interval is too narrow: Wilson's
serves.
"""


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

    def interval(self, cells: Cells = None, model: int = 0) -> Interval:
        """95 % interval of one model's mean over `cells`: all of them, those given, or by weights given.

        Where there is too little to resample, it is Wilson's for as many independent questions as there are
        concepts: questions of one concept count as one, which errs on the wide side.
        """
        index, weights = self._weights(cells)
        mean = self._mean(index, weights, model)
        clusters = self._clusters(index)
        asked, right = self.counts[:, index].sum(), self.sums[:, index, model].sum()
        if clusters < MIN_CLUSTERS or min(right, asked - right) < MIN_EACH:
            return wilson(mean * clusters, clusters)
        return percentile_interval(mean, self.draws[:, index, model] @ weights / weights.sum(), clusters)

    def difference(self, a: int, b: int, cells: Cells = None) -> Interval:
        """95 % interval of model a's mean minus model b's, paired on the resampled concepts."""
        index, weights = self._weights(cells)
        draws = (self.draws[:, index, a] - self.draws[:, index, b]) @ weights / weights.sum()
        mean = self._mean(index, weights, a) - self._mean(index, weights, b)
        return percentile_interval(mean, draws, self._clusters(index), bounds=(-1.0, 1.0))

    def wins(self, cells: Cells = None) -> Array:
        """[M]: in which share of the resamples each model has the best mean (the first of equals wins)."""
        index, weights = self._weights(cells)
        best = np.einsum("rkm,k->rm", self.draws[:, index], weights).argmax(axis=1)
        return np.bincount(best, minlength=self.sums.shape[2]) / len(best)

    def _weights(self, cells: Cells) -> tuple[list[int], Array]:
        wanted = self.cells if cells is None else cells
        given = wanted if isinstance(wanted, Mapping) else dict.fromkeys(wanted, 1.0)
        index = [k for k, cell in enumerate(self.cells) if cell in given]
        weights = np.array([given[self.cells[k]] for k in index])
        return index, weights

    def _mean(self, index: list[int], weights: Array, model: int) -> float:
        rates = self.sums[:, index, model].sum(axis=0) / self.counts[:, index].sum(axis=0)
        return float(rates @ weights / weights.sum())

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
    return Bootstrap(cell_names, counts, sums, draws)


def resample_weights(clusters: int, resamples: int, seed: int) -> Array:
    """[R, C]: how often each cluster is drawn when `clusters` of them are drawn with replacement."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples).astype(np.float64)


def percentile_interval(
    mean: float, draws: Array, clusters: int, *, bounds: tuple[float, float] = (0.0, 1.0)
) -> Interval:
    """The middle 95 % of the draws, stretched about the mean for the small number of clusters C.

    A resample spreads sqrt(C / (C - 1)) less than the population it stands for, and with few clusters
    Student's t takes the place of the normal (its quantile by the Cornish-Fisher expansion, Abramowitz &
    Stegun 26.7.5).
    """
    freedom = max(1, clusters - 1)
    t = Z95 + (Z95**3 + Z95) / (4 * freedom) + (5 * Z95**5 + 16 * Z95**3 + 3 * Z95) / (96 * freedom**2)
    stretch = math.sqrt(clusters / freedom) * t / Z95
    low, high = mean + (np.quantile(draws, [0.025, 0.975]) - mean) * stretch
    return Interval(mean, max(bounds[0], float(low)), min(bounds[1], float(high)))


def wilson(successes: float, n: float) -> Interval:
    """Wilson's score interval (1927), for `n` independent questions. Never empty, never outside 0..1."""
    if n <= 0:
        return Interval(0.0, 0.0, 1.0)
    p = successes / n
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def _codes(names: Sequence[Hashable]) -> tuple[list[Any], NDArray[np.int64]]:
    """The distinct names in order of appearance, and each element's index among them."""
    index: dict[Hashable, int] = {}
    codes = [index.setdefault(name, len(index)) for name in names]
    return list(index), np.asarray(codes, dtype=np.int64)
