"""transformers: its model and its cache in a plain loop, which is faster than its `generate`."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from measure import main
from transformers import AutoModelForCausalLM


class Transformers:
    def __init__(self, weights: str, option: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(weights, dtype=getattr(torch, option)).eval()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[float]:
        start, times, cache = time.perf_counter(), [], None
        ids = torch.tensor(prompts)
        for _ in range(new_tokens):
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = out.logits[:, -1].argmax(dim=-1, keepdim=True), out.past_key_values
            times.append(time.perf_counter() - start)
        return times

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return self.model(torch.tensor([ids])).logits[0].float().numpy()


if __name__ == "__main__":
    main(Transformers)
