"""What replies held to a form cost on a GPU: masks made while it computes and applied there, beside masks
made and applied afterwards.

    python benchmarks/gpu/masks.py --tokenizer FOLDER_OF_GEMMA_3 --out benchmarks/gpu/masks.json
    TRITON_INTERPRET=1 python benchmarks/gpu/masks.py --tokenizer ... --size 270m --layers 1 --device cpu \\
        --dtype float32 --batch 2 --tokens 4     # to try it

Weights are random, and so are the replies, within their form. Ways take turns; figures are medians of steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seavlm.engine.bench import machine
from seavlm.engine.engine import Engine
from seavlm.engine.grammar import Constraint, Grammars
from seavlm.engine.sampler import Sampling
from seavlm.engine.sequence import Prompt
from seavlm.text.tokenizer import Tokenizer

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from speed import Ours, geometry
from structured import forms

WARM = 8


class Plain:
    """A mask without bits for the GPU."""

    def __init__(self, form: Constraint) -> None:
        self._form = form.copy()

    def __call__(self, ids: Sequence[int]) -> np.ndarray:
        return self._form(ids)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--size", default="4b", help="270m, 1b, 4b, 12b or 27b")
    parser.add_argument("--layers", type=int, help="fewer than the size has")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", default="1,16,64", help="sequences at once")
    parser.add_argument("--tokens", type=int, default=72)
    parser.add_argument("--out", type=Path, default=Path("masks.json"))
    options = parser.parse_args()
    device = torch.device(options.device)
    tokenizer = Tokenizer.from_dir(options.tokenizer)
    config = geometry(options.size, options.layers)
    kinds = forms(Grammars(tokenizer, config.eos_token_ids))
    ours = Ours(config, device, getattr(torch, options.dtype), None)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rows: list[dict[str, Any]] = []
    told = {"machine": machine() | {"device": name}, "size": options.size, "rows": rows}
    for batch in map(int, options.batch.split(",")):
        cache = batch * (options.tokens + 128)
        engine = Engine(ours.runner, tokenizer, max_sequences=batch, cache_tokens=cache, prefix_cache=False)
        ways: dict[str, dict[str, list[float]]] = {kind: {"ours": [], "afterwards": []} for kind in kinds}
        for _ in range(2):
            for kind, form in kinds.items():
                for way in ("afterwards", "ours"):
                    prompt = Prompt([2, *tokenizer.encode("Animals:")])
                    asked = [
                        engine.add(
                            prompt,
                            Sampling(seed=number),
                            max_new_tokens=options.tokens,
                            stop_ids=(),
                            mask=None if form is None else (form.copy() if way == "ours" else Plain(form)),
                        )
                        for number in range(batch)
                    ]
                    steps: list[float] = []
                    while not any(sequence.finished for sequence in asked):
                        began = time.perf_counter()
                        engine.step()
                        steps.append(time.perf_counter() - began)
                    ways[kind][way] += steps[WARM:]
                    for sequence in asked:
                        if sequence.error is not None:
                            raise sequence.error
                        engine.cancel(sequence)
        for kind, found in ways.items():
            ours_ms, after = (statistics.median(found[way]) * 1e3 for way in ("ours", "afterwards"))
            rows.append(
                {
                    "form": kind,
                    "batch": batch,
                    "ms a step": round(ours_ms, 2),
                    "masks afterwards": round(after, 2),
                    "times as fast": round(after / ours_ms, 2),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            options.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
