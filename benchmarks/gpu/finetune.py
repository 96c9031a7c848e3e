"""Fine-tuning at the geometry of a large model on one card: LoRA on all layers, and all weights of as many
layers as fit. Our own training step (seavlm.train.sft) on packed rows with pictures; weights, tokens and the
pictures' features are random.

    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \\
        python benchmarks/gpu/finetune.py --size 27b --out benchmarks/gpu/finetune.json
    python benchmarks/gpu/finetune.py --size toy --device cpu --tokens 128 --sample-tokens 32  # to try it

Layers are computed in bfloat16 and again in the backward pass (`train.recompute`); what is trained, and its
moments, are held in fp32. A step is one packed row; half of a sample's tokens are supervised, and every
second sample begins with a picture. Counted as useful (MFU): 2 x weights x tokens forward, as much again for
the gradients of the activations, as much again for those of the weights where they are trained, likewise the
head for supervised tokens, and attention within each sample; not what is computed again.

From the seconds of a step: hours and kWh of a run over --samples samples on --cards cards, each as fast as
this one, without what cards say to each other. --watts a card is assumed, not measured. All weights of all
layers on several cards is arithmetic from a part of the layers: the seconds of a layer are those of two
counts of layers, subtracted.

Shapes: B packed rows, T tokens a row, L layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed import attention_used, device_name, matrix_rate, matrix_weights, seconds
from torch import Tensor
from torch.nn import functional as F

from seavlm.carbon import footprint, grid
from seavlm.engine.bench import machine
from seavlm.model.config import GLOBAL, Gemma3Config
from seavlm.model.gemma3 import Gemma3
from seavlm.parity import small_config
from seavlm.recipe import Train
from seavlm.train import sft
from seavlm.train.batches import Samples, micro_batches
from seavlm.train.features import Features, View
from seavlm.train.memory import TrainingMemory, training_memory

PEAK = 989e12  # bf16 operations a second of an H100 or H200 (SXM), by its data sheet
SHARE = 0.9  # of the card's memory, to be filled


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--size", default="27b", help="4b, 12b, 27b or toy")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--modes", default="lora,full")
    parser.add_argument("--layers", type=int, help="LoRA on so many layers only")
    parser.add_argument("--full-layers", type=int, help="all weights of so many layers; default: that fit")
    parser.add_argument("--tokens", type=int, default=4096, help="of a packed row")
    parser.add_argument("--sample-tokens", type=int, default=512, help="mean length of a sample")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--warm", type=int, default=4, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--compile", action="store_true", help="each decoder layer through torch.compile")
    parser.add_argument("--samples", type=int, default=540_000)
    parser.add_argument("--cards", type=int, default=8)
    parser.add_argument("--watts", type=float, default=700.0, help="of a card, assumed")
    parser.add_argument("--out", type=Path, default=Path("finetune.json"))
    options = parser.parse_args()
    device = torch.device(options.device)
    whole = small_config() if options.size == "toy" else Gemma3Config.named(options.size)
    rate = matrix_rate(device, torch.bfloat16)
    told: dict[str, Any] = {
        "machine": machine() | {"device": device_name(device)}, "size": options.size,
        "tokens of a step": options.tokens, "tokens of a sample": options.sample_tokens,
        "lora_rank": options.rank, "compiled": options.compile, "matrix, TFLOP/s": rate / 1e12,
        "TFLOP/s by the data sheet": PEAK / 1e12, "runs": [],
    }  # fmt: skip

    def keep() -> None:
        options.out.write_text(json.dumps(told, indent=1) + "\n")

    print({"device": device_name(device), "matrix, TFLOP/s": rate / 1e12}, flush=True)
    told["attention"] = attention_times(whole, options.tokens, device)
    print(json.dumps(told["attention"]), flush=True)
    keep()
    empty(device)
    for mode in options.modes.split(","):
        rank = options.rank if mode == "lora" else None
        counts = [options.layers or whole.text.num_hidden_layers]
        if mode == "full":
            most = options.full_layers or fitting(whole, options, device)
            counts = [most, max(1, most // 2)] if most > 1 else [most]
        for layers in counts:
            row: dict[str, Any] = {"mode": mode, "layers": layers}
            try:
                row |= Run(first_layers(whole, layers), options, rank, device).measured(
                    rate, options.warm, options.steps
                )
            except torch.OutOfMemoryError as error:
                row["error"] = str(error).split(". ")[0]
            told["runs"].append(row)
            print(json.dumps(row, indent=1), flush=True)
            keep()
            empty(device)
    told["projected"] = projected(whole, told["runs"], options)
    print(json.dumps(told["projected"], indent=1))
    keep()


def empty(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def first_layers(config: Gemma3Config, layers: int) -> Gemma3Config:
    """The model with its first layers only."""
    kinds = config.text.layer_types[:layers]
    return dataclasses.replace(
        config, text=dataclasses.replace(config.text, num_hidden_layers=len(kinds), layer_types=kinds)
    )


def estimate(config: Gemma3Config, options: argparse.Namespace, rank: int | None) -> TrainingMemory:
    """What a step holds, bytes."""
    return training_memory(
        config, rows=1, tokens=options.tokens, images=pictures(options), dtype="bfloat16", lora_rank=rank,
        recompute=True,
    )  # fmt: skip


def peak(found: TrainingMemory, rank: int | None) -> int:
    """Bytes at the worst moment: in the loss, beside the bf16 copies of all that is trained in fp32, or at
    the end of the backward pass."""
    copies = 0 if rank else found.weights // 2
    loss = found.activations + found.loss + copies
    backward = found.gradients + found.tied + found.activations
    return found.weights + found.moments + max(loss, backward)


def guess(config: Gemma3Config, options: argparse.Namespace, rank: int | None) -> int:
    """Bytes at the worst moment, from what one and two layers take."""
    one, two = (peak(estimate(first_layers(config, n), options, rank), rank) for n in (1, 2))
    return one + (config.text.num_hidden_layers - 1) * (two - one)


def fitting(config: Gemma3Config, options: argparse.Namespace, device: torch.device) -> int:
    """How many layers can be trained whole."""
    room = int(torch.cuda.mem_get_info(device)[0] * SHARE) if device.type == "cuda" else 2**33
    most = config.text.num_hidden_layers
    one, all_of_them = guess(first_layers(config, 1), options, None), guess(config, options, None)
    return max(1, min(most, 1 + int((room - one) * (most - 1) // (all_of_them - one))))


def pictures(options: argparse.Namespace) -> int:
    """In a packed row."""
    return -(-(options.tokens // options.sample_tokens) // 2)


class RandomFeatures(Features):
    """Features of no picture: random numbers, the same for each."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.row = torch.randn(shape).bfloat16()

    def get(self, wanted: Any) -> Tensor:
        """[n, mm_tokens, vision_hidden]"""
        views: list[View] = list(wanted)
        return self.row.expand(len(views), -1, -1)


def made_up(config: Gemma3Config, options: argparse.Namespace) -> Samples:
    """Samples of one length that fill the rows: every second begins with a picture, the latter half of each
    is supervised."""
    length = options.sample_tokens
    count = options.tokens // length
    assert options.tokens % length == 0 and config.mm_tokens_per_image < length, "choose other lengths"
    random = np.random.default_rng(0)
    top = min(config.text.vocab_size, config.image_token_index, config.boi_token_index)
    tokens = random.integers(3, top, (count, length)).astype(np.int32)
    tokens[::2, : config.mm_tokens_per_image] = config.image_token_index
    seen = np.arange(count) % 2 == 0
    return Samples(
        ids=np.arange(count).astype(str),
        tasks=np.full(count, "none"),
        tokens=tokens.reshape(-1),
        learn=np.tile(np.arange(length) >= length // 2, count),
        starts=np.arange(count + 1, dtype=np.int64) * length,
        images=np.zeros(int(seen.sum()), np.int32),
        image_starts=np.concatenate([[0], np.cumsum(seen)]).astype(np.int64),
        image_keys=np.asarray(["none"]),
    )


class Run:
    """A model under training, made as `sft.run` makes it, but of random weights."""

    def __init__(
        self, config: Gemma3Config, options: argparse.Namespace, rank: int | None, device: torch.device
    ) -> None:
        began = time.perf_counter()
        self.config, self.rank, self.device = config, rank, device
        self.cfg = Train(
            max_seq_len=options.tokens, micro_rows=1, lora_rank=rank, dtype="bfloat16", recompute=True
        )
        self.model: Gemma3 = sft.unfilled(self.cfg, config).to_empty(device=device)
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.normal_(std=0.02) if weight.ndim > 1 else weight.zero_()
        self.trained = sft.prepare(self.cfg, self.model)
        if options.compile:
            for layer in self.model.language_model.layers:
                layer.compile()
        self.optimizer = sft.make_optimizer(self.cfg, self.trained)
        self.samples = made_up(config, options)
        assert config.vision is not None
        self.features = RandomFeatures((config.mm_tokens_per_image, config.vision.hidden_size))
        self.made = seconds(lambda: None, device) + time.perf_counter() - began
        self.guess = guess(config, options, rank)

    def step(self) -> float:
        """One optimizer step, as in `sft.run`; returns the loss."""
        passes = list(
            micro_batches(
                self.samples,
                [(0, i) for i in range(len(self.samples))],
                max_seq_len=self.cfg.max_seq_len,
                micro_rows=self.cfg.micro_rows,
                pad_id=self.config.pad_token_id,
            )
        )
        valid = sum(len(micro.targets) for micro in passes)
        losses, norm = sft.gradients(
            self.cfg, self.model, self.trained, passes, valid, self.samples, self.features, None, self.device
        )
        loss = float(torch.stack(losses).double().sum())
        assert np.isfinite(loss) and np.isfinite(float(norm)), (loss, float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def measured(self, rate: float, warm: int, steps: int) -> dict[str, Any]:
        """Speed and memory of the steps after the first, and where the time of one more goes."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        losses: list[float] = []
        with sft.deterministic(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels that are not deterministic
            taken = [seconds(lambda: losses.append(self.step()), self.device) for _ in range(warm + steps)]
            most = torch.cuda.max_memory_allocated(self.device) if cuda else 0
            try:
                kernels = spent(self.step, self.device)
            except (RuntimeError, AttributeError) as error:  # what was measured is worth more
                kernels = {"error": str(error)}
        step, tokens = statistics.median(taken[warm:]), len(self.samples.tokens)
        useful, again = self.flops()
        return {
            "tokens/s": tokens / step, "s/step": step, "steps, s": [round(t, 4) for t in taken],
            "TFLOP/s": useful / step / 1e12, "MFU of the measured": useful / step / rate,
            "MFU of the data sheet": useful / step / PEAK,
            "with what is computed again, of the measured": (useful + again) / step / rate,
            "peak memory, GB": most / 1e9,
            "reserved, GB": torch.cuda.max_memory_reserved(self.device) / 1e9 if cuda else 0,
            "estimated, GB": self.guess and self.guess / 1e9,
            "parameters, B": sum(p.numel() for p in self.model.parameters()) / 1e9,
            "trained, M": sum(p.numel() for p in self.trained.values()) / 1e6,
            "making the model, s": self.made, "losses": losses, "time": kernels,
        }  # fmt: skip

    def flops(self) -> tuple[float, float]:
        """(useful, computed again) of a step."""
        text, tokens = self.config.text, len(self.samples.tokens)
        length = int(self.samples.lengths()[0])
        pairs = 0.0  # that a token sees, mean, all layers together
        for kind in text.layer_types:
            seen = length if kind == GLOBAL else min(length, text.sliding_window)
            pairs += seen - seen * (seen - 1) / (2 * length)
        attention = 4 * text.num_attention_heads * text.head_dim * pairs * tokens
        layers = 2 * matrix_weights(self.config) * tokens
        head = 2 * text.vocab_size * text.hidden_size * int(self.samples.learn.sum())
        times = 2 if self.rank else 3
        return times * (layers + head) + 3 * attention, layers + attention


def spent(work: Any, device: torch.device) -> dict[str, Any]:
    """Which attention a step took, and on a GPU seconds by kind of kernel and the longest kernels."""
    if device.type != "cuda":
        return {"attention": attention_used(work)}
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as seen:
        work()
        torch.cuda.synchronize(device)
    name = "aten::_scaled_dot_product_"
    used, kernels = {}, {}
    for event in seen.key_averages():
        if event.key.startswith(name):
            used[event.key.removeprefix(name)] = event.count
        elif event.device_type == torch.autograd.DeviceType.CUDA and not event.key.startswith("Optimizer."):
            kernels[event.key] = event.self_device_time_total / 1e6
    words = {
        "attention": ("fmha", "flash", "sdpa", "attention"),
        "matrix": ("gemm", "nvjet", "cutlass", "xmma"),
    }
    groups = {"attention, s": 0.0, "matrix, s": 0.0, "else, s": 0.0}
    for kernel, time_taken in kernels.items():
        kind = next((k for k, some in words.items() if any(w in kernel.lower() for w in some)), "else")
        groups[f"{kind}, s"] += time_taken
    longest = sorted(kernels.items(), key=lambda pair: -pair[1])[:14]
    return {"attention": used, **groups, "longest": {k[:120]: round(v, 5) for k, v in longest}}


def attention_times(config: Gemma3Config, tokens: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds forward and backward of a layer's attention with a mask of packed samples, as the model
    calls it and with keys and values repeated for every head; and causal, without a mask."""
    text = config.text
    heads, few = text.num_attention_heads, text.num_key_value_heads
    q, k, v = (
        torch.randn(1, n, tokens, text.head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, few, few)
    )
    segment = torch.arange(tokens, device=device) // 512
    mask = (segment[:, None] == segment) & torch.ones_like(segment[:, None] == segment).tril()

    def grouped(**how: Any) -> None:
        F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != few, **how).sum().backward()

    def repeated() -> None:
        both = (x.repeat_interleave(heads // few, 1) for x in (k, v))
        F.scaled_dot_product_attention(q, *both, attn_mask=mask).sum().backward()

    ways: dict[str, Any] = {
        "masked": lambda: grouped(attn_mask=mask),
        "masked, repeated": repeated,
        "causal": lambda: grouped(is_causal=True),
    }
    found = {}
    for name, work in ways.items():
        try:
            taken = [seconds(work, device) for _ in range(4)]
            found[name] = {"ms": 1e3 * min(taken[1:]), "by": attention_used(work)}
        except torch.OutOfMemoryError:
            found[name] = {"error": "out of memory"}
    return found


def projected(whole: Gemma3Config, runs: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Hours and kWh of the whole run."""
    tokens, found = options.samples * options.sample_tokens, dict[str, Any]()
    layers = whole.text.num_hidden_layers
    for mode in ("lora", "full"):
        steps = {run["layers"]: run["s/step"] for run in runs if run["mode"] == mode and "s/step" in run}
        if not steps:
            continue
        most, least = max(steps), min(steps)
        if most == layers:
            step = steps[most]
        elif len(steps) > 1:
            step = steps[most] + (layers - most) * (steps[most] - steps[least]) / (most - least)
        else:
            continue
        hours = tokens / (options.tokens / step * options.cards) / 3600
        kwh, kg = footprint(hours, options.watts * options.cards, grid("singapore").kg_per_kwh)
        found[mode] = {
            "s/step": step, "tokens/s of a card": options.tokens / step, "hours": hours, "kWh": kwh,
            "kg CO2e, Singapore": kg, "extrapolated from layers": most if most != layers else None,
        }  # fmt: skip
    said = f"{options.samples} samples of {options.sample_tokens} tokens on {options.cards} cards"
    return {"of": f"{said}, {options.watts:g} W each assumed, once through", **found}


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        main()
