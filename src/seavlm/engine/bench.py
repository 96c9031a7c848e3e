"""How fast a model is on this machine, how much memory it takes, and what its rounding costs.

Every figure is a median over repeats, greedy, of token ids cut from the Universal Declaration of Human Rights
(udhr.json) so that lengths are exact; no two prompts of a run begin alike, so the prefix cache finds nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from seavlm import __version__
from seavlm.engine.engine import Engine
from seavlm.engine.sampler import Sampling, log_probabilities
from seavlm.engine.sequence import Prompt, Sequence
from seavlm.engine.vlm import VLM, load
from seavlm.errors import SeavlmError

PREFILL = (128, 512, 4096)
DECODE = ((1, 128), (1, 4096), (8, 128))  # batch, context
NEW_TOKENS = 64
QUALITY_TOKENS = 192  # of each language
GREEDY = Sampling(temperature=0)
Row = dict[str, Any]  # work, value, unit, repeats, and what tells it apart: batch, context, language


@cache
def declaration() -> dict[str, str]:
    """Language -> the beginning of the Universal Declaration of Human Rights."""
    return dict(json.loads(Path(__file__).with_name("udhr.json").read_text(encoding="utf-8")))


def bench(
    vlm: VLM,
    *,
    repeats: int = 3,
    quality_against: VLM | None = None,
    show: Callable[[Row], None] = lambda _: None,
) -> list[Row]:
    """Prefill, decode, batch, vision; with `quality_against` (the same model, not rounded) KL."""
    rows: list[Row] = []

    def add(work: str, values: list[float], unit: str, **what: Any) -> None:
        rows.append(
            {"work": work, **what, "value": statistics.median(values), "unit": unit, "repeats": values}
        )
        show(rows[-1])

    prompts = _prompts(vlm)
    context = vlm.config.text.max_position_embeddings
    _timed(vlm.engine, [next(prompts)[:32]], 4)  # the first run pays for what later ones find ready
    for length in PREFILL:
        if length + 1 <= context:
            taken = [_timed(vlm.engine, [next(prompts)[:length]], 1)[0] for _ in range(repeats)]
            add("prefill", [length / seconds for seconds in taken], "tokens/s", context=length)
    for batch, length in DECODE:
        if length + NEW_TOKENS <= context:
            speeds = [
                _timed(vlm.engine, [next(prompts)[:length] for _ in range(batch)], NEW_TOKENS)[1]
                for _ in range(repeats)
            ]
            add("decode", speeds, "tokens/s", batch=batch, context=length)
    if vlm.config.vision is not None:
        size = vlm.config.vision.image_size
        random = np.random.default_rng(0)
        taken = []
        for _ in range(repeats):
            pixels = random.standard_normal((3, size, size)).astype(np.float32)
            began = time.perf_counter()
            vlm.runner.encode([pixels])
            taken.append(time.perf_counter() - began)
        add("vision", taken, "s/picture", size=size)
    if quality_against is not None:
        for language, value in divergence(vlm, quality_against).items():
            add("kl", [value], "nats", language=language)
    return rows


def cold(ref: str, options: list[str], *, repeats: int = 3) -> list[Row]:
    """A new process: seconds from its start to the first token of a 128-token prompt, and its peak memory.

    options: of `load`, each NAME=VALUE. The files lie in the page cache after the first.
    """
    text = declaration()["en"]
    child = (
        "import resource, sys; from seavlm.engine.bench import first_token; "
        "first_token(sys.argv[1], sys.argv[2], sys.argv[3:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    seconds, memory = [], []
    for number in range(repeats + 1):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", child, ref, text, *options],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SeavlmError(f"a new process could not answer: {done.stderr.strip().splitlines()[-1]}")
        if number:
            seconds.append(time.perf_counter() - began)
            memory.append(int(done.stdout) / 1024)
    return [
        {"work": "cold start", "value": statistics.median(seconds), "unit": "s", "repeats": seconds},
        {"work": "peak memory", "value": statistics.median(memory), "unit": "MiB", "repeats": memory},
    ]


def first_token(ref: str, text: str, options: list[str]) -> None:
    """What a cold process does: load, and answer with one token."""
    vlm = load(ref, **dict(option.split("=", 1) for option in options))
    ids = [vlm.tokenizer.bos_id, *vlm.tokenizer.encode(text)][:128]
    sequence = vlm.engine.add(Prompt(ids), GREEDY, max_new_tokens=1, stop_ids=())
    _until(vlm.engine, [sequence], lambda one: one.finished)


def divergence(vlm: VLM, exact: VLM) -> dict[str, float]:
    """Language -> mean over positions of KL(exact || vlm) in nats, over the tokenizer's vocabulary.

    The first QUALITY_TOKENS of the declaration in that language, after <bos>.
    """
    found = {}
    for language, text in declaration().items():
        ids = [exact.tokenizer.bos_id, *exact.tokenizer.encode(text)][: QUALITY_TOKENS + 1]
        limit = exact.engine.limit
        both = [log_probabilities_of(one.engine, ids, limit) for one in (exact, vlm)]
        p, q = (x.astype(np.float64) for x in both)
        found[language] = float((np.exp(p) * (p - q)).sum(axis=1).mean())
    return found


def log_probabilities_of(engine: Engine, ids: list[int], limit: int) -> np.ndarray:
    """Natural log of the next token's probabilities at every position, [T, limit]."""
    rows: list[np.ndarray] = []
    sequence = engine.add(
        Prompt(ids), max_new_tokens=0, inspect=lambda _, x: rows.append(log_probabilities(x[:limit]))
    )
    _until(engine, [sequence], lambda one: one.finished)
    return np.stack(rows)


def machine() -> dict[str, Any]:
    """What the figures were made on."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in lines_of(info) if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "seavlm": __version__,
    }


def lines_of(path: Path) -> list[str]:
    """A file's lines; none where there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _prompts(vlm: VLM) -> Iterator[list[int]]:
    """Ids of text, 4,096 each and more if need be, beginning with <bos> and differing from the second on."""
    texts = [vlm.tokenizer.encode(text) for text in declaration().values()]
    ids = [token for text in texts for token in text]
    while len(ids) < max(PREFILL) + 4096:
        ids += ids
    for number in itertools.count():
        start = number * 61 % 4000
        yield [vlm.tokenizer.bos_id, *ids[start : start + max(PREFILL)]][: max(PREFILL)]


def _timed(engine: Engine, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    """Seconds until all prompts are read and have a first token; tokens a second from there to the end."""
    sequences = [engine.add(Prompt(ids), GREEDY, max_new_tokens=new_tokens, stop_ids=()) for ids in prompts]
    began = time.perf_counter()
    _until(engine, sequences, lambda one: one.first_token_at > 0)
    middle, before = time.perf_counter(), sum(len(one.ids) for one in sequences)
    _until(engine, sequences, lambda one: one.finished)
    made = sum(len(one.ids) for one in sequences) - before
    return middle - began, made / max(time.perf_counter() - middle, 1e-9)


def _until(engine: Engine, sequences: list[Sequence], there: Callable[[Sequence], bool]) -> None:
    """Step until all are there; an error is raised."""
    while not all(there(sequence) for sequence in sequences):
        engine.step()
        for sequence in sequences:
            if sequence.error is not None:
                raise sequence.error


def label(row: Row) -> str:
    """What a row measured, in words."""
    words = {
        "prefill": "prefill, {context} tokens",
        "decode": "decode, batch {batch}, context {context}",
        "vision": "vision, one picture of {size} x {size}",
        "kl": "KL to the unrounded model, {language}",
    }
    return words.get(str(row["work"]), str(row["work"])).format(**row)


def plot(rows: list[Row], title: str, path: Path) -> None:
    """The speeds as bars, each with its smallest and largest repeat."""
    from matplotlib.figure import Figure

    speeds = [row for row in rows if row["unit"] == "tokens/s"]
    figure = Figure(figsize=(8, 0.5 * len(speeds) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(reversed(speeds)):
        low, high = row["value"] - min(row["repeats"]), max(row["repeats"]) - row["value"]
        axes.barh(
            place,
            row["value"],
            xerr=[[low], [high]],
            color="#2a9d8f" if row["work"] == "prefill" else "#e76f51",
        )
        axes.annotate(f" {row['value']:,.0f}", (max(row["repeats"]), place), va="center")
    axes.set_yticks(range(len(speeds)), [label(row) for row in reversed(speeds)])
    axes.set_xscale("log")
    axes.set_xlim(left=1)
    axes.set_xlabel("tokens a second")
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
