"""How far weights rounded as for a GPU (`seavlm.engine.weight_only`) are from the model, in each language.

    python benchmarks/gpu/quality.py gemma3-270m --out benchmarks/gpu/quality.json

KL divergence from float32 in nats, means over the Universal Declaration in eleven languages. Rounded weights
are turned back and the plain model runs on them, in float32 on the CPU: what rounding costs, nothing else.
Set TRITON_INTERPRET=1 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from seavlm.engine import gpu_kernels as kernels
from seavlm.engine.bench import divergence, machine
from seavlm.engine.vlm import load
from seavlm.engine.weight_only import Matrix


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=Path("quality.json"))
    options = parser.parse_args()
    exact, told = load(options.model, device="cpu", dtype="float32"), {}
    for kind in ("int8", "int4"):
        rounded = load(options.model, device="cpu", dtype="float32")
        with torch.no_grad():
            for part in rounded.model.language_model.layers.modules():
                if isinstance(part, torch.nn.Linear):
                    matrix = Matrix.rounded(part.weight, kind)
                    if matrix.scales is not None:
                        part.weight.copy_(
                            kernels.unpack(matrix.weight, matrix.scales, matrix.zeros, torch.float32)
                        )
        found = divergence(rounded, exact)
        told[kind] = found | {"mean": sum(found.values()) / len(found)}
        print(kind, {key: round(value, 4) for key, value in told[kind].items()}, flush=True)
    options.out.write_text(
        json.dumps({"machine": machine(), "model": options.model, "KL": told}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
