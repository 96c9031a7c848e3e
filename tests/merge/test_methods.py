"""linear: fp32 sums, one rounding, parents reproduced bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from seavlm.errors import SeavlmError
from seavlm.merge.methods import check_weights, combine, merge_tensors, order_statistics, uniform


def parents(dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(64, 48, generator=g)
    tuned = base + 1e-3 * torch.randn(64, 48, generator=g)
    tuned[0, 0], base[0, 0] = -0.0, 0.5
    base[0, 1], tuned[0, 1] = -0.0, 0.5
    return [tuned.to(dtype), base.to(dtype)]


def linear(tensors, weights, dtype=None):
    check_weights(weights, len(tensors))
    return combine(tensors, weights).to(dtype or tensors[0].dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beta_one_and_zero_are_the_parents(dtype: torch.dtype) -> None:
    tuned, base = parents(dtype)
    assert torch.equal(bits(linear([tuned, base], [1.0, 0.0])), bits(tuned))
    assert torch.equal(bits(linear([tuned, base], [0.0, 1.0])), bits(base))


def test_equals_numpy_fp32() -> None:
    tuned, base = parents(torch.bfloat16)
    got = linear([tuned, base], [0.1, 0.9], dtype=torch.float32).numpy()
    wanted = tuned.float().numpy() * np.float32(0.1) + base.float().numpy() * np.float32(0.9)
    assert np.array_equal(got.view(np.int32), wanted.view(np.int32))


def test_one_rounding_beats_bf16_arithmetic() -> None:
    tuned, base = parents(torch.bfloat16)
    exact = 0.1 * tuned.double() + 0.9 * base.double()
    ours = (linear([tuned, base], [0.1, 0.9]).double() - exact).abs().mean()
    naive = tuned * 0.1 + base * 0.9
    assert ours < 0.8 * (naive.double() - exact).abs().mean()
    # Half a unit in the last place of bf16 (8 bits) bounds a single rounding.
    assert ((linear([tuned, base], [0.1, 0.9]).double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-12).all()


def test_three_parents_and_mixed_dtypes() -> None:
    tuned, base = parents(torch.bfloat16)
    result = combine([tuned, base.float(), base], [0.2, 0.3, 0.5])
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, 0.2 * tuned.float() + 0.8 * base.float())


@pytest.mark.parametrize("weights", [[0.5], [0.5, 0.6], [float("nan"), 1.0], [float("inf"), -float("inf")]])
def test_wrong_weights(weights: list[float]) -> None:
    with pytest.raises(SeavlmError, match="weights"):
        linear(parents(torch.float32), weights)


def test_shapes_must_match() -> None:
    with pytest.raises(SeavlmError, match="shapes"):
        linear([torch.zeros(2, 3), torch.zeros(3, 2)], [0.5, 0.5])


# --- the other methods, beside plain numpy in float64 that sees the whole tensor at once


SHAPE = (12, 40)


def three() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    base = torch.randn(*SHAPE, generator=g)
    return [base, *(base + 0.1 * torch.randn(*SHAPE, generator=g) for _ in range(2))]


def merged(method: str, tensors, *, base: int | None = 0, each=None, **shared) -> np.ndarray:
    return merge_tensors(method, tensors, base=base, key="0/x", each=each, **shared).numpy()


def np_slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    angle = np.arccos(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def np_trim(d: np.ndarray, density: float, gamma: float = 0.0) -> np.ndarray:
    order = np.argsort(-np.abs(d).ravel(), kind="stable")
    skipped = int(gamma * d.size)
    keep = order[skipped : skipped + int(density * d.size)]
    out = np.zeros(d.size)
    out[keep] = d.ravel()[keep]
    return out.reshape(d.shape)


def np_elect(deltas: list[np.ndarray], weights: list[float], normalize: bool) -> np.ndarray:
    weighted = [w * d for w, d in zip(weights, deltas, strict=True)]
    sign = np.where(sum(weighted) >= 0, 1, -1)
    masks = [np.sign(d) == sign for d in weighted]
    total = sum(d * m for d, m in zip(weighted, masks, strict=True))
    below = sum(w * m for w, m in zip(weights, masks, strict=True))
    return total / np.where(below == 0, 1, below) if normalize else total


def np_kept(key: str, chance: np.ndarray, d: np.ndarray) -> np.ndarray:
    kept = d * (uniform(key, 0, d.size).numpy().reshape(d.shape) < chance)
    return kept * np.abs(d).sum() / np.abs(kept).sum()


WEIGHTS = [{}, {"weight": 0.7, "density": 0.4}, {"weight": 0.5, "density": 0.6}]


def test_weighted_sums_of_spherical_methods() -> None:
    xs = three()
    base, a, b = (x.double().numpy() for x in xs)
    close = np.testing.assert_allclose
    close(merged("slerp", xs[:2], each=[{}, {}], t=0.3), np_slerp(base, a, 0.3), atol=1e-6)
    close(merged("slerp", xs[1::-1], base=1, t=0.3), np_slerp(base, a, 0.3), atol=1e-6)
    two = [{"weight": 0.2}, {"weight": 0.6}]
    close(merged("nuslerp", xs[1:], base=None, each=two), np_slerp(a, b, 0.75), atol=1e-6)
    whole = base + np_slerp(a - base, b - base, 0.75)
    close(merged("nuslerp", xs, each=[{}, *two]), whole, atol=1e-6)
    rows = np.stack([np_slerp(p, q, 0.75) for p, q in zip(a - base, b - base, strict=True)])
    close(merged("nuslerp", xs, each=[{}, *two], nuslerp_flatten=False), base + rows, atol=1e-5)
    columns = np.stack([np_slerp(p, q, 0.75) for p, q in zip((a - base).T, (b - base).T, strict=True)]).T
    by_column = merged("nuslerp", xs, each=[{}, *two], nuslerp_flatten=False, nuslerp_row_wise=True)
    close(by_column, base + columns, atol=1e-5)
    cosine = np.sum((a - base) * (b - base)) / np.linalg.norm(a - base) / np.linalg.norm(b - base)
    t = 2 * cosine / (1 + cosine)
    close(merged("model_stock", xs), t * (a + b) / 2 + (1 - t) * base, atol=1e-6)
    close(
        merged("linear", xs, base=None, each=[{"weight": w} for w in (1, 2, 1)]),
        (base + 2 * a + b) / 4,
        atol=1e-6,
    )
    close(merged("passthrough", xs[:1], base=None, each=[{"scale": 0.5}]), base / 2, atol=1e-7)


def test_slerp_of_a_straight_line_is_linear() -> None:
    base, *_ = three()
    assert np.allclose(merged("slerp", [base, 2 * base], t=0.5), 1.5 * base.numpy())
    assert np.allclose(merged("slerp", [base, torch.zeros_like(base)], t=0.25), 0.75 * base.numpy())


def test_karcher_is_the_mean_on_the_sphere() -> None:
    """Of two: half-way along the great circle. Of three: no direction lowers the sum of squared angles."""
    xs = three()
    _, a, b = (x.double().numpy() for x in xs)
    half = np_slerp(a / np.linalg.norm(a), b / np.linalg.norm(b), 0.5)
    length = (np.linalg.norm(a) + np.linalg.norm(b)) / 2
    np.testing.assert_allclose(merged("karcher", xs[1:], base=None), half * length, atol=1e-5)
    g = torch.Generator().manual_seed(1)
    apart = [torch.randn(*SHAPE, generator=g) + 1 for _ in range(3)]
    mean = merged("karcher", apart, base=None, max_iter=50).astype(float)
    units = [(x / x.norm()).double().numpy() for x in apart]
    mean /= np.linalg.norm(mean)
    dots = [np.sum(u * mean) for u in units]
    pull = sum((u - c * mean) * np.arccos(c) / np.sin(np.arccos(c)) for u, c in zip(units, dots, strict=True))
    assert np.abs(pull).max() < 1e-3


@pytest.mark.parametrize("method, gamma", [("ties", 0.0), ("breadcrumbs", 0.05), ("breadcrumbs_ties", 0.05)])
def test_trimmed_by_magnitude(method: str, gamma: float) -> None:
    xs = three()
    base, a, b = (x.numpy() for x in xs)
    deltas = [np_trim(a - base, 0.4, gamma), np_trim(b - base, 0.6, gamma)]
    each = [entry | ({"gamma": gamma} if gamma else {}) for entry in WEIGHTS]
    plain = 0.7 * deltas[0] + 0.5 * deltas[1]
    change = np_elect(deltas, [0.7, 0.5], method == "ties") if "ties" in method else plain
    got = merged(method, xs, each=[{}, *each[1:]], **{"lambda": 0.9})
    np.testing.assert_allclose(got, base + 0.9 * change, atol=1e-6)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_dropped_at_random(method: str) -> None:
    xs = three()
    base, a, b = (x.numpy() for x in xs)
    kept = []
    for i, (x, density) in enumerate([(a, 0.4), (b, 0.6)], 1):
        d, chance = x - base, np.full(SHAPE, density)
        if "della" in method:
            ranks = np.abs(d).argsort(axis=1).argsort(axis=1)
            chance = density - 0.1 + 0.2 * ranks / (SHAPE[1] - 1)
        kept.append(np_kept(f"0/x/{i}", chance, d))
    each = [entry | ({"epsilon": 0.1} if "della" in method else {}) for entry in WEIGHTS]
    plain = 0.7 * kept[0] + 0.5 * kept[1]
    change = np_elect(kept, [0.7, 0.5], method == "della") if method in ("dare_ties", "della") else plain
    np.testing.assert_allclose(merged(method, xs, each=[{}, *each[1:]]), base + change, atol=1e-5)


def test_rescaled_by_the_density_as_in_the_papers() -> None:
    xs = three()[:2]
    each = [{}, {"weight": 1.0, "density": 0.25}]
    change = merged("dare_linear", xs, each=each, rescale="density") - xs[0].numpy()
    kept = uniform("0/x/1", 0, xs[0].numel()).numpy().reshape(SHAPE) < 0.25
    np.testing.assert_allclose(change, (xs[1] - xs[0]).numpy() * kept * 4, atol=1e-5)


def test_sce() -> None:
    xs = three()
    base, a, b = (x.double().numpy() for x in xs)
    stack = np.stack([a - base, b - base])
    spread = stack.var(axis=0)
    chosen = stack * (spread >= np.sort(spread.ravel())[-int(0.3 * spread.size)])
    weights = np.square(chosen).sum(axis=(1, 2)) / np.square(chosen).sum()
    sign = np.where(chosen.sum(0) >= 0, 1, -1)
    agree = np.sign(chosen) == sign
    below = (weights[:, None, None] * agree).sum(0)
    change = (chosen * weights[:, None, None] * agree).sum(0) / np.where(below == 0, 1, below)
    np.testing.assert_allclose(merged("sce", xs, select_topk=0.3), base + change, atol=1e-6)


def test_small_differences_keep_their_weights() -> None:
    """sce: squares of 1e-10 are not taken for nothing; the larger difference still counts for more."""
    base, *_ = three()
    g = torch.Generator().manual_seed(0)
    noise = torch.rand(*SHAPE, generator=g) * 2**-14
    change = merged("sce", [base.mul(0), noise, 3 * noise])
    np.testing.assert_allclose(change, (0.1 * noise + 0.9 * 3 * noise).numpy(), rtol=1e-4)


def test_order_statistics_are_exact() -> None:
    g = torch.Generator().manual_seed(0)
    numbers = [
        torch.randn(1000, generator=g).abs(),
        torch.zeros(1000),
        torch.rand(1000, generator=g).round(decimals=1),
    ]
    ranks = [[0, 1, 500, 999]] * 3
    pieces = [[x[i : i + 77] for x in numbers] for i in range(0, 1000, 77)]
    found = order_statistics(lambda: iter(pieces), lambda count: ranks if count == 1000 else [])
    assert found == [[float(x.sort().values[r]) for r in ranks[0]] for x in numbers]


def test_uniform_is_one_row_wherever_it_is_read() -> None:
    row = uniform("key", 0, 1000)
    for start, count in ((0, 1), (3, 500), (8, 8), (13, 987)):
        assert torch.equal(uniform("key", start, count), row[start : start + count])
    assert not torch.equal(uniform("other", 0, 1000), row) and 0.45 < float(row.mean()) < 0.55
    assert [round(float(x), 6) for x in row[:3]] == [0.788749, 0.227839, 0.10342]


def test_epsilon_out_of_range() -> None:
    with pytest.raises(SeavlmError, match="epsilon"):
        merged("della", three()[:2], each=[{}, {"weight": 1, "density": 0.1, "epsilon": 0.2}])
