"""Packing: every sample once, no bin over its size, little waste, always the same."""

import random

import pytest

from seavlm.data.packing import pack
from seavlm.errors import SeavlmError


@pytest.mark.parametrize("seed", range(5))
def test_every_sample_is_in_one_bin_and_bins_hold(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 200) for _ in range(500)]
    bins = pack(lengths, 256)
    assert sorted(index for one in bins for index in one) == list(range(500))
    assert all(sum(lengths[index] for index in one) <= 256 for one in bins)


def test_little_is_wasted() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(20, 120) for _ in range(2000)]
    bins = pack(lengths, 512)
    assert sum(lengths) / (512 * len(bins)) > 0.99


def test_best_fit_on_a_case_done_by_hand() -> None:
    # 6 alone leaves 4; 5 opens a bin (5 left); 4 goes where least room is left: to the 6; 3 and 2 to the 5.
    assert pack([3, 6, 2, 4, 5], 10) == [[0, 2, 4], [1, 3]]


def test_equal_input_gives_equal_bins() -> None:
    lengths = [7, 7, 7, 3, 3, 3, 1]
    assert pack(lengths, 10) == pack(list(lengths), 10) == [[0, 3], [1, 4], [2, 5], [6]]


def test_nothing_to_pack() -> None:
    assert pack([], 10) == []


@pytest.mark.parametrize("length", [0, -1, 11])
def test_a_sample_that_does_not_fit_is_named(length: int) -> None:
    with pytest.raises(SeavlmError, match=rf"sample 1 has {length} tokens.* 1 to 10"):
        pack([5, length], 10)
