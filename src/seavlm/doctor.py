"""What this machine has for running models, and what would make it faster."""

from __future__ import annotations

import importlib.util
import itertools
import os
import platform
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from seavlm.engine import kernels
from seavlm.engine.bench import lines_of

GIB = 2**30
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimd")
PACKAGES = ("seavlm", "torch", "numpy", "tokenizers", "transformers", "gguf")


def examine() -> dict[str, Any]:
    """Name -> finding, in the order to show them. Takes a second or two: memory bandwidth is measured."""
    cpu = _cpuinfo()
    flags = set(cpu.get("flags", cpu.get("Features", "")).split())
    page = os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": cpu.get("model name") or platform.processor() or platform.machine(),
        "cores": kernels.pace(None).most,
        "instructions": [flag for flag in FLAGS if flag in flags],
        "memory, GiB": round(os.sysconf("SC_PHYS_PAGES") * page / GIB, 1),
        "memory free, GiB": round(available_memory() / GIB, 1),
        "memory read, GB/s": round(read_bandwidth() / 1e9, 1),
        "disk free here, GiB": round(shutil.disk_usage(".").free / GIB, 1),
        "GPU": _gpus(),
        "kernels": _kernels(),
        "compiler": next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None),
        "python": platform.python_version(),
        "versions": [f"{name} {_version(name)}" for name in PACKAGES],
    }


def advice(found: dict[str, Any]) -> list[str]:
    """What would be faster and why; the limit that no software passes comes first."""
    speed = found["memory read, GB/s"]
    lines = [
        f"Writing is limited by reading the weights once a token: at {speed} GB/s a model of 1 GB writes "
        f"at most {speed:.0f} tokens a second, and one of half a GB twice as many."
    ]
    if found["kernels"] is None:
        how = "" if found["compiler"] else "install one (Debian: apt install g++) and "
        lines.append(
            f"The kernels are not built: {how}run python -m seavlm.engine.kernels, then use --quantize int8."
        )
    elif not found["GPU"]:
        lines.append("There is no GPU: --quantize int8 reads a quarter of the bytes of float32.")
    if found["kernels"] in ("avx2", "portable") and {"avx512_vnni"} & set(found["instructions"]):
        lines.append("The processor has AVX512-VNNI and another build is in use: unset SEAVLM_ISA.")
    if found["memory free, GiB"] < 2:
        lines.append(
            "Less than 2 GiB of memory is free: close something, or models will be read from disk again."
        )
    if found["GPU"]:
        lines.append("There is a GPU: --device auto uses it, in bfloat16.")
        if importlib.util.find_spec("triton") is None:
            lines.append("Triton is missing, on which the kernels for a GPU run: pip install triton.")
    return lines


def read_bandwidth(megabytes: int = 256, repeats: int = 4) -> float:
    """Bytes a second that all cores together read from memory: the best of a few passes."""
    import numpy as np

    cores = kernels.pace(None).most
    parts = np.ones((cores, megabytes * 2**20 // cores // 4), np.float32)
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(repeats):
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, parts.nbytes / (time.perf_counter() - began))
    return best


def available_memory() -> int:
    """Bytes that can be had without swapping, the page cache among them."""
    for line in lines_of(Path("/proc/meminfo")):
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cpuinfo() -> dict[str, str]:
    """Of the first processor."""
    lines = list(itertools.takewhile(str.strip, lines_of(Path("/proc/cpuinfo"))))
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _gpus() -> list[str]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    return [
        f"{one.name} ({one.total_memory / GIB:.0f} GiB)"
        for one in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]


def _kernels() -> str | None:
    """The instruction set of the kernels in use."""
    from seavlm.engine import kernels

    lib = kernels.library()
    return None if lib is None else Path(lib._name).stem.removeprefix("_decoder_")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"
