"""What computes a step: the protocol between the engine and the model behind it.

The engine hands over a ragged batch: the rows (tokens) of all pieces of a step, one after the other. There
are three runners: `torch_runner.py` (the plain model, any device), `int8.py` (our kernels, CPU) and `gpu.py`.

Shapes: R rows, S sequences of the step (slots), M soft tokens a picture, C width, V vocabulary rows.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from seavlm.engine.pages import BLOCK
from seavlm.model.config import Gemma3Config


@dataclass
class Batch:
    """The rows of a step. Rows of one sequence stand together, positions rising, a picture whole."""

    ids: np.ndarray  # int64 [R]; at soft tokens any id
    rows: np.ndarray  # int32 [R, 3]: slot, position, and reach, the last position that the row sees
    tables: dict[str, np.ndarray]  # kind of layer -> int32 [S, blocks]: page of each block of 64 positions
    pictures: list[tuple[int, Any]] = field(default_factory=list)  # first row, embeddings from `encode`
    wanted: np.ndarray = field(
        default_factory=lambda: np.zeros(0, np.int32)
    )  # rows whose logits are asked for
    best: int = 0  # so many of the best logits of each do; 0: all are asked for
    limit: int = 0  # the best of the ids below this one
    banned: Sequence[int] = ()  # and not these
    # Of those that are allowed: int32 [wanted, limit / 32], a bit an id, to be asked for once the device is
    # at work, as it takes a while.
    allowed: Callable[[], np.ndarray] | None = None


@dataclass
class Best:
    """The best logits of some rows, the largest first."""

    ids: np.ndarray  # int64 [rows, K]
    logits: np.ndarray  # float32 [rows, K]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> Best:
        return Best(self.ids[rows], self.logits[rows])

    def __iter__(self) -> Iterator[Best]:
        return (self[i : i + 1] for i in range(len(self)))


class Runner(Protocol):
    """The model behind an engine."""

    config: Gemma3Config
    device: str
    rows: int  # about how many a step should have

    def allocate(self, pages: dict[str, int]) -> None:
        """Make room for the keys and values of so many pages of each kind. A runner has one engine."""

    def page_bytes(self, kind: str) -> int:
        """Bytes of a page."""

    def memory(self) -> int:
        """Bytes that pages may take, where nobody says otherwise."""

    def copy_page(self, kind: str, source: int, target: int) -> None:
        """Copy the keys and values of a page."""

    def encode(self, pixels: Sequence[np.ndarray]) -> list[Any]:
        """Each float32 [3, S, S] -> embeddings [M, C], to be kept, and handed back in `Batch.pictures`."""

    def forward(self, batch: Batch) -> np.ndarray | Best:
        """Logits float32 [wanted, V], the caller's to change, until the next step. Where `batch.best` allows,
        a runner may give the best alone."""


def page_bytes(config: Gemma3Config, kind: str, head_bytes: int) -> int:
    """Keys and values of BLOCK positions in all layers of one kind; head_bytes: of a head's key, or value."""
    text = config.text
    return 2 * text.layer_types.count(kind) * BLOCK * text.num_key_value_heads * head_bytes


def aligned(rows: int, size: int) -> np.ndarray:
    """uint8 [rows, size] of zeros that begins on a page of the system's, and takes memory as it is written, a
    page at a time (numpy's large arrays take 2 MiB)."""
    memory = mmap.mmap(-1, rows * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint8).reshape(rows, size)


def apart(array: np.ndarray) -> np.ndarray:
    """A copy in pages of its own, which the system has back when it is dropped. What stays for long, such as
    embeddings of pictures, would else lie strewn between larger things, and the holes that those leave would
    be too small for the next (a tensor's own hole is, too: glibc finds none again for aligned memory)."""
    copy = aligned(1, array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def physical_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
