"""Compiles decoder.cpp, vision.cpp and mean.cpp together, once for each instruction set. Run by the package's
build, or by hand:

    python -m seavlm.engine.kernels

Imports nothing of seavlm and nothing that is not in Python itself: the package's build runs it before there
is a package.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
FLAGS = {  # best first
    "avx512vnni": [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"],
    "avx2": _AVX2,
    "portable": [],
}
OPTIONS = ["-O3", "-std=c++20", "-shared", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math"]
ISAS = tuple(FLAGS)


def path_of(isa: str) -> Path:
    """Where the library for an instruction set lies, or would."""
    return HERE / f"_decoder_{isa}.so"


def build() -> list[Path]:
    """The libraries made. RuntimeError with the compiler's words when it fails or there is none."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler found (c++, g++, clang++, or $CXX)")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = [isa for isa in ISAS if x86 or not FLAGS[isa]]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda isa: _compile(compiler, isa), isas))


def _compile(compiler: str, isa: str) -> Path:
    partial = path_of(isa).with_suffix(f".tmp-{os.getpid()}")
    sources = [str(HERE / name) for name in ("decoder.cpp", "vision.cpp", "mean.cpp")]
    command = [*compiler.split(), *OPTIONS, *FLAGS[isa], *sources, "-o", str(partial)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        partial.replace(path_of(isa))
    finally:
        partial.unlink(missing_ok=True)
    return path_of(isa)
