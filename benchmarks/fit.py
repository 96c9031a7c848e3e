"""What `seavlm fit` says against what a process then takes.

    python benchmarks/fit.py --model gemma3-270m.gguf --quantised out/small --out benchmarks/fit.json

Each case runs in a process of its own, which loads the model and answers the requests; its peak is the
system's (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from seavlm.engine.bench import declaration, machine
from seavlm.engine.sampler import Sampling
from seavlm.engine.sequence import Prompt
from seavlm.engine.vlm import load
from seavlm.fit import fit, resident
from seavlm.weights.refs import resolve

NEW_TOKENS = 64


def run(case: dict[str, Any]) -> int:
    """The peak of this process after the requests of a case, in bytes."""
    options = {key: case[key] for key in ("quantize", "dtype") if case.get(key)}
    vlm = load(case["model"], **options)
    ids = [token for text in declaration().values() for token in vlm.tokenizer.encode(text)]
    ids *= 1 + (case["context"] + case["batch"] * 61) // len(ids)
    for i in range(case["batch"]):
        if case["images"]:
            import numpy as np
            from PIL import Image

            noise = np.random.default_rng(i).integers(0, 256, (case["images"], 90, 120, 3), dtype=np.uint8)
            parts = [{"type": "image", "image": Image.fromarray(picture)} for picture in noise]
            prompt = vlm.prompt([{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}])
            room = case["context"] - len(prompt.ids) - NEW_TOKENS
            prompt = Prompt([*prompt.ids, *ids[i * 61 : i * 61 + max(0, room)]], prompt.pictures)
        else:
            prompt = Prompt([vlm.tokenizer.bos_id, *ids[i * 61 : i * 61 + case["context"] - NEW_TOKENS - 1]])
        greedy = Sampling(temperature=0)
        vlm.engine.add(prompt, greedy, max_new_tokens=NEW_TOKENS, stop_ids=())
    while not vlm.engine.idle:
        for sequence in vlm.engine.step():
            if sequence.error is not None:
                raise sequence.error
    return resident("VmHWM")


def train(case: dict[str, Any]) -> int:
    """The peak of this process after three steps on rows full of text, in bytes."""
    from seavlm.data.samples import write_samples
    from seavlm.recipe import Train
    from seavlm.text.tokenizer import Tokenizer
    from seavlm.train import sft

    base = resolve(case["model"])
    tokenizer = Tokenizer.from_gguf(base) if base.suffix == ".gguf" else Tokenizer.from_dir(base)
    ids = [token for text in declaration().values() for token in tokenizer.encode(text)]
    size, rows = case["context"] - 24, []  # what the turns' own tokens leave
    for i in range(3 * 2 * case["batch"]):
        start = i * 61 % (len(ids) - size)
        words = {"user": "?", "assistant": tokenizer.decode(ids[start : start + size])}
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}]} for role, text in words.items()
        ]
        row = {
            "id": str(i),
            "task": "chat",
            "language": "en",
            "messages": messages,
            "images": [],
            "meta": "{}",
        }
        rows.append(row)
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "train.parquet", Path(folder) / "out"
        write_samples(data, rows)
        batch = case["batch"]
        settings = {"steps": 3, "batch_size": 2 * batch, "micro_rows": batch, "max_seq_len": case["context"]}
        rank = 16 if case["train"] == "lora" else None
        cfg = Train(**settings, dtype=case["dtype"], lora_rank=rank)
        sft.run(cfg, base=base, data=data, out=out, seed=0, progress=False)
    return resident("VmHWM")


def cases(model: str, quantised: str) -> list[dict[str, Any]]:
    sizes = [(512, 1), (4096, 1), (1024, 8), (16384, 1)]
    found = [{"model": quantised, "context": c, "batch": b, "images": 0} for c, b in sizes]
    for how in ({"quantize": "int8"}, {"quantize": "stored"}, {"dtype": "float32"}, {"dtype": "bfloat16"}):
        found += [{"model": model, "context": c, "batch": b, "images": 0, **how} for c, b in sizes[:3]]
    for how in ({"quantize": "int8"}, {"dtype": "float32"}):
        found += [{"model": "nano", "context": 512, "batch": b, "images": 2, **how} for b in (1, 8)]
    for dtype in ("float32", "bfloat16"):
        for train_how in ("full", "lora"):
            given = {"context": 256, "batch": 8, "images": 0, "dtype": dtype, "train": train_how}
            found.append({"model": model, **given})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gemma3-270m", help="plain weights")
    parser.add_argument("--quantised", help="what `seavlm quantize` made of them")
    parser.add_argument("--out", type=Path, default=Path("fit.json"))
    parser.add_argument("--only", default="", help="cases that hold this text, as JSON")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case = json.loads(options.case)
        print(train(case) if "train" in case else run(case))
        return
    rows = []
    for case in cases(options.model, options.quantised):
        if options.only not in json.dumps(case):
            continue
        given = {key: value for key, value in case.items() if key != "model"}
        said = fit(resolve(case["model"]), **given)
        command = [sys.executable, __file__, "--case", json.dumps(case)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peak = int(done.stdout.split()[-1])
        rows.append(case | {"model": Path(case["model"]).name, "said": said.peak, "measured": peak})
        how = case.get("quantize") or case.get("dtype") or "quantised"
        how += f", {case['train']}" if "train" in case else ""
        print(
            f"{rows[-1]['model']:32} {how:14} context {case['context']:6} batch {case['batch']} "
            f"images {case['images']}: {said.peak / 1e6:6,.0f} MB said, {peak / 1e6:6,.0f} measured, "
            f"{said.peak / peak:.3f}  {json.dumps({k: round(v / 1e6) for k, v in said.parts.items()})} "
            f"loading {said.loading / 1e6:,.0f}",
            flush=True,
        )
        options.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
