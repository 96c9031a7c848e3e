"""How tensors of one name become one: the methods of the literature, in fp32, rounded once at the end.

Summed in bf16 (8 bits of mantissa) a weight of 0.1 is already 0.1001, and each rounding is as large as a
small fine-tuning's whole change.

A method is a function `method(passes, settings) -> finish`. `passes()` goes through the sources piece by
piece, as often as the method asks, to take what it needs of the whole tensor (a norm, a threshold);
`finish(start, sources)` then merges one piece. A piece is its first element's index and one fp32 tensor a
source, [n], or [rows, columns] for the methods that look at rows. So a tensor of any size costs a piece's
memory, and `merge_tensors` does the same with one piece.

Slerp, nuslerp, model_stock and karcher all end in a weighted sum whose weights follow from the sources'
inner products; these are taken in fp64. What is drawn at random depends on the seed, the tensor's name and
the place in it alone, so neither order nor sharding change a bit.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seavlm.errors import SeavlmError

Piece = tuple[int, list[Tensor]]
Passes = Callable[[], Iterator[Piece]]
Finish = Callable[[int, list[Tensor]], Tensor]
REQUIRED = object()


@dataclass(frozen=True)
class Settings:
    """A tensor's parameters. base: the base model's index among the sources; each: a mapping a source; key:
    names what is drawn at random (the seed and the tensor's name).
    """

    shared: dict[str, Any] = field(default_factory=dict)
    each: tuple[dict[str, Any], ...] = ()
    base: int | None = None
    key: str = ""

    @property
    def others(self) -> list[int]:
        """The sources besides the base."""
        return [i for i in range(len(self.each)) if i != self.base]

    def of(self, name: str) -> list[Any]:
        """A parameter of all sources besides the base."""
        return [self.each[i][name] for i in self.others]


@dataclass(frozen=True)
class Method:
    """A method, its parameters with their defaults, and what it needs: a base ("required", "optional",
    "none": then one that is given is a source like the others), and how many sources besides it; columns: of
    a row, for a tensor of this shape; 0 where rows do not matter.
    """

    start: Callable[[Passes, Settings], Finish]
    shared: dict[str, Any] = field(default_factory=dict)
    each: dict[str, Any] = field(default_factory=dict)
    base: str = "none"
    least: int = 1
    most: int = 1_000
    columns: Callable[[Settings, Sequence[int]], int] = lambda settings, shape: 0


def merge_tensors(
    method: str,
    tensors: Sequence[Tensor],
    *,
    base: int | None = None,
    key: str = "",
    each: Sequence[dict[str, Any]] | None = None,
    **shared: Any,
) -> Tensor:
    """`tensors` (of one shape, any float dtype) merged by `method`, fp32. Parameters not given have their
    defaults. SeavlmError for other shapes, or parameters that are missing or out of range.
    """
    how = METHODS[method]
    _one_shape(tensors)
    given = each or [{} for _ in tensors]
    settings = Settings(
        {**how.shared, **shared}, tuple({**how.each, **mine} for mine in given), base=base, key=key
    )
    check_settings(method, settings)
    shape = tensors[0].shape
    columns = how.columns(settings, shape)
    parts = [t.float().reshape((-1, columns) if columns else (-1,)) for t in tensors]
    return how.start(lambda: iter([(0, list(parts))]), settings)(0, list(parts)).reshape(shape)


# --- weighted sums


def check_weights(weights: Sequence[float], parents: int) -> None:
    """SeavlmError unless there is one finite weight for each parent and they sum to 1."""
    if len(weights) != parents or not parents:
        raise SeavlmError(
            f"{len(weights)} weights for {parents} parents", hint="Give one weight for each parent."
        )
    if not all(math.isfinite(w) for w in weights) or abs(math.fsum(weights) - 1.0) > 1e-6:
        raise SeavlmError(
            f"the merge weights {', '.join(map(str, weights))} do not sum to 1",
            hint="For two parents give beta and 1 - beta.",
        )


def combine(tensors: Sequence[Tensor], weights: Sequence[float | Tensor]) -> Tensor:
    """sum_i weights[i] * tensors[i] in fp32; a weight is a number or an fp32 tensor that broadcasts.

    A source of weight 0 is not read into the sum, so that beta = 0 and beta = 1 give a parent back bit for
    bit, signed zeros included. A product and a sum, each rounded to fp32: no fused multiply-add, so every
    machine gives the same bits.
    """
    _one_shape(tensors)
    total: Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        if not isinstance(weight, Tensor) and weight == 0.0:
            continue
        term = tensor.float() * (weight if isinstance(weight, Tensor) else float(np.float32(weight)))
        total = term if total is None else total.add_(term)
    return torch.zeros_like(tensors[0], dtype=torch.float32) if total is None else total


def _one_shape(tensors: Sequence[Tensor]) -> None:
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) != 1:
        raise SeavlmError(f"tensors of different shapes: {', '.join(map(str, sorted(shapes)))}")


def widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype that holds all of `dtypes` without loss."""
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


def _linear(passes: Passes, settings: Settings) -> Finish:
    """sum w_i x_i, divided by sum w_i where `normalize` (model soups: Wortsman et al. 2022,
    arXiv:2203.05482).
    """
    weights = linear_weights(settings)
    return lambda _, xs: combine(xs, weights)


def linear_weights(settings: Settings) -> list[float]:
    """Each source's weight in a linear merge."""
    weights = [float(mine["weight"]) for mine in settings.each]
    if settings.shared["normalize"]:
        total = math.fsum(weights)
        if abs(total) < 1e-8:
            raise SeavlmError("the weights sum to 0 and cannot be normalised", hint="Set normalize: false.")
        weights = [weight / total for weight in weights]
    return weights


def _passthrough(passes: Passes, settings: Settings) -> Finish:
    """The one source, times `scale`."""
    scale = settings.each[0]["scale"]
    return lambda _, xs: combine(xs[:1], [1.0 if scale is None else float(scale)])


# --- weights that follow from inner products


def _gram(passes: Passes, base: int | None, over: str = "all") -> Tensor:
    """Inner products of the sources, or of their differences from source `base`: fp64 [..., n, n].

    over: "all" elements; "columns", one matrix a row, in a list of pieces' rows; "rows", one a column.
    """
    total: Tensor | None = None
    parts = []
    for _, xs in passes():
        wide = [x.double() for x in xs]
        if base is not None:
            wide = [x - wide[base] for i, x in enumerate(wide) if i != base]
        stack = torch.stack(wide)
        if over == "columns":
            parts.append(torch.einsum("irc,jrc->rij", stack, stack))
            continue
        flat = stack.flatten(1)
        part = flat @ flat.T if over == "all" else torch.einsum("irc,jrc->cij", stack, stack)
        total = part if total is None else total + part
    if over == "columns":
        return torch.cat(parts)
    assert total is not None
    return total


def _spherical(gram: Tensor, t: float, colinear: float) -> tuple[Tensor, Tensor]:
    """The two weights of a spherical interpolation (Shoemake 1985): sin((1-t) a) / sin a, sin(t a) / sin a.

    gram: [..., 2, 2]. Where |cos a| > colinear, or a vector is zero: those of the straight line.
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    cosine = (gram[..., 0, 1] / norms.prod(-1).clamp(min=1e-300)).clamp(-1, 1)
    straight = (cosine.abs() > colinear) | (norms.amin(-1) <= 0)
    angle = torch.acos(torch.where(straight, 0.0, cosine))
    first, second = (torch.sin(share * angle) / torch.sin(angle) for share in (1 - t, t))
    return torch.where(straight, 1 - t, first), torch.where(straight, t, second)


def _slerp(passes: Passes, settings: Settings) -> Finish:
    """From the base (t = 0) to the other source (t = 1) along the sphere (Shoemake 1985)."""
    base, (other,) = settings.base, settings.others
    assert base is not None
    order = [base, other]
    gram = _gram(passes, None)[order][:, order]
    weights = [float(w) for w in _spherical(gram, float(settings.shared["t"]), 0.9995)]
    return lambda _, xs: combine([xs[i] for i in order], weights)


def _nuslerp(passes: Passes, settings: Settings) -> Finish:
    """Spherical interpolation at t = w_2 / (w_1 + w_2); with a base, of the differences from it.

    As one vector (nuslerp_flatten, the default), one a row, or one a column (nuslerp_row_wise, as mergekit
    calls it).
    """
    flatten, by_column = settings.shared["nuslerp_flatten"], settings.shared["nuslerp_row_wise"]
    over = "all" if flatten else "rows" if by_column else "columns"
    first, second = (float(w) for w in settings.of("weight"))
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    gram = _gram(passes, settings.base, over)
    weights = [w.float() for w in _spherical(gram, t, math.sqrt(1 - 1e-15))]
    return _from_base(settings, weights, over)


def _model_stock(passes: Passes, settings: Settings) -> Finish:
    """Base + t * (mean - base), t = n cos a / (1 + (n - 1) cos a), a: the mean angle between the differences.

    Jang et al. 2024, arXiv:2403.19522. filter_wise: one t a row.
    """
    over = "columns" if settings.shared["filter_wise"] else "all"
    gram = _gram(passes, settings.base, over)
    count = gram.shape[-1]
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    cosines = gram / (norms[..., :, None] * norms[..., None, :]).clamp(min=1e-300)
    pairs = [cosines[..., i, j].clamp(-1, 1) for i, j in itertools.combinations(range(count), 2)]
    cosine = torch.stack(pairs).mean(0)
    below = 1 + (count - 1) * cosine
    safe = torch.where(below.abs() < 1e-6, 1.0, below)
    t = torch.where(below.abs() < 1e-6, 0.0, count * cosine / safe)  # nothing agrees: the base
    return _from_base(settings, [(t / count).float()] * count, over)


def _from_base(settings: Settings, weights: Sequence[Tensor], over: str) -> Finish:
    """base + sum_i weights[i] * (x_i - base), or sum_i weights[i] * x_i without a base."""

    def finish(start: int, xs: list[Tensor]) -> Tensor:
        mine = list(weights)
        if over == "columns":
            first = start // xs[0].shape[1]
            mine = [w[first : first + xs[0].shape[0], None] for w in weights]
        if settings.base is None:
            return combine(xs, mine)
        base = xs[settings.base]
        return combine([xs[i] - base for i in settings.others], mine).add_(base)

    return finish


def _karcher(passes: Passes, settings: Settings) -> Finish:
    """The mean of the directions on the sphere (Karcher 1977), times the mean norm.

    Gradient steps on the sphere; every iterate is a weighted sum of the unit vectors, so the steps are taken
    on the weights alone, through the inner products.
    """
    gram = _gram(passes, None).numpy()
    norms = np.sqrt(gram.diagonal())
    tol, used = float(settings.shared["tol"]), np.flatnonzero(norms > float(settings.shared["tol"]))
    if len(used) == 0:
        return lambda _, xs: torch.zeros_like(xs[0])
    cosines = gram[np.ix_(used, used)] / np.outer(norms[used], norms[used])
    share = np.full(len(used), 1 / len(used))

    def length(weights: np.ndarray) -> float:
        return math.sqrt(max(0.0, float(weights @ cosines @ weights)))

    mean = np.eye(len(used))[0] if length(share) < tol else share / length(share)
    for _ in range(int(settings.shared["max_iter"])):
        dots = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(dots)
        stretch = np.where(angles < tol, 0.0, angles / np.maximum(np.sin(angles), 1e-12))
        step = share * stretch - (share * stretch * dots).sum() * mean
        far = length(step)
        if far < tol:
            break
        mean = math.cos(far) * mean + math.sin(far) / far * step
        mean = mean / length(mean)
    weights = np.zeros(len(norms))
    weights[used] = norms.mean() * mean / norms[used]
    return lambda _, xs: combine(xs, weights.tolist())


# --- sums of differences from a base: task arithmetic and what came of it

Keep = Callable[[int, Tensor], Tensor]  # (first element's index, differences) -> what is kept of them


def _arithmetic(sparsify: str | None, consensus: bool) -> Callable[[Passes, Settings], Finish]:
    """base + lambda * sum_i w_i keep_i(x_i - base): task arithmetic (Ilharco et al. 2023, arXiv:2212.04089).

    sparsify: which differences are kept. "magnitude", the `density` largest (TIES: Yadav et al. 2023,
    arXiv:2306.01708); "outliers", those below the `gamma` largest (breadcrumbs: Davari and Belilovsky 2023,
    arXiv:2312.06795); "random" (DARE: Yu et al. 2023, arXiv:2311.03099); "ranks", at random, the larger
    of an output unit likelier (DELLA: Deep et al. 2024, arXiv:2406.11617). Equal magnitudes share one fate.
    consensus: keep those whose sign is the sign of the weighted sum (TIES). normalize: divide by the sum of
    the weights that took part. rescale: to the L1 norm from before the sparsification, as mergekit has it;
    the papers divide by the density, which differs by chance alone ("density" does so).
    """

    def start(passes: Passes, settings: Settings) -> Finish:
        shared, weights = settings.shared, [float(w) for w in settings.of("weight")]
        keeps = _keeps(sparsify, passes, settings)

        def finish(at: int, xs: list[Tensor]) -> Tensor:
            base = xs[settings.base] if settings.base is not None else torch.zeros_like(xs[0])
            deltas = [
                keep(at, xs[i] - base).mul_(weight)
                for i, keep, weight in zip(settings.others, keeps, weights, strict=True)
            ]
            divisor: float | Tensor
            if consensus:
                up = sum(deltas[1:], start=deltas[0]) >= 0
                agree = [(delta != 0) & ((delta > 0) == up) for delta in deltas]
                deltas = [delta * mask for delta, mask in zip(deltas, agree, strict=True)]
                divisor = combine([mask.float() for mask in agree], weights)
                divisor[divisor == 0] = 1.0
            else:
                divisor = math.fsum(weights)
                divisor = 1.0 if abs(divisor) < 1e-8 else divisor
            total = combine(deltas, [1.0] * len(deltas))
            if shared["normalize"]:
                total /= divisor
            return total.mul_(float(shared["lambda"])).add_(base)

        return finish

    return start


def _keeps(sparsify: str | None, passes: Passes, settings: Settings) -> list[Keep]:
    """For each source besides the base, what is kept of its differences."""
    others, densities = settings.others, [float(d) for d in settings.of("density")]
    if sparsify is None or all(d >= 1 for d in densities):
        return [lambda _, delta: delta for _ in others]

    def deltas() -> Iterator[tuple[int, list[Tensor]]]:
        for at, xs in passes():
            yield at, [xs[i] - xs[settings.base or 0] for i in others]

    masks: list[Callable[[int, Tensor], Tensor]]
    if sparsify in ("magnitude", "outliers"):
        empty: list[bool] = []

        def ranks(count: int) -> list[list[int]]:
            """The smallest and the largest that are kept."""
            result = []
            for density, other in zip(densities, others, strict=True):
                kept, outliers = int(density * count), 0
                if sparsify == "magnitude":
                    kept = max(1, kept) if density > 0 else 0
                elif density < 1:
                    outliers = int(float(settings.each[other]["gamma"]) * count)
                empty.append(kept == 0)
                low = max(0, count - kept - outliers)
                result.append([min(max(rank, 0), count - 1) for rank in (low, low + kept - 1)])
            return result

        values = order_statistics(lambda: ([d.abs() for d in ds] for _, ds in deltas()), ranks)
        masks = [
            (lambda _, d: torch.zeros_like(d, dtype=torch.bool)) if nothing else _band(low, high)
            for (low, high), nothing in zip(values, empty, strict=True)
        ]
    else:
        masks = [
            _chances(f"{settings.key}/{i}", density, settings.each[i].get("epsilon"))
            for i, density in zip(others, densities, strict=True)
        ]
    rescale = settings.shared["rescale"]
    if rescale == "density":
        scales = [1 / max(d, 1e-9) if d < 1 else 1.0 for d in densities]
    elif rescale:
        before, after = ([0.0] * len(others) for _ in range(2))
        for at, ds in deltas():
            for i, (delta, mask) in enumerate(zip(ds, masks, strict=True)):
                size = delta.abs()
                before[i] += float(size.sum(dtype=torch.float64))
                after[i] += float((size * mask(at, delta)).sum(dtype=torch.float64))
        scales = [b / a if a > 0 else 1.0 for b, a in zip(before, after, strict=True)]
    else:
        scales = [1.0] * len(others)

    def keep(mask: Callable[[int, Tensor], Tensor], scale: float) -> Keep:
        return lambda at, delta: delta * mask(at, delta) * scale

    return [keep(mask, scale) for mask, scale in zip(masks, scales, strict=True)]


def _band(low: float, high: float) -> Callable[[int, Tensor], Tensor]:
    def mask(_: int, delta: Tensor) -> Tensor:
        size = delta.abs()
        return (size >= low) & (size <= high)

    return mask


def _chances(key: str, density: float, epsilon: float | None) -> Callable[[int, Tensor], Tensor]:
    """Kept with probability `density`; with epsilon, from density - epsilon (the row's smallest) to density +
    epsilon (its largest).
    """

    def mask(at: int, delta: Tensor) -> Tensor:
        chance = torch.full_like(delta, density)
        if epsilon is not None and 0 < density < 1 and delta.shape[-1] > 1:
            ranks = delta.abs().argsort(dim=-1, stable=True).argsort(dim=-1)
            chance = (density - epsilon) + ranks.float() / (delta.shape[-1] - 1) * (2 * epsilon)
        return uniform(key, at, delta.numel()).reshape(delta.shape) < chance

    return mask


def uniform(key: str, start: int, count: int) -> Tensor:
    """`count` numbers of [0, 1), fp32: those at `start` and after of the endless row that `key` names.

    Philox 4x64 (Salmon et al. 2011) as a counter: any part of the row, without what comes before it.
    """
    seed = np.frombuffer(hashlib.sha256(key.encode()).digest()[:16], dtype=np.uint64)
    skipped = start % 8  # a count of the counter gives four words of 64 bits, eight numbers
    philox = np.random.Philox(key=seed, counter=start // 8)
    words = philox.random_raw((count + skipped + 1) // 2).astype("<u8").view("<u4")
    numbers = (words[skipped : skipped + count] >> 8).astype(np.float32) * np.float32(2**-24)
    return torch.from_numpy(numbers)


def order_statistics(
    values: Callable[[], Iterator[list[Tensor]]], ranks: Callable[[int], Sequence[Sequence[int]]]
) -> list[list[float]]:
    """The numbers of some ranks (0: the smallest) in each of several streams, exactly, in two passes.

    values: a pass over non-negative fp32 tensors, one a stream; ranks: a stream's length -> each stream's.
    Such numbers are ordered as their bits are: the first pass counts the upper 16 of the 31 bits, the second
    the lower 15 within the bin of each rank.
    """
    bits = lambda: ([part.reshape(-1).view(torch.int32) for part in parts] for parts in values())  # noqa: E731
    upper = [row[0] for row in _counts(([[x >> 15] for x in parts] for parts in bits()), 1 << 16)]
    wanted = ranks(int(upper[0].sum()))
    ends = [counts.cumsum(0) for counts in upper]
    bins = [
        torch.searchsorted(end, torch.tensor(mine), right=True).tolist()
        for end, mine in zip(ends, wanted, strict=True)
    ]

    def inside() -> Iterator[list[list[Tensor]]]:
        for parts in bits():
            yield [[x[(x >> 15) == b] & 0x7FFF for b in mine] for x, mine in zip(parts, bins, strict=True)]

    lower = _counts(inside(), 1 << 15)
    result = []
    for mine, places, end, counts, found in zip(bins, wanted, ends, upper, lower, strict=True):
        row = []
        for b, rank, within in zip(mine, places, found, strict=True):
            place = rank - int(end[b] - counts[b])
            low = int(torch.searchsorted(within.cumsum(0), torch.tensor(place), right=True))
            row.append(float(torch.tensor((b << 15) | low, dtype=torch.int32).view(torch.float32)))
        result.append(row)
    return result


class _Counter:
    """How often each number below `bins` comes. Numbers wait in one buffer: a counting costs a pass over the
    bins, and many small tensors that wait between large ones that go would leave the heap full of holes.
    """

    def __init__(self, bins: int) -> None:
        self.totals, self.waiting, self.held = torch.zeros(bins, dtype=torch.int64), torch.empty(0), 0

    def add(self, numbers: Tensor) -> None:
        if self.held + len(numbers) > len(self.waiting):
            self.count()
            if len(numbers) > len(self.waiting):
                self.waiting = torch.empty(max(1 << 18, len(numbers)), dtype=torch.int32)
        self.waiting[self.held : self.held + len(numbers)] = numbers
        self.held += len(numbers)

    def count(self) -> Tensor:
        if self.held:
            self.totals += torch.bincount(self.waiting[: self.held], minlength=len(self.totals))
            self.held = 0
        return self.totals


def _counts(parts: Iterator[list[list[Tensor]]], bins: int) -> list[list[Tensor]]:
    """How often each number below `bins` comes in several rows of streams."""
    counters: list[list[_Counter]] = []
    for part in parts:
        counters = counters or [[_Counter(bins) for _ in row] for row in part]
        for mine, row in zip(counters, part, strict=True):
            for counter, numbers in zip(mine, row, strict=True):
                counter.add(numbers)
    return [[counter.count() for counter in mine] for mine in counters]


def _sce(passes: Passes, settings: Settings) -> Finish:
    """Select, calculate, erase (FuseChat-3: Wan et al. 2024, arXiv:2408.07990).

    Select the `select_topk` share of elements whose differences vary most between the sources; weigh each
    source by the mean square of its selected differences; erase those against the sign of the sum.
    """
    others, share = settings.others, float(settings.shared["select_topk"])
    assert settings.base is not None
    base = settings.base

    def deltas() -> Iterator[Tensor]:
        for _, xs in passes():
            yield torch.stack([xs[i] - xs[base] for i in others])

    least = 0.0
    if share < 1:
        kept = int(share * sum(int(torch.count_nonzero(_variance(d))) for d in deltas()))
        least = math.inf
        if kept:
            spreads = lambda: ([_variance(d)] for d in deltas())  # noqa: E731
            ((least,),) = order_statistics(spreads, lambda count: [[count - kept]])

    def selected(stack: Tensor) -> Tensor:
        return stack if share >= 1 else stack * ((_variance(stack) >= least) & (_variance(stack) > 0))

    squares = torch.zeros(len(others), dtype=torch.float64)
    for stack in deltas():
        squares += selected(stack).double().square().flatten(1).sum(1)
    total = float(squares.sum())
    weights = (squares / total).tolist() if total > 0 else [1 / len(others)] * len(others)

    def finish(_: int, xs: list[Tensor]) -> Tensor:
        chosen = selected(torch.stack([xs[i] - xs[base] for i in others]))
        up = chosen.sum(0) >= 0
        agree = (chosen != 0) & ((chosen > 0) == up)
        divisor = combine(list(agree.float()), weights)
        divisor[divisor == 0] = 1.0
        return combine(list(chosen * agree), weights).div_(divisor).add_(xs[base])

    return finish


def _variance(stack: Tensor) -> Tensor:
    away = stack - stack.mean(0)
    return away.mul_(away).mean(0)  # Tensor.var takes many times as long


def check_settings(method: str, settings: Settings) -> None:
    """SeavlmError for parameters that do not go together; before a merge begins, not in the midst of it."""
    if method == "linear":
        linear_weights(settings)
    for mine in settings.each:
        density, epsilon = mine.get("density"), mine.get("epsilon")
        if density and epsilon is not None and density < 1 and not epsilon < min(density, 1 - density):
            raise SeavlmError(
                f"density {density:g} with epsilon {epsilon:g} gives chances outside 0 to 1",
                hint="Choose epsilon so that density - epsilon and density + epsilon are between 0 and 1.",
            )


def _last(shape: Sequence[int]) -> int:
    return shape[-1] if len(shape) else 1


def _unit(shape: Sequence[int]) -> int:
    """Weights of one output unit; all of a vector."""
    return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)


def _nuslerp_columns(settings: Settings, shape: Sequence[int]) -> int:
    if settings.shared["nuslerp_flatten"]:
        return 0
    return math.prod(shape[1:]) if settings.shared["nuslerp_row_wise"] else _last(shape)


_SHARED = {"normalize": False, "rescale": False, "lambda": 1.0}
_EACH = {"weight": REQUIRED, "density": 1.0}


def _family(
    sparsify: str | None, consensus: bool, *, each: dict[str, Any] | None = None, **shared: Any
) -> Method:
    return Method(
        _arithmetic(sparsify, consensus),
        {**_SHARED, **shared},
        {**_EACH, **(each or {})},
        base="required",
        columns=lambda _, shape: _unit(shape) if sparsify == "ranks" else 0,
    )


_EPSILON, _GAMMA = {"epsilon": 0.15}, {"gamma": 0.01}
METHODS: dict[str, Method] = {
    "linear": Method(_linear, {"normalize": True}, {"weight": REQUIRED}),
    "passthrough": Method(_passthrough, {}, {"scale": None}, most=1),
    "slerp": Method(_slerp, {"t": REQUIRED}, base="required", most=1),
    "nuslerp": Method(
        _nuslerp,
        {"nuslerp_flatten": True, "nuslerp_row_wise": False},
        {"weight": REQUIRED},
        base="optional",
        least=2,
        most=2,
        columns=_nuslerp_columns,
    ),
    "model_stock": Method(
        _model_stock,
        {"filter_wise": False},
        base="required",
        least=2,
        columns=lambda settings, shape: _last(shape) if settings.shared["filter_wise"] else 0,
    ),
    "karcher": Method(_karcher, {"max_iter": 10, "tol": 1e-5}),
    "sce": Method(_sce, {"select_topk": 1.0}, base="required"),
    "task_arithmetic": _family(None, False),
    "ties": _family("magnitude", True, normalize=True),
    "dare_linear": _family("random", False, rescale=True),
    "dare_ties": _family("random", True, rescale=True),
    "breadcrumbs": _family("outliers", False, each=_GAMMA),
    "breadcrumbs_ties": _family("outliers", True, each=_GAMMA),
    "della": _family("ranks", True, normalize=True, rescale=True, each=_EPSILON),
    "della_linear": _family("ranks", False, rescale=True, each=_EPSILON),
}
