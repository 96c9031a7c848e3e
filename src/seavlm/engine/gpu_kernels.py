"""The decoder's kernels for a GPU, in Triton.

A step on a GPU takes as long as reading its weights, if nothing else gets in the way: so what lies between
two matrix products is one kernel, a product of few rows streams its weights once whatever they are stored
as, and attention reads the pages where they are.

Sums are in float32; what a kernel hands on is rounded to the dtype of the activations. Where TRITON_INTERPRET
is set the same code runs on the CPU, which is how the tests know it.

Shapes: R rows (tokens), S slots (sequences), C width, N outputs of a matrix, K its inputs, H heads, KV heads
of keys and values, D head dim, P parts of a sum.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor, cuda, device, dtype, empty, float32, int8

from seavlm.engine.pages import BLOCK

INTERPRETED = triton.knobs.runtime.interpret
MOST_ROWS = 64  # of a product that streams its weights
GROUP = 128  # weights that share a scale in 4 bits
ROWS = 64  # of a tile of rounded weights, which lies in one piece
LOG2E = 1.4426950408889634


@triton.jit
def _dot(a, b, acc, FAST: tl.constexpr):
    """acc + a @ b; not FAST: in full float32."""
    if FAST:
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


@functools.cache
def shared_memory(place: device) -> int:
    """Bytes that a program may have."""
    if place.type != "cuda":
        return 2**18
    return int(getattr(cuda.get_device_properties(place), "shared_memory_per_block_optin", 99 * 2**10))


def stages(most: int, each: int, place: device) -> int:
    """How many rounds of a loop may be loaded ahead, of `each` bytes, at most `most`."""
    return max(1, min(most, (shared_memory(place) - 2048) // each))


def fast(x: Tensor) -> bool:
    """The matrix units take it as it is."""
    return x.dtype != float32 and not INTERPRETED


# --- activations as integers
#
# Turning each rounded weight back into a float costs more than reading it. So the activations become integers
# instead, two for each: x = scale (a + b / 254), a and b int8, with a scale for each GROUP of a row: 15 bits,
# where bfloat16 has 8. The matrix units multiply integers as they come from memory.


@dataclass
class Planes:
    """Activations [R, K] as integers. q int8 [2, R, K]: a, b; scales float32 [2, R, K/GROUP]: scale and
    scale / 254; totals alike: scales times the sum of the integers."""

    q: Tensor
    scales: Tensor
    totals: Tensor

    @classmethod
    def empty(cls, rows: int, inputs: int, device: device) -> Planes:
        shape = (2, rows, inputs // GROUP)
        return cls(
            empty(2, rows, inputs, dtype=int8, device=device),
            empty(shape, dtype=float32, device=device),
            empty(shape, dtype=float32, device=device),
        )

    def __len__(self) -> int:
        return self.q.shape[1]


@triton.jit
def _split(x, AXIS: tl.constexpr):
    """float32, a group along AXIS -> a, b and the scale."""
    scale = tl.max(tl.abs(x), AXIS) / 127.0
    y = x / tl.expand_dims(tl.where(scale > 0, scale, 1.0), AXIS)
    a = tl.floor(y + 0.5)
    return a, tl.floor((y - a) * 254.0 + 0.5), scale


@triton.jit
def _put(q, scales, totals, rows, width, row, group, x, live, GROUP: tl.constexpr):
    """Groups x [G, GROUP], the first of them number `group` of `row`, G of them where `live`."""
    a, b, scale = _split(x, 1)
    g = tl.arange(0, x.shape[0])
    k = tl.arange(0, GROUP)
    there = (group + g < width // GROUP) & live
    place = row.to(tl.int64) * width + (group + g)[:, None] * GROUP + k[None, :]
    tl.store(q + place, a.to(tl.int8), mask=there[:, None])
    tl.store(q + rows.to(tl.int64) * width + place, b.to(tl.int8), mask=there[:, None])
    place = row * (width // GROUP) + group + g
    second = rows * (width // GROUP) + place
    tl.store(scales + place, scale, mask=there)
    tl.store(scales + second, scale / 254.0, mask=there)
    tl.store(totals + place, scale * tl.sum(a, 1), mask=there)
    tl.store(totals + second, scale / 254.0 * tl.sum(b, 1), mask=there)


def _targets(x: Tensor | Planes) -> tuple[Tensor, Tensor, Tensor]:
    return (x.q, x.scales, x.totals) if isinstance(x, Planes) else (x, x, x)


# --- norms


@triton.jit(do_not_specialize=["rows"])
def _add_norm(
    x, parts, after, before, x_out, h_out, h_scales, h_totals, rows, width, eps,
    P: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, C)
    live = column < width
    here = tl.load(x + row * width + column, mask=live, other=0.0).to(tl.float32)
    then = 1.0 + tl.load(before + column, mask=live, other=0.0).to(tl.float32)
    if P > 0:
        scale = 1.0 + tl.load(after + column, mask=live, other=0.0).to(tl.float32)
        d = tl.zeros([C], tl.float32)
        for part in tl.static_range(P):
            d += tl.load(parts + (part * rows + row) * width + column, mask=live, other=0.0).to(tl.float32)
        d = d.to(x.dtype.element_ty).to(tl.float32)
        d = d * tl.rsqrt(tl.sum(d * d, 0) / width + eps) * scale
        here = (here + d.to(x.dtype.element_ty).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x_out + row * width + column, here, mask=live)
        here = here.to(tl.float32)
    h = here * tl.rsqrt(tl.sum(here * here, 0) / width + eps) * then
    if GROUP > 0:
        h = tl.reshape(h, [C // GROUP, GROUP])
        _put(h_out, h_scales, h_totals, rows, width, tl.program_id(0), 0, h, True, GROUP)
    else:
        tl.store(h_out + row * width + column, h.to(h_out.dtype.element_ty), mask=live)


def add_norm(
    x: Tensor, parts: Tensor | None, after: Tensor | None, before: Tensor, eps: float, *, split: bool = False
) -> tuple[Tensor, Tensor | Planes]:
    """x + norm(sum of parts, after), and norm of that with `before`; without parts x itself, and its norm.

    x [R, C]; parts [P, R, C]; after, before [C]: weights of RMSNorm, of which 1 + weight counts. split: the
    second one as `Planes`.
    """
    rows, width = x.shape
    h = Planes.empty(rows, width, x.device) if split else empty_like(x)
    out = x if parts is None else empty_like(x)
    size = max(GROUP, triton.next_power_of_2(width))
    _add_norm[(rows,)](
        x, x if parts is None else parts, before if after is None else after, before, out, *_targets(h),
        rows, width, eps,
        P=0 if parts is None else parts.shape[0], C=size, GROUP=GROUP if split else 0,
        num_warps=max(1, min(16, size // 512)),
    )  # fmt: skip
    return out, h


def empty_like(x: Tensor) -> Tensor:
    return empty(x.shape, dtype=x.dtype, device=x.device)


@triton.jit
def _gelu(x):
    # tanh(y) = 1 - 2 / (exp(2 y) + 1), which is right at both ends
    y = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * (1.0 - 1.0 / (tl.exp(2.0 * y) + 1.0))


@triton.jit
def _geglu(x, out, width, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = column < width
    gate = tl.load(x + row * 2 * width + column, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + column, mask=live, other=0.0).to(tl.float32)
    gate = _gelu(gate).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + column, (gate * up).to(out.dtype.element_ty), mask=live)


def geglu(x: Tensor) -> Tensor:
    """gelu_tanh(gate) * up of x [R, 2 N] = gate | up -> [R, N]."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = empty(rows, width, dtype=x.dtype, device=x.device)
    _geglu[(rows, triton.cdiv(width, 2048))](x, out, width, BLOCK_C=2048, num_warps=4)
    return out


# --- attention


@triton.jit(do_not_specialize=["stride", "count"])
def _place_heads(
    qkv, q_out, keys, values, rows, table, stride, cos, sin, q_norm, k_norm, eps, count,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    head = tl.program_id(1)
    half = tl.arange(0, D // 2)
    live = (row < count)[:, None]
    slot = tl.load(rows + row * 3, mask=row < count, other=0)
    position = tl.load(rows + row * 3 + 1, mask=row < count, other=0)
    a = tl.zeros([R, D // 2], tl.float32)
    b = tl.zeros([R, D // 2], tl.float32)
    for part in tl.static_range(P):
        source = (part * count + row)[:, None].to(tl.int64) * ((H + 2 * KV) * D) + head * D + half[None, :]
        a += tl.load(qkv + source, mask=live, other=0.0).to(tl.float32)
        b += tl.load(qkv + source + D // 2, mask=live, other=0.0).to(tl.float32)
    if head < H + KV:
        if head < H:
            wa = tl.load(q_norm + half).to(tl.float32)
            wb = tl.load(q_norm + half + D // 2).to(tl.float32)
        else:
            wa = tl.load(k_norm + half).to(tl.float32)
            wb = tl.load(k_norm + half + D // 2).to(tl.float32)
        root = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
        a = a * root * (1.0 + wa)[None, :]
        b = b * root * (1.0 + wb)[None, :]
        angle = row[:, None] * (D // 2) + half[None, :]
        c = tl.load(cos + angle, mask=live, other=0.0)
        s = tl.load(sin + angle, mask=live, other=0.0)
        first = a * c - b * s
        second = b * c + a * s
    else:
        first = a
        second = b
    kind = q_out.dtype.element_ty
    if head < H:
        target = q_out + (row[:, None].to(tl.int64) * H + head) * D + half[None, :]
        tl.store(target, first.to(kind), mask=live)
        tl.store(target + D // 2, second.to(kind), mask=live)
    else:
        page = tl.load(table + slot * stride + position // BLOCK, mask=row < count, other=0).to(tl.int64)
        place = (page * BLOCK + position % BLOCK)[:, None] * KV
        if head < H + KV:
            target = keys + (place + (head - H)) * D + half[None, :]
        else:
            target = values + (place + (head - H - KV)) * D + half[None, :]
        tl.store(target, first.to(kind), mask=live)
        tl.store(target + D // 2, second.to(kind), mask=live)


def place_heads(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    table: Tensor,
    angles: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor],
    eps: float,
    heads: int,
) -> Tensor:
    """Norm and turn the queries and keys of qkv [P, R, (H + 2 KV) D], and put keys and values on their pages.

    keys, values [pages, BLOCK, KV, D]; rows int32 [R, 3]: slot, position, reach; table int32 [S, blocks];
    angles: cosines and sines, float32 [R, D/2]; norms: weights [D] of queries and keys. Returns queries
    [R, H, D].
    """
    count, (kv, dim) = qkv.shape[1], keys.shape[2:]
    q = empty(count, heads, dim, dtype=keys.dtype, device=qkv.device)
    some = 1 if count <= 64 else 16
    _place_heads[(triton.cdiv(count, some), heads + 2 * kv)](
        qkv, q, keys, values, rows, table, table.stride(0), *angles, *norms, eps, count,
        H=heads, KV=kv, D=dim, BLOCK=BLOCK, R=some, P=len(qkv), num_warps=1 if some == 1 else 4,
    )  # fmt: skip
    return q


@triton.jit(do_not_specialize=["stride"])
def _attend(
    q, keys, values, rows, table, stride, pieces, out, scale, window,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(pieces + piece * 2)
    count = tl.load(pieces + piece * 2 + 1)
    column = tl.arange(0, D)
    number = tl.arange(0, M)
    live = number < count
    row = (first + number).to(tl.int64)
    slot = tl.load(rows + first * 3)
    position = tl.load(rows + row * 3 + 1, mask=live, other=0)
    reach = tl.load(rows + row * 3 + 2, mask=live, other=-1)
    query = tl.load(q + (row[:, None] * H + head) * D + column[None, :], mask=live[:, None], other=0.0)
    oldest = tl.maximum(tl.load(rows + first * 3 + 1) - window + 1, 0)
    newest = tl.max(reach, 0)
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, D], tl.float32)
    inside = tl.arange(0, BLOCK)
    for block in range(oldest // BLOCK, newest // BLOCK + 1):
        page = tl.load(table + slot * stride + block).to(tl.int64)
        at = block * BLOCK + inside
        place = ((page * BLOCK + inside) * KV + head // (H // KV)) * D
        written = at <= newest  # past it there may be a NaN of others
        k = tl.load(keys + place[:, None] + column[None, :], mask=written[:, None], other=0.0)
        s = _dot(query, tl.trans(k), tl.zeros([M, BLOCK], tl.float32), FAST) * scale
        seen = (at[None, :] <= reach[:, None]) & (position[:, None] - at[None, :] < window)
        s = tl.where(seen, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2(s - shift[:, None])
        old = tl.exp2(top - shift)
        total = total * old + tl.sum(p, 1)
        v = tl.load(values + place[:, None] + column[None, :], mask=written[:, None], other=0.0)
        sums = _dot(p.to(v.dtype), v, sums * old[:, None], FAST)
        top = higher
    sums = sums / total[:, None]
    tl.store(
        out + (row[:, None] * H + head) * D + column[None, :],
        sums.to(out.dtype.element_ty),
        mask=live[:, None],
    )


def piece_rows(dim: int, dtype: dtype) -> int:
    """Rows of one sequence that a program of `attend` takes at most."""
    return 16 if dtype == float32 else 128 if dim <= 128 else 64


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    table: Tensor,
    pieces: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """Attention of queries [R, H, D] to the pages of their sequences -> [R, H D].

    pieces int32 [n, 2]: first row and number of rows, of one sequence, positions rising by one, at most
    `piece_rows`. A row sees what lies up to its reach and within the window.
    """
    count, heads, dim = q.shape
    out = empty(count, heads * dim, dtype=q.dtype, device=q.device)
    m, ahead = piece_rows(dim, q.dtype), 1
    if fast(q):  # a tile of queries, and tiles of keys and of values for each round
        ahead = stages(2, (BLOCK + m // 2) * 2 * dim * q.itemsize, q.device)
    _attend[(len(pieces), heads)](
        q, keys, values, rows, table, table.stride(0), pieces, out, scale * LOG2E, window,
        H=heads, KV=keys.shape[2], D=dim, BLOCK=BLOCK, M=m, FAST=fast(q),
        num_warps=8 if fast(q) and dim <= 128 else 4, num_stages=ahead,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["stride", "count"])
def _attend_one(
    q, keys, values, rows, table, stride, count, out, out_scales, out_totals, scale, window,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr,
    P: tl.constexpr, GROUP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kv = tl.program_id(1)
    part = tl.program_id(2)
    group: tl.constexpr = H // KV
    head = tl.arange(0, G)
    column = tl.arange(0, D)
    live = head < group
    slot = tl.load(rows + row * 3)
    position = tl.load(rows + row * 3 + 1)
    oldest = tl.maximum(position - window + 1, 0)
    begin = oldest // BLOCK
    each = tl.cdiv(position // BLOCK + 1 - begin, P)
    start = begin + part * each
    end = tl.minimum(start + each, position // BLOCK + 1)
    heads = row * H + kv * group + head
    query = tl.load(q + heads[:, None] * D + column[None, :], mask=live[:, None], other=0.0)
    top = tl.full([G], -float("inf"), tl.float32)
    total = tl.zeros([G], tl.float32)
    sums = tl.zeros([G, D], tl.float32)
    inside = tl.arange(0, BLOCK)
    for block in range(start, end):
        page = tl.load(table + slot * stride + block).to(tl.int64)
        at = block * BLOCK + inside
        place = ((page * BLOCK + inside) * KV + kv) * D
        seen = (at <= position) & (at >= oldest)
        k = tl.load(keys + place[:, None] + column[None, :], mask=seen[:, None], other=0.0)
        v = tl.load(values + place[:, None] + column[None, :], mask=seen[:, None], other=0.0)
        s = _dot(query, tl.trans(k), tl.zeros([G, BLOCK], tl.float32), FAST) * scale
        s = tl.where(seen[None, :], s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        old = tl.exp2(top - higher)
        total = total * old + tl.sum(p, 1)
        sums = _dot(p.to(v.dtype), v, sums * old[:, None], FAST)
        top = higher
    if P == 1:
        sums = sums / total[:, None]
        if GROUP > 0:
            each_head: tl.constexpr = D // GROUP
            there = tl.arange(0, G * each_head) < group * each_head
            first = kv * group * each_head
            x = tl.reshape(sums, [G * each_head, GROUP])
            _put(out, out_scales, out_totals, count, H * D, tl.program_id(0), first, x, there, GROUP)
        else:
            target = out + heads[:, None] * D + column[None, :]
            tl.store(target, sums.to(out.dtype.element_ty), mask=live[:, None])
    else:
        target = out + (heads[:, None] * P + part) * D + column[None, :]
        tl.store(target, sums, mask=live[:, None])
        tl.store(out_scales + (heads * P + part) * 2, top, mask=live)
        tl.store(out_scales + (heads * P + part) * 2 + 1, total, mask=live)


@triton.jit(do_not_specialize=["count"])
def _join(
    sums, tops, count, out, out_scales, out_totals,
    H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, own = tl.program_id(0), tl.program_id(1)
    head = (row * H + own).to(tl.int64)
    part = tl.arange(0, P)
    column = tl.arange(0, D)
    top = tl.load(tops + (head * P + part) * 2)
    total = tl.load(tops + (head * P + part) * 2 + 1)
    weight = tl.exp2(top - tl.max(top, 0))
    x = tl.load(sums + (head * P + part)[:, None] * D + column[None, :])
    x = tl.sum(x * weight[:, None], 0) / tl.sum(total * weight, 0)
    if GROUP > 0:
        x = tl.reshape(x, [D // GROUP, GROUP])
        _put(out, out_scales, out_totals, count, H * D, row, own * (D // GROUP), x, True, GROUP)
    else:
        tl.store(out + head * D + column, x.to(out.dtype.element_ty))


def attend_one(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    table: Tensor,
    scale: float,
    window: int,
    parts: int,
    *,
    split: bool = False,
) -> Tensor | Planes:
    """`attend` where every sequence has one row: the keys of one are shared out among `parts` programs.
    split: the result as `Planes`, for which D is to be a multiple of GROUP."""
    count, heads, dim = q.shape
    kv, group = keys.shape[2], GROUP if split else 0
    out = (
        Planes.empty(count, heads * dim, q.device)
        if split
        else empty(count, heads * dim, dtype=q.dtype, device=q.device)
    )
    targets = _targets(out)
    if parts > 1:
        sums = empty(count, heads, parts, dim, dtype=float32, device=q.device)
        tops = empty(count, heads, parts, 2, dtype=float32, device=q.device)
        targets = sums, tops, tops
    _attend_one[(count, kv, parts)](
        q, keys, values, rows, table, table.stride(0), count, *targets, scale * LOG2E, window,
        H=heads, KV=kv, D=dim, BLOCK=BLOCK, G=max(16, triton.next_power_of_2(heads // kv)), P=parts,
        GROUP=group, FAST=fast(q), num_warps=4, num_stages=3 if fast(q) else 1,
    )  # fmt: skip
    if parts > 1:
        _join[(count, heads)](
            sums, tops, count, *_targets(out),
            H=heads, D=dim, P=parts, GROUP=group, num_warps=2,
        )  # fmt: skip
    return out


# --- products of few rows


@triton.jit(do_not_specialize=["rows", "parts"])
def _few(
    x, w, out, rows, outputs, inputs, parts,
    GATED: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * N + tl.arange(0, N)
    part = tl.program_id(1)
    m = tl.arange(0, M)
    k = tl.arange(0, K)
    each = tl.cdiv(tl.cdiv(inputs, K), parts)
    start = part * each
    end = tl.minimum(start + each, tl.cdiv(inputs, K))
    row = w + tl.minimum(n, outputs - 1).to(tl.int64)[:, None] * inputs
    other = row + outputs.to(tl.int64) * inputs
    acc = tl.zeros([N, M], tl.float32)
    acc2 = tl.zeros([N, M], tl.float32)
    for block in range(start, end):
        column = block * K + k
        at = x + m[None, :] * inputs + column[:, None]
        if EVEN:
            xs = tl.load(at, mask=(m < rows)[None, :], other=0.0)
            acc = _dot(tl.load(row + column[None, :]), xs, acc, FAST)
            if GATED:
                acc2 = _dot(tl.load(other + column[None, :]), xs, acc2, FAST)
        else:
            there = column < inputs
            xs = tl.load(at, mask=(m < rows)[None, :] & there[:, None], other=0.0)
            acc = _dot(tl.load(row + column[None, :], mask=there[None, :], other=0.0), xs, acc, FAST)
            if GATED:
                ws = tl.load(other + column[None, :], mask=there[None, :], other=0.0)
                acc2 = _dot(ws, xs, acc2, FAST)
    if GATED:
        acc = _gelu(acc) * acc2
    target = out + (part * rows + m[None, :]) * outputs + n[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(m < rows)[None, :] & (n < outputs)[:, None])


def few(x: Tensor, w: Tensor, *, gated: bool = False, wide: bool = False, tile: tuple[int, ...]) -> Tensor:
    """x [R, K] times a matrix [N, K], R at most MOST_ROWS -> [P, R, N], parts whose sum is meant; in x's
    dtype if there is one and it is not asked to be `wide`, else in float32.

    gated: the matrix has gates [N, K], then as many others: gelu(gate) * other. tile: outputs and inputs of a
    program at a time, parts, warps, stages.
    """
    rows, inputs = x.shape
    outputs = len(w) // 2 if gated else len(w)
    n, k, parts, warps, ahead = tile
    m = max(16, triton.next_power_of_2(rows))
    ahead = stages(ahead, (n * (2 if gated else 1) + m) * k * x.itemsize, x.device)
    out = empty(parts, rows, outputs, dtype=float32 if wide or parts > 1 else x.dtype, device=x.device)
    _few[(triton.cdiv(outputs, n), parts)](
        x, w, out, rows, outputs, inputs, parts,
        GATED=gated, EVEN=inputs % k == 0, FAST=fast(x),
        M=m, N=n, K=k, num_warps=warps, num_stages=ahead,
    )  # fmt: skip
    return out


# --- products of few rows with rounded weights


@triton.jit(do_not_specialize=["rows"])
def _planes(x, q, scales, totals, rows, width, C: tl.constexpr, GROUP: tl.constexpr):
    row, first = tl.program_id(0), tl.program_id(1) * C
    column = first + tl.arange(0, C)
    y = tl.load(x + row.to(tl.int64) * width + column, mask=column < width, other=0.0).to(tl.float32)
    y = tl.reshape(y, [C // GROUP, GROUP])
    _put(q, scales, totals, rows, width, row, first // GROUP, y, True, GROUP)


def planes(x: Tensor) -> Planes:
    """x [R, K], K a multiple of GROUP."""
    rows, width = x.shape
    out = Planes.empty(rows, width, x.device)
    _planes[(rows, triton.cdiv(width, 2048))](
        x, out.q, out.scales, out.totals, rows, width, C=2048, GROUP=GROUP, num_warps=4
    )
    return out


@triton.jit
def _nibbles(packed, FAST: tl.constexpr):
    """uint8 -> its low and its high four bits, int8."""
    if FAST:
        low, high = tl.inline_asm_elementwise(
            """
            and.b32 $0, $2, 0x0f0f0f0f;
            shr.u32 $1, $2, 4;
            and.b32 $1, $1, 0x0f0f0f0f;
            """,
            "=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
        return low, high
    else:
        return (packed & 15).to(tl.int8), (packed >> 4).to(tl.int8)


@triton.jit(do_not_specialize=["rows", "parts"])
def _few_rounded(
    q, q_scales, q_totals, w, scales, zeros, out, out_scales, out_totals, rows, outputs, inputs, parts,
    FOUR: tl.constexpr, GATED: tl.constexpr, FAST: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * N + tl.arange(0, N)
    part = tl.program_id(1)
    column = tl.arange(0, 2 * M)
    source = column // M * rows + column % M
    live = column % M < rows
    groups = inputs // GROUP
    each = tl.cdiv(groups, parts)
    start = part * each
    end = tl.minimum(start + each, groups)
    safe = tl.minimum(n, outputs - 1)
    all_rows = outputs * 2 if GATED else outputs
    half: tl.constexpr = GROUP // 2
    wide: tl.constexpr = half if FOUR else GROUP
    k = tl.arange(0, wide)
    # A tile of ROWS rows and one group lies in one piece.
    row = w + ((safe // ROWS).to(tl.int64) * groups * ROWS + safe % ROWS)[:, None] * wide + k[None, :]
    other = row + outputs.to(tl.int64) * groups * wide
    acc = tl.zeros([N, 2 * M], tl.float32)
    acc2 = tl.zeros([N, 2 * M], tl.float32)
    none = tl.zeros([N, 2 * M], tl.int32)
    # Scales are asked for a round before they are needed; a part may have none.
    then = tl.minimum(start, groups - 1)
    x_scale = tl.load(q_scales + source * groups + then, mask=live, other=0.0)
    if FOUR:
        total = tl.load(q_totals + source * groups + then, mask=live, other=0.0)
        scale, zero = tl.load(scales + then * all_rows + safe), tl.load(zeros + then * all_rows + safe)
        if GATED:
            scale2 = tl.load(scales + then * all_rows + safe + outputs)
            zero2 = tl.load(zeros + then * all_rows + safe + outputs)
    for block in range(start, end):
        at = q + source[None, :] * inputs + block * GROUP + k[:, None]
        x = tl.load(at, mask=live[None, :], other=0)
        then = tl.minimum(block + 1, end - 1)
        x_scale_then = tl.load(q_scales + source * groups + then, mask=live, other=0.0)
        if FOUR:
            high_x = tl.load(at + half, mask=live[None, :], other=0)
            total_then = tl.load(q_totals + source * groups + then, mask=live, other=0.0)
            scale_then = tl.load(scales + then * all_rows + safe)
            zero_then = tl.load(zeros + then * all_rows + safe)
            low, high = _nibbles(tl.load(row + block * (ROWS * wide)), FAST)
            d = tl.dot(high, high_x, tl.dot(low, x, none, out_dtype=tl.int32), out_dtype=tl.int32)
            d = d.to(tl.float32) * x_scale[None, :] - zero.to(tl.float32)[:, None] * total[None, :]
            acc += d * scale.to(tl.float32)[:, None]
            if GATED:
                scale2_then = tl.load(scales + then * all_rows + safe + outputs)
                zero2_then = tl.load(zeros + then * all_rows + safe + outputs)
                low, high = _nibbles(tl.load(other + block * (ROWS * wide)), FAST)
                d = tl.dot(high, high_x, tl.dot(low, x, none, out_dtype=tl.int32), out_dtype=tl.int32)
                d = d.to(tl.float32) * x_scale[None, :] - zero2.to(tl.float32)[:, None] * total[None, :]
                acc2 += d * scale2.to(tl.float32)[:, None]
                scale2, zero2 = scale2_then, zero2_then
            total, scale, zero = total_then, scale_then, zero_then
        else:
            d = tl.dot(tl.load(row + block * (ROWS * wide)), x, none, out_dtype=tl.int32)
            acc += d.to(tl.float32) * x_scale[None, :]
            if GATED:
                d = tl.dot(tl.load(other + block * (ROWS * wide)), x, none, out_dtype=tl.int32)
                acc2 += d.to(tl.float32) * x_scale[None, :]
        x_scale = x_scale_then
    y = tl.sum(tl.reshape(acc, [N, 2, M]), 1)
    if not FOUR:
        y *= tl.load(scales + safe)[:, None]
    m = tl.arange(0, M)
    there = (m < rows)[None, :] & (n < outputs)[:, None]
    if GATED:
        up = tl.sum(tl.reshape(acc2, [N, 2, M]), 1)
        if not FOUR:
            up *= tl.load(scales + safe + outputs)[:, None]
        a, b, scale = _split(tl.where(there, _gelu(y) * up, 0.0), 0)
        place = m[None, :] * outputs + n[:, None]
        tl.store(out + place, a.to(tl.int8), mask=there)
        tl.store(out + rows * outputs + place, b.to(tl.int8), mask=there)
        place = m * (outputs // GROUP) + tl.program_id(0)
        second = rows * (outputs // GROUP) + place
        tl.store(out_scales + place, scale, mask=m < rows)
        tl.store(out_scales + second, scale / 254.0, mask=m < rows)
        tl.store(out_totals + place, scale * tl.sum(a, 0), mask=m < rows)
        tl.store(out_totals + second, scale / 254.0 * tl.sum(b, 0), mask=m < rows)
    else:
        target = out + (part * rows + m[None, :]) * outputs + n[:, None]
        tl.store(target, y.to(out.dtype.element_ty), mask=there)


def few_rounded(
    x: Planes, w: Tensor, scales: Tensor, zeros: Tensor | None, dtype: dtype, *, tile: tuple[int, ...]
) -> Tensor:
    """`few` with rounded weights, in tiles [N/ROWS, K/GROUP, ROWS, ..]: w int8 [.., GROUP], scales float32
    [N]; or w uint8 [.., GROUP/2], scales and zeros [K/GROUP, N], where a byte holds the weights i and
    i + GROUP/2 of its group, each of which stands for (q - zero) scale. dtype: of one part. tile: outputs,
    parts, warps, stages."""
    rows, outputs, parts = len(x), len(w) * ROWS, tile[1]
    out = empty(parts, rows, outputs, dtype=dtype if parts == 1 else float32, device=w.device)
    _rounded(x, w, scales, zeros, out, x.scales, x.totals, False, outputs, tile)
    return out


def gated_rounded(
    x: Planes, w: Tensor, scales: Tensor, zeros: Tensor | None, *, tile: tuple[int, ...]
) -> Planes:
    """gelu(gate) * other of weights [2 N, K] -> [R, N], N a multiple of GROUP. tile: as above, of GROUP
    outputs in one part."""
    outputs = len(w) * ROWS // 2
    out = Planes.empty(len(x), outputs, w.device)
    _rounded(x, w, scales, zeros, out.q, out.scales, out.totals, True, outputs, tile)
    return out


def _rounded(
    x: Planes,
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    out: Tensor,
    out_scales: Tensor,
    out_totals: Tensor,
    gated: bool,
    outputs: int,
    tile: tuple[int, ...],
) -> None:
    n, parts, warps, ahead = tile
    m = max(8, triton.next_power_of_2(len(x)))
    each = n * (2 if gated else 1) * w.shape[3] * w.itemsize + 2 * m * GROUP
    _few_rounded[(triton.cdiv(outputs, n), parts)](
        x.q, x.scales, x.totals, w, scales, w if zeros is None else zeros, out, out_scales, out_totals,
        len(x), outputs, x.q.shape[2], parts,
        FOUR=zeros is not None, GATED=gated, FAST=not INTERPRETED, GROUP=GROUP, ROWS=ROWS,
        M=m, N=n, num_warps=warps, num_stages=stages(ahead, each, w.device),
    )  # fmt: skip


@triton.jit
def _unpack(
    w, scales, zeros, out, outputs, inputs,
    FOUR: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    group = tl.program_id(1)
    half: tl.constexpr = GROUP // 2
    wide: tl.constexpr = half if FOUR else GROUP
    r = tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, wide)[None, :]
    row = tile * ROWS + r
    x = tl.load(w + ((tile * (inputs // GROUP) + group).to(tl.int64) * ROWS + r) * wide + k)
    at = out + row.to(tl.int64) * inputs + group * GROUP + k
    if FOUR:
        scale = tl.load(scales + group * outputs + row).to(tl.float32)
        zero = tl.load(zeros + group * outputs + row).to(tl.float32)
        tl.store(at, (((x & 15).to(tl.float32) - zero) * scale).to(out.dtype.element_ty))
        tl.store(at + half, (((x >> 4).to(tl.float32) - zero) * scale).to(out.dtype.element_ty))
    else:
        tl.store(at, (x.to(tl.float32) * tl.load(scales + row)).to(out.dtype.element_ty))


def unpack(w: Tensor, scales: Tensor, zeros: Tensor | None, dtype: dtype) -> Tensor:
    """Rounded weights (see `few_rounded`) as a matrix [N, K] of a floating dtype."""
    tiles, groups = w.shape[:2]
    out = empty(tiles * ROWS, groups * GROUP, dtype=dtype, device=w.device)
    _unpack[(tiles, groups)](
        w, scales, w if zeros is None else zeros, out, *out.shape,
        FOUR=zeros is not None, GROUP=GROUP, ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return out
