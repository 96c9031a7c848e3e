"""Gemma 3 270M with its real weights, against transformers on the same dequantised weights."""

from __future__ import annotations

import pytest

from seavlm import parity


@pytest.mark.timeout(1800)  # half a minute on a quiet machine; memory bandwidth decides
def test_270m_says_what_transformers_says(material) -> None:
    """64 greedy tokens in each of five languages, from one left-padded batch."""
    row = parity.real_weights(material.gguf_270m)
    assert row.equal == row.tokens == 5 * 64
    assert row.difference <= parity.TOLERANCE
