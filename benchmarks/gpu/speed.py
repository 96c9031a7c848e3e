"""Decode and prefill at the geometry of a large model, beside what the device's memory and arithmetic allow
and beside transformers, in one run. Weights are random.

    python benchmarks/gpu/speed.py --size 27b --out benchmarks/gpu/speed-27b.json
    TRITON_INTERPRET=1 python benchmarks/gpu/speed.py --size 270m --layers 2 --device cpu \\
        --dtype float32 --work 1x64 --weights plain  # to try it

A decode step must read the weights once and the keys and values of every sequence: bytes over the measured
copy rate is its limit. Prefill must multiply: 2 x weights x tokens over the measured rate of a large matrix
product. A figure is the median of the steps after the first few.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from seavlm.engine.bench import machine
from seavlm.engine.engine import Engine
from seavlm.engine.gpu import GpuRunner
from seavlm.engine.gpu_kernels import GROUP
from seavlm.engine.sampler import Sampling
from seavlm.engine.sequence import Prompt
from seavlm.model.config import GLOBAL, LOCAL, Gemma3Config
from seavlm.model.gemma3 import Gemma3

STEPS = 24
WARM = 4  # steps that are not counted: a CUDA graph is captured in the first


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--size", default="4b", help="270m, 1b, 4b, 12b or 27b")
    parser.add_argument("--layers", type=int, help="fewer than the size has")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--weights", default="plain,int8,int4", help="of ours; 4 bits only on CUDA")
    parser.add_argument(
        "--work", default="1x128,8x128,64x128,1x4096,8x4096,1x32768", help="sequences x tokens"
    )
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--out", type=Path, default=Path("speed.json"))
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    config = geometry(options.size, options.layers)
    work = [tuple(map(int, part.split("x"))) for part in options.work.split(",")]
    limits = {"copy, GB/s": copy_rate(device) / 1e9, "matrix, TFLOP/s": matrix_rate(device, dtype) / 1e12}
    print(limits, flush=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rows: list[dict[str, Any]] = []
    told = {"machine": machine() | {"device": name}, "size": options.size, "dtype": options.dtype}
    told |= {"layers": config.text.num_hidden_layers, "limits": limits, "rows": rows}
    engines = [f"seavlm {weights}" for weights in options.weights.split(",")]
    for engine in engines if options.no_peer else [*engines, "transformers"]:
        weights = engine.partition(" ")[2] or "plain"
        began = time.perf_counter()
        made: Any
        if engine == "transformers":
            made = Transformers(config, device, dtype)
        else:
            made = Ours(config, device, dtype, None if weights == "plain" else weights)
        print(f"{engine} made in {time.perf_counter() - began:.1f} s", flush=True)
        for batch, context in work:
            row: dict[str, Any] = {"engine": engine, "batch": batch, "context": context}
            try:
                prefill, step = made.run(batch, context)
                read = step_bytes(config, dtype, weights, batch, context + STEPS // 2)
                flops = 2 * matrix_weights(config) * batch * context / 1e12
                row |= {
                    "decode, tokens/s": batch / step,
                    "of the memory's": read / 1e9 / limits["copy, GB/s"] / step,
                    "prefill, tokens/s": batch * context / prefill,
                    "of the arithmetic's": flops / prefill / limits["matrix, TFLOP/s"],
                }
            except torch.OutOfMemoryError:
                row["error"] = "out of memory"
            rows.append(row)
            print(json.dumps(row), flush=True)
            options.out.write_text(json.dumps(told, indent=1) + "\n")
        del made
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def geometry(size: str, layers: int | None) -> Gemma3Config:
    """The decoder of one of Google's sizes."""
    config = Gemma3Config.named(size)
    text = config.text
    if layers:
        text = dataclasses.replace(text, num_hidden_layers=layers, layer_types=text.layer_types[:layers])
    return dataclasses.replace(config, text=text, vision=None)


def matrix_weights(config: Gemma3Config) -> int:
    """Weights that every token is multiplied by, without the head."""
    t = config.text
    attention = t.hidden_size * t.head_dim * 2 * (t.num_attention_heads + t.num_key_value_heads)
    return t.num_hidden_layers * (attention + 3 * t.hidden_size * t.intermediate_size)


def step_bytes(config: Gemma3Config, dtype: torch.dtype, weights: str, batch: int, context: int) -> float:
    """What a decode step must read: all weights, and keys and values as far as each layer sees."""
    t = config.text
    seen = {GLOBAL: context, LOCAL: min(context, t.sliding_window)}
    cached = 2 * t.num_key_value_heads * t.head_dim * sum(seen[kind] for kind in t.layer_types)
    size = {"plain": dtype.itemsize, "int8": 1, "int4": 0.5 + 4 / GROUP}[weights]
    return matrix_weights(config) * size + (t.vocab_size * t.hidden_size + batch * cached) * dtype.itemsize


def seconds(work: Any, device: torch.device) -> float:
    """Of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def copy_rate(device: torch.device) -> float:
    """Bytes a second that are read and written by a large copy."""
    size = 2**30 if device.type == "cuda" else 2**27
    a, b = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / min(seconds(lambda: b.copy_(a), device) for _ in range(8))


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(8))


def attention_used(work: Any) -> dict[str, int]:
    """Which of torch's attentions a call takes, and how often each."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        work()
    name = "aten::_scaled_dot_product_"
    return {e.key.removeprefix(name): e.count for e in seen.key_averages() if e.key.startswith(name)}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


class Ours:
    """The engine."""

    def __init__(
        self, config: Gemma3Config, device: torch.device, dtype: torch.dtype, quantize: str | None
    ) -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # never a copy in float32
        try:
            self.runner = GpuRunner(Gemma3(config, device=device), quantize=quantize)
        finally:
            torch.set_default_dtype(before)
        self.config, self.device = config, device

    def run(self, batch: int, context: int) -> tuple[float, float]:
        """Seconds of the prefill, and of a decode step."""
        # The first ones write already while the last ones are read.
        reading = -(-batch * context // self.runner.rows) + batch
        tokens = batch * (context + STEPS + reading + 64)
        engine = Engine(self.runner, max_sequences=batch, cache_tokens=tokens, prefix_cache=False)
        for _ in range(2 if batch * context <= 8192 else 1):  # kernels are compiled, libraries loaded
            prompts = torch.randint(3, 200_000, (batch, context)).tolist()
            greedy, most = Sampling(temperature=0), STEPS + reading
            asked = [engine.add(Prompt(ids), greedy, max_new_tokens=most, stop_ids=()) for ids in prompts]
            began = time.perf_counter()
            while not all(sequence.ids for sequence in asked):
                self._step(engine)
            prefill = time.perf_counter() - began
            steps = []
            while not any(sequence.finished for sequence in asked):  # all of them write
                steps.append(seconds(lambda: self._step(engine), self.device))
            for sequence in asked:
                engine.cancel(sequence)
        return prefill, statistics.median(steps[WARM:])

    def _step(self, engine: Engine) -> None:
        for sequence in engine.step():
            if sequence.error is not None:
                raise sequence.error.__cause__ or sequence.error


class Transformers:
    """Its model and its cache in a plain loop, which is faster than its `generate`."""

    def __init__(self, config: Gemma3Config, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig

        known = config.to_dict()
        text = known.get("text_config", known)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                self.model = Gemma3ForCausalLM(Gemma3TextConfig(**text)).eval()
        finally:
            torch.set_default_dtype(before)
        self.device = device

    @torch.inference_mode()
    def run(self, batch: int, context: int) -> tuple[float, float]:
        """Seconds of the prefill, and of a decode step."""
        for _ in range(2 if batch * context <= 8192 else 1):
            ids = torch.randint(3, 200_000, (batch, context), device=self.device)
            out: Any = None

            def step(ids: torch.Tensor) -> None:
                nonlocal out
                cache = None if out is None else out.past_key_values
                out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

            prefill = seconds(lambda ids=ids: step(ids), self.device)
            steps = []
            for _ in range(STEPS - 1):
                new = out.logits[:, -1:].argmax(-1)
                steps.append(seconds(lambda new=new: step(new), self.device))
        return prefill, statistics.median(steps[WARM:])


if __name__ == "__main__":
    main()
