"""What a frozen vision tower sees, computed once: pooled features of each distinct picture, memory-mapped.

With the tower frozen its output for a picture never changes, so a training step needs only the projector and
the decoder. The key of a row is (SHA-256 of the picture's bytes, view); the folder's name holds the hash of
the tower's weights and of the code that makes pixels, so a folder can serve many runs and never serves a
wrong one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from seavlm.data.samples import read_samples
from seavlm.errors import SeavlmError
from seavlm.image import augment as augment_module
from seavlm.image import decode as decode_module
from seavlm.image import preprocess as preprocess_module
from seavlm.model.gemma3 import Gemma3
from seavlm.train.checkpoint import write_atomic

View = tuple[str, int]  # (SHA-256 of the picture's bytes, number of the view; 0 is the picture as it is)


def view_pixels(picture: bytes, view: int, image_size: int) -> Tensor:
    """float32 [3, S, S]: the picture itself for view 0, else the augmented one that belongs to (picture,
    view).
    """
    image = decode_module.decode(picture)
    if view > 0:
        seed = int.from_bytes(hashlib.sha256(picture + view.to_bytes(4, "big")).digest()[:8], "big")
        image = augment_module.augment(image, np.random.default_rng(seed))
    return torch.from_numpy(preprocess_module.preprocess([image], image_size)[0])


def read_pictures(path: Path, wanted: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """(SHA-256, bytes) of each wanted picture of a sample file, once."""
    missing = set(wanted)
    if not missing:
        return
    for row in read_samples(path):
        for image in row["images"] or []:
            key = hashlib.sha256(image["bytes"]).hexdigest()
            if key in missing:
                missing.discard(key)
                yield key, image["bytes"]


def tower_key(model: Gemma3, dtype: torch.dtype) -> str:
    """16 hex digits that name the tower's weights, the pixels' making and the features' dtype."""
    digest = hashlib.sha256(f"{model.config.vision} {model.config.mm_tokens_per_image} {dtype}".encode())
    for name, parameter in model.named_parameters():
        if name.startswith("vision_tower."):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().float().contiguous().numpy().tobytes())
    for module in (decode_module, augment_module, preprocess_module):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:16]


class Features:
    """Rows of [mm_tokens, vision_hidden] in `folder`/pooled.bin, their keys one a line in `folder`/index.txt.

    A row is written and flushed before its line, so a killed writer leaves at most a row without a line,
    which the next writer writes over.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder, shape, dtype
        # numpy has no bfloat16: its bits are kept as int16.
        self._stored = np.dtype(np.int16 if dtype == torch.bfloat16 else np.float32)
        self._row_bytes = shape[0] * shape[1] * self._stored.itemsize
        self._rows: dict[View, int] = {}
        self._map: np.ndarray | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._read_index()

    def __len__(self) -> int:
        return len(self._rows)

    def missing(self, wanted: Iterable[View]) -> list[View]:
        return [key for key in dict.fromkeys(wanted) if key not in self._rows]

    def fill(
        self,
        wanted: Sequence[View],
        pictures: Callable[[Iterable[str]], Iterator[tuple[str, bytes]]],
        compute: Callable[[list[tuple[bytes, int]]], Tensor],
        *,
        batch: int = 32,
        done: Callable[[int], None] = lambda count: None,
    ) -> int:
        """Computes the wanted rows that are not there yet; returns how many. One writer at a time, others
        wait.

        pictures: keys -> (key, bytes); compute: [(bytes, view)] -> [n, mm_tokens, vision_hidden].
        """
        with self._lock():
            self._read_index()
            views: dict[str, list[int]] = {}
            for key, view in self.missing(wanted):
                views.setdefault(key, []).append(view)
            todo = sum(map(len, views.values()))
            if todo:
                self._write(_batches(pictures(views), views, batch), compute, done)
                self._read_index()
        absent = self.missing(wanted)
        if absent:
            raise SeavlmError(
                f"{len(absent)} pictures of the samples cannot be found again ({absent[0][0][:12]}...)",
                hint="The sample file changed while it was read: start again.",
            )
        return todo

    def get(self, wanted: Sequence[View]) -> Tensor:
        """[n, mm_tokens, vision_hidden] in the cache's dtype."""
        if self._map is None:
            self._map = np.memmap(self.folder / "pooled.bin", dtype=self._stored, mode="r").reshape(
                -1, *self.shape
            )
        rows = torch.from_numpy(self._map[[self._rows[key] for key in wanted]]).clone()
        return rows.view(torch.bfloat16) if self.dtype == torch.bfloat16 else rows

    def _read_index(self) -> None:
        index, data = self.folder / "index.txt", self.folder / "pooled.bin"
        text = index.read_text() if index.exists() else ""
        whole = data.stat().st_size // self._row_bytes if data.exists() else 0
        self._rows = {}
        for row, line in enumerate(text.splitlines(keepends=True)[:whole]):
            if line.endswith("\n"):  # a line without its end was being written when its writer was killed
                key, view = line.split()
                self._rows[key, int(view)] = row
        self._map = None

    def _write(
        self,
        batches: Iterator[list[tuple[str, int, bytes]]],
        compute: Callable[[list[tuple[bytes, int]]], Tensor],
        done: Callable[[int], None],
    ) -> None:
        rows = len(self._rows)
        write_atomic(self.folder / "index.txt", "".join(f"{key} {view}\n" for key, view in self._rows))
        (self.folder / "pooled.bin").touch()
        with (self.folder / "pooled.bin").open("r+b") as data, (self.folder / "index.txt").open("a") as index:
            data.truncate(rows * self._row_bytes)
            data.seek(rows * self._row_bytes)
            for batch in batches:
                features = (
                    compute([(picture, view) for _, view, picture in batch]).to(self.dtype).cpu().contiguous()
                )
                if tuple(features.shape) != (len(batch), *self.shape):
                    raise ValueError(
                        f"features of shape {tuple(features.shape)}, wanted {(len(batch), *self.shape)}"
                    )
                bits = features.view(torch.int16) if self.dtype == torch.bfloat16 else features
                data.write(bits.numpy().tobytes())
                data.flush()
                os.fsync(data.fileno())
                index.write("".join(f"{key} {view}\n" for key, view, _ in batch))
                index.flush()
                done(len(batch))

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _batches(
    pictures: Iterator[tuple[str, bytes]], views: dict[str, list[int]], size: int
) -> Iterator[list[tuple[str, int, bytes]]]:
    batch: list[tuple[str, int, bytes]] = []
    for key, picture in pictures:
        for view in views[key]:
            batch.append((key, view, picture))
            if len(batch) == size:
                yield batch
                batch = []
    if batch:
        yield batch
