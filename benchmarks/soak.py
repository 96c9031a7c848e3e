"""Half an hour of random requests with pictures: memory stays flat and no page of the cache is lost.

    python benchmarks/soak.py --minutes 30 --out benchmarks/soak.json

Requests come at random in eleven languages, none to three pictures each (most never seen before), short and
long, greedy and sampled, with stop texts; some are cancelled, some fail. Writes JSON and a plot beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

from seavlm.engine.bench import declaration, machine
from seavlm.engine.sequence import Sequence
from seavlm.engine.vlm import VLM, load
from seavlm.fit import resident
from seavlm.model.config import GLOBAL, LOCAL


def a_request(vlm: VLM, random: np.random.Generator) -> Sequence:
    """One of many kinds."""
    text = random.choice(list(declaration().values()))
    start, size = int(random.integers(0, 1000)), int(random.integers(1, 400))
    parts: list[dict] = []
    for _ in range(int(random.integers(0, 4)) if random.random() < 0.6 else 0):
        seed = int(random.integers(20)) if random.random() < 0.2 else int(random.integers(2**31))
        noise = np.random.default_rng(seed).integers(0, 256, (90, 120, 3), dtype=np.uint8)
        parts.append({"type": "image", "image": Image.fromarray(noise)})
    parts.append({"type": "text", "text": text[start : start + size] or "?"})
    options = {"temperature": float(random.choice([0, 0.7, 1.5])), "seed": int(random.integers(1000))}
    if random.random() < 0.2:
        options["stop"] = ["a", "น"]
    if random.random() < 0.1:
        options["logprobs"] = 3

    def breaks(ids: list[int]) -> np.ndarray:
        raise ValueError("a mask that breaks")

    return vlm.engine.add(
        vlm.prompt([{"role": "user", "content": parts}]),
        vlm.sampling(**options),
        max_new_tokens=int(random.integers(1, 65)),
        mask=breaks if random.random() < 0.02 else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--quantize", default="int8")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-tokens", type=int, help="few: sequences have to give up their pages")
    parser.add_argument("--speculate", help="lookup, or a model")
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    args = parser.parse_args()
    vlm = load(
        args.model,
        quantize=args.quantize or None,
        cache_tokens=args.cache_tokens,
        speculate=args.speculate or False,
    )
    random = np.random.default_rng(args.seed)
    pages, running = vlm.engine.pages, list[Sequence]()
    ends: dict[str, int] = {}
    samples: list[dict[str, float]] = []
    began = last = time.perf_counter()
    tokens = 0
    while (now := time.perf_counter()) - began < 60 * args.minutes or running:
        more = now - began < 60 * args.minutes
        while more and len(running) < 24 and random.random() < 0.5:
            try:
                running.append(a_request(vlm, random))
            except Exception as error:  # too long for the context, say: refused, and nothing is held
                ends[type(error).__name__] = ends.get(type(error).__name__, 0) + 1
        if running and random.random() < 0.02:
            vlm.engine.cancel(running[int(random.integers(len(running)))])
        vlm.engine.step()
        for sequence in [one for one in running if one.finished]:
            running.remove(sequence)
            ends[str(sequence.finish_reason)] = ends.get(str(sequence.finish_reason), 0) + 1
            tokens += len(sequence.ids)
        if now - last > 2:
            last = now
            samples.append({"seconds": now - began, "resident MiB": resident() / 2**20, **_pages(pages)})
    lost = {kind: pages.num[kind] - len(pages.free[kind]) - len(pages.idle[kind]) for kind in (GLOBAL, LOCAL)}
    told = {
        "machine": machine(),
        "model": args.model,
        "quantize": args.quantize,
        "minutes": args.minutes,
        "ends": ends,
        "new tokens": tokens,
        "pages lost": lost,
        "samples": samples,
    }
    args.out.write_text(json.dumps(told, indent=1) + "\n")
    plot(told, args.out.with_suffix(".png"))
    half = [s["resident MiB"] for s in samples[len(samples) // 2 :]]
    print(f"{sum(ends.values())} requests {ends}, {tokens} tokens; pages lost: {lost}")
    print(f"resident in the second half: {min(half):.0f} to {max(half):.0f} MiB")
    if any(lost.values()):
        raise SystemExit("pages were lost")


def _pages(pages) -> dict[str, float]:  # type: ignore[no-untyped-def]
    return {f"{kind} in use": pages.in_use(kind) for kind in (GLOBAL, LOCAL)}


def plot(told: dict, path: Path) -> None:
    """Memory and pages over time."""
    from matplotlib.figure import Figure

    minutes = [sample["seconds"] / 60 for sample in told["samples"]]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(minutes, [sample["resident MiB"] for sample in told["samples"]], color="#264653")
    top.set_ylim(bottom=0)
    top.set_ylabel("resident MiB")
    top.set_title(f"{told['model']} {told['quantize']}: {sum(told['ends'].values()):,} requests", loc="left")
    for kind, color in ((GLOBAL, "#2a9d8f"), (LOCAL, "#e76f51")):
        used = [sample[f"{kind} in use"] for sample in told["samples"]]
        bottom.plot(minutes, used, color=color, label=kind.removesuffix("_attention"), linewidth=0.8)
    bottom.set_ylabel("pages in use")
    bottom.set_xlabel("minutes")
    bottom.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
