"""What every engine's script does: read a job, run it, print a JSON line for each number.

A script gives `main` its function load(weights, option, threads), which returns an engine of two functions:

    generate(prompts, new_tokens) -> seconds from the call to each step's tokens, greedy and past any EOS
    logits(ids) -> float32 [T, V]

A job is `{"mode": "speed", "tokens": [ids of a long text]}` (mode "cold": the cold start alone) or
`{"mode": "kl", "passages": {language: ids}, "reference": folder}` ("write": true writes the reference).
Runs with the standard library and numpy only: it is part of every environment.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from quality import log_softmax, mean_kl

BOS = 2
NEW_TOKENS = 64
STRIDE = 131  # tokens between the beginnings of two prompts: no two share a prefix


class Engine(Protocol):
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[float]: ...

    def logits(self, ids: Sequence[int]) -> np.ndarray: ...


def main(load: Callable[[str, str, int], Engine]) -> None:
    """`script.py JOB.json START`, START being time.time() when the process was started."""
    job, start = json.loads(Path(sys.argv[1]).read_text()), float(sys.argv[2])
    engine = load(job["weights"], job["option"], job["threads"])
    if job["mode"] == "kl":
        divergence(engine, job)
    else:
        speed(engine, job["tokens"], start, cold_only=job["mode"] == "cold")


def speed(engine: Engine, tokens: list[int], start: float, cold_only: bool) -> None:
    """Cold start first; then each piece of work, of which the first go is thrown away where it is short."""
    taken = 0

    def run(batch: int, context: int, new_tokens: int) -> list[float]:
        nonlocal taken
        prompts = []
        for _ in range(batch):
            begin = taken * STRIDE % (len(tokens) - context)
            prompts.append([BOS, *tokens[begin : begin + context - 1]])
            taken += 1
        return engine.generate(prompts, new_tokens)

    run(1, 128, 1)
    emit("cold start", 1, 128, time.time() - start, "s")
    emit("memory, cold start", 1, 128, peak_mb(), "MB")
    if cold_only:
        return
    for batch, context, new_tokens in ((1, 128, NEW_TOKENS), (1, 512, 2), (8, 128, NEW_TOKENS)):
        runs = [run(batch, context, new_tokens) for _ in range(3)][1:]
        if batch == 1:
            first = statistics.median(times[0] for times in runs)
            emit("prefill", batch, context, context / first, "tokens/s")
        if new_tokens > 2:
            emit("decode", batch, context, statistics.median(map(rate, runs)) * batch, "tokens/s")
    times = run(1, 4096, NEW_TOKENS)
    emit("prefill", 1, 4096, 4096 / times[0], "tokens/s")
    emit("decode", 1, 4096, rate(times), "tokens/s")
    emit("memory, whole run", 8, 4096, peak_mb(), "MB")


def rate(times: list[float]) -> float:
    """Steps a second after the first token."""
    return (len(times) - 1) / (times[-1] - times[0])


def divergence(engine: Engine, job: dict[str, Any]) -> None:
    """The mean KL divergence for each passage; the last position predicts nothing that is in the passage."""
    for language, ids in job["passages"].items():
        file = Path(job["reference"]) / f"{language}.npy"
        logits = engine.logits(ids)[:-1]
        if job.get("write"):
            np.save(file, log_softmax(logits))
        else:
            reference = np.load(file, mmap_mode="r")
            value = mean_kl(reference, logits)
            print(
                json.dumps({"work": "kl", "language": language, "value": value, "unit": "nats"}), flush=True
            )


def emit(work: str, batch: int, context: int, value: float, unit: str) -> None:
    row = {"work": work, "batch": batch, "context": context, "value": value, "unit": unit}
    print(json.dumps(row), flush=True)


def peak_mb() -> float:
    """Of this process, in MB of 10^6 bytes. ru_maxrss would count what the parent had when it forked."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("no VmHWM in /proc/self/status")
