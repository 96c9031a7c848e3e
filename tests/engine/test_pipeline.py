"""Our pipeline is called like transformers' and answers in the same form."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import seavlm
from seavlm.errors import SeavlmError


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def pipe(model_dir: Path) -> Any:
    return seavlm.pipeline("image-text-to-text", model=model_dir, device="cpu", torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs(model_dir: Path) -> Any:
    import transformers

    return transformers.pipeline(
        "image-text-to-text", model=str(model_dir), device="cpu", dtype=torch.float32
    )


@pytest.fixture
def messages(tmp_path: Path) -> list[dict[str, Any]]:
    picture(0).save(tmp_path / "p.png")
    return [
        {"role": "system", "content": [{"type": "text", "text": "a cat"}]},
        {
            "role": "user",
            "content": [
                {"type": "image", "path": str(tmp_path / "p.png")},
                {"type": "text", "text": "What is this?"},
            ],
        },
    ]


def test_the_card_snippet_gives_what_transformers_gives(pipe: Any, theirs: Any, messages: list[Any]) -> None:
    settings = {"max_new_tokens": 10, "generate_kwargs": {"do_sample": False}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(text=messages, **settings)
    output = pipe(text=messages, **settings)
    assert [list(entry) for entry in output] == [list(entry) for entry in expected]
    assert [turn["role"] for turn in output[0]["generated_text"]] == ["system", "user", "assistant"]
    assert output[0]["generated_text"][-1]["content"] == expected[0]["generated_text"][-1]["content"]
    assert output[0]["input_text"] == messages


def test_only_the_reply_on_request(pipe: Any, messages: list[Any]) -> None:
    full = pipe(text=messages, max_new_tokens=6, do_sample=False)
    new = pipe(messages, max_new_tokens=6, do_sample=False, return_full_text=False)
    assert new[0]["generated_text"] == full[0]["generated_text"][-1]["content"]


def test_a_list_of_conversations_gives_a_list_of_lists(pipe: Any, messages: list[Any]) -> None:
    other = [{"role": "user", "content": "yes"}]
    both = pipe(text=[messages, other], max_new_tokens=6, do_sample=False, batch_size=1)
    assert both == [pipe(text=chat, max_new_tokens=6, do_sample=False) for chat in (messages, other)]


def test_plain_text_with_a_picture(pipe: Any) -> None:
    output = pipe(images=picture(0), text="What is this?", max_new_tokens=5, do_sample=False)
    assert output[0]["generated_text"].startswith("What is this?")
    several = pipe(
        images=[picture(0), picture(1)], text=["What is this?", "yes"], max_new_tokens=5, do_sample=False
    )
    assert several[0] == output and len(several) == 2


def test_a_begun_reply_is_continued(pipe: Any) -> None:
    begun = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "a cat"}]
    output = pipe(text=begun, max_new_tokens=5, do_sample=False)
    assert len(output[0]["generated_text"]) == 2
    assert output[0]["generated_text"][-1]["content"].startswith("a cat")


@pytest.mark.parametrize(
    "call, complaint",
    [
        ({}, "nothing was given"),
        ({"text": 3}, "neither messages nor text"),
        (
            {"text": [{"role": "user", "content": "yes"}], "images": "p.png"},
            "messages and images were both given",
        ),
        ({"text": "yes", "max_tokens": 3}, "no option 'max_tokens'"),
        ({"text": "yes", "num_beams": 4}, "num_beams is not supported"),
        ({"text": ["yes", "no"], "images": ["a.png"]}, "2 texts came with 1 images"),
    ],
)
def test_wrong_calls_say_what_is_wrong(pipe: Any, call: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SeavlmError, match=complaint):
        pipe(**call)


def test_other_tasks_do_not_exist() -> None:
    with pytest.raises(SeavlmError, match="there is no pipeline for 'text-generation'"):
        seavlm.pipeline("text-generation", model="nano")


def test_urls_are_off_until_allowed(pipe: Any) -> None:
    part = {"type": "image", "url": "https://example.invalid/p.png"}
    chat = [{"role": "user", "content": [part, {"type": "text", "text": "yes"}]}]
    with pytest.raises(SeavlmError, match="URL"):
        pipe(text=chat)
