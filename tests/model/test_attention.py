"""The mask rule, against a slow and obvious version of it, one pair of tokens at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seavlm.model.attention import PADDING, make_layout, make_mask, visible
from seavlm.model.config import GLOBAL, LOCAL


def obvious(segments: list[int], image: list[bool], window: int | None) -> Tensor:
    """Rule by rule for one row without gaps: same segment; causal, or same run of soft tokens; window."""
    n = len(segments)
    run, runs = 0, []
    for i in range(n):
        run += i > 0 and not (image[i] and image[i - 1] and segments[i] == segments[i - 1])
        runs.append(run)
    seen = torch.zeros(n, n, dtype=torch.bool)
    for q in range(n):
        for k in range(n):
            together = k <= q or (image[q] and runs[q] == runs[k])
            near = window is None or q - k < window
            seen[q, k] = segments[q] == segments[k] and together and near
    return seen


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("seed", range(5))
def test_rule(window: int | None, seed: int) -> None:
    """Random packed rows with random runs of soft tokens, some longer than the window, some touching."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (5,), generator=generator)
    segments = torch.repeat_interleave(torch.arange(5), lengths)
    image = torch.randint(0, 3, (len(segments),), generator=generator) > 0
    layout = make_layout(segments[None], segment_ids=segments[None], is_image=image[None])
    assert layout.positions[0].tolist() == [i for n in lengths.tolist() for i in range(n)]
    seen = visible(layout, layout.positions, layout.segments, window)[0]
    assert torch.equal(seen, obvious(segments.tolist(), image.tolist(), window))


def test_window_counts_the_query_itself() -> None:
    layout = make_layout(torch.zeros(1, 9, dtype=torch.int64))
    assert visible(layout, layout.positions, layout.segments, 4)[0].sum(1).tolist() == [
        1,
        2,
        3,
        4,
        4,
        4,
        4,
        4,
        4,
    ]


def test_two_pictures_and_text_between() -> None:
    """Block longer than the window: the future of the own block is open, its far past is not."""
    image = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1, 0]]).bool()
    layout = make_layout(image.long(), is_image=image)
    assert layout.reach.tolist() == [[0, 4, 4, 4, 4, 5, 7, 7, 8]]
    local = visible(layout, layout.positions, layout.segments, 3)[0].int().tolist()
    assert local[1] == [1, 1, 1, 1, 1, 0, 0, 0, 0]  # first soft token: all of its block
    assert local[4] == [0, 0, 1, 1, 1, 0, 0, 0, 0]  # last soft token: the window cuts its block
    assert local[5] == [0, 0, 0, 1, 1, 1, 0, 0, 0]  # the end token is causal
    assert local[6] == [0, 0, 0, 0, 1, 1, 1, 1, 0]  # second picture: not the future text


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    """Positions count real tokens; nobody real sees padding, and padding sees itself (no empty softmax)."""
    mask = torch.tensor([[0, 0, 1, 1, 1]] if side == "left" else [[1, 1, 1, 0, 0]])
    layout = make_layout(mask, attention_mask=mask)
    real = mask[0].bool()
    assert layout.positions[0, real].tolist() == [0, 1, 2]
    assert (layout.segments[0, ~real] == PADDING).all()
    for window in (None, 2):
        seen = visible(layout, layout.positions, layout.segments, window)[0]
        assert not seen[real][:, ~real].any() and not seen[~real][:, real].any()
        assert seen.diagonal().all()


def test_touching_pictures_of_two_samples_stay_apart() -> None:
    image = torch.ones(1, 6, dtype=torch.bool)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]])
    layout = make_layout(segments, segment_ids=segments, is_image=image)
    assert layout.reach.tolist() == [[2, 2, 2, 2, 2, 2]]
    seen = visible(layout, layout.positions, layout.segments, None)[0]
    assert torch.equal(seen, segments[0][:, None] == segments[0][None])


@pytest.mark.parametrize(("tokens", "kind", "window"), [(9, GLOBAL, None), (5, LOCAL, 5), (4, LOCAL, 5)])
def test_cheap_form_says_the_same(tokens: int, kind: str, window: int | None) -> None:
    """Where the mask is left to is_causal, the rule is plain causality."""
    layout = make_layout(torch.zeros(1, tokens, dtype=torch.int64))
    assert make_mask(layout, kind, window, None).causal
    seen = visible(layout, layout.positions, layout.segments, window)[0]
    assert torch.equal(seen, torch.ones(tokens, tokens).tril().bool())


def test_cheap_form_only_where_it_holds() -> None:
    ids = torch.zeros(1, 6, dtype=torch.int64)
    ones = torch.ones_like(ids)
    assert make_mask(make_layout(ids), LOCAL, 5, None).bias is not None  # longer than the window
    for extra in (
        {"attention_mask": ones},
        {"segment_ids": ids},
        {"is_image": ids.bool()},
        {"position_ids": ids},
    ):
        assert make_mask(make_layout(ids, **extra), GLOBAL, None, None).bias is not None
