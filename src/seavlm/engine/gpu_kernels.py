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

import triton
import triton.language as tl
from torch import Tensor, cuda, device, dtype, empty, float32
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from seavlm.engine.pages import BLOCK

INTERPRETED = triton.knobs.runtime.interpret
EARLY_STARTS = True
MOST_ROWS = 64  # of a product that streams its weights
AHEAD = 8  # lines of 128 bytes of each weight row that are fetched before they are needed
GROUP = 128  # weights that share a scale in 4 bits
LOG2E = 1.4426950408889634


@triton.jit
def _dot(a, b, acc, FAST: tl.constexpr):
    """acc + a @ b; not FAST: in full float32."""
    if FAST:
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def _begin(EARLY: tl.constexpr):
    """Let the next kernel be put in place, and wait for what the ones before have written."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


def early(x: Tensor) -> dict[str, bool]:
    """Options of a kernel that is put in place before the one ahead of it ends (programmatic dependent launch, of
    compute capability 9 and up), which pays where there are few rows."""
    can = EARLY_STARTS and x.is_cuda and len(x) <= MOST_ROWS and capability(x.device) >= 9
    return {"EARLY": True, "launch_pdl": True} if can else {"EARLY": False}


@functools.cache
def capability(device: device) -> int:
    """The major number."""
    return int(cuda.get_device_capability(device)[0])


def fast(x: Tensor) -> bool:
    """The matrix units take it as it is."""
    return x.dtype != float32 and not INTERPRETED


# --- norms


@triton.jit(do_not_specialize=["rows"])
def _add_norm(x, parts, after, before, x_out, h_out, rows, width, eps, P: tl.constexpr, C: tl.constexpr, EARLY: tl.constexpr):
    _begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, C)
    live = column < width
    here = tl.load(x + row * width + column, mask=live, other=0.0).to(tl.float32)
    if P > 0:
        d = tl.zeros([C], tl.float32)
        for part in tl.static_range(P):
            d += tl.load(parts + (part * rows + row) * width + column, mask=live, other=0.0).to(tl.float32)
        d = d.to(x.dtype.element_ty).to(tl.float32)
        scale = 1.0 + tl.load(after + column, mask=live, other=0.0).to(tl.float32)
        d = d * tl.rsqrt(tl.sum(d * d, 0) / width + eps) * scale
        here = (here + d.to(x.dtype.element_ty).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x_out + row * width + column, here, mask=live)
        here = here.to(tl.float32)
    scale = 1.0 + tl.load(before + column, mask=live, other=0.0).to(tl.float32)
    h = here * tl.rsqrt(tl.sum(here * here, 0) / width + eps) * scale
    tl.store(h_out + row * width + column, h.to(h_out.dtype.element_ty), mask=live)


def add_norm(
    x: Tensor, parts: Tensor | None, after: Tensor | None, before: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + norm(sum of parts, after), and norm of that with `before`; without parts x itself, and its norm.

    x [R, C]; parts [P, R, C]; after, before [C]: weights of RMSNorm, of which 1 + weight counts.
    """
    rows, width = x.shape
    h = empty_like(x)
    out = x if parts is None else empty_like(x)
    size = triton.next_power_of_2(width)
    _add_norm[(rows,)](
        x, x if parts is None else parts, before if after is None else after, before, out, h, rows, width, eps,
        P=0 if parts is None else parts.shape[0], C=size, num_warps=max(1, min(8, size // 512)), **early(x),
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
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    _begin(EARLY)
    row = tl.program_id(0) * R + tl.arange(0, R)
    head = tl.program_id(1)
    half = tl.arange(0, D // 2)
    live = (row < count)[:, None] & (half < D)[None, :]
    slot = tl.load(rows + row * 3, mask=row < count, other=0)
    position = tl.load(rows + row * 3 + 1, mask=row < count, other=0)
    source = qkv + row[:, None].to(tl.int64) * ((H + 2 * KV) * D) + head * D + half[None, :]
    a = tl.load(source, mask=live, other=0.0).to(tl.float32)
    b = tl.load(source + D // 2, mask=live, other=0.0).to(tl.float32)
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
    """Norm and turn the queries and keys of qkv [R, (H + 2 KV) D], and put keys and values on their pages.

    keys, values [pages, BLOCK, KV, D]; rows int32 [R, 3]: slot, position, reach; table int32 [S, blocks];
    angles: cosines and sines, float32 [R, D/2]; norms: weights [D] of queries and keys. Returns queries
    [R, H, D].
    """
    count, (kv, dim) = len(qkv), keys.shape[2:]
    q = empty(count, heads, dim, dtype=qkv.dtype, device=qkv.device)
    some = 1 if count <= 64 else 16
    _place_heads[(triton.cdiv(count, some), heads + 2 * kv)](
        qkv, q, keys, values, rows, table, table.stride(0), *angles, *norms, eps, count,
        H=heads, KV=kv, D=dim, BLOCK=BLOCK, R=some, num_warps=1 if some == 1 else 4, **early(qkv),
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
        out + (row[:, None] * H + head) * D + column[None, :], sums.to(out.dtype.element_ty), mask=live[:, None]
    )


def piece_rows(dim: int, dtype: dtype) -> int:
    """Rows of one sequence that a program of `attend` takes at most."""
    return 16 if dtype == float32 else 128 if dim <= 128 else 64


def attend(
    q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, table: Tensor, pieces: Tensor, scale: float, window: int
) -> Tensor:
    """Attention of queries [R, H, D] to the pages of their sequences -> [R, H D].

    pieces int32 [n, 2]: first row and number of rows, of one sequence, positions rising by one, at most
    `piece_rows`. A row sees what lies up to its reach and within the window.
    """
    count, heads, dim = q.shape
    out = empty(count, heads * dim, dtype=q.dtype, device=q.device)
    _attend[(len(pieces), heads)](
        q, keys, values, rows, table, table.stride(0), pieces, out, scale * LOG2E, window,
        H=heads, KV=keys.shape[2], D=dim, BLOCK=BLOCK, M=piece_rows(dim, q.dtype), FAST=fast(q),
        num_warps=8 if fast(q) and dim <= 128 else 4, num_stages=2 if fast(q) else 1,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["stride"])
def _attend_one(
    q, keys, values, rows, table, stride, out, tops, scale, window,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr,
    P: tl.constexpr, FAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    _begin(EARLY)
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
        target = out + heads[:, None] * D + column[None, :]
        tl.store(target, (sums / total[:, None]).to(out.dtype.element_ty), mask=live[:, None])
    else:
        target = out + (heads[:, None] * P + part) * D + column[None, :]
        tl.store(target, sums, mask=live[:, None])
        tl.store(tops + (heads * P + part) * 2, top, mask=live)
        tl.store(tops + (heads * P + part) * 2 + 1, total, mask=live)


@triton.jit
def _join(sums, tops, out, D: tl.constexpr, P: tl.constexpr, EARLY: tl.constexpr):
    _begin(EARLY)
    head = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, P)
    column = tl.arange(0, D)
    top = tl.load(tops + (head * P + part) * 2)
    total = tl.load(tops + (head * P + part) * 2 + 1)
    weight = tl.exp2(top - tl.max(top, 0))
    x = tl.load(sums + (head * P + part)[:, None] * D + column[None, :])
    x = tl.sum(x * weight[:, None], 0) / tl.sum(total * weight, 0)
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
) -> Tensor:
    """`attend` where every sequence has one row: the keys of one are shared out among `parts` programs."""
    count, heads, dim = q.shape
    kv = keys.shape[2]
    out = empty(count, heads * dim, dtype=q.dtype, device=q.device)
    sums, tops = out, out
    if parts > 1:
        sums = empty(count, heads, parts, dim, dtype=float32, device=q.device)
        tops = empty(count, heads, parts, 2, dtype=float32, device=q.device)
    _attend_one[(count, kv, parts)](
        q, keys, values, rows, table, table.stride(0), sums, tops, scale * LOG2E, window,
        H=heads, KV=kv, D=dim, BLOCK=BLOCK, G=max(16, triton.next_power_of_2(heads // kv)), P=parts,
        FAST=fast(q), num_warps=4, num_stages=3 if fast(q) else 1, **early(q),
    )  # fmt: skip
    if parts > 1:
        _join[(count * heads,)](sums, tops, out, D=dim, P=parts, num_warps=2, **early(q))
    return out


# --- products of few rows

PLAIN, INT8, INT4 = 0, 1, 2


@triton.jit
def _nibbles(packed, FAST: tl.constexpr):
    """uint8 -> its low and its high four bits, + 128, as bfloat16 (FAST) or float32."""
    if FAST:
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b, c;
            prmt.b32 a, $4, 0, 0x4140;
            prmt.b32 b, $4, 0, 0x4342;
            lop3.b32 $0, a, 0x000f000f, 0x43004300, 0xea;
            lop3.b32 $1, b, 0x000f000f, 0x43004300, 0xea;
            shr.u32 c, $4, 4;
            prmt.b32 a, c, 0, 0x4140;
            prmt.b32 b, c, 0, 0x4342;
            lop3.b32 $2, a, 0x000f000f, 0x43004300, 0xea;
            lop3.b32 $3, b, 0x000f000f, 0x43004300, 0xea;
            }
            """,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
        return low, high
    else:
        return (packed & 15).to(tl.float32) + 128.0, (packed >> 4).to(tl.float32) + 128.0


@triton.jit
def _prefetch(address):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["rows", "parts"])
def _few(
    x, w, scales, zeros, out, rows, outputs, inputs, parts,
    KIND: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out [parts, rows, outputs] = x [rows, inputs] @ w [outputs, inputs].T; GATED: w has the gates, then as many
    others, and out is gelu(gate) * other."""
    n = tl.program_id(0) * N + tl.arange(0, N)
    part = tl.program_id(1)
    m = tl.arange(0, M)
    each = tl.cdiv(tl.cdiv(inputs, K), parts)
    start = part * each
    end = tl.minimum(start + each, tl.cdiv(inputs, K))
    safe = tl.minimum(n, outputs - 1).to(tl.int64)
    if EARLY:  # weights do not wait for anybody: the first of them into the L2 cache
        gdc_launch_dependents()
        size: tl.constexpr = w.dtype.element_ty.primitive_bitwidth // 8
        wide = inputs // 2 if KIND == 2 else inputs * size
        skip = start * K // 2 if KIND == 2 else start * K * size
        line = tl.minimum(skip + tl.arange(0, AHEAD) * 128, wide - 1)
        address = w.to(tl.int64) + safe[:, None] * wide + line[None, :]
        _prefetch(address)
        if GATED:
            _prefetch(address + outputs.to(tl.int64) * wide)
        gdc_wait()
    acc = tl.zeros([N, M], tl.float32)
    acc2 = tl.zeros([N, M], tl.float32)
    if KIND == 2:
        half: tl.constexpr = K // 2  # = GROUP / 2
        k = tl.arange(0, half)
        groups = inputs // K
        for block in range(start, end):
            at = x + m[None, :] * inputs + block * K + k[:, None]
            low_x = tl.load(at, mask=(m < rows)[None, :], other=0.0)
            high_x = tl.load(at + half, mask=(m < rows)[None, :], other=0.0)
            sums = (tl.sum(low_x.to(tl.float32), 0) + tl.sum(high_x.to(tl.float32), 0))[None, :]
            low, high = _nibbles(tl.load(w + safe[:, None] * (inputs // 2) + block * half + k[None, :]), FAST)
            scale = tl.load(scales + safe * groups + block).to(tl.float32)
            zero = tl.load(zeros + safe * groups + block).to(tl.float32) + 128.0
            product = _dot(high, high_x, _dot(low, low_x, tl.zeros([N, M], tl.float32), FAST), FAST)
            acc += (product - sums * zero[:, None]) * scale[:, None]
            if GATED:
                other = safe + outputs
                packed = tl.load(w + other[:, None] * (inputs // 2) + block * half + k[None, :])
                low, high = _nibbles(packed, FAST)
                scale = tl.load(scales + other * groups + block).to(tl.float32)
                zero = tl.load(zeros + other * groups + block).to(tl.float32) + 128.0
                product = _dot(high, high_x, _dot(low, low_x, tl.zeros([N, M], tl.float32), FAST), FAST)
                acc2 += (product - sums * zero[:, None]) * scale[:, None]
    else:
        k = tl.arange(0, K)
        for block in range(start, end):
            column = block * K + k
            if EVEN:
                xs = tl.load(x + m[None, :] * inputs + column[:, None], mask=(m < rows)[None, :], other=0.0)
                ws = tl.load(w + safe[:, None] * inputs + column[None, :])
            else:
                there = column < inputs
                xs = tl.load(
                    x + m[None, :] * inputs + column[:, None],
                    mask=(m < rows)[None, :] & there[:, None],
                    other=0.0,
                )
                ws = tl.load(w + safe[:, None] * inputs + column[None, :], mask=there[None, :], other=0.0)
            acc = _dot(ws.to(xs.dtype if FAST else tl.float32), xs, acc, FAST)
            if GATED:
                other = safe + outputs
                if EVEN:
                    ws = tl.load(w + other[:, None] * inputs + column[None, :])
                else:
                    ws = tl.load(
                        w + other[:, None] * inputs + column[None, :], mask=(column < inputs)[None, :], other=0.0
                    )
                acc2 = _dot(ws.to(xs.dtype if FAST else tl.float32), xs, acc2, FAST)
        if KIND == 1:
            acc = acc * tl.load(scales + safe).to(tl.float32)[:, None]
            if GATED:
                acc2 = acc2 * tl.load(scales + safe + outputs).to(tl.float32)[:, None]
    if GATED:
        acc = _gelu(acc) * acc2
    target = out + (part * rows + m[None, :]) * outputs + n[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(m < rows)[None, :] & (n < outputs)[:, None])


def few(
    x: Tensor,
    w: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    *,
    gated: bool = False,
    wide: bool = False,
    tile: tuple[int, ...],
) -> Tensor:
    """x [R, K] times a matrix [N, K], R at most MOST_ROWS -> [P, R, N], parts whose sum is meant; in x's dtype
    if there is one and it is not asked to be `wide`, else in float32.

    w: in x's dtype; int8 with scales [N]; or uint8 [N, K/2] with scales and zeros [N, K/GROUP], where a byte
    holds the weights i and i + 64 of its group. gated: see `_few`. tile: outputs and inputs of a program at a
    time, parts, warps, stages.
    """
    rows, inputs = x.shape
    outputs = len(w) // 2 if gated else len(w)
    kind = PLAIN if scales is None else INT8 if zeros is None else INT4
    n, k, parts, warps, stages = tile
    k = GROUP if kind == INT4 else k
    out = empty(parts, rows, outputs, dtype=float32 if wide or parts > 1 else x.dtype, device=x.device)
    _few[(triton.cdiv(outputs, n), parts)](
        x, w, w if scales is None else scales, w if zeros is None else zeros, out, rows, outputs, inputs, parts,
        KIND=kind, GATED=gated, EVEN=inputs % k == 0, FAST=fast(x),
        M=max(16, triton.next_power_of_2(rows)), N=n, K=k, AHEAD=AHEAD, num_warps=warps, num_stages=stages,
        **early(x),
    )  # fmt: skip
    return out


@triton.jit
def _unpack(w, scales, zeros, out, inputs, KIND: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * K + tl.arange(0, K)
    if KIND == 2:
        half: tl.constexpr = GROUP // 2
        group = k // half
        live = k < inputs // 2
        packed = tl.load(w + row * (inputs // 2) + k, mask=live, other=0)
        scale = tl.load(scales + row * (inputs // GROUP) + group, mask=live, other=0.0).to(tl.float32)
        zero = tl.load(zeros + row * (inputs // GROUP) + group, mask=live, other=0.0).to(tl.float32)
        at = out + row * inputs + group * GROUP + k % half
        tl.store(at, (((packed & 15).to(tl.float32) - zero) * scale).to(out.dtype.element_ty), mask=live)
        high = ((packed >> 4).to(tl.float32) - zero) * scale
        tl.store(at + half, high.to(out.dtype.element_ty), mask=live)
    else:
        live = k < inputs
        x = tl.load(w + row * inputs + k, mask=live, other=0).to(tl.float32) * tl.load(scales + row)
        tl.store(out + row * inputs + k, x.to(out.dtype.element_ty), mask=live)


def unpack(w: Tensor, scales: Tensor, zeros: Tensor | None, dtype: dtype) -> Tensor:
    """Rounded weights (see `few`) as a matrix [N, K] of a floating dtype."""
    outputs, inputs = len(w), w.shape[1] * (1 if zeros is None else 2)
    out = empty(outputs, inputs, dtype=dtype, device=w.device)
    _unpack[(outputs, triton.cdiv(w.shape[1], 2048))](
        w, scales, w if zeros is None else zeros, out, inputs,
        KIND=INT8 if zeros is None else INT4, GROUP=GROUP, K=2048, num_warps=4,
    )  # fmt: skip
    return out
