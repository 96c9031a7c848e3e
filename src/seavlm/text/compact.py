"""A tokenizer.json in a form that is loaded at once: its vocabulary and merges as sorted arrays.

`tokenizers` spends more than a second, and 300 MB, on the 262,144 pieces and 514,906 merges of Gemma 3. Here
they stay arrays, looked up by bisection, and byte-pair encoding is a heap of pairs in Python: good for some
thousand characters. Longer texts go to the library, which is then loaded after all. The ids are equal.

Written by `write_compact` beside a tokenizer.json; it knows that file's SHA-256 and stands for no other.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from seavlm.errors import SeavlmError

NAME = "tokenizer.npz"
MOST_PAIRS = 500_000  # remembered
MOST_LINES = 1000  # whose ids the library remembers
LONGEST = 4000  # characters; the library is faster from here on
SPACE = "\u2581"


@dataclass(frozen=True)
class Added:
    """A token that is found in the text before anything else."""

    content: str
    special: bool


@dataclass(frozen=True)
class Encoded:
    """As far as `tokenizers.Encoding` is used."""

    ids: list[int]


def write_compact(folder: Path) -> bool:
    """Write tokenizer.npz beside tokenizer.json; False, and nothing written, if it is of another kind."""
    data = (folder / "tokenizer.json").read_bytes()
    spec = json.loads(data)
    model, plain = spec["model"], {"special", "content", "id"}
    # There is no space left to split at when the normalizer has been there.
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    known = (
        model.get("type") == "BPE"
        and model.get("byte_fallback")
        and not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and not model.get("ignore_merges")
        and spec.get("normalizer") == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        and spec.get("pre_tokenizer") in (None, split)
        and not spec.get("truncation")
        and not spec.get("padding")
        and not any(
            value for token in spec["added_tokens"] for key, value in token.items() if key not in plain
        )
    )
    vocab: dict[str, int] = dict(model["vocab"])
    if not known or any(f"<0x{byte:02X}>" not in vocab for byte in range(256)):
        return False
    added = {token["id"]: Added(token["content"], token["special"]) for token in spec["added_tokens"]}
    tokens = {**{i: piece for piece, i in vocab.items()}, **{i: one.content for i, one in added.items()}}
    if len(tokens) <= max(tokens):
        return False  # ids that no token has
    pieces = [tokens[i].encode() for i in range(len(tokens))]
    single = sorted((ord(piece), i) for piece, i in vocab.items() if len(piece) == 1)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    left = np.array([vocab[a] for a, _ in merges], np.uint64)
    right = np.array([vocab[b] for _, b in merges], np.uint64)
    made = np.array([vocab[a + b] for a, b in merges], np.int32)
    keys = left << np.uint64(32) | right
    order = np.argsort(keys, kind="stable")
    buffer = io.BytesIO()
    np.savez(
        buffer,
        sha256=np.frombuffer(hashlib.sha256(data).digest(), np.uint8),
        text=np.frombuffer(b"".join(pieces), np.uint8),
        ends=np.cumsum([len(piece) for piece in pieces], dtype=np.int64),
        letters=np.array(single, np.int32).reshape(-1, 2),
        bytes=np.array([vocab[f"<0x{byte:02X}>"] for byte in range(256)], np.int32),
        keys=keys[order],
        ranks=order.astype(np.int32),
        made=made[order],
        added=np.frombuffer(
            json.dumps([[i, one.content, one.special] for i, one in sorted(added.items())]).encode(), np.uint8
        ),
    )
    (folder / NAME).write_bytes(buffer.getvalue())
    return True


def small_cache(backend: Backend) -> Backend:
    """Let it remember the first lines that it reads, what a chat repeats among them, and no more. Of 10,000,
    as it would (a line is a word here, and takes some kB), most would never be seen again."""
    if isinstance(backend.model, BPE):
        backend.model._resize_cache(MOST_LINES)
    return backend


class Compact:
    """Stands for `tokenizers.Tokenizer` in `seavlm.text.tokenizer`, as far as that goes."""

    def __init__(self, folder: Path, arrays: dict[str, np.ndarray]) -> None:
        self._folder = folder
        self._text, self._ends = arrays["text"].tobytes(), arrays["ends"]
        self._letters = dict(arrays["letters"].tolist())
        self._byte_ids = arrays["bytes"].tolist()
        self._keys, self._ranks, self._made = arrays["keys"], arrays["ranks"], arrays["made"]
        listed = json.loads(arrays["added"].tobytes())
        self._added = {i: Added(content, special) for i, content, special in listed}
        self._added_ids = {one.content: i for i, one in self._added.items()}
        unused = [one for one in self._added_ids if re.fullmatch(r"<unused\d+>", one)]
        others = sorted(set(self._added_ids) - set(unused), key=len, reverse=True)
        self._names = re.compile("|".join([*map(re.escape, others), *([r"<unused\d+>"] if unused else [])]))
        self._pairs: dict[int, tuple[int, int] | None] = {}  # of two ids: rank and the id that they make

    @classmethod
    def beside(cls, folder: Path, spec: bytes) -> Compact | None:
        """The compact form of this very tokenizer.json, if there is one."""
        path = folder / NAME
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as stored:
                if stored["sha256"].tobytes() != hashlib.sha256(spec).digest():
                    return None
                return cls(folder, dict(stored))
        except Exception as error:  # zipfile, zlib and numpy each have their own
            raise SeavlmError(
                f"{path} is damaged ({error})", hint="Delete it; tokenizer.json is enough."
            ) from error

    @cached_property
    def _library(self) -> Backend:
        return small_cache(Backend.from_file(str(self._folder / "tokenizer.json")))

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        return len(self._ends)

    def get_added_tokens_decoder(self) -> dict[int, Added]:
        return self._added

    def id_to_token(self, i: int) -> str | None:
        if not 0 <= i < len(self._ends):
            return None
        return self._text[self._ends[i - 1] if i else 0 : self._ends[i]].decode()

    def encode_batch_fast(self, texts: Iterable[str], add_special_tokens: bool = False) -> list[Any]:
        return self._library.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)

    def encode(self, text: str, add_special_tokens: bool = False) -> Any:
        """Without special tokens."""
        if len(text) > LONGEST:
            return self._library.encode(text, add_special_tokens=False)
        ids: list[int] = []
        at = 0
        for name in self._names.finditer(text):
            token = self._added_ids.get(name[0])
            if token is None:  # <unused> with a number that there is not
                continue
            ids += self._merge(text[at : name.start()])
            ids.append(token)
            at = name.end()
        return Encoded(ids + self._merge(text[at:]))

    def _pair(self, left: int, right: int) -> tuple[int, int] | None:
        key = left << 32 | right
        if key not in self._pairs:
            if len(self._pairs) > MOST_PAIRS:
                self._pairs.clear()
            place = int(self._keys.searchsorted(np.uint64(key)))
            there = place < len(self._keys) and int(self._keys[place]) == key
            self._pairs[key] = (int(self._ranks[place]), int(self._made[place])) if there else None
        return self._pairs[key]

    def _merge(self, text: str) -> list[int]:
        """Byte-pair encoding: of all neighbours that make a piece, those of the lowest rank become one, the
        first first, until none are left."""
        ids: list[int] = []
        for letter in text.replace(" ", SPACE):
            known = self._letters.get(ord(letter))
            ids += [known] if known is not None else [self._byte_ids[byte] for byte in letter.encode()]
        count = len(ids)
        after, before = list(range(1, count + 1)), list(range(-1, count - 1))
        heap: list[tuple[int, int, int]] = []  # rank, place of the left one, what they make

        def offer(place: int) -> None:
            found = self._pair(ids[place], ids[after[place]])
            if found is not None:
                heapq.heappush(heap, (found[0], place, found[1]))

        for place in range(count - 1):
            offer(place)
        while heap:
            _, place, made = heapq.heappop(heap)
            if ids[place] < 0 or (gone := after[place]) >= count:
                continue
            found = self._pair(ids[place], ids[gone])
            if found is None or found[1] != made:  # one of them has become another since
                continue
            ids[place], ids[gone] = made, -1
            after[place] = after[gone]
            if after[place] < count:
                before[after[place]] = place
                offer(place)
            if before[place] >= 0:
                offer(before[place])
        return [i for i in ids if i >= 0]
