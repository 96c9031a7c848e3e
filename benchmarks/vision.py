"""Gemma's vision tower (SigLIP-so400m, 896 x 896 pixels, 256 tokens): ours, PyTorch's and OpenVINO's.

    python benchmarks/peers/run.py --only openvino --setup-only
    python benchmarks/vision.py --pictures 3 --out benchmarks/vision.json

No registry has the tower's weights, so they are random; a hundredth of the channels of the norms is --outlier
times the others. All have the same weights and pictures and take turns, after a picture that is thrown away.
Seconds a picture, how far the soft tokens are from PyTorch's float32 (|a - b| / |b|), and what other
processes took of the machine meanwhile. Then our speed against that of the fastest which is no further off.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seavlm.engine.bench import machine
from seavlm.engine.vision import Int8Vision
from seavlm.model.config import Gemma3Config
from seavlm.model.vision import Projector, VisionTower

PEER = Path(__file__).parent / "peers" / "openvino_vision_peer.py"
OURS, REFERENCE = "seavlm int8", "torch float32"
Encode = Callable[[np.ndarray], tuple[float, float, np.ndarray]]  # -> seconds, CPU seconds, soft tokens


class Eyes(nn.Module):
    """Tower and projector of the 4B model, random."""

    def __init__(self, layers: int, outlier: float) -> None:
        super().__init__()
        config = Gemma3Config.named("4b")
        assert config.vision is not None
        vision = dataclasses.replace(config.vision, num_hidden_layers=layers)
        self.size = vision.image_size
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

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, M, C]"""
        pooled = self.multi_modal_projector.pool(self.vision_tower(pixels))
        return self.multi_modal_projector(pooled)

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [3, S, S] -> [M, C]"""
        return self(torch.from_numpy(pixels)[None])[0].numpy()


def a_picture(seed: int, size: int) -> np.ndarray:
    """Smooth colours with noise on them, float32 [3, S, S] in [-1, 1]."""
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.uniform(-1, 1, (1, 3, 7, 7)).astype(np.float32))
    smooth = nn.functional.interpolate(coarse, size=size, mode="bicubic")[0].numpy()
    return np.clip(smooth + random.normal(0, 0.1, smooth.shape), -1, 1).astype(np.float32)


def timed(encode: Callable[[np.ndarray], np.ndarray]) -> Encode:
    def run(picture: np.ndarray) -> tuple[float, float, np.ndarray]:
        began, busy = time.perf_counter(), time.process_time()
        found = encode(picture)
        return time.perf_counter() - began, time.process_time() - busy, found

    return run


class OpenVINO:
    """A process in its own environment, which has the tower in several precisions."""

    def __init__(self, eyes: Eyes, peers: Path, folder: Path, threads: int) -> None:
        self.folder = folder
        if not (folder / "done").exists():
            example = torch.zeros(1, 3, eyes.size, eyes.size)
            torch.export.save(torch.export.export(eyes, (example,)), folder / "eyes.pt2")
            np.save(folder / "calibration.npy", a_picture(1000, eyes.size))
            convert: list[Any] = [python_of(peers, "openvino-convert"), PEER, "convert", folder]
            subprocess.run(convert, check=True, stdout=sys.stderr)
            (folder / "eyes.pt2").unlink()
            (folder / "done").touch()
        self.process = subprocess.Popen(
            [python_of(peers, "openvino"), PEER, "serve", folder, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.version, names = self._answer()
        self.engines: dict[str, Encode] = {name: self._encode(name) for name in names}

    def _encode(self, name: str) -> Encode:
        def run(picture: np.ndarray) -> tuple[float, float, np.ndarray]:
            files = [str(self.folder / "picture.npy"), str(self.folder / "result.npy")]
            np.save(files[0], picture)
            assert self.process.stdin is not None
            print(json.dumps([name, *files]), file=self.process.stdin, flush=True)
            seconds, busy = self._answer()
            return seconds, busy, np.load(files[1])

        return run

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("OpenVINO's process ended; what it said is above")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()


def python_of(peers: Path, environment: str) -> Path:
    path = peers / environment / "bin" / "python"
    if not path.exists():
        raise SystemExit(
            f"{path} is not there; make it: python benchmarks/peers/run.py --only openvino --setup-only"
            f" --envs {peers}"
        )
    return path


def busy_seconds() -> float:
    """CPU time of everything on the machine since its start (and steal: another guest of the same host)."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def measure(engines: dict[str, Encode], pictures: list[np.ndarray]) -> dict[str, dict[str, Any]]:
    """The engines in turn on each picture; the first picture is thrown away."""
    rows: dict[str, dict[str, Any]] = {
        name: {"median, s": 0.0, "s": [], "CPU s": [], "relative error": [], "cores taken by others": []}
        for name in engines
    }
    for turn, picture in enumerate(pictures):
        wanted = np.empty(0)
        for name, encode in engines.items():
            began, before = time.perf_counter(), busy_seconds()
            seconds, busy, found = encode(picture)
            others = max(0.0, busy_seconds() - before - busy) / (time.perf_counter() - began)
            if name == REFERENCE:
                wanted = found
            error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
            note = f"{turn}/{len(pictures) - 1} {name}: {seconds:.2f} s, {busy:.2f} of CPU, error {error:.2g}"
            print(f"{note}, others took {others:.2f} cores", file=sys.stderr, flush=True)
            if turn:
                rows[name]["s"].append(seconds)
                rows[name]["CPU s"].append(busy)
                rows[name]["relative error"].append(error)
                rows[name]["cores taken by others"].append(round(others, 2))
    for row in rows.values():
        row["median, s"] = statistics.median(row["s"])
    return rows


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--pictures", type=int, default=3)
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--outlier", type=float, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", type=Path, default=Path("~/.cache/seavlm/peers"), help="the environments")
    kept = "keep OpenVINO's models here, to use them again: making them takes minutes"
    parser.add_argument("--models", type=Path, help=kept)
    parser.add_argument("--out", type=Path, default=Path("vision.json"))
    args = parser.parse_args()
    peers = args.peers.expanduser().resolve()
    for environment in ("openvino", "openvino-convert"):
        python_of(peers, environment)
    torch.set_num_threads(args.threads)
    eyes: Any = Eyes(args.layers, args.outlier).eval()
    pictures = [a_picture(seed, eyes.size) for seed in range(args.pictures + 1)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.models or Path(temporary)) / f"{args.layers}-{args.outlier:g}"
        folder.mkdir(parents=True, exist_ok=True)
        openvino = OpenVINO(eyes, peers, folder, args.threads)
        ours = Int8Vision(copy.deepcopy(eyes), args.threads)
        engines = {REFERENCE: timed(eyes.encode), OURS: timed(ours.encode), **openvino.engines}
        rows = measure(engines, pictures)
        openvino.close()
    errors = {name: statistics.median(row["relative error"]) for name, row in rows.items()}
    medians = {name: row["median, s"] for name, row in rows.items()}
    peer = min(
        (name for name in rows if name != OURS and errors[name] <= errors[OURS]), key=medians.__getitem__
    )
    told = {
        "machine": machine() | {"openvino": openvino.version, "threads": args.threads},
        "layers": args.layers,
        "outlier": args.outlier,
        "engines": rows,
        "best peer of no more error": peer,
        "times as fast": medians[peer] / medians[OURS],
    }
    args.out.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
