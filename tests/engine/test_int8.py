"""The int8 decoder: its products exact, its model equal to the plain one with the same rounding."""

from __future__ import annotations

import hashlib
import mmap
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from seavlm.engine import kernels
from seavlm.engine.engine import Engine
from seavlm.engine.int8 import Int8Runner, library_for
from seavlm.engine.quantize import pack_decoder
from seavlm.engine.sequence import Picture, Prompt
from seavlm.engine.vision import Eyes, Int8Vision, Tensors
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


def int8(model: Gemma3) -> Int8Runner:
    checkpoint = Tensors(Path("a model"), model.config, model.state_dict())
    library_for(model.config)
    return Int8Runner(model.config, dict(pack_decoder(checkpoint)), vision=Int8Vision(Eyes(checkpoint)))


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Gemma3, Int8Runner]]:
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
        yield plain, int8(other)


def a_prompt(seed: int, length: int, pictures: list[int]) -> Prompt:
    """Random ids with a picture's four placeholders at each of the given places."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, 250, length).tolist()
    for at in pictures:
        ids[at : at + TOKENS] = [IMAGE] * TOKENS
    seen = [random.standard_normal((3, 28, 28)).astype(np.float32) for _ in pictures]
    return Prompt(ids, tuple(Picture(x, hashlib.sha256(x.tobytes()).digest()) for x in seen))


def read(engine: Engine, *prompts: Prompt) -> list[np.ndarray]:
    """All logits of prompts that are read together, each [T, V]."""
    found: list[list[np.ndarray]] = [[] for _ in prompts]
    for prompt, rows in zip(prompts, found, strict=True):
        engine.add(prompt, max_new_tokens=0, inspect=lambda _, logits, rows=rows: rows.append(logits.copy()))
    while not engine.idle:
        for sequence in engine.step():
            assert sequence.error is None
    return [np.stack(rows) for rows in found]


@compiled
@pytest.mark.parametrize(
    ("length", "pictures"), [(1, []), (50, []), (40, [3, 20]), (300, [60, 130]), (700, [508, 600])]
)
def test_it_is_the_plain_model_with_rounded_numbers(
    pair: tuple[Gemma3, Int8Runner], length: int, pictures: list[int]
) -> None:
    """Past the window, over several chunks, with a picture where a chunk would end.

    Rounding is a step: queries, keys and values in int8 push some activations to its other side. A wrong
    mask, rotation or norm moves logits by their own size.
    """
    plain, quick = pair
    prompt = a_prompt(length, length, pictures)
    pixels = torch.from_numpy(np.stack([p.pixels for p in prompt.pictures])) if pictures else None
    wanted = plain(torch.tensor([prompt.ids]), pixel_values=pixels)[0]
    (found,) = read(Engine(quick), prompt)
    assert found.shape == wanted.shape
    difference = (torch.from_numpy(found) - wanted).abs()
    assert difference.mean() <= 6e-3 * wanted.abs().max() and difference.max() <= 6e-2 * wanted.abs().max()


@compiled
def test_pages_take_a_byte_a_number_and_a_scale_a_head(pair: tuple[Gemma3, Int8Runner]) -> None:
    """Global layers keep all positions, local ones a window, in whole pages."""
    _, quick = pair
    text, engine = quick.config.text, Engine(quick)
    sequence = engine.add(a_prompt(0, 600, []), max_new_tokens=8)
    engine.step(), engine.step()
    for kind, positions in ((GLOBAL, 600), (LOCAL, text.sliding_window - 1)):
        layers = text.layer_types.count(kind)
        position = 2 * layers * text.num_key_value_heads * (text.head_dim + 4)
        assert quick.page_bytes(kind) == 64 * position
        assert sum(pool[0].nbytes for pool in quick._pools) == sum(map(quick.page_bytes, (GLOBAL, LOCAL)))
        held = engine.pages.in_use(kind) * quick.page_bytes(kind)
        assert positions * position <= held <= (positions + 2 * 64) * position
    engine.cancel(sequence)


@compiled
def test_embeddings_lie_in_pages_of_their_own(pair: tuple[Gemma3, Int8Runner]) -> None:
    _, quick = pair
    seen = [picture.pixels for picture in a_prompt(0, 40, [3, 20]).pictures]
    found = quick.encode(seen)
    assert quick.vision is not None
    for embedding, pixels in zip(found, seen, strict=True):
        assert embedding.ctypes.data % mmap.PAGESIZE == 0
        assert np.array_equal(embedding, quick.vision.encode(pixels))
    assert found[0].ctypes.data != found[1].ctypes.data


@compiled
def test_a_row_is_the_same_to_the_bit_in_any_company(pair: tuple[Gemma3, Int8Runner]) -> None:
    """Alone or with others, in one piece or in small ones, after a prefix hit or not."""
    _, quick = pair
    prompts = [
        a_prompt(0, 200, [10, 63, 90, 126]),
        a_prompt(1, 333, []),
        a_prompt(2, 7, [2]),
        a_prompt(3, 64, []),
    ]
    alone = [read(Engine(quick, prefix_cache=False), prompt)[0] for prompt in prompts]
    for rows in (64, 100, 5):
        for found, wanted in zip(read(Engine(quick, rows=rows), *prompts), alone, strict=True):
            np.testing.assert_array_equal(found, wanted)
    longer = Prompt([*prompts[1].ids, *prompts[3].ids])
    (whole,) = read(Engine(quick), longer)
    engine = Engine(quick)
    read(engine, *prompts)
    tail: list[np.ndarray] = []
    sequence = engine.add(
        longer, max_new_tokens=0, inspect=lambda _, logits: tail.append(logits.copy()), inspect_from=340
    )
    while not engine.idle:
        engine.step()
    assert sequence.cached == 333
    np.testing.assert_array_equal(np.stack(tail), whole[340:])


@compiled
def test_the_shipped_model_answers_as_before(root: Path) -> None:
    """nano in int8: the greedy answers to pictures, and the memory."""
    plain, quick = load("nano", dtype="float32"), load("nano", quantize="int8")
    assert isinstance(quick.runner, Int8Runner)
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
    assert quick.runner.weight_bytes < 0.28 * decoder
    assert "".join(quick.stream(asked[0], max_new_tokens=16, temperature=0)) == answers(quick)[0]


@compiled
def test_the_command_line_asks_in_int8(cli: Callable, root: Path) -> None:
    done = cli("ask", root / "docs" / "elephant.png", "Apa ini?", "--quantize", "int8")
    assert done.code == 0 and done.out.strip() == "gajah"
    wrong = cli("ask", root / "docs" / "elephant.png", "Apa ini?", "--quantize", "int3")
    assert wrong.code == 2 and "unknown quantisation 'int3'. Use one of int8" in wrong.err


def test_what_it_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SeavlmError, match="unknown quantisation 'int3'"):
        load("nano", quantize="int3")
    with pytest.raises(SeavlmError, match="int4 is for a GPU"):
        load("nano", quantize="int4", device="cpu")
    if kernels.library() is not None:
        with pytest.raises(SeavlmError, match="multiples of 32, and intermediate_size is 100"):
            int8(a_model(intermediate_size=100))
    monkeypatch.setattr(kernels, "library", lambda: None)
    with pytest.raises(SeavlmError, match=r"built without a C\+\+ compiler.*apt install g\+\+"):
        int8(a_model())


@compiled
def test_two_models_work_at_once_as_if_alone() -> None:
    """In two threads: the kernels' scratch memory is one."""
    models = [load(name, device="cpu", quantize="int8") for name in ("nano", "nano-global")]
    shades = [Image.new("RGB", (32, 32), (shade, 9, 90)) for shade in range(0, 250, 10)]
    asked = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": shade}, {"type": "text", "text": "Apa ini?"}],
            }
        ]
        for shade in shades
    ]

    def replies(vlm: VLM) -> list[tuple[str, list[float]]]:
        told = vlm.generate_batch(asked, max_new_tokens=6, temperature=0, logprobs=0)
        return [(one.text, [token.logprob for token in one.logprobs]) for one in told]

    alone = [replies(vlm) for vlm in models]
    with ThreadPoolExecutor(2) as both:
        assert list(both.map(replies, models)) == alone


def test_fewer_threads_while_others_keep_the_cores_busy() -> None:
    now = 0.0
    pace = kernels.Pace(4, lambda: now)

    def steps(share: float, count: int = 10) -> list[int]:
        """Of a hundredth of a second each, of which the caller's thread had a core for `share`."""
        nonlocal now
        taken = []
        for _ in range(count):
            with pace.step() as threads:
                taken.append(threads)
            now += 0.01
            pace.note(0.01, 0.01 * share)
        return taken

    assert set(steps(1.0)) == {4}
    assert steps(0.2, 11)[-1] == 1  # 4, then 2, then 1
    assert set(steps(1.0, 20)) == {1}  # for a while
    assert steps(1.0, 90)[-1] == 2  # more are tried, one doubling at a time
    assert steps(1.0, 60)[-1] == 4
    assert kernels.pace(3).threads == 3 and kernels.pace(None) is kernels.pace(None)


@compiled
def test_replies_do_not_depend_on_the_number_of_threads() -> None:
    vlm = load("nano", device="cpu", quantize="int8")
    image = Image.new("RGB", (60, 40), (200, 30, 30))
    asked = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Ini?"}]}
    ]
    found = []
    for threads in (1, 2, 3):
        vlm.runner.pace = vlm.runner.vision.pace = kernels.pace(threads)  # type: ignore[attr-defined]
        vlm.engine._embeddings.clear()
        vlm.engine.pages.forget() if hasattr(vlm.engine.pages, "forget") else None
        found.append(vlm.logits(asked))
    assert all(torch.equal(one, found[0]) for one in found)
