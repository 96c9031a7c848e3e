"""The engine: the plain model's tokens under any traffic, pages that come back, errors that stay alone."""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
import time
from collections.abc import Callable
from collections.abc import Sequence as Listed
from typing import Any

import numpy as np
import pytest
import torch

from seavlm.engine.engine import Engine
from seavlm.engine.pages import BLOCK
from seavlm.engine.sampler import Sampling
from seavlm.engine.sequence import Picture, Prompt, Sequence
from seavlm.engine.speculate import DraftModel, best_length
from seavlm.engine.torch_runner import TorchRunner
from seavlm.engine.vlm import VLM
from seavlm.errors import SeavlmError
from seavlm.model.config import GLOBAL, LOCAL, Gemma3Config
from seavlm.model.gemma3 import Gemma3
from seavlm.parity import SIX_TO_ONE, random_model, small_config

# Window 70: more than a page, less than most prompts. Pictures of 9 tokens, contexts of 1024.
CONFIG: Gemma3Config = dataclasses.replace(small_config(SIX_TO_ONE), eos_token_ids=(1,))
CONFIG = dataclasses.replace(
    CONFIG, text=dataclasses.replace(CONFIG.text, sliding_window=70, max_position_embeddings=1024)
)
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model() -> Gemma3:
    return random_model(CONFIG)


def a_picture(seed: int) -> Picture:
    assert CONFIG.vision is not None
    size = CONFIG.vision.image_size
    pixels = np.random.default_rng(seed).standard_normal((3, size, size)).astype(np.float32)
    return Picture(pixels, hashlib.sha256(pixels.tobytes()).digest())


def a_prompt(seed: int, length: int, pictures: dict[int, int] | None = None) -> Prompt:
    """Random ids; pictures: where each begins -> its seed."""
    ids = np.random.default_rng(seed).integers(2, 200, length).tolist()
    size = CONFIG.mm_tokens_per_image
    for at in pictures or {}:
        ids[at : at + size] = [CONFIG.image_token_index] * size
    return Prompt(ids, tuple(a_picture(number) for number in (pictures or {}).values()))


def plain(model: Gemma3, prompt: Prompt, more: list[int]) -> torch.Tensor:
    """All logits of prompt and more, [T, V], by the plain model in one go."""
    pixels = torch.from_numpy(np.stack([p.pixels for p in prompt.pictures])) if prompt.pictures else None
    with torch.no_grad():
        return model(torch.tensor([prompt.ids + more]), pixel_values=pixels)[0]


def greedy(model: Gemma3, prompt: Prompt, count: int) -> list[int]:
    """The plain model's greedy reply, everything read again for each token."""
    ids: list[int] = []
    while len(ids) < count:
        logits = plain(model, prompt, ids)[-1]
        logits[CONFIG.image_token_index] = -torch.inf
        token = int(logits.argmax())
        if token in CONFIG.eos_token_ids:
            break
        ids.append(token)
    return ids


def nearly(model: Gemma3) -> Gemma3:
    """The model with some noise on its weights: it mostly says the same."""
    other = random_model(CONFIG)
    other.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.02 * weight.std() * torch.randn_like(weight) if weight.dim() > 1 else 0
    return other


def finish(engine: Engine, *sequences: Sequence) -> None:
    for _ in range(10_000):
        if all(sequence.finished for sequence in sequences):
            return
        engine.step()
    raise AssertionError("the engine does not get on")


def nothing_is_held(engine: Engine) -> None:
    assert engine.idle
    for kind in (GLOBAL, LOCAL):
        assert engine.pages.in_use(kind) == 0
        assert len(engine.pages.free[kind]) + len(engine.pages.idle[kind]) == engine.pages.num[kind]
        assert len(set(engine.pages.free[kind])) == len(engine.pages.free[kind])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rows": 40, "speculate": True},
        {"rows": 7, "max_sequences": 3},
        {"rows": 64, "cache_tokens": 640, "speculate": True},
        {"rows": 90, "speculate": "a draft model"},
        {"prefix_cache": False},
    ],
    ids=str,
)
def test_its_tokens_are_the_plain_models_under_random_traffic(model: Gemma3, options: dict[str, Any]) -> None:
    """40 requests a setting, 240 in all: long and short, no to three pictures, some that begin alike, some
    cancelled, arriving at random. Each reply is the plain model's, or the beginning of it."""
    random = np.random.default_rng(len(str(options)))
    if options.get("speculate") == "a draft model":
        options["speculate"] = Engine(TorchRunner(nearly(model)))
    engine = Engine(TorchRunner(model), max_sequences=options.pop("max_sequences", 12), **options)
    shared = a_prompt(1000, 90, {20: 7})
    todo: list[tuple[Prompt, int]] = []
    for number in range(40):
        length = int(random.integers(1, 200))
        places = sorted(random.choice(range(0, max(1, length // 12)), min(3, length // 40), replace=False))
        prompt = a_prompt(number, length, {int(12 * at + 2): int(random.integers(3)) for at in places})
        if number % 4 == 0:
            cut = int(random.integers(30, 90))
            tail = a_prompt(number, 12).ids
            prompt = Prompt(shared.ids[:cut] + tail, shared.pictures)
        if number % 5 == 1:  # repeats itself, for speculation
            prompt = Prompt(a_prompt(number, 12).ids * 6)
        todo.append((prompt, int(random.integers(1, 24))))
    asked: list[tuple[Sequence, Prompt, int]] = []
    cancelled: set[Sequence] = set()
    while todo or not engine.idle:
        for _ in range(min(len(todo), int(random.integers(0, 4)))):
            prompt, count = todo.pop()
            asked.append((engine.add(prompt, GREEDY, max_new_tokens=count), prompt, count))
        if asked and random.random() < 0.05:
            sequence = asked[int(random.integers(len(asked)))][0]
            if not sequence.finished:
                engine.cancel(sequence)
                cancelled.add(sequence)
        engine.step()
        for kind in (GLOBAL, LOCAL):  # what sequences hold between steps is what they may
            held = [s.held for s in engine.scheduler.running if s.held]
            most = sum(len(h.blocks) - (h.passed if kind == LOCAL else 0) for h in held)
            assert engine.pages.in_use(kind) <= most
        for sequence in engine.scheduler.running:
            if not sequence.reading and sequence.held:
                assert len(sequence.held.blocks) - sequence.held.passed <= -(-69 // BLOCK) + 1
    nothing_is_held(engine)
    assert len(asked) == 40
    for sequence, prompt, count in asked:
        assert sequence.error is None
        wanted = greedy(model, prompt, len(sequence.ids) if sequence in cancelled else count)
        assert sequence.ids == wanted[: len(sequence.ids)]
        if sequence not in cancelled:
            assert sequence.ids == wanted
            assert sequence.finish_reason == ("length" if len(wanted) == count else "stop")
    if options.get("prefix_cache", True):
        assert sum(sequence.cached for sequence, _, _ in asked) > 100
    if options.get("speculate"):
        assert sum(sequence.accepted for sequence, _, _ in asked) > 0


@pytest.mark.parametrize("rows", [2048, 50])
def test_logits_are_the_plain_models(model: Gemma3, rows: int) -> None:
    engine = Engine(TorchRunner(model), rows=rows)
    for length, pictures in ((1, {}), (150, {10: 1, 100: 2}), (300, {48: 1, 60: 1, 120: 3})):
        prompt = a_prompt(length, length, pictures)
        found: list[np.ndarray] = []
        engine.add(prompt, max_new_tokens=0, inspect=lambda _, x, found=found: found.append(x.copy()))
        while not engine.idle:
            engine.step()
        wanted = plain(model, prompt, [])
        assert np.abs(np.stack(found) - wanted.numpy()).max() <= 1e-4


def test_a_hit_never_ends_inside_a_picture_and_tells_pixels_apart(model: Gemma3) -> None:
    engine = Engine(TorchRunner(model))
    first = a_prompt(0, 120, {30: 1, 62: 2})
    finish(engine, engine.add(first, GREEDY, max_new_tokens=1))
    encoded: list[int] = []
    encode = engine.runner.encode
    engine.runner.encode = lambda pixels: encoded.append(len(pixels)) or encode(pixels)  # type: ignore[method-assign, func-returns-value]
    for prompt, known in (
        (first, 119),
        (Prompt(first.ids[:62] + [5] * 20, first.pictures[:1]), 62),
        (Prompt(first.ids, (first.pictures[0], a_picture(3))), 62),
        (Prompt(first.ids, (a_picture(4), first.pictures[1])), 30),
        (Prompt([9, *first.ids], first.pictures), 0),
    ):
        sequence = engine.add(prompt, GREEDY, max_new_tokens=6)
        finish(engine, sequence)
        assert sequence.cached == known
        assert sequence.ids == greedy(model, prompt, 6)
    assert sum(encoded) == 2, "pictures 3 and 4; the others were remembered"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_lie_in_pages_of_their_own(dtype: torch.dtype) -> None:
    model = random_model(CONFIG).to(dtype)
    seen = [a_picture(seed).pixels for seed in (0, 1)]
    found = TorchRunner(model).encode(seen)
    with torch.inference_mode():
        wanted = model.encode_images(torch.from_numpy(np.stack(seen)).to(dtype))
    for embedding, other in zip(found, wanted, strict=True):
        assert embedding.data_ptr() % mmap.PAGESIZE == 0 and torch.equal(embedding, other)
    assert found[0].data_ptr() != found[1].data_ptr()


def test_memory_is_that_of_the_formula(model: Gemma3) -> None:
    """Global layers keep all T positions, local ones W - 1, both in whole pages."""
    engine = Engine(TorchRunner(model))
    length = 600
    sequence = engine.add(a_prompt(0, length), GREEDY, max_new_tokens=8)
    engine.step()
    text = CONFIG.text
    position = 2 * text.num_key_value_heads * text.head_dim * 4  # bytes a layer
    held = {kind: engine.pages.in_use(kind) * engine.runner.page_bytes(kind) for kind in (GLOBAL, LOCAL)}
    layers = {kind: text.layer_types.count(kind) for kind in (GLOBAL, LOCAL)}
    exact = {
        GLOBAL: length * layers[GLOBAL] * position,
        LOCAL: (text.sliding_window - 1) * layers[LOCAL] * position,
    }
    for kind in (GLOBAL, LOCAL):
        page = BLOCK * layers[kind] * position
        assert engine.runner.page_bytes(kind) == page
        assert exact[kind] <= held[kind] <= exact[kind] + 2 * page
    engine.cancel(sequence)
    nothing_is_held(engine)


def test_a_cancelled_request_frees_its_pages_at_once(model: Gemma3) -> None:
    engine = Engine(TorchRunner(model), max_sequences=2)
    sequences = [engine.add(a_prompt(i, 100), GREEDY, max_new_tokens=50) for i in range(4)]
    engine.step()
    for sequence in (sequences[3], sequences[0], sequences[0]):
        engine.cancel(sequence)
        assert sequence.finish_reason == "cancelled" and sequence.held is None
    finish(engine, *sequences[1:3])
    assert all(s.finish_reason == ("length" if len(s.ids) == 50 else "stop") for s in sequences[1:3])
    nothing_is_held(engine)


def test_one_bad_request_never_stops_the_others(model: Gemma3, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that raises, one that allows nothing, pixels that break the tower, numbers not finite."""
    engine = Engine(TorchRunner(model))
    wanted = greedy(model, a_prompt(0, 50), 12)

    def broken(ids: list[int]) -> np.ndarray:
        raise ZeroDivisionError("grammar")

    bad_picture = Picture(np.zeros((3, 5, 5), np.float32), b"x" * 32)
    ids = a_prompt(1, 30, {3: 0}).ids
    poisoned = a_picture(9)
    poisoned = Picture(np.full_like(poisoned.pixels, np.nan), b"y" * 32)
    good = engine.add(a_prompt(0, 50), GREEDY, max_new_tokens=12)
    bad = [
        engine.add(a_prompt(2, 20), GREEDY, mask=broken),
        engine.add(a_prompt(3, 20), GREEDY, mask=lambda ids: np.zeros(CONFIG.text.vocab_size, bool)),
        engine.add(Prompt(ids, (bad_picture,)), GREEDY),
        engine.add(Prompt(ids, (poisoned,)), GREEDY),
    ]
    finish(engine, good, *bad)
    assert good.ids == wanted and good.error is None
    for sequence, text in zip(
        bad, ("grammar", "no token is left", "pixel_values has shape", "not finite"), strict=True
    ):
        assert sequence.finish_reason == "error" and text in str(sequence.error)
    nothing_is_held(engine)

    # What breaks a whole step is found by trying each alone.
    runner, forward = engine.runner, engine.runner.forward

    def fails(batch):
        if 77 in batch.ids:
            raise MemoryError("no room")
        return forward(batch)

    monkeypatch.setattr(runner, "forward", fails)
    one = engine.add(Prompt([5, 77, 8]), GREEDY, max_new_tokens=5)
    two = engine.add(a_prompt(0, 50), GREEDY, max_new_tokens=12)
    if 77 in two.prompt.ids:
        pytest.fail("choose another seed")
    finish(engine, one, two)
    assert "no room" in str(one.error) and two.ids == wanted and two.error is None
    nothing_is_held(engine)


def test_a_mask_decides_what_may_follow(model: Gemma3) -> None:
    engine = Engine(TorchRunner(model))

    def even(ids: list[int]) -> np.ndarray:
        return np.arange(CONFIG.text.vocab_size) % 2 == len(ids) % 2

    sequence = engine.add(a_prompt(0, 9), Sampling(seed=1), max_new_tokens=10, mask=even, stop_ids=())
    finish(engine, sequence)
    assert [i % 2 for i in sequence.ids] == [0, 1] * 5


def test_the_same_seed_says_the_same_alone_and_in_a_crowd(model: Gemma3) -> None:
    for speculate in (False, True):
        engine = Engine(TorchRunner(model), speculate=speculate)
        sampling = Sampling(temperature=1.5, top_k=0, top_p=0.98, seed=11, repetition_penalty=1.2)
        alone = engine.add(a_prompt(0, 80, {3: 1}), sampling, max_new_tokens=20)
        finish(engine, alone)
        crowd = [engine.add(a_prompt(i, 30 + i), Sampling(seed=i), max_new_tokens=30) for i in range(5)]
        engine.step()
        again = engine.add(a_prompt(0, 80, {3: 1}), sampling, max_new_tokens=20)
        finish(engine, again, *crowd)
        assert again.ids == alone.ids
        if not speculate:
            first = alone.ids
    assert alone.ids == first, "speculation changes nothing"


def test_logprobs_are_those_of_the_model(model: Gemma3) -> None:
    engine = Engine(TorchRunner(model))
    prompt = a_prompt(0, 20)
    sampling = Sampling(temperature=2.0, seed=3, logprobs=4, logit_bias={5: 100.0}, presence_penalty=1.0)
    sequence = engine.add(prompt, sampling, max_new_tokens=5, stop_ids=())
    finish(engine, sequence)
    assert sequence.ids == [5] * 5
    wanted = plain(model, prompt, sequence.ids[:-1])[len(prompt.ids) - 1 :].log_softmax(-1)
    for told, row in zip(sequence.logprobs, wanted, strict=True):
        assert told.token == 5 and told.logprob == pytest.approx(float(row[5]), abs=1e-4)
        best = row[: CONFIG.text.vocab_size].topk(4)
        assert [token for token, _ in told.top] == best.indices.tolist()
        assert [x for _, x in told.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_several_that_begin_alike_are_read_once(model: Gemma3) -> None:
    """n replies to one prompt: the others wait for the first to be read."""
    engine = Engine(TorchRunner(model))
    prompt = a_prompt(0, 150, {70: 1})
    rows: list[int] = []
    forward = engine.runner.forward
    engine.runner.forward = lambda batch: rows.append(len(batch.ids)) or forward(batch)  # type: ignore[method-assign, func-returns-value]
    sequences = [engine.add(prompt, Sampling(seed=i), max_new_tokens=4, stop_ids=()) for i in range(4)]
    finish(engine, *sequences)
    assert sum(rows) == 150 + 3 + 4 * 3
    assert [s.cached for s in sequences] == [0, 149, 149, 149]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda e: e.add(Prompt([])), "the prompt is empty"),
        (lambda e: e.add(Prompt([5]), max_new_tokens=0), "max_new_tokens is 0"),
        (lambda e: e.add(Prompt([5] * 5000)), "reads at most"),
        (lambda e: e.add(Prompt([5, 9999])), "token id 9999 is outside the vocabulary"),
        (lambda e: e.add(Prompt([5, -1])), "token id -1 is outside the vocabulary"),
        (
            lambda e: e.add(Prompt([5, CONFIG.image_token_index])),
            "1 image placeholder tokens in the prompt, but 0",
        ),
        (lambda e: e.add(Prompt([5], (a_picture(0),))), "but 1 pictures of 9 tokens each need 9"),
        (lambda e: e.add(Prompt([5] * 300), max_new_tokens=200), "the cache holds"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_reason(
    model: Gemma3, make: Callable[[Engine], Sequence], complaint: str
) -> None:
    engine = Engine(TorchRunner(model), rows=64, cache_tokens=320)
    with pytest.raises(SeavlmError, match=complaint):
        make(engine)
    assert engine.idle


class Knows:
    """Guesses that are right: what the plain model says."""

    def __init__(self, replies: dict[int, list[int]]) -> None:
        self.replies = replies  # by the prompt's length

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        said = len(sequence.ids)
        return self.replies[len(sequence.prompt.ids)][said : said + min(most, 5)]


def test_guesses_of_a_sequence_that_had_to_give_up_its_pages_are_forgotten(model: Gemma3) -> None:
    """Too few pages, right guesses: sequences begin again in the middle of their replies."""
    engine = Engine(TorchRunner(model), rows=64, cache_tokens=320, speculate=True)
    prompts = [a_prompt(i, 40 + 3 * i) for i in range(12)]
    wanted = [greedy(model, prompt, 50) for prompt in prompts]
    knows = Knows({len(p.ids): reply for p, reply in zip(prompts, wanted, strict=True)})
    engine.scheduler.drafter = knows
    released: list[Sequence] = []
    release = engine.pages.release
    engine.pages.release = lambda one: (released.append(one), release(one))[1]  # type: ignore[method-assign]
    sequences = [engine.add(prompt, GREEDY, max_new_tokens=50) for prompt in prompts]
    finish(engine, *sequences)
    assert [one.ids for one in sequences] == wanted
    assert len(released) > len(sequences), "none had to give up its pages: nothing was shown"
    nothing_is_held(engine)


def test_a_draft_model_that_is_right_is_asked_for_more_and_one_that_is_wrong_no_longer(
    model: Gemma3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DraftModel, "cost", 0.2)
    prompt = a_prompt(0, 60, {9: 1})
    wanted = greedy(model, prompt, 120)
    text = Prompt([token for token in prompt.ids if token != CONFIG.image_token_index])
    found = []
    for other in (model, random_model(CONFIG, seed=7)):
        for asked in (prompt, text):
            engine = Engine(TorchRunner(model), speculate=Engine(TorchRunner(other)))
            sequence = engine.add(asked, GREEDY, max_new_tokens=120)
            finish(engine, sequence)
            assert sequence.ids == (wanted if asked is prompt else greedy(model, text, 120))
            found.append(sequence)
        nothing_is_held(engine)
    assert (found[1].missed, found[1].drafted) == (0, found[1].accepted) and found[1].accepted > 100
    assert found[3].drafted < 40 and found[3].accepted < 10


def test_guessing_stops_where_the_draft_model_is_too_slow(model: Gemma3) -> None:
    """Right guesses, that cost five steps each, or a fifth of one; alone and among four."""
    for slow, count in (("draft", 1), ("model", 1), ("draft", 4)):
        draft, runner = Engine(TorchRunner(model)), TorchRunner(model)
        engine = Engine(runner, speculate=draft)
        target = draft if slow == "draft" else runner
        name = "step" if slow == "draft" else "forward"
        plain_call = getattr(target, name)
        setattr(target, name, lambda *given, call=plain_call: (time.sleep(0.05), call(*given))[1])
        sequences = [engine.add(a_prompt(i, 40), GREEDY, max_new_tokens=60) for i in range(count)]
        finish(engine, *sequences)
        for i, sequence in enumerate(sequences):
            assert sequence.ids == greedy(model, a_prompt(i, 40), 60)
            assert sequence.drafted > 40 if slow == "model" else sequence.drafted < 24


def test_a_text_that_a_draft_model_cannot_hold_is_answered_without_it(model: Gemma3) -> None:
    small = Engine(TorchRunner(model), rows=32, cache_tokens=128)
    engine = Engine(TorchRunner(model), speculate=small)
    prompts = [a_prompt(0, 60), a_prompt(1, 64 * small.pages.num[GLOBAL] - 8)]
    sequences = [engine.add(prompt, GREEDY, max_new_tokens=30) for prompt in prompts]
    finish(engine, *sequences)
    assert [one.ids for one in sequences] == [greedy(model, prompt, 30) for prompt in prompts]
    assert sequences[0].drafted > sequences[1].drafted


def test_the_best_number_of_guesses() -> None:
    assert best_length(0.9, 0.1) == 8 and best_length(0.1, 0.5) == 0
    assert best_length(0.5, 0.15) == 2  # 1.75 / 1.3; one guess: 1.5 / 1.15, three: 1.875 / 1.45


def test_a_draft_model_of_other_words_is_refused(model: Gemma3) -> None:
    text = dataclasses.replace(CONFIG.text, vocab_size=CONFIG.text.vocab_size - 64)
    other = random_model(dataclasses.replace(CONFIG, text=text))
    with pytest.raises(SeavlmError, match="their tokenizers differ"):
        Engine(TorchRunner(model), speculate=Engine(TorchRunner(other)))
    with pytest.raises(SeavlmError, match="without a prefix cache"):
        Engine(TorchRunner(model), speculate=Engine(TorchRunner(model), prefix_cache=False))


def test_a_prompt_that_nearly_fills_the_cache_can_be_asked_twice(model: Gemma3) -> None:
    engine = Engine(TorchRunner(model), rows=64, cache_tokens=320)
    most = engine.pages.num[GLOBAL] * BLOCK
    for length in (most - 10, most - 64, most - 70):
        for _ in range(2):
            prompt = a_prompt(0, length, {length - 40: 1})
            sequence = engine.add(prompt, GREEDY, max_new_tokens=4)
            finish(engine, sequence)
            assert sequence.ids == greedy(model, prompt, 4)
    nothing_is_held(engine)


def test_what_a_failed_request_left_in_its_pages_stays_there(model: Gemma3) -> None:
    engine = Engine(TorchRunner(model), rows=512, cache_tokens=1024, prefix_cache=False)
    bad = a_prompt(1, 100, {3: 0})
    poison = Picture(np.full_like(bad.pictures[0].pixels, np.nan), b"y" * 32)
    failed = engine.add(Prompt(bad.ids, (poison,)), GREEDY)
    finish(engine, failed)
    assert failed.finish_reason == "error"
    prompts = [a_prompt(i, 20 + 13 * i) for i in range(6)]
    sequences = [engine.add(prompt, GREEDY, max_new_tokens=5) for prompt in prompts]
    finish(engine, *sequences)
    assert [one.ids for one in sequences] == [greedy(model, prompt, 5) for prompt in prompts]


def test_text_only_models_have_no_picture_id() -> None:
    config = small_config(SIX_TO_ONE, vision=False)
    engine = Engine(TorchRunner(random_model(config)))
    with pytest.raises(SeavlmError, match=f"token id {config.image_token_index} is outside"):
        engine.add(Prompt([5, config.image_token_index, 7]))


def test_every_position_is_inspected_also_with_guesses(model: Gemma3) -> None:
    prompt = a_prompt(0, 30)
    reply = greedy(model, prompt, 20)
    engine = Engine(TorchRunner(model), speculate=True)
    engine.scheduler.drafter = Knows({30: reply})
    seen: list[int] = []
    sequence = engine.add(prompt, GREEDY, max_new_tokens=20, inspect=lambda at, _: seen.append(at))
    finish(engine, sequence)
    assert sequence.ids == reply and sequence.accepted > 5
    assert seen == list(range(30 + len(reply) - 1)) or seen == list(range(30 + len(reply)))


def test_a_callback_may_cancel(model: Gemma3) -> None:
    engine = Engine(TorchRunner(model))

    def gives_up(ids: Listed[int]) -> None:
        for one in (first, second):
            engine.cancel(one)

    first = engine.add(a_prompt(0, 20), GREEDY, mask=gives_up)
    second = engine.add(a_prompt(1, 30), GREEDY)
    third = engine.add(a_prompt(2, 40), GREEDY, max_new_tokens=4)
    finish(engine, first, second, third)
    assert [one.finish_reason for one in (first, second)] == ["cancelled"] * 2
    assert third.ids == greedy(model, third.prompt, 4)
    nothing_is_held(engine)


def test_text_that_may_begin_a_stop_text_is_not_shown(vlm: VLM) -> None:
    sequence = vlm.engine.add(Prompt([5]), Sampling(stop=("bz", "xabq")))
    vlm.engine.cancel(sequence)
    sequence.finish_reason = None
    sequence.text = "xab"
    assert sequence.take_text() == ""
    sequence.text = "xabc"
    assert sequence.take_text() == "xabc"


def test_a_call_that_fails_leaves_nothing_behind(vlm: VLM) -> None:
    ask = [{"role": "user", "content": "yes"}]
    long = [{"role": "user", "content": "123 " * 300}]
    with pytest.raises(SeavlmError, match="reads at most"):
        vlm.generate_batch([ask, long])
    assert vlm.engine.idle
