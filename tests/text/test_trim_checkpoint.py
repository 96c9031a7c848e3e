"""Trimming a whole model: the same answers from fewer rows."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from seavlm.errors import SeavlmError
from seavlm.image.preprocess import preprocess
from seavlm.model.gemma3 import Gemma3
from seavlm.text.chat import encode_chat
from seavlm.text.tokenizer import Tokenizer
from seavlm.trim import trim_checkpoint
from seavlm.weights.checkpoint import load_into, open_checkpoint

CORPUS = ["ນີ້ແມ່ນຫຍັງ? ແມວ", "What is this? a cat"]
MESSAGES = [
    {"role": "user", "content": [{"type": "image", "image": "x"}, {"type": "text", "text": CORPUS[0]}]}
]


def logits(folder) -> tuple[list[int], torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    model = Gemma3(checkpoint.config, dtype=torch.float32)
    load_into(model, checkpoint)
    config = checkpoint.config
    prompt = encode_chat(Tokenizer.from_dir(folder), MESSAGES, mm_tokens_per_image=config.mm_tokens_per_image)
    pixels = torch.from_numpy(preprocess([picture()], config.vision.image_size))
    with torch.inference_mode():
        return prompt.input_ids, model(torch.tensor([prompt.input_ids]), pixel_values=pixels)[0]


def picture() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB")


@pytest.fixture(scope="module")
def trimmed(model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("trim") / "small"
    return out, trim_checkpoint(model_dir, out, CORPUS)


def test_kept_tokens_have_the_logits_they_had(model_dir, trimmed):
    out, kept = trimmed
    old_ids, old = logits(model_dir)
    new_ids, new = logits(out)
    assert len(kept) < old.shape[1] - 64  # fewer rows, and no spare ones
    assert [kept[i] for i in new_ids] == old_ids
    torch.testing.assert_close(new, old[:, kept], rtol=0, atol=1e-5)


def test_configs_have_the_new_ids(model_dir, trimmed):
    out, kept = trimmed
    tokenizer = Tokenizer.from_dir(out)
    config = open_checkpoint(out).config
    assert config.text.vocab_size == tokenizer.vocab_size == len(kept)
    assert config.image_token_index == tokenizer.image_id
    assert (config.boi_token_index, config.eoi_token_index) == (tokenizer.boi_id, tokenizer.eoi_id)
    assert config.eos_token_ids == (tokenizer.eos_id, tokenizer.end_of_turn_id)
    before, after = (json.loads((d / "generation_config.json").read_text()) for d in (model_dir, out))
    assert after == {**before, "eos_token_id": [tokenizer.eos_id, tokenizer.end_of_turn_id]}


def test_loads_in_transformers_and_says_the_same(trimmed):
    out, _ = trimmed
    ids, ours = logits(out)
    messages = [
        {**MESSAGES[0], "content": [{"type": "image", "image": picture()}, MESSAGES[0]["content"][1]]}
    ]
    inputs = AutoProcessor.from_pretrained(out, backend="pil").apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert inputs["input_ids"][0].tolist() == ids
    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = model(**inputs).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_nothing_is_left_after_an_error(model_dir, tmp_path):
    def broken():
        yield "What"
        raise SeavlmError("the corpus ends here")

    with pytest.raises(SeavlmError, match="ends here"):
        trim_checkpoint(model_dir, tmp_path / "out", broken())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(SeavlmError, match="exists already"):
        trim_checkpoint(model_dir, tmp_path / "out", ["What"])
    assert (tmp_path / "out" / "mine").exists()


@pytest.mark.slow
def test_the_real_270m(material, tmp_path):
    """262,144 rows to a few thousand; the text-only file has no row for <image_soft_token>."""
    kept = trim_checkpoint(material.gguf_270m, tmp_path / "small", CORPUS)
    checkpoint = open_checkpoint(tmp_path / "small")
    original = open_checkpoint(material.gguf_270m)
    name = "language_model.embed_tokens.weight"
    assert checkpoint.shape(name) == (len(kept), 640)
    rows = torch.tensor(kept[:-1])
    expected = original.get(name)[rows].to(checkpoint.dtype(name))
    assert torch.equal(checkpoint.get(name)[:-1], expected)
