"""Which tile is fastest for the products of few rows (`gpu_kernels.few`), at the geometry of a size.

    python benchmarks/gpu/tune.py --size 27b --out benchmarks/gpu/tune-27b.json

Each product of a layer, and the head, with few and with many rows and weights plain, int8 and int4: GB/s of
weights read, of every tile (parts first), and of cuBLAS. Weights rotate, so that none is in the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from seavlm.engine import gpu_kernels as kernels
from seavlm.engine.gpu_kernels import GROUP, ROWS
from seavlm.engine.weight_only import Matrix
from seavlm.model.config import Gemma3Config

SHARED = 225 * 2**10  # bytes that a program may have
TURNS = 16  # products in a CUDA graph
KINDS = ("plain", "int8", "int4")
SIZE = {"plain": 2.0, "int8": 1.0, "int4": 0.5}


def tiles(kind: str, rows: int, gated: bool) -> list[tuple[int, ...]]:
    """Without parts: see `kernels.few` and `kernels.few_rounded`."""
    found: list[tuple[int, ...]] = []
    if kind != "plain":
        m = 2 * max(8, rows)
        for n, warps, stages in itertools.product((32, 64, 128), (4, 8), (2, 3, 4, 6)):
            size = n * GROUP * SIZE[kind] * (2 if gated else 1) + m * GROUP
            fits = size * stages <= SHARED and n * m * (2 if gated else 1) <= 64 * warps * 32
            if fits and (n >= 16 * warps or (n, warps) == (32, 4)) and (n == GROUP or not gated):
                found.append((n, warps, stages))
        return found
    m = max(16, rows)
    for n, k, warps, stages in itertools.product((16, 32, 64, 128), (64, 128, 256), (4, 8), (3, 4, 5)):
        size = n * k * SIZE[kind] * (2 if gated else 1) + m * k * 2
        fits = size * stages <= SHARED and n * m * (2 if gated else 1) <= 64 * warps * 32
        if fits and size * stages >= 24 * 2**10 and (k > 64 or n >= 64) and (warps == 4 or n >= 64):
            found.append((n, k, warps, stages))
    return found


def weights(kind: str, outputs: int, inputs: int, pool: torch.Tensor, at: int) -> Matrix:
    """A matrix in the pool of bytes."""
    size = int(outputs * inputs * SIZE[kind])
    first = at * size % (len(pool) - size) // 256 * 256
    raw = pool[first : first + size]
    if kind == "plain":
        return Matrix(raw.view(torch.bfloat16).view(outputs, inputs))
    if kind == "int8":
        q = raw.view(torch.int8).view(outputs // ROWS, inputs // GROUP, ROWS, GROUP)
        return Matrix(q, torch.ones(outputs, device=pool.device))
    scales = torch.ones(inputs // GROUP, outputs, dtype=torch.bfloat16, device=pool.device)
    return Matrix(raw.view(outputs // ROWS, inputs // GROUP, ROWS, GROUP // 2), scales, scales)


def multiply(x: Any, made: list[Matrix], gated: bool, tile: tuple[int, ...], parts: int, turn: int) -> None:
    matrix = made[turn]
    if matrix.scales is None:
        n, k, warps, stages = tile
        kernels.few(x, matrix.weight, gated=gated, tile=(n, k, parts, warps, stages))
        return
    n, warps, stages = tile
    told = x, matrix.weight, matrix.scales, matrix.zeros
    if gated:
        kernels.gated_rounded(*told, tile=(n, parts, warps, stages))
    else:
        kernels.few_rounded(*told, torch.bfloat16, tile=(n, parts, warps, stages))


def library(x: torch.Tensor, made: list[Matrix], turn: int) -> None:
    F.linear(x, made[turn].weight)


def activations(kind: str, rows: int, inputs: int) -> Any:
    x = torch.randn(rows, inputs, dtype=torch.bfloat16, device="cuda")
    return x if kind == "plain" else kernels.planes(x)


def compile_some(work: list[tuple[str, int, bool, tuple[int, ...]]]) -> None:
    pool = torch.zeros(2**22, dtype=torch.uint8, device="cuda")
    for kind, rows, gated, tile in work:
        x, matrix = activations(kind, rows, 1024), weights(kind, 1024, 1024, pool, 0)
        for parts in (1,) if gated else (1, 2):
            with contextlib.suppress(Exception):  # more shared memory than there is
                multiply(x, [matrix], gated, tile, parts, 0)
    torch.cuda.synchronize()


def seconds(work: Any) -> float:
    """Of one of TURNS calls, in a CUDA graph."""
    work(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(TURNS):
            work(turn)
    graph.replay()
    torch.cuda.synchronize()
    best = float("inf")
    for _ in range(3):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        best = min(best, began.elapsed_time(ended) / 1e3)
    return best / TURNS


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--size", default="27b")
    parser.add_argument("--rows", default="1,64")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of weights")
    parser.add_argument("--out", type=Path, default=Path("tune.json"))
    options = parser.parse_args()
    t = Gemma3Config.named(options.size).text
    wide = t.num_attention_heads * t.head_dim
    shapes = {
        "qkv": (wide + 2 * t.num_key_value_heads * t.head_dim, t.hidden_size),
        "out": (t.hidden_size, wide),
        "gate_up": (2 * t.intermediate_size, t.hidden_size),
        "down": (t.hidden_size, t.intermediate_size),
        "head": (t.vocab_size, t.hidden_size),
    }
    kinds = options.kinds.split(",")
    many = [int(part) for part in options.rows.split(",")]
    work = [
        (kind, rows, gated, tile)
        for kind, rows, gated in itertools.product(
            kinds, sorted({max(8, rows) for rows in many}), (False, True)
        )
        for tile in tiles(kind, rows, gated)
    ]
    began, cores = time.perf_counter(), min(14, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(cores) as others:
        others.map(compile_some, [work[i :: 4 * cores] for i in range(4 * cores)], chunksize=1)
    print(f"{len(work)} tiles compiled in {time.perf_counter() - began:.0f} s", flush=True)
    pool = torch.randint(0, 255, (3 * 2**30,), dtype=torch.uint8, device="cuda")
    pool.view(torch.bfloat16).normal_()
    found = []
    for kind, rows, (name, (outputs, inputs)) in itertools.product(kinds, many, shapes.items()):
        if name == "head" and kind != "plain":
            continue
        gated = name == "gate_up"
        if kind != "plain" and gated and rows > 16:
            gated = False  # gelu is a kernel of its own there
        x = activations(kind, rows, inputs)
        made = [weights(kind, outputs, inputs, pool, turn) for turn in range(TURNS)]
        read = made[0].nbytes
        here = []
        for tile in tiles(kind, rows, gated):
            for parts in (1, 2, 4) if name in ("qkv", "out", "down") else (1,):
                try:
                    took = seconds(functools.partial(multiply, x, made, gated, tile, parts))
                except Exception as error:
                    print(tile, kind, rows, name, type(error).__name__, str(error)[:90], flush=True)
                    continue
                here.append((read / took / 1e9, (parts, *tile)))
        if kind == "plain":
            took = seconds(functools.partial(library, x, made))
            found.append({"kind": "cuBLAS", "rows": rows, "product": name, "GB/s": [read / took / 1e9]})
            print("cuBLAS", rows, name, f"{read / took / 1e9:.0f}", flush=True)
        here.sort(reverse=True)
        found.append(
            {
                "kind": kind,
                "rows": rows,
                "product": name,
                "tiles": [(round(rate), tile) for rate, tile in here],
            }
        )
        print(kind, rows, name, [(round(rate), *tile) for rate, tile in here[:3]], flush=True)
    told = {"device": torch.cuda.get_device_name(), "size": options.size, "found": found}
    options.out.write_text(json.dumps(told) + "\n")
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
