"""128k tokens of context: memory is the formula's, and only global layers make a later token dearer.

    python benchmarks/long_context.py --out benchmarks/long_context.json

The attention of Gemma 3 4B (8 heads on 4 of keys and values, 256 wide, window 1,024; five local layers, one
global), random weights, a narrow rest. A prompt of 131,072 tokens is read 512 at a time on the CPU's kernels;
beside it the same with the global layer made local. Writes JSON and a plot beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from seavlm.engine.bench import machine
from seavlm.engine.engine import Engine
from seavlm.engine.int8 import Int8Runner
from seavlm.engine.quantize import pack_decoder
from seavlm.engine.sampler import Sampling
from seavlm.engine.sequence import Prompt
from seavlm.engine.vision import Tensors
from seavlm.model.config import GLOBAL, LOCAL, Gemma3Config, TextConfig
from seavlm.model.gemma3 import Gemma3

NEW_TOKENS = 32


def a_runner(kinds: tuple[str, ...], context: int) -> Int8Runner:
    torch.manual_seed(0)
    text = TextConfig(
        vocab_size=1024, hidden_size=640, intermediate_size=1024, num_hidden_layers=len(kinds),
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, sliding_window=1024,
        query_pre_attn_scalar=256, layer_types=kinds, rope_factor=8.0, max_position_embeddings=context,
    )  # fmt: skip
    model = Gemma3(Gemma3Config(text=text, vision=None), dtype=torch.float32)
    checkpoint = Tensors(Path("random"), model.config, model.state_dict())
    return Int8Runner(model.config, dict(pack_decoder(checkpoint)))


def read(kinds: tuple[str, ...], context: int) -> dict[str, list[float]]:
    """After each step: position, seconds a token, bytes of keys and values held, and those of the formula."""
    runner = a_runner(kinds, context)
    engine = Engine(runner, cache_tokens=context, prefix_cache=False)
    text = runner.config.text
    ids = np.random.default_rng(0).integers(3, 1024, context - NEW_TOKENS).tolist()
    sequence = engine.add(Prompt(ids), Sampling(temperature=0), max_new_tokens=NEW_TOKENS, stop_ids=())
    number = 2 * text.num_key_value_heads * (text.head_dim + 4)  # int8 and a scale for each head
    layers = {kind: text.layer_types.count(kind) for kind in (GLOBAL, LOCAL)}
    found: dict[str, list[float]] = {name: [] for name in ("position", "seconds", "held", "formula")}
    while not sequence.finished:
        before, began = sequence.computed, time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - began
        if sequence.error is not None:
            raise sequence.error
        if sequence.finished:
            break
        done = sequence.computed
        local = min(done, text.sliding_window - 1)
        found["position"].append(done)
        found["seconds"].append(seconds / (done - before))
        found["held"].append(sum(engine.pages.in_use(kind) * runner.page_bytes(kind) for kind in layers))
        found["formula"].append(number * (layers[GLOBAL] * done + layers[LOCAL] * local))
    return found


def plot(runs: dict[str, dict[str, list[float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    time_axis, memory_axis = figure.subplots(1, 2)
    for (name, run), colour in zip(runs.items(), ("#e76f51", "#2a9d8f"), strict=True):
        chunks = [i for i, seconds in enumerate(run["position"]) if i < len(run["position"]) - NEW_TOKENS]
        x = np.array(run["position"])[chunks]
        time_axis.plot(x, 1e3 * np.array(run["seconds"])[chunks], color=colour, label=name)
        memory_axis.plot(x, np.array(run["held"])[chunks] / 2**20, color=colour, label=f"{name}, held")
        memory_axis.plot(x, np.array(run["formula"])[chunks] / 2**20, color="black", lw=0.8, ls="--")
    time_axis.set(xlabel="position", ylabel="ms a token, read 512 at a time", ylim=0)
    memory_axis.set(xlabel="position", ylabel="keys and values, MiB (dashed: the formula)", ylim=0)
    for axis in (time_axis, memory_axis):
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=131_072)
    parser.add_argument("--out", type=Path, default=Path("long_context.json"))
    options = parser.parse_args()
    cases = {"five local layers, one global": (LOCAL,) * 5 + (GLOBAL,), "six local layers": (LOCAL,) * 6}
    runs = {name: read(kinds, options.context) for name, kinds in cases.items()}
    options.out.write_text(json.dumps({"machine": machine(), "runs": runs}) + "\n")
    plot(runs, options.out.with_suffix(".png"))
    for name, run in runs.items():
        early, late = (run["seconds"][i] * 1e3 for i in (8, -NEW_TOKENS - 2))
        page = max(abs(h - f) for h, f in zip(run["held"], run["formula"], strict=True)) / 2**20
        print(
            f"{name}: {early:.2f} ms a token at 4k, {late:.2f} at the end; held - formula <= {page:.1f} MiB"
        )


if __name__ == "__main__":
    main()
