"""Weights of a PyTorch model in 8 or 4 bits, for a GPU: torchao's kernels, activations as they are.

A decode step on a GPU takes as long as reading the weights: half or a quarter of the bytes is what it gains.
Only the matrices of the decoder's layers are rounded; embedding, head and tower stay.
"""

from __future__ import annotations

import warnings

from seavlm.errors import SeavlmError
from seavlm.model.gemma3 import Gemma3

GROUP = 32  # weights that share a scale in 4 bits


def round_weights(model: Gemma3, kind: str) -> None:
    """In place. kind: "int8", a scale for each row; "int4", a scale and a zero for each GROUP of a row.

    4 bits are chosen by HQQ (Badri & Shaji 2023), and are for bfloat16 on CUDA. SeavlmError where torchao is
    missing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise SeavlmError(
            f"{kind} on a GPU needs torchao ({error})", hint="Install it: pip install 'seavlm[gpu]'"
        ) from None
    if kind == "int8":
        config = Int8WeightOnlyConfig()
    else:
        config = Int4WeightOnlyConfig(
            group_size=GROUP,
            int4_packing_format="tile_packed_to_4d",
            int4_choose_qparams_algorithm="hqq",
        )
    quantize_(model.language_model.layers, config)
