"""seavlm beside its peers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from measure import main

import seavlm


class Ours:
    def __init__(self, weights: str, option: str, threads: int) -> None:
        torch.set_num_threads(threads)
        quantize = None if option == "float32" else option
        self.model: Any = seavlm.load(weights, dtype="float32", quantize=quantize).model

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[float]:
        start, times = time.perf_counter(), []
        ids = torch.tensor(prompts)
        cache = self.model.new_cache(len(ids), ids.shape[1] + new_tokens)
        for _ in range(new_tokens):
            ids = self.model(ids, cache=cache, last_only=True)[:, -1].argmax(dim=-1, keepdim=True)
            times.append(time.perf_counter() - start)
        return times

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return self.model(torch.tensor([ids]))[0].float().numpy()


if __name__ == "__main__":
    main(Ours)
