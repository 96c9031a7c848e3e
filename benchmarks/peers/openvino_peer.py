"""openvino-genai: its continuous batching pipeline, stepped by hand.

It gives no logits, so for those the same model is run with OpenVINO's runtime, which rounds as it does there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino
import openvino_genai
from measure import main


class OpenVINO:
    def __init__(self, weights: str, option: str, threads: int) -> None:
        self.weights, self.properties = weights, {"INFERENCE_NUM_THREADS": threads}
        self._pipeline: Any = None
        self._model: Any = None

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[float]:
        if self._pipeline is None:
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.enable_prefix_caching = False
            scheduler.max_num_batched_tokens = 4096
            self._pipeline = openvino_genai.ContinuousBatchingPipeline(
                self.weights, scheduler, "CPU", self.properties
            )
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        start, times = time.perf_counter(), []
        handles = [  # a request ends when its handle goes
            self._pipeline.add_request(i, openvino.Tensor(np.array([ids], np.int64)), config)
            for i, ids in enumerate(prompts)
        ]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            times.append(time.perf_counter() - start)
        if any(len(handle.read_all()[0].generated_ids) != new_tokens for handle in handles):
            raise RuntimeError("not every step gave a token")
        return times

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        if self._model is None:
            model = f"{self.weights}/openvino_model.xml"
            self._model = openvino.Core().compile_model(model, "CPU", self.properties)
        given = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        wanted = {name for tensor in self._model.inputs for name in tensor.get_names()}
        result = self._model.create_infer_request().infer({k: v for k, v in given.items() if k in wanted})
        return result["logits"][0]


if __name__ == "__main__":
    main(OpenVINO)
