"""The kernels for a GPU and their runner: on a GPU, or else on the CPU by Triton's interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

from seavlm.engine import gpu_kernels as kernels  # noqa: E402
from seavlm.engine.engine import Engine  # noqa: E402
from seavlm.engine.gpu import GpuRunner, best  # noqa: E402
from seavlm.engine.sampler import Sampling  # noqa: E402
from seavlm.engine.sequence import Prompt  # noqa: E402
from seavlm.engine.torch_runner import TorchRunner  # noqa: E402
from seavlm.engine.weight_only import Matrix, four_bits  # noqa: E402
from seavlm.errors import SeavlmError  # noqa: E402
from seavlm.model.config import GLOBAL, LOCAL  # noqa: E402
from seavlm.model.layers import RMSNorm  # noqa: E402
from seavlm.parity import random_model  # noqa: E402
from tests.engine.test_engine import CONFIG as ENGINE_CONFIG  # noqa: E402
from tests.engine.test_engine import a_prompt  # noqa: E402


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def off(x: torch.Tensor, exact: torch.Tensor) -> float:
    return float((x.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("parts", [0, 1, 2])
def test_add_norm(parts: int) -> None:
    x, d, (a, b) = random(3, 150), random(max(1, parts), 3, 150, seed=1), random(2, 150, seed=2)
    norm, then = RMSNorm(150, 1e-6), RMSNorm(150, 1e-6)
    norm.weight.data, then.weight.data = a, b
    out, h = kernels.add_norm(x, d if parts else None, a if parts else None, b, 1e-6)
    with torch.no_grad():
        expected = x + norm(d.sum(0)) if parts else x
        assert off(out, expected) < 1e-6 and off(h, then(expected)) < 1e-6


def test_geglu() -> None:
    x = 4 * random(3, 300)
    gate, up = x.chunk(2, 1)
    assert off(kernels.geglu(x), F.gelu(gate, approximate="tanh") * up) < 1e-6


@pytest.mark.parametrize(  # a gate needs the whole sum: one part
    ("gated", "rows", "parts"),
    [(False, 1, 1), (False, 5, 3), (False, 40, 1), (True, 1, 1), (True, 40, 1)],
)
def test_few(gated: bool, rows: int, parts: int) -> None:
    w, x = random(2 * 70, 400, dtype=torch.bfloat16), random(rows, 400, seed=1, dtype=torch.bfloat16)
    y = kernels.few(x, w, gated=gated, wide=True, tile=(32, 128, parts, 4, 2))
    exact = product(x, w, gated)
    assert y.shape[0] == parts and off(y.sum(0), exact) < 3e-3
    narrow = Matrix(w).gated(x) if gated else Matrix(w).times(x)[0]
    assert isinstance(narrow, torch.Tensor) and narrow.dtype == torch.bfloat16 and off(narrow, exact) < 6e-3


def product(x: torch.Tensor, w: torch.Tensor, gated: bool) -> torch.Tensor:
    y = x.double() @ w.double().T
    if gated:
        gate, up = y.chunk(2, 1)
        y = F.gelu(gate, approximate="tanh") * up
    return y


def whole(x: kernels.Planes) -> torch.Tensor:
    """What the integers stand for."""
    q = x.q.double().unflatten(2, (-1, kernels.GROUP))
    assert torch.allclose((q.sum(3) * x.scales).float(), x.totals, atol=1e-5 * float(x.scales.max()) * 127)
    return (q * x.scales[..., None]).flatten(2).sum(0)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(
    ("gated", "rows", "parts"),
    [(False, 1, 1), (False, 5, 4), (False, 40, 1), (True, 1, 1), (True, 40, 1)],
)
def test_few_rounded(kind: str, gated: bool, rows: int, parts: int) -> None:
    outputs = 512 if gated else 256
    w, x = random(outputs, 384), random(rows, 384, seed=1)
    x[:, 7] *= 100  # one that is much larger than the others
    planes = kernels.planes(x)
    assert off(whole(planes), x) < 1e-4
    matrix = Matrix.rounded(w, kind)
    assert matrix.scales is not None
    near = kernels.unpack(matrix.weight, matrix.scales, matrix.zeros, torch.float32)
    assert off(near, w) < (0.01 if kind == "int8" else 0.11)
    exact = product(whole(planes), near, gated)
    if gated:
        y = matrix.gated(planes)
        assert isinstance(y, kernels.Planes)
        assert off(whole(y), exact) < (1e-3 if rows <= 16 else 1e-2)  # bfloat16 between
    else:
        tile = (64, parts, 4, 2)
        y = kernels.few_rounded(planes, matrix.weight, matrix.scales, matrix.zeros, torch.float32, tile=tile)
        assert y.shape[0] == parts and off(y.sum(0), exact) < 1e-5


def test_some_parts_have_nothing_to_do() -> None:
    w, x = random(128, 640), random(2, 640, seed=1)
    for kind in ("int8", "int4"):
        matrix = Matrix.rounded(w, kind)
        y = matrix.times(kernels.planes(x), splits=True)
        near = kernels.unpack(matrix.weight, matrix.scales, matrix.zeros, torch.float32)
        assert len(y) == 4 and off(y.sum(0), x @ near.T) < 1e-4


def test_norms_and_attention_can_hand_on_integers() -> None:
    x, b = random(3, 384), random(384, seed=1)
    exact = kernels.add_norm(x, None, None, b, 1e-6)[1]
    assert off(whole(kernels.add_norm(x, None, None, b, 1e-6, split=True)[1]), exact) < 1e-4
    heads, dim, kv = 4, 256, 2
    q, keys, values = random(2, heads, dim), random(9, 64, kv, dim, seed=1), random(9, 64, kv, dim, seed=2)
    rows = torch.tensor([[0, 200, 200], [1, 70, 70]], dtype=torch.int32, device=DEVICE)
    table = torch.tensor([[3, 1, 4, 2], [5, 8, 0, 0]], dtype=torch.int32, device=DEVICE)
    for window in (2**30, 100):
        expected = []
        for row, (slot, position, _) in enumerate(rows.tolist()):
            seen = range(max(0, position - window + 1), position + 1)
            k, v = (x[table[slot].long()].flatten(0, 1)[list(seen)].transpose(0, 1) for x in (keys, values))
            expected.append(F.scaled_dot_product_attention(q[row][:, None], k, v, scale=0.1, enable_gqa=True))
        exact = torch.stack(expected).flatten(1)
        for parts in (1, 4):
            y = kernels.attend_one(q, keys, values, rows, table, 0.1, window, parts)
            assert isinstance(y, torch.Tensor) and off(y, exact) < 1e-5
            y = kernels.attend_one(q, keys, values, rows, table, 0.1, window, parts, split=True)
            assert isinstance(y, kernels.Planes) and off(whole(y), exact) < 1e-4


def test_four_bits_are_better_than_the_range_of_a_group() -> None:
    w = random(64, 256)
    packed, scales, zeros = four_bits(w)
    near = kernels.unpack(packed, scales, zeros, torch.float32)
    groups = w.unflatten(1, (-1, kernels.GROUP))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = (high - low) / 15
    plain = (((groups - low) / step).round() * step + low).flatten(1)
    assert off(near, w) < 0.95 * off(plain, w)


@pytest.mark.parametrize("k", [1, 5, 64])
@pytest.mark.parametrize("size", [100, 512 * 20, 64 * 101, 262_145])
def test_best(k: int, size: int) -> None:
    x = random(3, size)
    x[1, 7], x[2, size - 1], x[0, 3] = 100, float("nan"), 50
    ids, values = best(x, k, torch.tensor([3], device=DEVICE)).cpu()
    assert ids[1, 0] == 7 and ids[2, 0] == size - 1
    x[:, 3] = -torch.inf
    expected = x.cpu().topk(k, dim=1)
    assert torch.equal(ids[:2], expected.indices[:2].double())
    assert torch.equal(values[:2], expected.values[:2].double())


@pytest.mark.parametrize("rows", [40, 400])
def test_the_runner_is_the_model(rows: int) -> None:
    """Text and pictures, chunks and not, beyond the window, alone and together: its logits, its tokens."""
    text = dataclasses.replace(ENGINE_CONFIG.text, num_hidden_layers=2, layer_types=(LOCAL, GLOBAL))
    config = dataclasses.replace(ENGINE_CONFIG, text=text)
    if rows == 400:  # the placeholder of pictures need not be in the vocabulary
        config = dataclasses.replace(config, image_token_index=config.text.vocab_size + 7)
    model, other = random_model(config), random_model(config)
    other.load_state_dict(model.state_dict())
    engines = [
        Engine(TorchRunner(model), rows=rows),
        Engine(GpuRunner(other, device=DEVICE), rows=rows),
    ]

    def shown(prompt: Prompt) -> Prompt:
        ids = [config.image_token_index if i == ENGINE_CONFIG.image_token_index else i for i in prompt.ids]
        return Prompt(ids, prompt.pictures)

    found: list[list[np.ndarray]] = [[], []]
    replies = []
    for engine, seen in zip(engines, found, strict=True):
        asked = [
            engine.add(prompt, Sampling(temperature=0), max_new_tokens=4, stop_ids=())
            for prompt in (a_prompt(1, 100), a_prompt(2, 3), shown(a_prompt(3, 64, {5: 1, 30: 2})))
        ]
        asked.append(
            engine.add(
                shown(a_prompt(4, 90, {70: 1})),
                max_new_tokens=0,
                inspect=lambda _, row, seen=seen: seen.append(row.copy()),
            )
        )
        while not engine.idle:
            engine.step()
        assert not any(one.error for one in asked)
        replies.append([one.ids for one in asked])
    assert np.abs(np.stack(found[0]) - np.stack(found[1])).max() < 1e-3
    assert replies[0] == replies[1]


class Some:
    """Each time other tokens may follow, a few or many; after some, an error or none."""

    def __init__(self, size: int, seed: int, fails: bool = False) -> None:
        self.size, self.seed, self.fails = size, seed, fails

    def __call__(self, ids: Sequence[int]) -> np.ndarray:
        if self.fails and len(ids) == 1:
            raise SeavlmError("no more")
        share = np.random.default_rng([self.seed, len(ids)])
        return share.random(self.size) < (0.02, 0.5)[len(ids) % 2]

    def bits(self, ids: Sequence[int]) -> np.ndarray:
        allowed = np.pad(self(ids), (0, -self.size % 32))
        return np.packbits(allowed, bitorder="little").view(np.int32)


def test_masks_on_the_gpu_are_those_of_the_cpu() -> None:
    text = dataclasses.replace(ENGINE_CONFIG.text, num_hidden_layers=1, layer_types=(GLOBAL,))
    config = dataclasses.replace(ENGINE_CONFIG, text=text, vision=None)
    model, other = random_model(config), random_model(config)
    other.load_state_dict(model.state_dict())
    replies = []
    for runner in (TorchRunner(model), GpuRunner(other, device=DEVICE)):
        engine = Engine(runner, rows=60)
        asked = [
            engine.add(
                a_prompt(seed, seed),
                sampling,
                max_new_tokens=3,
                stop_ids=(),
                mask=None if seed == 3 else Some(text.vocab_size - 5, seed, fails=seed == 4),
            )
            for seed, sampling in enumerate(
                (Sampling(temperature=0), Sampling(seed=1), Sampling(seed=2, top_p=1.0), Sampling(seed=3)), 1
            )
        ]
        while not engine.idle:
            engine.step()
        replies.append([(one.ids, one.error is None) for one in asked])
    assert replies[0] == replies[1]
    assert [(len(ids), fine) for ids, fine in replies[1]] == [(3, True)] * 3 + [(1, False)]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_runner_with_rounded_weights_is_the_model_with_those_weights(kind: str) -> None:
    """Few rows (as integers) and many (unpacked)."""
    text = dataclasses.replace(
        ENGINE_CONFIG.text,
        hidden_size=256, intermediate_size=384, num_attention_heads=2, num_key_value_heads=1, head_dim=128,
        num_hidden_layers=2, layer_types=(LOCAL, GLOBAL),
    )  # fmt: skip
    config = dataclasses.replace(ENGINE_CONFIG, text=text, vision=None)
    model, other = random_model(config).bfloat16(), random_model(config).bfloat16()
    other.load_state_dict(model.state_dict())
    runner = GpuRunner(other, device=DEVICE, quantize=kind)
    runner.try_out()
    assert all(len(part.weight) == 0 for part in other.language_model.layers[0].mlp.children())
    with torch.no_grad():
        for layer, ours in zip(model.language_model.layers, runner._layers, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            for matrix, parts in (
                (ours.qkv, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (ours.out, (attention.o_proj,)),
                (ours.gate_up, (mlp.gate_proj, mlp.up_proj)),
                (ours.down, (mlp.down_proj,)),
            ):
                assert matrix.rounds
                near = kernels.unpack(matrix.weight, matrix.scales, matrix.zeros, torch.float32).cpu()
                for part, weight in zip(parts, near.split([len(p.weight) for p in parts]), strict=True):
                    part.weight.copy_(weight)
    engine, seen = Engine(runner, rows=80), []
    ids = a_prompt(1, 100).ids
    asked = engine.add(
        Prompt(ids), Sampling(temperature=0), max_new_tokens=4, stop_ids=(),
        inspect=lambda _, row: seen.append(torch.from_numpy(row.copy())),
    )  # fmt: skip
    while not engine.idle:
        engine.step()
    assert asked.error is None
    with torch.no_grad():
        exact = model.float()(torch.tensor([ids + asked.ids]))[0]
    p, q = exact[: len(seen)].double().log_softmax(-1), torch.stack(seen).double().log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 3e-4  # bfloat16 between


def test_what_does_not_divide_is_not_rounded() -> None:
    text = dataclasses.replace(
        ENGINE_CONFIG.text, hidden_size=256, intermediate_size=192, num_hidden_layers=2, head_dim=128,
        layer_types=(LOCAL, GLOBAL),
    )  # fmt: skip
    config = dataclasses.replace(ENGINE_CONFIG, text=text, vision=None)
    with pytest.raises(SeavlmError, match="divide into tiles"):
        GpuRunner(random_model(config).bfloat16(), device=DEVICE, quantize="int8")
