"""A smaller output head.

After layers of a few hundred columns, Gemma 3's head of 262,144 rows is most of what a step reads. Here it
takes 5.7 bits a weight instead of 8.5. Its input is far from round: of the 640 directions of the 270M's, the
first 32 hold 98 % of the squared length. So the columns are turned (in floats, once a token) to the
eigenvectors of the input's second moment; the first tenth of them is kept in 8 bits, three tenths in 5, the
others in 4: transform coding (Huang and Schultheiss, 1963). What int8 leaves over of the input's first
columns is multiplied as well.

The moment is that of text: a few words that are given, and how the model goes on.

Shapes: V rows (a multiple of 16), C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from seavlm.engine.engine import Engine
from seavlm.engine.quantize import EIGHT, FIVE, FOUR, Packed, pack, round_int8, round_range
from seavlm.engine.sampler import Sampling
from seavlm.engine.sequence import Prompt

if TYPE_CHECKING:
    from seavlm.engine.int8 import Int8Runner
    from seavlm.text.tokenizer import Tokenizer

NEW_TOKENS = 64  # that the model adds to each text
AT_ONCE = 16_384  # rows


def moment(
    runner: Int8Runner, tokenizer: Tokenizer, texts: Sequence[str], progress: Callable[[str], None]
) -> np.ndarray:
    """Mean of x x^T over the head's inputs x while the model reads the texts and goes on, float64 [C, C]."""
    total, seen = np.zeros((runner.config.text.hidden_size,) * 2), 0

    def observe(x: np.ndarray) -> None:
        nonlocal total, seen
        total, seen = total + x.T.astype(np.float64) @ x, seen + len(x)
        progress(f"{seen:,} tokens of what it writes itself")

    engine = Engine(runner, tokenizer, prefix_cache=False)
    runner.observe = observe
    try:
        for seed, text in enumerate(texts):
            ids = [tokenizer.bos_id, *tokenizer.encode(text)][: engine.context - NEW_TOKENS]
            sampling = Sampling(top_k=64, seed=seed)
            engine.add(Prompt(ids), sampling, max_new_tokens=NEW_TOKENS, stop_ids=())
        while not engine.idle:
            for sequence in engine.step():
                if sequence.error is not None:
                    raise sequence.error
    finally:
        runner.observe = None
    return total / seen


def pack_head(embedding: Packed, moment: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of this embedding's head: "head.rotation", float16 [C / 16, C, 16], and parts "head.0",
    "head.1"..: of the columns of embedding @ rotation the first ones, the next ones, and so on."""
    width = embedding.k
    rotation = np.ascontiguousarray(np.linalg.eigh(moment)[1][:, ::-1], np.float16)
    yield "head.rotation", np.ascontiguousarray(rotation.reshape(width, -1, 16).transpose(1, 0, 2))
    turn = rotation.astype(np.float32)
    ends = (0, *(max(32, round(width * share / 32) * 32) for share in (0.1, 0.4)), width)
    parts_of = [part for part in zip((EIGHT, FIVE, FOUR), ends, ends[1:], strict=False) if part[1] < part[2]]
    for number, (kind, start, end) in enumerate(parts_of):
        parts = (
            round_int8(rows) if kind == EIGHT else round_range(rows, kind)
            for rows in _rows(embedding, turn[:, start:end])
        )
        yield from pack(kind, embedding.n, end - start, parts).tensors(f"head.{number}").items()


def _rows(embedding: Packed, turn: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, embedding.n, AT_ONCE):
        yield embedding.rows(np.arange(start, min(start + AT_ONCE, embedding.n))) @ turn
