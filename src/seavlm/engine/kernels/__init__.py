"""The C++ of the CPU engine: built with the package (`build.py`), found and called here.

`library()` is the build for the best instruction set that this processor has, or None where the package was
built without a C++ compiler. SEAVLM_ISA=avx2 (or portable) takes another one.
"""

from __future__ import annotations

import contextlib
import ctypes as c
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from seavlm.engine.kernels.build import ISAS, path_of
from seavlm.errors import SeavlmError

Pointer = c.c_void_p

# A library's scratch memory and threads are one, however many models there are: one forward pass at a time.
ONE_AT_A_TIME = threading.Lock()


class Pace:
    """On how many threads to compute: `most`, or fewer while other programs keep the cores busy.

    The kernels' threads wait for each other many times a step. Where one of them has to wait for a core, all
    do, and two threads are slower than one, by far. A thread that waits long sleeps: where the caller's has a
    core for much less time than passes, half as many go on, and after a while more are tried again.
    """

    WINDOW = 0.05  # seconds of steps that are looked at together
    BUSY = 0.6  # of the time that passes a thread has its core, on a machine of our own
    FIRST, LONGEST = 0.5, 30.0  # seconds until more threads are tried again, twice as long after each failure

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.most = self.threads = most
        self._clock, self._passed, self._had = clock, 0.0, 0.0
        self._until, self._pause = 0.0, self.FIRST

    @contextlib.contextmanager
    def step(self) -> Iterator[int]:
        """Around a step; how many threads it may take."""
        if self.threads < self.most and self._clock() >= self._until:
            self.threads = min(self.most, 2 * self.threads)
            self._until = self._clock() + self.FIRST
            self._passed = self._had = 0.0
        began, had = self._clock(), time.thread_time()
        yield self.threads
        self.note(self._clock() - began, time.thread_time() - had)

    def note(self, passed: float, had: float) -> None:
        """What a step took, in seconds that passed and in seconds that its calling thread had a core."""
        if self.threads == 1:
            return
        self._passed, self._had = self._passed + passed, self._had + had
        if self._passed < self.WINDOW:
            return
        if self._had < self.BUSY * self._passed:
            self.threads //= 2
            self._until = self._clock() + self._pause
            self._pause = min(self.LONGEST, 2 * self._pause)
        elif self.threads == self.most:
            self._pause = self.FIRST
        self._passed = self._had = 0.0


@cache
def _shared(most: int) -> Pace:
    return Pace(most)


def pace(threads: int | None) -> Pace:
    """Of so many threads, always; by default OMP_NUM_THREADS, else a thread for each core that the process
    may use, all models together.
    """
    if threads is not None:
        fixed = Pace(threads)
        fixed.BUSY = 0.0
        return fixed
    told = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return _shared(int(told) if told.isdigit() and int(told) > 0 else cores)


class Matrix(c.Structure):
    """Weights [n, k] as `seavlm.engine.quantize` packs them."""

    _fields_ = [
        *((name, Pointer) for name in ("q", "scale", "least")),
        *((name, c.c_int32) for name in ("n", "k", "kind")),
    ]


class Layer(c.Structure):
    _fields_ = [
        ("qkv", Matrix * 3),
        *((name, Matrix) for name in ("o", "gate_up", "down")),
        *(
            (name, Pointer)
            for name in (
                "input_norm",
                "post_attention_norm",
                "pre_feedforward_norm",
                "post_feedforward_norm",
                "q_norm",
                "k_norm",
            )
        ),
        ("local", c.c_int32),
    ]


class Model(c.Structure):
    _fields_ = [
        ("layers", c.POINTER(Layer)),
        *(
            (name, c.c_int32)
            for name in ("num_layers", "width", "heads", "kv_heads", "head_dim", "hidden", "window")
        ),
        ("eps", c.c_float),
        ("attention_scale", c.c_float),
        ("final_norm", Pointer),
        ("global_frequencies", Pointer),
        ("local_frequencies", Pointer),
        ("embedding", Matrix),
        ("head", Matrix * 4),
        ("num_head", c.c_int32),
        ("rotation", Pointer),
    ]


class VisionMatrix(c.Structure):
    """int8 weights [n, k] as vision.cpp packs them, and a bias."""

    _fields_ = [
        *((name, Pointer) for name in ("q", "rest", "scale", "bias")),
        ("n", c.c_int32),
        ("k", c.c_int32),
    ]


class VisionLayer(c.Structure):
    _fields_ = [
        *((name, VisionMatrix) for name in ("qkv", "o", "fc1", "fc2")),
        *((name, Pointer) for name in ("norm1", "norm1_bias", "norm2", "norm2_bias")),
    ]


class Vision(c.Structure):
    _fields_ = [
        ("layers", c.POINTER(VisionLayer)),
        *((name, c.c_int32) for name in ("num_layers", "width", "heads", "hidden")),
        ("eps", c.c_float),
    ]


@cache
def library() -> c.CDLL | None:
    """The kernels, or None where they were not built."""
    simplest = path_of(ISAS[-1])
    if not simplest.exists():
        return None
    wanted = os.environ.get("SEAVLM_ISA") or best()
    if wanted not in ISAS:
        raise SeavlmError(f"SEAVLM_ISA is {wanted!r}", hint=f"Use one of {', '.join(ISAS)}, or unset it.")
    return _open(path_of(wanted) if path_of(wanted).exists() else simplest)


def best() -> str:
    """The best instruction set that this processor has."""
    return _open(path_of(ISAS[-1])).seavlm_best_isa().decode()


@cache
def mean() -> Any:
    """seavlm_mean(a, b, weight, weight, out, n, figures) of mean.cpp, or None where it was not built."""
    return mean_of(library())


def mean_of(lib: c.CDLL | None) -> Any:
    function = getattr(lib, "seavlm_mean", None)
    if function is not None:
        function.argtypes = [Pointer, Pointer, c.c_float, c.c_float, Pointer, c.c_int64, Pointer]
        function.restype = None
    return function


@cache
def mean_of_files() -> Any:
    """seavlm_mean_of_files(a, at_a, b, at_b, weight, weight, out, n, file, at, figures), or None."""
    function = getattr(library(), "seavlm_mean_of_files", None)
    if function is not None:
        i32, i64, f32 = c.c_int32, c.c_int64, c.c_float
        function.argtypes = [i32, i64, i32, i64, f32, f32, Pointer, i64, i32, i64, Pointer]
        function.restype = c.c_bool
    return function


def required() -> c.CDLL:
    """The kernels; SeavlmError where they were not built."""
    if (lib := library()) is None:
        raise SeavlmError(
            "int8 needs the compiled kernels, and this package was built without a C++ compiler",
            hint="Install one (Debian: apt install g++) and run: python -m seavlm.engine.kernels",
        )
    return lib


def _open(path: Path) -> c.CDLL:
    lib = c.CDLL(str(path))
    i32, p = c.c_int32, Pointer
    lib.seavlm_best_isa.restype = c.c_char_p
    signatures: tuple[tuple[Any, list[Any]], ...] = (
        (lib.seavlm_arrange, [p, i32, i32, i32, p, i32]),
        (lib.seavlm_round, [p, i32, i32, p, p, i32]),
        (lib.seavlm_rows, [c.POINTER(Matrix), p, i32, p]),
        (lib.seavlm_multiply, [c.POINTER(Matrix), p, i32, p, i32]),
        (lib.seavlm_embed, [c.POINTER(Model), p, i32, p]),
        (
            lib.seavlm_forward,
            [c.POINTER(Model), p, p, p, i32, p, p, i32, p, i32, p, i32],
        ),
        (lib.seavlm_vision_pack, [p, i32, i32, i32, i32, p, p, p, i32]),
        (lib.seavlm_vision_forward, [c.POINTER(Vision), p, i32, i32]),
    )
    for function, arguments in signatures:
        function.argtypes, function.restype = arguments, None
    return lib
