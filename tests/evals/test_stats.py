"""Intervals that mean what they say."""

import numpy as np
import pytest

from seavlm.evals.stats import Interval, bootstrap, percentile_interval, resample_weights, wilson


def share(right: list[float], concepts: list[int]) -> Interval:
    return bootstrap(np.array(right), concepts, [0] * len(right)).interval()


def simulate(rng: np.random.Generator, clusters: int, per_cluster: int, models: int = 1) -> np.ndarray:
    """Right or wrong [C, P, M]: concepts differ in difficulty (Beta(2, 1)), models in luck with each."""
    difficulty = rng.beta(2, 1, size=(clusters, 1, 1))
    luck = rng.normal(0, 0.08, size=(clusters, 1, models))
    return rng.random((clusters, per_cluster, models)) < np.clip(difficulty + luck, 0, 1)


def true_mean() -> float:
    return float(simulate(np.random.default_rng(99), 400_000, 1).mean())


def coverage(clusters: int, per_cluster: int, runs: int = 1500) -> tuple[float, float]:
    """How often the interval of the mean, and of the difference of two equal models, holds the truth."""
    rng = np.random.default_rng(5)
    truth = true_mean()
    weights = resample_weights(clusters, 600, seed=1)
    mean_hits = difference_hits = 0
    for _ in range(runs):
        sums = simulate(rng, clusters, per_cluster, models=2).mean(axis=1)  # [C, 2]
        draws = weights @ sums / clusters
        estimate = sums.mean(axis=0)
        interval = percentile_interval(estimate[0], draws[:, 0], clusters)
        mean_hits += interval.low <= truth <= interval.high
        difference = percentile_interval(
            estimate[0] - estimate[1], draws[:, 0] - draws[:, 1], clusters, bounds=(-1, 1)
        )
        difference_hits += not difference.excludes_zero
    return mean_hits / runs, difference_hits / runs


@pytest.mark.parametrize(("clusters", "per_cluster"), [(40, 11), (100, 11), (200, 3)])
def test_intervals_cover_the_truth_95_times_in_100(clusters: int, per_cluster: int) -> None:
    means, differences = coverage(clusters, per_cluster)
    assert 0.93 <= means <= 0.97
    assert 0.93 <= differences <= 0.97


def test_taking_questions_for_independent_would_not_cover() -> None:
    """The mistake that clustering cures: with eleven questions a concept, Wilson's is far too narrow."""
    rng = np.random.default_rng(6)
    truth = true_mean()
    hits = 0
    for _ in range(500):
        right = simulate(rng, 100, 11)
        interval = wilson(right.sum(), right.size)
        hits += interval.low <= truth <= interval.high
    assert hits / 500 < 0.85


def test_bootstrap_equals_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 20, 200).tolist()
    cells = rng.choice(["a", "b", "c"], 200).tolist()
    values = (rng.random((200, 2)) < 0.6).astype(float)
    result = bootstrap(values, clusters, cells, resamples=50, seed=3)
    names = list(dict.fromkeys(clusters))
    weights = resample_weights(20, 50, seed=3)
    for draw in (0, 49):
        for k, cell in enumerate(result.cells):
            rows = [
                values[i]
                for position, cluster in enumerate(names)
                for _ in range(int(weights[draw, position]))
                for i in range(200)
                if clusters[i] == cluster and cells[i] == cell
            ]
            np.testing.assert_allclose(result.draws[draw, k], np.mean(rows, axis=0))
    a_only = result.interval(["a"], model=1)
    mean_a = float(np.mean([values[i, 1] for i in range(200) if cells[i] == "a"]))
    assert a_only.mean == pytest.approx(mean_a)
    assert result.difference(0, 0).low == result.difference(0, 0).high == 0
    assert result.difference(0, 1).mean == pytest.approx(-result.difference(1, 0).mean)


def test_the_same_seed_gives_the_same_interval() -> None:
    values, clusters = np.tile([1.0, 0.0, 1.0], 40), [i // 3 for i in range(120)]
    first = bootstrap(values, clusters, [0] * 120, seed=4).interval()
    assert first == bootstrap(values, clusters, [0] * 120, seed=4).interval()


def test_pairing_finds_a_small_difference_that_separate_intervals_miss() -> None:
    rng = np.random.default_rng(1)
    base = rng.random(400) < rng.beta(0.3, 0.3, 400)
    better = base | (rng.random(400) < 0.05)
    draws = bootstrap(np.stack([better, base], axis=1).astype(float), list(range(400)), [0] * 400)
    one, other, paired = draws.interval(model=0), draws.interval(model=1), draws.difference(0, 1)
    assert one.low < other.high  # the intervals overlap
    assert paired.low > 0


def test_small_and_one_sided_cells() -> None:
    assert wilson(0, 0) == Interval(0.0, 0.0, 1.0)
    ten = share([1.0] * 10, list(range(10)))
    assert ten.mean == 1 and ten.high == 1 and 0.65 < ten.low < 0.75  # the textbook value is 0.722
    assert share([0.0] * 500, list(range(500))).high > 0  # never an interval of no width
    repeated = share([1.0, 0.0] * 50, [0, 1] * 50)  # two concepts asked fifty times each are two concepts
    assert repeated.high - repeated.low > 0.8
    half = wilson(50, 100)
    assert (half.low, half.high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
