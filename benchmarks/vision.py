"""Gemma's vision tower (SigLIP-so400m, 896 x 896 pixels, 256 tokens) in our int8 and in PyTorch's float32.

    python benchmarks/vision.py --pictures 3 --out benchmarks/vision.json

No registry has the tower's weights, so they are random; a hundredth of the channels of the norms is --outlier
times the others. Seconds a picture, and how far the soft tokens are from float32's: |a - b| / |b|.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from seavlm.engine.bench import machine
from seavlm.engine.vision import Int8Vision
from seavlm.model.config import Gemma3Config
from seavlm.model.vision import Projector, VisionTower


class Eyes(nn.Module):
    """Tower and projector of the 4B model, random."""

    def __init__(self, layers: int, outlier: float) -> None:
        super().__init__()
        config = Gemma3Config.named("4b")
        assert config.vision is not None
        vision = dataclasses.replace(config.vision, num_hidden_layers=layers)
        self.config = dataclasses.replace(config, vision=vision)
        torch.manual_seed(0)
        self.vision_tower = VisionTower(vision)
        self.multi_modal_projector = Projector(self.config, vision)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name.endswith("norm1.weight") or name.endswith("norm2.weight"):
                    p.mul_(torch.where(torch.rand_like(p) < 0.01, outlier, 1.0))
                elif name.endswith("bias"):
                    p.normal_(std=0.1)

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [3, S, S] -> [M, C]"""
        features = self.vision_tower(torch.from_numpy(pixels)[None])
        return self.multi_modal_projector(self.multi_modal_projector.pool(features))[0].numpy()


def a_picture(seed: int, size: int) -> np.ndarray:
    """Smooth colours with noise on them, float32 [3, S, S] in [-1, 1]."""
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.uniform(-1, 1, (1, 3, 7, 7)).astype(np.float32))
    smooth = nn.functional.interpolate(coarse, size=size, mode="bicubic")[0].numpy()
    return np.clip(smooth + random.normal(0, 0.1, smooth.shape), -1, 1).astype(np.float32)


def timed(encode: Any, pictures: list[np.ndarray]) -> tuple[list[float], list[np.ndarray]]:
    seconds, found = [], []
    for picture in pictures:
        began = time.perf_counter()
        found.append(encode(picture))
        seconds.append(time.perf_counter() - began)
    return seconds, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=3)
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--outlier", type=float, default=5)
    parser.add_argument("--out", type=Path, default=Path("vision.json"))
    args = parser.parse_args()
    eyes: Any = Eyes(args.layers, args.outlier)
    size = eyes.config.vision.image_size
    pictures = [a_picture(seed, size) for seed in range(args.pictures)]
    theirs, wanted = timed(eyes.encode, pictures)
    ours, found = timed(Int8Vision(eyes).encode, pictures)
    errors = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, wanted, strict=True)]
    told = {
        "machine": machine(),
        "layers": args.layers,
        "outlier": args.outlier,
        "torch float32, s": theirs,
        "seavlm int8, s": ours,
        "relative error": errors,
    }
    args.out.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
