"""OpenVINO on the vision tower that `benchmarks/vision.py` exported with torch.export.

    openvino_vision_peer.py convert FOLDER         in the environment openvino-convert: eyes.pt2 -> three .xml
    openvino_vision_peer.py serve FOLDER THREADS   in the environment openvino: runs them

The server says its version and its engines; then it reads [engine, picture.npy, result.npy] and answers
[seconds, CPU seconds], each a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import openvino

ENGINES = {  # name -> the model, the precision of what is not int8
    "openvino float32": ("float32", "f32"),
    "openvino bfloat16": ("float32", "bf16"),
    "openvino int8 weights": ("weights", "f32"),
    "openvino int8": ("int8", "f32"),
}


def convert(folder: Path) -> None:
    """As it is; weights in int8 (activations are then rounded as they come); both in int8, by SmoothQuant."""
    import nncf
    import torch

    model = openvino.convert_model(torch.export.load(folder / "eyes.pt2"))
    picture = np.load(folder / "calibration.npy")[None]
    model.reshape(list(picture.shape))
    openvino.save_model(model, folder / "float32.xml", compress_to_fp16=False)
    openvino.save_model(nncf.compress_weights(model.clone()), folder / "weights.xml", compress_to_fp16=False)
    transformer = nncf.ModelType.TRANSFORMER
    whole = nncf.quantize(model, nncf.Dataset([picture]), model_type=transformer, subset_size=1)
    openvino.save_model(whole, folder / "int8.xml", compress_to_fp16=False)


def serve(folder: Path, threads: int) -> None:
    core = openvino.Core()
    engines = {
        name: core.compile_model(
            folder / f"{model}.xml",
            "CPU",
            {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision},
        )
        for name, (model, precision) in ENGINES.items()
    }
    print(json.dumps([openvino.__version__.split("-")[0], list(engines)]), flush=True)
    for line in sys.stdin:
        busy = time.process_time()
        name, picture, result = json.loads(line)
        pixels = np.load(picture)[None]
        began = time.perf_counter()
        found = engines[name](pixels)[0][0]
        seconds = time.perf_counter() - began
        np.save(result, found)
        print(json.dumps([seconds, time.process_time() - busy]), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]))
    else:
        serve(Path(sys.argv[2]), int(sys.argv[3]))
