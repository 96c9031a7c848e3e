"""llama.cpp, through llama-cpp-python's C interface: a batch is so many sequences in one context."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import llama_cpp as llama
import numpy as np
from measure import main


class LlamaCpp:
    def __init__(self, weights: str, option: str, threads: int) -> None:
        self.threads = threads
        llama.llama_log_set(_quiet, None)
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(weights.encode(), llama.llama_model_default_params())
        self.words = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))

    def context(self, batch: int, length: int) -> Any:
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max = batch * (-(-length // 256) * 256), batch
        params.n_threads = params.n_threads_batch = self.threads
        return llama.llama_init_from_model(self.model, params)

    def decode(self, context: Any, ids: np.ndarray, position: int, every: bool = False) -> np.ndarray:
        """Logits [B, V] after ids [B, T], which begin at a position; with `every`, [B * T, V]."""
        rows, columns = ids.shape
        chunk = max(1, 2048 // rows)
        found = []
        for first in range(0, columns, chunk):
            part = ids[:, first : first + chunk]
            batch = llama.llama_batch_init(part.size, 0, 1)
            for i, ((row, column), token) in enumerate(np.ndenumerate(part)):
                batch.token[i], batch.pos[i] = int(token), position + first + column
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
                batch.logits[i] = every or first + column == columns - 1
            batch.n_tokens = part.size
            if llama.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            for i in range(part.size):
                if batch.logits[i]:
                    pointer = llama.llama_get_logits_ith(context, i)
                    found.append(np.ctypeslib.as_array(pointer, (self.words,)))
            llama.llama_batch_free(batch)
        return np.stack(found)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[float]:
        ids = np.array(prompts)
        context = self.context(len(ids), ids.shape[1] + new_tokens)
        start, times, position = time.perf_counter(), [], 0
        for _ in range(new_tokens):
            logits = self.decode(context, ids, position)
            position += ids.shape[1]
            ids = logits.argmax(axis=1)[:, None]
            times.append(time.perf_counter() - start)
        llama.llama_free(context)
        return times

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        context = self.context(1, len(ids))
        logits = self.decode(context, np.array([ids]), 0, every=True)
        llama.llama_free(context)
        return logits


@llama.llama_log_callback
def _quiet(level: int, text: bytes, data: Any) -> None:
    pass


if __name__ == "__main__":
    main(LlamaCpp)
