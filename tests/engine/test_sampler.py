"""The sampler draws what the distribution says, and nothing it must not draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from seavlm.engine.sampler import Sampling, adjust, best_first, choose, log_probabilities, probabilities
from seavlm.errors import SeavlmError


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_frequencies_follow_the_probabilities() -> None:
    p = np.array([0.5, 0.3, 0.15, 0.05])
    sampling = Sampling(1.0, 0, 1.0, seed=0)
    stream = sampling.stream()
    drawn = [choose(np.log(p).astype(np.float32), sampling, stream) for _ in range(8000)]
    # four standard errors of a share of 8000 draws
    assert np.allclose(np.bincount(drawn, minlength=4) / 8000, p, atol=4 * (0.25 / 8000) ** 0.5)


@pytest.mark.parametrize(
    "temperature, top_k, top_p, min_p",
    [(1.0, 64, 0.95, 0), (0.3, 10, 0.5, 0), (2.0, 300, 0.9, 0), (1.0, 3, 0.01, 0),
     (1.5, 0, 0.97, 0.05), (1, 0, 1, 0.2)],
)  # fmt: skip
def test_what_is_kept_is_what_transformers_keeps(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits = torch.randn(20, 300) * 3
    theirs = TopPLogitsWarper(top_p)(
        None, TopKLogitsWarper(top_k or 300)(None, TemperatureLogitsWarper(float(temperature))(None, logits))
    )
    theirs = MinPLogitsWarper(min_p)(None, theirs)
    for row, wanted in zip(logits.numpy(), theirs, strict=True):
        p, ids = probabilities(row, Sampling(temperature, top_k, top_p, min_p))
        ours = torch.zeros(300, dtype=torch.float64)
        ours[torch.from_numpy(ids)] = torch.from_numpy(p)
        assert torch.allclose(ours, wanted.softmax(-1).double(), atol=1e-6)
        assert torch.equal(ours > 0, wanted.isfinite())


@pytest.mark.parametrize("size", [1, 63, 100, 300, 5000, 262_144])
@pytest.mark.parametrize("k", [1, 20, 64])
def test_the_best_are_the_best_in_order(size: int, k: int) -> None:
    """Also where many are equal, and where the best stand side by side."""
    random = np.random.default_rng(size + k)
    for x in (
        random.standard_normal(size).astype(np.float32),
        random.integers(0, 9, size).astype(np.float32),
        np.arange(size, dtype=np.float32),
        np.full(size, -np.inf, np.float32),
    ):
        assert best_first(x, k).tolist() == np.argsort(-x, kind="stable")[:k].tolist()


def test_greedy_is_the_largest_and_draws_nothing() -> None:
    sampling = Sampling(temperature=0, seed=1)
    stream = sampling.stream()
    assert choose(floats(0, 2, 1), sampling, stream) == 1
    assert stream.random() == Sampling(seed=1).stream().random()


def test_penalties_are_those_of_transformers_and_openai() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(1)
    logits = torch.randn(1, 50) * 3
    prompt, reply = [3, 3, 7, 60, -1], [7, 9, 9, 9]
    ours = logits[0].numpy().copy()
    adjust(ours, Sampling(repetition_penalty=1.3), prompt, reply)
    seen = torch.tensor([[3, 3, 7, 7, 9, 9, 9]])
    assert np.allclose(ours, RepetitionPenaltyLogitsProcessor(1.3)(seen, logits.clone())[0], atol=1e-6)
    # mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence
    ours = logits[0].numpy().copy()
    adjust(ours, Sampling(presence_penalty=0.5, frequency_penalty=0.25), prompt, reply)
    change = np.zeros(50)
    change[7], change[9] = -0.75, -1.25
    assert np.allclose(ours - logits[0].numpy(), change, atol=1e-6)


def test_bias_and_mask() -> None:
    x = floats(0, 1, 2, 3)
    adjust(x, Sampling(logit_bias={0: 5.0, 3: -math.inf, 99: 1.0}), [], [])
    assert x.tolist() == [5, 1, 2, -math.inf]
    adjust(x, Sampling(), [], [], np.array([False, True, False]))
    assert x.tolist() == [-math.inf, 1, -math.inf, -math.inf]
    most = np.arange(200) != 7
    adjust(y := np.ones(201, np.float32), Sampling(), [], [], most)
    assert np.isneginf(y).nonzero()[0].tolist() == [7, 200]
    x[1] = -math.inf
    with pytest.raises(SeavlmError, match="no token is left to choose from"):
        choose(x, Sampling(), Sampling().stream())


def test_log_probabilities_add_up() -> None:
    x = np.random.default_rng(0).standard_normal(262_144).astype(np.float32) * 10
    found = log_probabilities(x)
    assert np.allclose(found, torch.from_numpy(x).double().log_softmax(-1), atol=1e-5)


def test_without_a_seed_two_streams_differ() -> None:
    assert Sampling().stream().random() != Sampling().stream().random()
    assert Sampling(seed=3).stream().random() == Sampling(seed=3).stream().random()


def test_numbers_that_are_not_finite_are_reported() -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(SeavlmError, match="not finite"):
            choose(floats(0, bad, 1), Sampling(temperature=0), Sampling().stream())
    # a lower one that is -inf is only impossible, not broken
    assert choose(floats(0, -math.inf), Sampling(temperature=0), Sampling().stream()) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"temperature": float("nan")},
        {"min_p": 2}, {"repetition_penalty": 0}, {"presence_penalty": math.inf},
        {"frequency_penalty": math.nan},
        {"logit_bias": {3: math.nan}}, {"stop": [""]}, {"stop": "x"}, {"logprobs": -1}, {"seed": -1},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    (name, value) = next(iter(wrong.items()))
    with pytest.raises(SeavlmError) as told:
        Sampling(**wrong)
    assert f"{name} is {value}" in str(told.value)


def test_defaults_come_from_the_generation_config_then_from_gemma() -> None:
    assert Sampling.from_config({}) == Sampling(1.0, 64, 0.95)
    assert Sampling.from_config({"temperature": 0.7, "top_k": None}) == Sampling(0.7, 64, 0.95)
    assert Sampling.from_config({"temperature": 0.7}, temperature=0.0, top_k=3) == Sampling(0.0, 3, 0.95)
    assert Sampling.from_config({"do_sample": False}).greedy
    assert not Sampling.from_config({"do_sample": False}, temperature=1.0).greedy
    assert Sampling.from_config({"repetition_penalty": 1.1}, min_p=None).repetition_penalty == 1.1
