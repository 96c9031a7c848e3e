"""seavlm beside its peers."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from measure import main

import seavlm
from seavlm.engine.sampler import Sampling
from seavlm.engine.sequence import Prompt


class Ours:
    def __init__(self, weights: str, option: str, threads: int) -> None:
        if option == "float32":
            import torch

            torch.set_num_threads(threads)
            self.engine = seavlm.load(weights, dtype="float32").engine
        else:  # eight prompts of 128 are read in one step, and begin to write together
            self.engine = seavlm.load(weights, rows=1024).engine

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[float]:
        start, times = time.perf_counter(), list[float]()
        greedy = Sampling(temperature=0)
        sequences = [
            self.engine.add(Prompt(list(ids)), greedy, max_new_tokens=new_tokens, stop_ids=())
            for ids in prompts
        ]
        while len(times) < new_tokens:
            self.engine.step()
            for error in filter(None, (sequence.error for sequence in sequences)):
                raise error
            if min(len(sequence.ids) for sequence in sequences) > len(times):
                times.append(time.perf_counter() - start)
        return times

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        found: list[np.ndarray] = []
        self.engine.add(
            Prompt(list(ids)), max_new_tokens=0, inspect=lambda _, logits: found.append(logits.copy())
        )
        while not self.engine.idle:
            self.engine.step()
        return np.stack(found)


if __name__ == "__main__":
    main(Ours)
