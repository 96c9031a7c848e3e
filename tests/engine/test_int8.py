"""The int8 decoder: its products exact, its model equal to the plain one with the same rounding."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seavlm.engine import int8, kernels
from seavlm.engine.int8 import Int8Gemma3
from seavlm.engine.vlm import VLM, load
from seavlm.errors import SeavlmError
from seavlm.model.config import GLOBAL, LOCAL, Gemma3Config, TextConfig, VisionConfig
from seavlm.model.gemma3 import Gemma3

IMAGE, TOKENS = 250, 4


def test_a_machine_with_a_compiler_has_the_kernels() -> None:
    assert (kernels.library() is not None) or not any(map(shutil.which, ("c++", "g++", "clang++")))


compiled = pytest.mark.skipif(kernels.library() is None, reason="built without a C++ compiler")


def rounded_weight(w: Tensor) -> Tensor:
    """[n, k] to int8 and back, an fp16 scale for each 32 of a row."""
    groups = w.unflatten(-1, (-1, 32))
    scale = (groups.abs().amax(dim=-1, keepdim=True) / 127).half().float()
    return torch.where(scale > 0, (groups / scale).round().clamp(-127, 127) * scale, 0).flatten(-2)


def rounded_activations(x: Tensor) -> Tensor:
    """[.., k] to int8 and back, an fp32 scale for each 32."""
    groups = x.unflatten(-1, (-1, 32))
    scale = groups.abs().amax(dim=-1, keepdim=True) / 127
    q = groups / scale
    q = torch.where(scale > 0, torch.trunc(q + 0.5 * q.sign()), 0)
    return (q * scale).flatten(-2)


def a_model(seed: int = 0, **text: int) -> Gemma3:
    """Two local layers, a global one, two local: window 96, three heads on one; pictures of 4 tokens."""
    torch.manual_seed(seed)
    config = Gemma3Config(
        text=TextConfig(**{
            "vocab_size": 251, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 5,
            "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 96,
            "query_pre_attn_scalar": 24, "layer_types": (LOCAL, LOCAL, GLOBAL, LOCAL, LOCAL),
            "rope_factor": 8.0, "max_position_embeddings": 4096, "initializer_range": 0.15, **text,
        }),
        vision=VisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28,
            patch_size=7,
        ),
        mm_tokens_per_image=TOKENS, image_token_index=IMAGE,
    )  # fmt: skip
    model = Gemma3(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.normal_(0, 0.2)
    return model


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Gemma3, Int8Gemma3]]:
    """The plain model with every decoder product rounded as the kernels round, and the kernels'."""
    plain, other = a_model(), a_model()
    with torch.no_grad():
        plain.language_model.embed_tokens.weight.copy_(
            rounded_weight(plain.language_model.embed_tokens.weight)
        )
        for module in plain.language_model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(rounded_weight(module.weight))
    inside = {id(m.weight) for m in plain.language_model.modules() if isinstance(m, torch.nn.Linear)}
    inside.add(id(plain.language_model.embed_tokens.weight))
    linear = F.linear

    def rounding(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(rounded_activations(x) if id(weight) in inside else x, weight, bias)

    monkeypatch.setattr(F, "linear", rounding)
    with torch.inference_mode():
        yield plain, Int8Gemma3(other)


def prompt(seed: int, length: int, pictures: list[int]) -> Tensor:
    """[1, T] ids with a picture's four placeholders at each of the given places."""
    ids = torch.randint(0, 250, (1, length), generator=torch.Generator().manual_seed(seed))
    for at in pictures:
        ids[0, at : at + TOKENS] = IMAGE
    return ids


def near(found: Tensor, wanted: Tensor) -> None:
    """Rounding is a step: keys and values in fp16 push some activations to its other side. A wrong mask,
    rotation or norm moves logits by their own size."""
    assert found.shape == wanted.shape
    difference = (found - wanted).abs()
    assert difference.mean() <= 6e-3 * wanted.abs().max() and difference.max() <= 6e-2 * wanted.abs().max()


@compiled
@pytest.mark.parametrize(
    ("length", "pictures"), [(1, []), (50, []), (40, [3, 20]), (300, [60, 130]), (700, [508, 600])]
)
def test_it_is_the_plain_model_with_rounded_numbers(
    pair: tuple[Gemma3, Int8Gemma3], length: int, pictures: list[int]
) -> None:
    """Past the window, over several chunks, with a picture where a chunk would end."""
    plain, quick = pair
    ids = prompt(length, length, pictures)
    images = torch.randn(len(pictures), TOKENS, 96) if pictures else None
    near(quick(ids, image_embeds=images), plain(ids, image_embeds=images))


@compiled
def test_pictures_are_never_cut(pair: tuple[Gemma3, Int8Gemma3], monkeypatch: pytest.MonkeyPatch) -> None:
    _, quick = pair
    ids, images = prompt(0, 200, [10, 63, 90, 126]), torch.randn(4, TOKENS, 96)
    whole = quick(ids, image_embeds=images)
    monkeypatch.setattr(int8, "CHUNK", 64)
    torch.testing.assert_close(quick(ids, image_embeds=images), whole, atol=1e-4, rtol=1e-4)
    rows = torch.tensor([[0, i, i] for i in range(70)])
    rows[62:66, 2] = 65
    assert list(int8._chunks(rows)) == [(0, 66), (66, 70)]


@compiled
def test_decoding_over_the_ring_equals_reading_it_all(
    pair: tuple[Gemma3, Int8Gemma3], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ring of few blocks, gone round several times, one token at a time and in bursts."""
    _, quick = pair
    monkeypatch.setattr(int8, "CHUNK", 64)
    ids = prompt(1, 900, [])
    whole = quick(ids)
    cache = quick.new_cache(1, 900)
    assert cache.layers[0].blocks < cache.layers[2].blocks == 15
    at = 0
    for size in (50, 1, 1, 64, 300, *[1] * 40, 64, *[1] * 100, 280):
        found = quick(ids[:, at : at + size], cache=cache)
        torch.testing.assert_close(found, whole[:, at : at + size], atol=1e-4, rtol=1e-4)
        at += size
    with pytest.raises(SeavlmError, match="the KV cache holds 900 tokens, and 901 are needed"):
        quick(ids[:, :1], cache=cache)


@compiled
def test_a_padded_batch_equals_each_alone(pair: tuple[Gemma3, Int8Gemma3]) -> None:
    _, quick = pair
    one, two = prompt(2, 30, [5]), prompt(3, 18, [])
    images = torch.randn(1, TOKENS, 96)
    batch = torch.cat((one, F.pad(two, (12, 0))))
    mask = torch.ones_like(batch)
    mask[1, :12] = 0
    cache = quick.new_cache(2, 40)
    last = quick(batch, image_embeds=images, attention_mask=mask, cache=cache, last_only=True)
    torch.testing.assert_close(last[:1], quick(one, image_embeds=images)[:, -1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(last[1:], quick(two)[:, -1:], atol=1e-4, rtol=1e-4)
    forked = cache.fork(torch.tensor([1, 1, 0]), 4)
    more = torch.tensor([[7, 8], [9, 10], [11, 12]])
    after = quick(more, cache=forked)
    alone = quick(torch.cat((two, more[1:2]), dim=1))[:, -2:]
    torch.testing.assert_close(after[1:2], alone, atol=1e-4, rtol=1e-4)


@compiled
def test_the_shipped_model_answers_as_before(root: Path) -> None:
    """nano in int8: the greedy answers to pictures, and the memory."""
    plain, quick = load("nano", dtype="float32"), load("nano", quantize="int8")
    assert isinstance(quick.model, Int8Gemma3)
    texts = ("Apa ini?", "นี่คืออะไร", "Ano ito?", "What is this?", "Đây là gì?")
    pictures = [str(root / "docs" / f"{name}.png") for name in ("elephant", "watermelon", "pineapple")]
    asked = [
        [{"role": "user", "content": [{"type": "image", "path": name}, {"type": "text", "text": text}]}]
        for name, text in product(pictures, texts)
    ]

    def answers(vlm: VLM) -> list[str]:
        return [reply.text for reply in vlm.generate_batch(asked, max_new_tokens=16, temperature=0)]

    same = np.mean([a == b for a, b in zip(answers(plain), answers(quick), strict=True)])
    assert same >= 0.8
    decoder = sum(p.nbytes for n, p in plain.model.named_parameters() if n.startswith("language_model"))
    assert quick.model.weight_bytes < 0.28 * decoder
    assert "".join(quick.stream(asked[0], max_new_tokens=16, temperature=0)) == answers(quick)[0]


@compiled
def test_the_command_line_asks_in_int8(cli: Callable, root: Path) -> None:
    done = cli("ask", root / "docs" / "elephant.png", "Apa ini?", "--quantize", "int8")
    assert done.code == 0 and done.out.strip() == "gajah"
    wrong = cli("ask", root / "docs" / "elephant.png", "Apa ini?", "--quantize", "int3")
    assert wrong.code == 2 and "unknown quantisation 'int3'. Use int8" in wrong.err


def test_what_it_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SeavlmError, match="unknown quantisation 'int3'"):
        load("nano", quantize="int3")
    with pytest.raises(SeavlmError, match="int8 runs on the CPU, not on cuda"):
        load("nano", quantize="int8", device="cuda")
    if kernels.library() is not None:
        with pytest.raises(SeavlmError, match="multiples of 32, and intermediate_size is 100"):
            Int8Gemma3(a_model(intermediate_size=100))
    monkeypatch.setattr(kernels, "library", lambda: None)
    with pytest.raises(SeavlmError, match=r"built without a C\+\+ compiler.*apt install g\+\+"):
        Int8Gemma3(a_model())


@compiled
def test_inputs_that_do_not_fit_are_named() -> None:
    quick = Int8Gemma3(a_model())
    with pytest.raises(SeavlmError, match="4 image placeholder tokens in input_ids, but 0 pictures"):
        quick(prompt(0, 12, [3]))
    with pytest.raises(SeavlmError, match="token id 251 is outside the vocabulary of 251 rows"):
        quick(torch.tensor([[2, 251]]))
    with pytest.raises(SeavlmError, match=r"image_embeds has shape \(1, 4, 8\), expected \(N, 4, 96\)"):
        quick(prompt(0, 12, [3]), image_embeds=torch.randn(1, TOKENS, 8))
