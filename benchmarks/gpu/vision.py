"""The vision tower and projector (SigLIP-so400m, 896 x 896 pixels, 256 tokens a picture) on a GPU, beside
transformers' and beside what the arithmetic allows; and what a picture costs that the engine remembers.
Weights are random.

    python benchmarks/gpu/vision.py --out benchmarks/gpu/vision.json
    python benchmarks/gpu/vision.py --size toy --device cpu --dtype float32 --batches 1,2  # to try it

A tower's time is the median of a few passes after the first, pixels on the device already; "from numpy" is
the runner's `encode`, pixels copied there. A remembered picture is one that an engine of two decoder layers
was sent before: its first token again, everything but the tower's output computed anew.

Shapes: N pictures, S pixels a side, P patches, V tower width, M soft tokens a picture, C decoder width.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed import attention_used, device_name, matrix_rate, seconds
from torch import Tensor, nn

from seavlm.engine.bench import machine
from seavlm.engine.engine import Engine
from seavlm.engine.sampler import Sampling
from seavlm.engine.sequence import Picture, Prompt
from seavlm.engine.torch_runner import TorchRunner
from seavlm.model.config import Gemma3Config
from seavlm.model.gemma3 import Gemma3
from seavlm.parity import small_config

REPEATS = 4


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--size", default="4b", help="4b, 12b or 27b: of the decoder's width; or toy")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", default="1,2,4,8,16,32")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--out", type=Path, default=Path("vision.json"))
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    config = geometry(options.size)
    assert config.vision is not None
    size, flops = config.vision.image_size, picture_flops(config)
    limit = matrix_rate(device, dtype)
    print({"TFLOP/picture": flops / 1e12, "matrix, TFLOP/s": limit / 1e12}, flush=True)
    rows: list[dict[str, Any]] = []
    told = {
        "machine": machine() | {"device": device_name(device)}, "size": options.size, "dtype": options.dtype,
        "pixels": size, "TFLOP/picture": flops / 1e12, "matrix, TFLOP/s": limit / 1e12, "rows": rows,
    }  # fmt: skip
    engines = {"seavlm": Ours} if options.no_peer else {"seavlm": Ours, "transformers": Transformers}
    for name, kind in engines.items():
        made: Any = kind(config, device, dtype)
        for batch in map(int, options.batches.split(",")):
            row: dict[str, Any] = {"engine": name, "batch": batch}
            try:
                row |= speed(made, batch, config, device, dtype, limit)
            except torch.OutOfMemoryError:
                row["error"] = "out of memory"
            rows.append(row)
            print(json.dumps(row), flush=True)
        with torch.inference_mode():
            one = torch.randn(1, 3, size, size, device=device).to(dtype)
            told[f"attention, {name}"] = attention_used(lambda made=made, one=one: made(one))
        if name == "seavlm":
            told["engine"] = remembered(made.runner, config)
            print(json.dumps(told["engine"]), flush=True)
        del made
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print({key: value for key, value in told.items() if key.startswith("attention")})
    options.out.write_text(json.dumps(told, indent=1) + "\n")


@torch.inference_mode()
def speed(
    made: Any, batch: int, config: Gemma3Config, device: torch.device, dtype: torch.dtype, limit: float
) -> dict[str, float]:
    """Of one engine with `batch` pictures at once."""
    assert config.vision is not None
    size, flops = config.vision.image_size, picture_flops(config)
    pixels = torch.randn(batch, 3, size, size, device=device).to(dtype)
    taken = [seconds(lambda: made(pixels), device) for _ in range(REPEATS + 1)]
    rate = batch / statistics.median(taken[1:])
    row = {"pictures/s": rate, "TFLOP/s": rate * flops / 1e12, "of the arithmetic's": rate * flops / limit}
    if isinstance(made, Ours):
        views = list(pixels.float().cpu().numpy())
        taken = [seconds(lambda: made.runner.encode(views), device) for _ in range(3)]
        row["from numpy, pictures/s"] = batch / min(taken[1:])
    return row


def geometry(size: str) -> Gemma3Config:
    """The tower and projector of one of Google's sizes, with two layers of its decoder."""
    config = small_config() if size == "toy" else Gemma3Config.named(size)
    text = config.text
    text = dataclasses.replace(text, num_hidden_layers=2, layer_types=text.layer_types[:2])
    return dataclasses.replace(config, text=text)


def picture_flops(config: Gemma3Config) -> float:
    """Multiplications and additions of a picture: patches, layers, projector."""
    v = config.vision
    assert v is not None
    p, width = v.num_patches, v.hidden_size
    layer = 2 * p * (4 * width**2 + 2 * width * v.intermediate_size) + 4 * p**2 * width
    patches = 2 * p * 3 * v.patch_size**2 * width
    projector = 2 * config.mm_tokens_per_image * width * config.text.hidden_size
    return v.num_hidden_layers * layer + patches + projector


class Ours:
    """`Gemma3`'s tower and projector."""

    def __init__(self, config: Gemma3Config, device: torch.device, dtype: torch.dtype) -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            self.runner = TorchRunner(Gemma3(config, device=device))
        finally:
            torch.set_default_dtype(before)

    def __call__(self, pixels: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, M, C]"""
        return self.runner.model.encode_images(pixels)


class Transformers(nn.Module):
    """Its tower and projector, with its own choice of attention."""

    def __init__(self, config: Gemma3Config, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        from transformers import Gemma3Config as TheirConfig
        from transformers import SiglipVisionModel
        from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

        theirs = TheirConfig(**config.to_dict())
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                self.tower = SiglipVisionModel(theirs.vision_config)
                self.projector = Gemma3MultiModalProjector(theirs)
        finally:
            torch.set_default_dtype(before)
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, M, C]"""
        return self.projector(self.tower(pixel_values=pixels).last_hidden_state)


def remembered(runner: TorchRunner, config: Gemma3Config) -> dict[str, float]:
    """Median seconds to the first token of a prompt with one picture, new to the engine and known to it."""
    assert config.vision is not None
    size, random = config.vision.image_size, np.random.default_rng(0)
    engine = Engine(runner, max_sequences=1, cache_tokens=4096, prefix_cache=False)
    ids = [3, *[config.image_token_index] * config.mm_tokens_per_image, *range(4, 20)]
    taken: dict[str, list[float]] = {"new": [], "known": [], "no picture": []}
    for _ in range(REPEATS + 1):  # the first one warms up
        pixels = random.standard_normal((3, size, size)).astype(np.float32)
        picture = Picture(pixels, hashlib.sha256(pixels.tobytes()).digest())
        text = [5 if i == config.image_token_index else i for i in ids]
        prompts = {
            "new": Prompt(ids, (picture,)),
            "known": Prompt(ids, (picture,)),
            "no picture": Prompt(text),
        }
        for name, prompt in prompts.items():
            began = time.perf_counter()
            sequence = engine.add(prompt, Sampling(temperature=0), max_new_tokens=1, stop_ids=())
            while not sequence.finished:
                engine.step()
            if sequence.error is not None:
                raise sequence.error.__cause__ or sequence.error
            taken[name].append(time.perf_counter() - began)
    return {f"first token, {name}, s": statistics.median(each[1:]) for name, each in taken.items()}


if __name__ == "__main__":
    main()
