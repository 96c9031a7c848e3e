"""Asking a model: the same answer alone, in a batch, streamed, and from transformers."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import seavlm
from seavlm.engine.sampler import Sampling
from seavlm.engine.sequence import Prompt
from seavlm.engine.vlm import VLM, load
from seavlm.errors import SeavlmError


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def ask(text: str, *pictures: Image.Image) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": p} for p in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def read(vlm: VLM, prompt: Prompt, more: list[int]) -> torch.Tensor:
    """The plain model's logits over a prompt and more ids, [T, V], in one go."""
    pixels = torch.from_numpy(np.stack([p.pixels for p in prompt.pictures])) if prompt.pictures else None
    with torch.no_grad():
        return vlm.model(torch.tensor([prompt.ids + more]), pixel_values=pixels)[0]


CONVERSATIONS = [
    ask("What is this?", picture(0)),
    ask("ນີ້ແມ່ນຫຍັງ? ແມວ ໝາ ນີ້ແມ່ນຫຍັງ?"),
    ask("这是什么？", picture(1), picture(2)),
    [
        {"role": "system", "content": "a cat"},
        *ask("yes"),
        {"role": "assistant", "content": "no"},
        *ask("123"),
    ],
]


def test_greedy_equals_transformers_with_pictures(vlm: VLM, model_dir: Path) -> None:
    from transformers import AutoProcessor, Gemma3ForConditionalGeneration

    theirs = Gemma3ForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(model_dir, backend="pil")
    for conversation in (CONVERSATIONS[0], CONVERSATIONS[2]):
        inputs = processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert torch.equal(
            inputs["input_ids"][0],
            torch.tensor(vlm.prompt(conversation).ids),
        )
        with torch.no_grad():
            logits = theirs(**inputs).logits[0]
        assert (vlm.logits(conversation) - logits).abs().max() <= 1e-4
        made = theirs.generate(**inputs, max_new_tokens=12, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ].tolist()
        stops = [i for i, token in enumerate(made) if token in vlm.config.eos_token_ids]
        reply = vlm.generate(conversation, max_new_tokens=12, temperature=0.0)
        limit = vlm.tokenizer.vocab_size
        if max(made) < limit:  # else it took one of the rows that no token has, which we never do
            assert reply.token_ids == made[: stops[0] if stops else None]
        assert all(token < limit for token in reply.token_ids)


def test_a_batch_answers_as_one_by_one(vlm: VLM) -> None:
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 5}):
        together = vlm.generate_batch(CONVERSATIONS, max_new_tokens=16, **options)
        for number, conversation in enumerate(CONVERSATIONS):
            own = dict(options, **({"seed": options["seed"] + number} if "seed" in options else {}))
            alone = vlm.generate(conversation, max_new_tokens=16, **own)
            assert together[number].token_ids == alone.token_ids
            assert together[number].prompt_tokens == alone.prompt_tokens
        assert len({tuple(reply.token_ids) for reply in together}) == len(CONVERSATIONS)


def test_cached_decoding_equals_reading_it_all_again(vlm: VLM) -> None:
    """Each new token is the best one after the prompt and the tokens before it, read from the beginning."""
    prompt = vlm.prompt(CONVERSATIONS[0])
    ids = vlm.generate(CONVERSATIONS[0], max_new_tokens=24, temperature=0.0).token_ids
    assert len(prompt.ids) + len(ids) > vlm.config.text.sliding_window
    logits = read(vlm, prompt, ids)[len(prompt.ids) - 1 : -1, : vlm.tokenizer.vocab_size]
    logits[:, vlm.config.image_token_index] = -torch.inf
    assert logits.argmax(-1).tolist() == ids


def test_choices_are_ranked_by_the_probability_of_the_whole_reply(vlm: VLM) -> None:
    """Each as if prompt, choice and stop were read in one go; other rows, other choices and padding aside."""
    choices = [
        ["a cat", "yes"],
        ["ແມວ", "ໝາ ແມວ no", "1"],
        ["这是什么"],
        ["no", "no no no no no no no no no"],
    ]
    ranked = vlm.rank_batch(CONVERSATIONS, choices)
    for conversation, texts, found in zip(CONVERSATIONS, choices, ranked, strict=True):
        assert len(found) == len(texts)
        prompt = vlm.prompt(conversation)
        for text, chance in zip(texts, found, strict=True):
            ids = [*prompt.ids, *vlm.tokenizer.encode(text), vlm.tokenizer.end_of_turn_id]
            logits = read(vlm, prompt, ids[len(prompt.ids) :]).log_softmax(-1)
            start = len(prompt.ids)
            whole = sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids)))
            assert chance == pytest.approx(whole, abs=1e-4), text
    assert vlm.rank(CONVERSATIONS[0], choices[0]) == pytest.approx(ranked[0], abs=1e-4)
    for bad in ([], ["yes", " "]):
        with pytest.raises(SeavlmError, match="cannot rank"):
            vlm.rank(CONVERSATIONS[0], bad)
    with pytest.raises(SeavlmError, match="1 lists of choices for 2 conversations"):
        vlm.rank_batch(CONVERSATIONS[:2], [["yes"]])


def test_a_stream_is_the_reply_in_whole_graphemes(vlm: VLM) -> None:
    import regex

    for seed in range(4):
        options = {"max_new_tokens": 40, "temperature": 1.5, "top_k": 0, "top_p": 1.0, "seed": seed}
        pieces = list(vlm.stream(CONVERSATIONS[1], **options))
        text = "".join(pieces)
        assert text == vlm.generate(CONVERSATIONS[1], **options).text
        bounds = {match.end() for match in regex.finditer(r"\X", text)}
        at = 0
        for piece in pieces:
            at += len(piece)
            assert at in bounds, f"{piece!r} ends inside a character"


def test_the_generation_config_is_the_default(vlm: VLM, model_dir: Path) -> None:
    given = json.loads((model_dir / "generation_config.json").read_text())
    by_default = vlm.generate(CONVERSATIONS[0], max_new_tokens=20, seed=1)
    said = {key: given[key] for key in ("temperature", "top_k", "top_p")}
    assert by_default.token_ids == vlm.generate(CONVERSATIONS[0], max_new_tokens=20, seed=1, **said).token_ids
    assert (
        by_default.token_ids
        != vlm.generate(CONVERSATIONS[0], max_new_tokens=20, seed=1, temperature=3.0, top_k=0).token_ids
    )


def test_it_stops_at_the_stop_ids_of_the_config(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    options = {"max_new_tokens": 10, "temperature": 2.0, "top_k": 0, "seed": 3}
    free = vlm.generate(CONVERSATIONS[0], **options)
    assert free.finish_reason == "length" and len(free.token_ids) == 10
    stop = next(token for token in free.token_ids[2:] if token not in free.token_ids[:2])
    monkeypatch.setattr(vlm.engine, "config", dataclasses.replace(vlm.config, eos_token_ids=(stop,)))
    stopped = vlm.generate(CONVERSATIONS[0], **options)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop)]


def test_a_model_guesses_for_itself_in_int8_and_says_the_same() -> None:
    plain, quick = load("nano", device="cpu"), load("nano", device="cpu", speculate="nano")
    accepted = 0
    for question in ("ນີ້ແມ່ນຫຍັງ?", "Ini apa?", "ဒါဘာလဲ။"):
        prompt = plain.prompt(ask(question, picture(3)))
        pair = [vlm.engine.add(prompt, Sampling(temperature=0), max_new_tokens=24) for vlm in (plain, quick)]
        while not (plain.engine.idle and quick.engine.idle):
            plain.engine.step()
            quick.engine.step()
        assert pair[0].ids == pair[1].ids and pair[0].text == pair[1].text
        accepted += pair[1].accepted
    assert accepted > 0
    assert load("nano", speculate="lookup").generate(ask("Ini apa?", picture(3)), temperature=0).text


def test_equal_pixels_are_encoded_once(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    encode = vlm.model.encode_images
    monkeypatch.setattr(vlm.model, "encode_images", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    first = vlm.generate(
        ask("What is this?", picture(0), picture(1), picture(0)), max_new_tokens=4, temperature=0.0
    )
    assert seen == [2]
    again = vlm.generate(
        ask("What is this?", picture(0), picture(1), picture(0)), max_new_tokens=4, temperature=0.0
    )
    vlm.generate(ask("yes", picture(1)), max_new_tokens=1)
    assert seen == [2] and again.token_ids == first.token_ids
    vlm.generate(ask("yes", picture(2)), max_new_tokens=1)
    assert seen == [2, 1]


def test_remembered_embeddings_stay_within_their_bytes_and_number(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = vlm.config.mm_tokens_per_image * vlm.config.text.hidden_size * 4
    monkeypatch.setattr("seavlm.engine.engine.EMBEDDING_CACHE_BYTES", 3 * one)
    vlm.generate(ask("yes", *(picture(seed) for seed in range(5))), max_new_tokens=1)
    assert len(vlm.engine._embeddings) == 3 and vlm.engine._embedding_bytes == 3 * one
    monkeypatch.setattr("seavlm.engine.engine.EMBEDDING_CACHE_PICTURES", 2)
    vlm.generate(ask("yes", picture(4), picture(9)), max_new_tokens=1)
    assert len(vlm.engine._embeddings) == 2 and vlm.engine._embedding_bytes == 2 * one


def test_pictures_come_by_path_base64_data_uri_and_image(vlm: VLM, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture(0).save(buffer, "PNG")
    (tmp_path / "p.png").write_bytes(buffer.getvalue())
    text = base64.b64encode(buffer.getvalue()).decode()
    sources = [
        {"image": picture(0)},
        {"path": str(tmp_path / "p.png")},
        {"image": str(tmp_path / "p.png")},
        {"base64": text},
        {"url": "data:image/png;base64," + text},
    ]
    logits = [
        vlm.logits(
            [{"role": "user", "content": [{"type": "image", **source}, {"type": "text", "text": "yes"}]}]
        )
        for source in sources
    ]
    for other in logits[1:]:
        assert torch.equal(other, logits[0])
    assert not torch.equal(vlm.logits(ask("yes", picture(1))), logits[0]), "the picture matters"


def test_web_pictures_need_permission(vlm: VLM) -> None:
    part = {"type": "image", "url": "https://example.invalid/p.png"}
    with pytest.raises(SeavlmError, match="URL"):
        vlm.generate([{"role": "user", "content": [part, {"type": "text", "text": "yes"}]}])


def test_pan_and_scan_adds_views(vlm: VLM) -> None:
    wide = ask("What is this?", picture(0, (1200, 400)))
    plain = vlm.generate(wide, max_new_tokens=1).prompt_tokens
    scanned = vlm.generate(wide, max_new_tokens=1, pan_and_scan=True).prompt_tokens
    assert scanned - plain > 3 * vlm.config.mm_tokens_per_image


def test_a_last_assistant_message_is_continued(vlm: VLM) -> None:
    begun = [*ask("What is this?"), {"role": "assistant", "content": "a cat"}]
    ids = vlm.prompt(begun).ids
    fresh = vlm.prompt(begun[:1]).ids
    assert ids == fresh + vlm.tokenizer.encode("a cat")


def test_base_models_complete_text(vlm: VLM) -> None:
    reply = vlm.complete("What is", max_new_tokens=6, temperature=0.0)
    assert reply.prompt_tokens == 1 + len(vlm.tokenizer.encode("What is"))
    assert len(reply.token_ids) == 6 or reply.finish_reason == "stop"


def test_text_models_answer_text_and_refuse_pictures(text_model_dir: Path) -> None:
    model = load(text_model_dir, device="cpu")
    assert model.generate(ask("What is this?"), max_new_tokens=3).prompt_tokens > 3
    with pytest.raises(SeavlmError, match="reads text only, and the messages hold 2 pictures"):
        model.generate(ask("What is this?", picture(0), picture(1)))


def test_a_prompt_longer_than_the_context_is_refused_with_its_length(vlm: VLM) -> None:
    with pytest.raises(SeavlmError, match=r"the prompt has \d{3,} tokens and .* reads at most 255"):
        vlm.generate(ask("123 " * 300))
    nearly = ask("123 " * 55)
    tokens = vlm.generate(nearly, max_new_tokens=1).prompt_tokens
    reply = vlm.generate(nearly, max_new_tokens=300, temperature=0.0)
    assert tokens + len(reply.token_ids) <= vlm.config.text.max_position_embeddings


def test_text_is_normalised(vlm: VLM) -> None:
    import unicodedata

    text = "Đây là cái gì?"
    assert unicodedata.normalize("NFD", text) != text
    assert torch.equal(vlm.logits(ask(unicodedata.normalize("NFD", text))), vlm.logits(ask(text)))


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"dtype": "float16"}, "float16 cannot hold"),
        ({"dtype": torch.float16}, "float16 cannot hold"),
        ({"dtype": "float23"}, "unknown dtype 'float23'"),
    ],
)
def test_devices_and_dtypes_are_checked(model_dir: Path, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SeavlmError, match=complaint):
        seavlm.load(model_dir, **options)


def test_bfloat16_stays_close(model_dir: Path, vlm: VLM) -> None:
    half = load(model_dir, device="cpu", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    exact, rough = vlm.logits(CONVERSATIONS[0]), half.logits(CONVERSATIONS[0])
    assert rough.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.995
