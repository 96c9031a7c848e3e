"""The engine: requests in, tokens out, any number at once. `step` is the whole heartbeat.

    engine = Engine(runner, tokenizer)
    sequence = engine.add(prompt, Sampling(temperature=0), max_new_tokens=64)
    while not sequence.finished:
        engine.step()
        print(sequence.take_text(), end="")

A step: the scheduler says which tokens are read (`scheduler.py`), pictures among them go through the tower,
the runner computes (`runner.py`), each sequence that is read to its end gets a token (`sampler.py`), and the
pages take in what was read (`pages.py`). A request that fails, fails alone. Not for several threads at once.

Shapes: V vocabulary rows.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Listed
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from seavlm.engine.pages import BLOCK, Pages
from seavlm.engine.runner import Batch, Best, Runner
from seavlm.engine.sampler import Sampling, adjust, best_first, choose, log_probabilities
from seavlm.engine.scheduler import Piece, Scheduler
from seavlm.engine.sequence import (
    Inspect,
    Prompt,
    Sequence,
    TokenChance,
    TokenMask,
    picture_spans,
    prefix_items,
)
from seavlm.engine.speculate import Drafter, DraftModel, Lookup
from seavlm.errors import SeavlmError
from seavlm.model.config import GLOBAL, LOCAL, Gemma3Config
from seavlm.text.tokenizer import StreamDecoder, Tokenizer

MAX_SEQUENCES = 64
EMBEDDING_CACHE_BYTES = 256 * 2**20
EMBEDDING_CACHE_PICTURES = 4096  # small ones cost more than their bytes
FEW = 4  # so many times fewer tokens than there are
GEMMA = Sampling()
WORTH_A_THREAD = 1e-3  # seconds that a step's masks take
AHEAD = ThreadPoolExecutor(1, thread_name_prefix="masks")  # starts its thread when it is asked


def pool_sizes(
    config: Gemma3Config,
    page_bytes: dict[str, int],
    room: int,
    *,
    rows: int,
    max_sequences: int = MAX_SEQUENCES,
    cache_tokens: int | None = None,
) -> dict[str, int]:
    """How many pages of each kind an engine has: of global layers for a whole context and at least 16,384
    tokens, of local ones for all sequences' windows, as far as `room` bytes go."""
    window = -(-(config.text.sliding_window - 1) // BLOCK) + 1  # what a sequence holds between steps
    step = -(-(rows + config.mm_tokens_per_image) // BLOCK) + 1
    least = {GLOBAL: 1 + step, LOCAL: window + step}
    whole = max(config.text.max_position_embeddings, 16_384)
    wanted = {GLOBAL: -(-whole // BLOCK), LOCAL: max_sequences * window + step}
    num = {}
    for kind, share in ((LOCAL, room // 2), (GLOBAL, room)):
        size = max(1, page_bytes[kind])
        num[kind] = max(least[kind], min(wanted[kind], share // size))
        room -= num[kind] * size
    if cache_tokens is not None:
        num[GLOBAL] = max(least[GLOBAL], -(-cache_tokens // BLOCK))
    return num


class Engine:
    """runner: the model. tokenizer: None leaves text and stop texts out. name: of the model, for messages.

    max_sequences: how many are under way at once, the others wait. rows: about how many tokens a step reads.
    cache_tokens: positions that the cache of the global layers holds, of all sequences and the prefix cache
    together; cache_bytes: what all pages may take (by default what the runner's `memory` says, up to a full
    context or 16,384 tokens and the windows of max_sequences). prefix_cache: reuse what was read before.
    speculate: guess tokens ahead, for the same reply sooner (`speculate.py`): True, from the text before
    them; the engine of a smaller model of the same words, by that.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None = None,
        *,
        name: str = "the model",
        max_sequences: int = MAX_SEQUENCES,
        cache_tokens: int | None = None,
        cache_bytes: int | None = None,
        prefix_cache: bool = True,
        speculate: bool | Engine = False,
        rows: int | None = None,
    ) -> None:
        self.runner, self.tokenizer, self.config, self.name = runner, tokenizer, runner.config, name
        text = self.config.text
        rows = rows or runner.rows
        self.limit = text.vocab_size if tokenizer is None else min(tokenizer.vocab_size, text.vocab_size)
        picture = self.config.image_token_index  # stands for a picture, which a reply cannot hold
        self._banned = [picture] if picture < self.limit else []
        self.context = text.max_position_embeddings
        num = pool_sizes(
            self.config,
            {kind: runner.page_bytes(kind) for kind in (GLOBAL, LOCAL)},
            cache_bytes or runner.memory(),
            rows=rows,
            max_sequences=max_sequences,
            cache_tokens=cache_tokens,
        )
        runner.allocate(num)
        self.pages = Pages(num, text.sliding_window, runner.copy_page, remember=prefix_cache)
        drafter: Drafter | None = Lookup() if speculate else None
        if isinstance(speculate, Engine):
            self._check_words(speculate)
            drafter = DraftModel(speculate)
        self.scheduler = Scheduler(self.pages, rows=rows, max_sequences=max_sequences, drafter=drafter)
        self._embeddings: OrderedDict[bytes, Any] = OrderedDict()  # SHA-256 -> from runner.encode
        self._embedding_bytes = 0
        self._mask_seconds = 0.0  # what a mask takes
        self._ahead = False  # they are made while the model computes
        self.steps = 0

    def _check_words(self, other: Engine) -> None:
        """SeavlmError unless the ids of a draft model stand for the same bytes, as far as a sample shows."""
        mine, theirs = self.tokenizer, other.tokenizer
        same = self.limit == other.limit
        if same and mine is not None and theirs is not None:
            same = all(mine.token_bytes(i) == theirs.token_bytes(i) for i in range(0, self.limit, 101))
        if not same:
            raise SeavlmError(
                f"{other.name} cannot guess for {self.name}: their tokenizers differ",
                hint="Take a draft model of the same family, or leave it out.",
            )

    # --- requests

    def add(
        self,
        prompt: Prompt,
        sampling: Sampling = GEMMA,
        *,
        max_new_tokens: int = 256,
        stop_ids: Listed[int] | None = None,
        mask: TokenMask | None = None,
        inspect: Inspect | None = None,
        inspect_from: int = 0,
    ) -> Sequence:
        """Take in a request. It is read in the next steps.

        stop_ids: end the reply; by default the config's end-of-sequence ids. mask: which tokens may follow.
        inspect: shown the logits of positions from `inspect_from` on, which with max_new_tokens=0 is all
        there is to do. SeavlmError for a prompt that can never be read.
        """
        self._check(prompt, max_new_tokens, inspect)
        spans = picture_spans(
            prompt.ids if prompt.pictures else (),
            self.config.image_token_index,
            self.config.mm_tokens_per_image,
        )
        sequence = Sequence(
            prompt=prompt,
            sampling=sampling,
            max_new_tokens=min(max_new_tokens, self.context - len(prompt.ids)),
            spans=spans,
            items=prefix_items(prompt, spans),
            stop_ids=frozenset(self.config.eos_token_ids if stop_ids is None else stop_ids),
            mask=mask,
            inspect=inspect,
            inspect_from=inspect_from,
            decoder=None if self.tokenizer is None else StreamDecoder(self.tokenizer),
        )
        sequence.started = time.perf_counter()
        self.scheduler.waiting.append(sequence)
        return sequence

    def _check(self, prompt: Prompt, max_new_tokens: int, inspect: Inspect | None) -> None:
        expected = 0 if inspect else 1
        if max_new_tokens < expected:
            raise SeavlmError(f"max_new_tokens is {max_new_tokens}", hint="Give 1 or more.")
        tokens = len(prompt.ids)
        if tokens == 0:
            raise SeavlmError("the prompt is empty", hint="Send at least one token.")
        if tokens + expected > self.context:
            raise SeavlmError(
                f"the prompt has {tokens} tokens and {self.name} reads at most {self.context - expected}",
                hint="Shorten the text or send fewer pictures.",
            )
        most = self.pages.num[GLOBAL] * BLOCK
        if min(tokens + max_new_tokens, self.context) > most:
            raise SeavlmError(
                f"the prompt has {tokens} tokens and may get {max_new_tokens} more; the cache holds {most}",
                hint="Ask for fewer new tokens, or give the engine a larger cache_tokens.",
            )
        size = self.config.mm_tokens_per_image
        placeholders = prompt.ids.count(self.config.image_token_index) if self.config.vision else 0
        if placeholders != size * len(prompt.pictures):
            raise SeavlmError(
                f"{placeholders} image placeholder tokens in the prompt, but {len(prompt.pictures)} pictures "
                f"of {size} tokens each need {size * len(prompt.pictures)}",
                hint="Give as many pictures as the messages have image parts.",
            )
        rows = self.config.text.vocab_size
        picture = self.config.image_token_index if self.config.vision else -1
        wrong = next((i for i in prompt.ids if not 0 <= i < rows and i != picture), None)
        if wrong is not None:
            raise SeavlmError(
                f"token id {wrong} is outside the vocabulary of {rows} rows",
                hint="Was the text tokenised with another model's tokenizer?",
            )

    def cancel(self, sequence: Sequence) -> None:
        """Give up a request; its pages are free at once. Nothing happens to one that is finished."""
        if not sequence.finished:
            sequence.finish("cancelled")
            self._leave(sequence)

    @property
    def idle(self) -> bool:
        """There is nothing to do."""
        return not self.scheduler.waiting and not self.scheduler.running

    # --- the heartbeat

    def step(self) -> list[Sequence]:
        """Read the next tokens; returns the sequences that got one, or ended."""
        pieces = self.scheduler.plan()
        if not pieces:
            return []
        self.steps += 1
        failed = self._embed(pieces)
        pieces = [piece for piece in pieces if not piece.sequence.finished]
        if not pieces:
            return failed
        try:
            results = [self._forward(pieces)]
            groups = [pieces]
        except Exception:  # one of them is to blame: each alone
            groups, results = [], []
            for piece in pieces:
                try:
                    results.append(self._forward([piece]))
                    groups.append([piece])
                except Exception as error:
                    failed.append(self._fail(piece.sequence, error))
        changed = failed
        for group, (logits, counts) in zip(groups, results, strict=True):
            at = 0
            for piece, count in zip(group, counts, strict=True):
                if self._take(piece, logits[at : at + count]):
                    changed.append(piece.sequence)
                at += count
        self._forget_embeddings()
        return changed

    def _embed(self, pieces: list[Piece]) -> list[Sequence]:
        """Send the pictures of these pieces through the tower, those not remembered; returns who failed."""
        missing = {
            picture.digest: picture
            for piece in pieces
            for _, picture in _pictures(piece)
            if picture.digest not in self._embeddings
        }
        if not missing:
            return []
        failed = []
        try:
            found = self.runner.encode([picture.pixels for picture in missing.values()])
            for digest, embedding in zip(missing, found, strict=True):
                self._remember(digest, embedding)
        except Exception:
            for piece in pieces:
                try:
                    for _, picture in _pictures(piece):
                        if picture.digest not in self._embeddings:
                            self._remember(picture.digest, self.runner.encode([picture.pixels])[0])
                except Exception as error:
                    failed.append(self._fail(piece.sequence, error))
        return failed

    def _forward(self, pieces: list[Piece]) -> tuple[np.ndarray | Best, list[int]]:
        """Logits of the rows that are wanted of these pieces, and how many rows that is of each."""
        ids, rows, counts = [], [], []
        wanted: list[int] = []
        pictures: list[tuple[int, Any]] = []
        at = 0
        for slot, piece in enumerate(pieces):
            sequence, first, end = piece.sequence, piece.first, piece.end
            known = min(end, sequence.num_tokens)
            ids += [sequence.id_at(i) for i in range(first, known)] + sequence.draft[: end - known]
            place = np.empty((end - first, 3), np.int32)
            place[:, 0] = slot
            place[:, 1] = place[:, 2] = np.arange(first, end)
            for begin, picture in _pictures(piece):
                size = self.config.mm_tokens_per_image
                place[begin - first : begin - first + size, 2] = begin + size - 1
                pictures.append((at + begin - first, self._embeddings[picture.digest]))
                self._embeddings.move_to_end(picture.digest)
            rows.append(place)
            start = sequence.num_tokens - 1
            if sequence.inspect is not None:
                start = min(start, sequence.inspect_from)
            start = max(start, first)
            wanted += range(at + start - first, at + end - first)
            counts.append(max(0, end - start))
            at += end - first
        length = max(len(piece.sequence.held.blocks) for piece in pieces if piece.sequence.held)
        tables = {kind: np.zeros((len(pieces), length), np.int32) for kind in (GLOBAL, LOCAL)}
        for slot, piece in enumerate(pieces):
            held = piece.sequence.held
            assert held is not None
            for kind, table in tables.items():
                table[slot, : len(held.blocks)] = held.tables[kind][: len(held.blocks)]
        masks = self._masks_ahead(pieces)
        self._ahead = masks is not None
        batch = Batch(
            np.asarray(ids, np.int64),
            np.concatenate(rows),
            tables,
            pictures,
            np.asarray(wanted, np.int32),
            best=max(needs) if all(needs := [_needs(piece.sequence) for piece in pieces]) else 0,
            limit=self.limit,
            banned=self._banned,
        )
        try:
            return self.runner.forward(batch), counts
        finally:  # should it fail, too: the masks are not for two threads at once
            if masks is not None:
                masks.result()

    def _masks_ahead(self, pieces: list[Piece]) -> Future[None] | None:
        """Another thread makes the masks for what these pieces will say, while a GPU computes. On the CPU it
        would take from the model what it gives: there they are made when they are asked for."""
        wanted = [
            (prepare, piece.sequence.ids)
            for piece in pieces
            if piece.end >= piece.sequence.num_tokens
            and (prepare := getattr(piece.sequence.mask, "prepare", None)) is not None
        ]
        if self.runner.device == "cpu" or len(wanted) * self._mask_seconds < WORTH_A_THREAD:
            return None
        return AHEAD.submit(self._prepare, wanted)

    def _prepare(self, wanted: list[tuple[Callable[[list[int]], None], list[int]]]) -> None:
        began = time.perf_counter()
        for prepare, ids in wanted:
            prepare(ids)
        self._count_masks(began, len(wanted))

    def _count_masks(self, began: float, count: int = 1) -> None:
        """How long a mask takes, of the latest ones."""
        self._mask_seconds += 0.1 * ((time.perf_counter() - began) / count - self._mask_seconds)

    def _take(self, piece: Piece, logits: np.ndarray | Best) -> bool:
        """What a piece brought: a token or more for a sequence that is read to its end."""
        sequence, before = piece.sequence, piece.sequence.num_tokens
        if sequence.finished:  # cancelled while others of this step were dealt with
            return False
        try:
            first = piece.end - len(logits)
            for position, row in zip(range(first, min(piece.end, before - 1)), logits, strict=False):
                self._show(sequence, position, row)
            accepted = 0
            if piece.end >= before and not sequence.finished:
                accepted = self._say(sequence, before - 1, logits[before - 1 - first :])
            if sequence.held is not None:
                self.pages.commit(sequence, min(piece.end, before) + accepted)
        except Exception as error:
            self._fail(sequence, error)
        if sequence.finished:
            self._leave(sequence)
        return sequence.finished or piece.end >= before

    def _show(self, sequence: Sequence, position: int, row: np.ndarray | Best) -> None:
        if sequence.inspect is not None and position >= sequence.inspect_from:
            assert isinstance(row, np.ndarray)
            sequence.inspect(position, row)
            sequence.inspect_from = position + 1

    def _say(self, sequence: Sequence, position: int, logits: np.ndarray | Best) -> int:
        """Choose tokens from the rows of the newest token (at `position`) and of each guess; returns how many
        guesses were right. Each token is chosen as it would be without guesses, so the reply is the same."""
        draft, sequence.draft = sequence.draft, []
        sequence.drafted += len(draft)
        right = 0
        for number, row in enumerate(logits):
            self._show(sequence, position + number, row)
            if sequence.finished:
                break
            if sequence.max_new_tokens == 0:
                sequence.finish("length")
                break
            token = self._choose(sequence, row)
            if sequence.finished:  # its own mask gave it up
                break
            sequence.put(token)
            sequence.last_token_at = time.perf_counter()
            sequence.first_token_at = sequence.first_token_at or sequence.last_token_at
            guessed = number < len(draft) and token == draft[number] and token not in sequence.stop_ids
            right += guessed
            if sequence.finished or not guessed:
                break
        sequence.accepted += right
        sequence.missed += right < len(draft)
        return right

    def _choose(self, sequence: Sequence, row: np.ndarray | Best) -> int:
        if isinstance(row, Best):
            return int(row.ids[0, choose(row.logits[0], sequence.sampling, sequence.stream)])
        sampling, logits = sequence.sampling, row[: self.limit]
        told = None if sampling.logprobs is None else log_probabilities(row)[: self.limit]
        logits[self._banned] = -np.inf
        allowed = None
        if sequence.mask is not None:
            began = time.perf_counter()
            allowed = sequence.mask(sequence.ids)
            if not self._ahead:
                self._count_masks(began)
        few = None if allowed is None else _few(allowed[: len(logits)])
        if allowed is not None or not sampling.plain:
            adjust(logits, sampling, sequence.prompt.ids, sequence.ids, allowed if few is None else None)
        if few is None:
            token = choose(logits, sampling, sequence.stream)
        else:
            token = int(few[choose(logits[few], sampling, sequence.stream)])
        if told is not None and sampling.logprobs is not None and token not in sequence.stop_ids:
            best = best_first(told, sampling.logprobs) if sampling.logprobs else ()
            alternatives = [(int(i), float(told[i])) for i in best]
            sequence.logprobs.append(TokenChance(token, float(told[token]), alternatives))
        return token

    def _fail(self, sequence: Sequence, error: Exception) -> Sequence:
        """The request ends with an error; the others go on."""
        if sequence.finished:
            return sequence
        if not isinstance(error, SeavlmError):
            told = SeavlmError(f"{type(error).__name__}: {error}")
            told.__cause__ = error
            error = told
        sequence.error, sequence.finish_reason = error, "error"
        self._leave(sequence)
        return sequence

    def _leave(self, sequence: Sequence) -> None:
        """Out of the queues; the pages go back, and stay to be found by what begins alike."""
        for queue in (self.scheduler.running, self.scheduler.waiting):
            if sequence in queue:
                queue.remove(sequence)
        self.pages.release(sequence)

    def _remember(self, digest: bytes, embedding: Any) -> None:
        self._embeddings[digest] = embedding
        self._embedding_bytes += embedding.nbytes

    def _forget_embeddings(self) -> None:
        """Those not used for the longest time, where there are too many."""
        kept = self._embeddings
        while len(kept) > 1 and (
            self._embedding_bytes > EMBEDDING_CACHE_BYTES or len(kept) > EMBEDDING_CACHE_PICTURES
        ):
            self._embedding_bytes -= kept.popitem(last=False)[1].nbytes


def _needs(sequence: Sequence) -> int:
    """How many of the best logits do for the choice of a token; 0: all are needed."""
    sampling = sequence.sampling
    if not sampling.plain or sequence.mask is not None or sequence.inspect is not None:
        return 0
    return 1 if sampling.greedy else sampling.top_k


def _few(allowed: np.ndarray) -> np.ndarray | None:
    """The ids that may follow, where they are so few that the others need not be looked at."""
    return np.flatnonzero(allowed) if 0 < np.count_nonzero(allowed) <= len(allowed) // FEW else None


def _pictures(piece: Piece) -> list[tuple[int, Any]]:
    """(first position, picture) of the pictures in a piece."""
    sequence = piece.sequence
    return [
        (first, picture)
        for (first, _), picture in zip(sequence.spans, sequence.prompt.pictures, strict=True)
        if piece.first <= first < piece.end
    ]
