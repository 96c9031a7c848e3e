"""Several samples in one row of tokens, so that little of a training step is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from seavlm.errors import SeavlmError


def pack(lengths: Sequence[int], max_len: int) -> list[list[int]]:
    """Indices of `lengths` (tokens of each sample) in bins that hold at most `max_len` tokens.

    Best fit, longest first: each sample goes where it leaves least room. Equal input, equal bins; within a
    bin and between bins the order is the samples' own. SeavlmError when a sample is longer than a bin or
    not positive.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= max_len:
            raise SeavlmError(
                f"sample {index} has {length} tokens, a packed row holds 1 to {max_len}",
                hint="Raise max_seq_len, or leave the sample out.",
            )
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(rooms, (lengths[index], -1))
        if at == len(rooms):
            bins.append([])
            room, bin_index = max_len, len(bins) - 1
        else:
            room, bin_index = rooms.pop(at)
        bins[bin_index].append(index)
        insort(rooms, (room - lengths[index], bin_index))
    return sorted(sorted(one) for one in bins)
