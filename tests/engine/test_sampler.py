"""The sampler draws what the distribution says, and nothing it must not draw."""

from __future__ import annotations

import pytest
import torch

from seavlm.engine.sampler import Sampling, choose, probabilities
from seavlm.errors import SeavlmError


def draw(logits: torch.Tensor, sampling: Sampling, n: int, **options) -> torch.Tensor:
    return choose(logits.expand(n, -1), sampling, sampling.streams(n), **options)


def test_frequencies_follow_the_probabilities() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = draw(p.log()[None], Sampling(1.0, 0, 1.0, seed=0), 8000)
    frequencies = torch.bincount(drawn, minlength=4) / 8000
    # four standard errors of a share of 8000 draws
    assert torch.allclose(frequencies, p, atol=4 * (0.25 / 8000) ** 0.5)


def test_temperature_top_k_and_top_p_keep_what_transformers_keeps() -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits = torch.randn(20, 300) * 3
    for temperature, top_k, top_p in [(1.0, 64, 0.95), (0.3, 10, 0.5), (2.0, 300, 0.9), (1.0, 3, 0.01)]:
        theirs = logits
        for warper in (
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(top_k),
            TopPLogitsWarper(top_p),
        ):
            theirs = warper(None, theirs)
        p, ids = probabilities(logits, Sampling(temperature, top_k, top_p))
        ours = torch.zeros_like(logits).scatter(-1, ids, p)
        assert torch.allclose(ours, theirs.softmax(-1), atol=1e-6)
        assert torch.equal(ours > 0, theirs.isfinite())


def test_greedy_is_the_largest_and_needs_no_stream() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    assert choose(logits, Sampling(temperature=0)).tolist() == [1, 0]


def test_rows_past_the_tokenizer_and_banned_ids_are_never_drawn() -> None:
    logits = torch.tensor([[0.0, 1.0, 8.0, 9.0, 50.0, 50.0]])
    greedy, sampled = Sampling(temperature=0), Sampling(5.0, 0, 1.0, seed=1)
    assert draw(logits, greedy, 1, limit=4).item() == 3
    assert draw(logits, greedy, 1, limit=4, banned=[3]).item() == 2
    assert set(draw(logits, sampled, 500, limit=4, banned=[3]).tolist()) == {0, 1, 2}
    assert logits[0, 3] == 9.0, "the caller's logits stay as they were"


def test_a_row_draws_the_same_alone_and_in_company() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 50)
    together = choose(logits, Sampling(seed=7), Sampling(seed=7).streams(5))
    for row in range(5):
        assert choose(logits[row : row + 1], Sampling(), Sampling(seed=7 + row).streams(1)) == together[row]


def test_without_a_seed_two_draws_differ() -> None:
    logits = torch.zeros(1, 10_000)
    sampling = Sampling(1.0, 0, 1.0)
    assert draw(logits, sampling, 8).tolist() != draw(logits, sampling, 8).tolist()


def test_numbers_that_are_not_finite_are_reported() -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(SeavlmError, match="not finite"):
            choose(torch.tensor([[0.0, bad, 1.0]]), Sampling(temperature=0))
    # a lower one that is -inf is only impossible, not broken
    assert choose(torch.tensor([[0.0, -torch.inf]]), Sampling(temperature=0)).item() == 0


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"temperature": float("nan")}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    (name, value) = next(iter(wrong.items()))
    with pytest.raises(SeavlmError, match=f"{name} is {value}"):
        Sampling(**wrong)


def test_defaults_come_from_the_generation_config_then_from_gemma() -> None:
    assert Sampling.from_config({}) == Sampling(1.0, 64, 0.95)
    assert Sampling.from_config({"temperature": 0.7, "top_k": None}) == Sampling(0.7, 64, 0.95)
    assert Sampling.from_config({"temperature": 0.7}, temperature=0.0, top_k=3) == Sampling(0.0, 3, 0.95)
    assert Sampling.from_config({"do_sample": False}).greedy
    assert not Sampling.from_config({"do_sample": False}, temperature=1.0).greedy
