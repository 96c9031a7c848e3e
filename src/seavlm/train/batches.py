"""From Parquet rows to the rows of a forward pass: tokenised once, ordered by seed, packed.

Nothing here holds state between steps: which samples a step sees, and which view of each picture, follow from
(seed, epoch, position) alone. So a resumed run needs no random state to go on exactly where it was.

Shapes: B packed rows, T tokens a row, N images, n supervised tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from seavlm.data.packing import pack
from seavlm.data.samples import read_samples
from seavlm.errors import SeavlmError
from seavlm.model.attention import PADDING
from seavlm.text import chat
from seavlm.text.tokenizer import Tokenizer


@dataclass
class Samples:
    """All samples of a file, in flat arrays: sample i's tokens are tokens[starts[i]:starts[i+1]]."""

    ids: np.ndarray  # str [samples]
    tasks: np.ndarray  # str [samples]
    tokens: np.ndarray  # int32 [all tokens]
    learn: np.ndarray  # bool [all tokens]: True on the assistant's
    starts: np.ndarray  # int64 [samples + 1]
    images: np.ndarray  # int32 [all image slots]: index into image_keys
    image_starts: np.ndarray  # int64 [samples + 1]
    image_keys: np.ndarray  # str [distinct images]: SHA-256 of the bytes

    def __len__(self) -> int:
        return len(self.ids)

    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)


def sample_file(data: Path) -> Path:
    """The Parquet file of a data stage's directory, or `data` itself when it is a file."""
    path = data / "train.parquet" if data.is_dir() else data
    if not path.is_file():
        raise SeavlmError(
            f"no training samples at {path}", hint="Make them with `seavlm data`, or give a Parquet file."
        )
    return path


def tokenise(path: Path, tokenizer: Tokenizer, mm_tokens_per_image: int) -> Samples:
    """Reads and tokenises every row of a sample file. SeavlmError names the row whose messages are wrong."""
    ids: list[str] = []
    tasks: list[str] = []
    tokens: list[np.ndarray] = []
    learn: list[np.ndarray] = []
    images: list[int] = []
    image_counts: list[int] = []
    known: dict[str, int] = {}
    for row in read_samples(path):
        try:
            encoded = chat.encode_chat(
                tokenizer,
                chat.normalize_messages(row["messages"]),
                mm_tokens_per_image=mm_tokens_per_image,
                add_generation_prompt=False,
            )
        except SeavlmError as error:
            raise SeavlmError(f"sample {row['id']}: {error.message}", hint=error.hint) from error
        pictures = [image["bytes"] for image in row["images"] or []]
        if len(pictures) != len(encoded.image_spans):
            raise SeavlmError(
                f"sample {row['id']} has {len(pictures)} images for {len(encoded.image_spans)} image parts",
                hint="Give one image for each image part, in order.",
            )
        keys = [hashlib.sha256(picture).hexdigest() for picture in pictures]
        ids.append(str(row["id"]))
        tasks.append(str(row["task"]))
        tokens.append(np.asarray(encoded.input_ids, dtype=np.int32))
        learn.append(np.asarray(encoded.assistant_mask, dtype=bool))
        images += [known.setdefault(key, len(known)) for key in keys]
        image_counts.append(len(keys))
    if not ids:
        raise SeavlmError(f"{path} holds no samples", hint="Make it again with `seavlm data`.")
    return Samples(
        ids=np.asarray(ids),
        tasks=np.asarray(tasks),
        tokens=np.concatenate(tokens),
        learn=np.concatenate(learn),
        starts=np.cumsum([0, *(len(t) for t in tokens)], dtype=np.int64),
        images=np.asarray(images, dtype=np.int32),
        image_starts=np.cumsum([0, *image_counts], dtype=np.int64),
        image_keys=np.asarray(list(known), dtype="<U64"),
    )


def tokenise_cached(
    path: Path, tokenizer: Tokenizer, mm_tokens_per_image: int, *, key: str, folder: Path
) -> Samples:
    """`tokenise`, kept in `folder`. `key` says what the tokens depend on beside this program's text room."""
    code = hashlib.sha256()
    for source in sorted(Path(chat.__file__).parent.glob("*.py")):
        code.update(source.read_bytes())
    names = [f.name for f in fields(Samples)]
    code.update(f"{key} {mm_tokens_per_image} {names}".encode())  # a file with other arrays is another file
    place = folder / f"tokens-{code.hexdigest()[:16]}.npz"
    if place.exists():
        with np.load(place, allow_pickle=False) as stored:
            return Samples(**{name: stored[name] for name in names})
    samples = tokenise(path, tokenizer, mm_tokens_per_image)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"tmp-{os.getpid()}.npz"
    np.savez(partial, **{name: getattr(samples, name) for name in names})
    os.replace(partial, place)
    return samples


def usable(samples: Samples, max_seq_len: int) -> tuple[np.ndarray, dict[str, int]]:
    """Indices of the samples that can be learned from, and how many were left out for which reason."""
    lengths = samples.lengths()
    too_long = lengths > max_seq_len
    learned = np.concatenate([[0], np.cumsum(samples.learn)])
    nothing = learned[samples.starts[1:]] == learned[samples.starts[:-1]]
    keep = np.flatnonzero(~too_long & ~nothing)
    if not len(keep):
        raise SeavlmError(
            f"none of the {len(samples)} samples can be used: {int(too_long.sum())} are longer than "
            f"max_seq_len {max_seq_len}, {int(nothing.sum())} have no reply to learn",
            hint="Raise train.max_seq_len, or look at the data.",
        )
    left_out = {"longer than max_seq_len": int(too_long.sum()), "no reply": int((nothing & ~too_long).sum())}
    return keep, {reason: count for reason, count in left_out.items() if count}


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 0]).permutation(count)


@lru_cache(maxsize=4)
def _views(slots: int, views: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 1]).integers(views, size=slots)


@lru_cache(maxsize=4)
def _blends(slots: int, pictures: int, views: int, seed: int, epoch: int) -> tuple[np.ndarray, ...]:
    """For each image slot another picture, a view of it, and a number from 0 to 1."""
    rng = np.random.default_rng([seed, epoch, 2])
    other = rng.integers(pictures, size=slots), rng.integers(views, size=slots)
    return (*other, rng.random(slots, dtype=np.float32))


def chosen(count: int, step: int, batch_size: int, total: int, seed: int) -> list[tuple[int, int]]:
    """(epoch, index) of the samples of optimizer step `step` (from 0): the next batch_size of a stream that
    goes through a new permutation of all `count` samples each epoch, and ends after `total`.
    """
    return [
        (i // count, int(_permutation(count, seed, i // count)[i % count]))
        for i in range(step * batch_size, min((step + 1) * batch_size, total))
    ]


@dataclass
class MicroBatch:
    """One forward pass."""

    input_ids: Tensor  # int64 [B, T]
    position_ids: Tensor  # int64 [B, T], from 0 in each sample
    segment_ids: Tensor  # int64 [B, T], PADDING or the sample's number in its row
    logits_mask: Tensor  # bool [B, T]: positions whose next token is to be learned
    targets: Tensor  # int64 [n]: those next tokens, in row order
    images: np.ndarray  # [N] index into Samples.image_keys, in reading order
    views: np.ndarray  # [N]
    others: np.ndarray  # [N] another picture each, and
    other_views: np.ndarray  # [N]
    shares: np.ndarray  # float32 [N]: how much of it is blended in
    sample_ids: list[str]

    @property
    def tokens(self) -> int:
        return int((self.segment_ids != PADDING).sum())


def micro_batches(
    samples: Samples,
    batch: list[tuple[int, int]],
    *,
    max_seq_len: int,
    micro_rows: int,
    pad_id: int,
    views: int = 1,
    blend: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Iterator[MicroBatch]:
    """Packs a step's samples, (epoch, index) pairs, into rows, and gives `micro_rows` rows at a time.

    Rows of like length go together, and each group is only as wide as its longest row. blend: task -> largest
    share of another picture in its pictures.
    """
    lengths = samples.lengths()
    rows = pack([int(lengths[index]) for _, index in batch], max_seq_len)
    rows.sort(key=lambda row: -sum(int(lengths[batch[i][1]]) for i in row))
    for first in range(0, len(rows), micro_rows):
        group = [[batch[i] for i in row] for row in rows[first : first + micro_rows]]
        width = max(sum(int(lengths[index]) for _, index in row) for row in group)
        input_ids = np.full((len(group), width), pad_id, dtype=np.int64)
        position_ids = np.zeros((len(group), width), dtype=np.int64)
        segment_ids = np.full((len(group), width), PADDING, dtype=np.int64)
        logits_mask = np.zeros((len(group), width), dtype=bool)
        targets, images, drawn, blended, names = [], [], [], [], []
        for b, row in enumerate(group):
            at = 0
            for segment, (epoch, index) in enumerate(row):
                start, end = samples.starts[index], samples.starts[index + 1]
                size = int(end - start)
                input_ids[b, at : at + size] = samples.tokens[start:end]
                position_ids[b, at : at + size] = np.arange(size)
                segment_ids[b, at : at + size] = segment
                # Position t predicts token t + 1 of the same sample; the last predicts nothing.
                learn = samples.learn[start + 1 : end]
                logits_mask[b, at : at + size - 1] = learn
                targets.append(samples.tokens[start + 1 : end][learn])
                slots = slice(samples.image_starts[index], samples.image_starts[index + 1])
                images.append(samples.images[slots])
                drawn.append(_views(len(samples.images), views, seed, epoch)[slots])
                other, other_view, share = _blends(
                    len(samples.images), len(samples.image_keys), views, seed, epoch
                )
                most = np.float32((blend or {}).get(str(samples.tasks[index]), 0.0))
                blended.append((other[slots], other_view[slots], share[slots] * most))
                names.append(str(samples.ids[index]))
                at += size
        others, other_views, shares = (np.concatenate(column) for column in zip(*blended, strict=True))
        yield MicroBatch(
            input_ids=torch.from_numpy(input_ids),
            position_ids=torch.from_numpy(position_ids),
            segment_ids=torch.from_numpy(segment_ids),
            logits_mask=torch.from_numpy(logits_mask),
            targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
            images=np.concatenate(images),
            views=np.concatenate(drawn),
            others=others,
            other_views=other_views,
            shares=shares,
            sample_ids=names,
        )
