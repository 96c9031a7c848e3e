"""The model on a GPU beside itself on the CPU in float32: text and pictures, shorter and longer than the
sliding window, whole and through a cache, in the engine with its CUDA graphs, in float32 and in bfloat16.

    python benchmarks/gpu/parity.py --out benchmarks/gpu/parity.json
    python benchmarks/gpu/parity.py --device cpu --models nano --size toy  # to try it

Two models: the built-in nano, its own weights; and "slice", random weights of the widths, heads, window and
pictures of a large size in a few layers. For each case and each way of reading it: the largest difference of
two logits, the mean over positions of KL(CPU || GPU) in nats, and the share of positions whose likeliest
token is the same. Then greedy replies of the engine, up to the first other token. Ways:

    whole         one forward pass, no cache
    cache         prefill in two pieces, then a token at a time
    engine        our kernels, all cases of the model at once: prefill, then a token at a time
    torch engine  the same without our kernels

Exit code 1 where a row is outside the tolerance of its dtype (TOLERANCE), or a float32 reply differs. In
bfloat16 replies may part where two tokens are all but equal. No TF32 anywhere.

Shapes: T tokens, N pictures, S pixels a side, V vocabulary rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed import attention_used, device_name
from torch import Tensor

from seavlm.engine.bench import declaration, machine
from seavlm.engine.cache import KVCache
from seavlm.engine.engine import Engine
from seavlm.engine.sampler import Sampling
from seavlm.engine.sequence import Picture, Prompt
from seavlm.engine.torch_runner import TorchRunner
from seavlm.model.config import GLOBAL, LOCAL, Gemma3Config
from seavlm.model.gemma3 import Gemma3
from seavlm.parity import small_config
from seavlm.text.tokenizer import Tokenizer
from seavlm.weights.checkpoint import load_into, open_checkpoint
from seavlm.weights.refs import resolve

STEPS = 16  # tokens that are read one at a time
REPLY = 32  # greedy tokens
GREEDY = Sampling(temperature=0)
# dtype: largest difference over the largest logit, mean KL in nats, share of likeliest tokens that agree
TOLERANCE = {"float32": (1e-4, 1e-7, 0.998), "bfloat16": (0.03, 2e-3, 0.9)}


@dataclasses.dataclass
class Case:
    """A prompt: ids [1, T] and pixels [N, 3, S, S] or None."""

    name: str
    ids: Tensor
    pixels: Tensor | None = None

    @property
    def prefill(self) -> int:
        """Tokens before those that are read one at a time."""
        return self.ids.shape[1] - STEPS


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--size", default="4b", help="of the slice: 4b, 12b, 27b or toy")
    parser.add_argument("--models", default="nano,slice")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--out", type=Path, default=Path("parity.json"))
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_grad_enabled(False)
    device, rows = torch.device(options.device), list[dict[str, Any]]()
    told: dict[str, Any] = {"machine": machine() | {"device": device_name(device)}, "size": options.size}
    told |= {"tolerance": TOLERANCE, "rows": rows}
    for name in options.models.split(","):
        began = time.perf_counter()
        model, cases = nano() if name == "nano" else a_slice(options.size)
        right = {case.name: whole(model, case) for case in cases}
        runner = TorchRunner(model)
        replies = greedy(runner, cases)
        print(f"{name} on the CPU: {time.perf_counter() - began:.1f} s", flush=True)
        for dtype in options.dtypes.split(","):
            other = moved(model, device, getattr(torch, dtype))
            key = f"attention, {name}, {dtype}"
            told[key] = {}
            for case in cases:
                ways = {"whole": whole, "cache": through_cache}
                for way, read in ways.items():
                    rows.append(compared(name, dtype, case.name, way, right[case.name], read(other, case)))
                told[key][case.name] = attention_used(lambda m=other, c=case: whole(m, c))
            for way, kind in runners(device).items():  # the second takes over the weights
                try:
                    rows += through_engine(kind(other), cases, right, replies, name, dtype, way)
                except Exception as error:  # the other rows are worth having
                    said = f"{type(error).__name__}: {error}"
                    rows.append({"model": name, "dtype": dtype, "way": way, "error": said, "holds": False})
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
        options.out.write_text(json.dumps(told, indent=1) + "\n")
    for row in rows:
        print(line(row))
    print(json.dumps({key: value for key, value in told.items() if key.startswith("attention")}))
    return 0 if all(row["holds"] for row in rows) else 1


def runners(device: torch.device) -> dict[str, Any]:
    """The engine's, by name: of the plain model, and on a GPU the one of our kernels."""
    found: dict[str, Any] = {"torch engine": TorchRunner}
    if device.type == "cuda":
        from seavlm.engine.gpu import GpuRunner

        found["engine"] = GpuRunner
    return found


def through_engine(
    runner: Any,
    cases: list[Case],
    right: dict[str, Tensor],
    replies: list[list[int]],
    model: str,
    dtype: str,
    way: str,
) -> list[dict[str, Any]]:
    """Rows of the table: the logits of each case, and its reply."""
    rows = []
    for case, logits in zip(cases, forced(runner, cases), strict=True):
        rows.append(compared(model, dtype, case.name, way, right[case.name][:-1], logits))
    for case, wanted, got in zip(cases, replies, greedy(runner, cases), strict=True):
        same = int(np.cumprod(np.equal(wanted, got)).sum())
        rows.append(
            {
                "model": model, "dtype": dtype, "case": case.name, "way": f"{way}, reply",
                "equal tokens": same, "tokens": REPLY, "holds": same == REPLY or dtype != "float32",
            }
        )  # fmt: skip
    return rows


def line(row: dict[str, Any]) -> str:
    """Of the table."""
    head = "    " if row["holds"] else "FAIL"
    head += f" {row['model']:5} {row['dtype']:8} {row.get('case', ''):32} {row['way']:19}"
    if "error" in row:
        return f"{head} {row['error']}"
    if "tokens" in row:
        return f"{head} {row['equal tokens']} / {row['tokens']}"
    difference = f"{row['max difference']:.1e} of {row['largest logit']:.1f}"
    return f"{head} {difference:18} KL {row['mean KL']:.1e}  same {row['same token']:.4f}"


def compared(model: str, dtype: str, case: str, way: str, right: Tensor, got: Tensor) -> dict[str, Any]:
    """A row of the table, of logits [T, V] on the CPU."""
    most = float(right.abs().max())
    difference = float((right - got).abs().max())
    p, q = (x.double().log_softmax(-1) for x in (right, got))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    same = float((right.argmax(-1) == got.argmax(-1)).double().mean())
    far, nats, share = TOLERANCE[dtype]
    return {
        "model": model, "dtype": dtype, "case": case, "way": way, "max difference": difference,
        "largest logit": most, "mean KL": kl, "same token": same,
        "holds": difference <= far * most and kl <= nats and same >= share,
    }  # fmt: skip


def moved(model: Gemma3, device: torch.device, dtype: torch.dtype) -> Gemma3:
    """A copy."""
    copy = Gemma3(model.config, device="meta")
    weights = {name: weight.to(device, dtype, copy=True) for name, weight in model.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    return copy.eval()


# --- models and what they read


def nano() -> tuple[Gemma3, list[Case]]:
    """The built-in model, in float32, and texts with and without pictures."""
    path = resolve("nano")
    checkpoint = open_checkpoint(path)
    model = Gemma3(checkpoint.config, device="meta")
    load_into(model, checkpoint, dtype=torch.float32)
    tokenizer = Tokenizer.from_dir(path)
    ids = [tokenizer.bos_id]
    for text in declaration().values():
        ids += tokenizer.encode(text)[:200]
    return model.eval(), cases(model.config, torch.tensor(ids[1:]), tokenizer.bos_id)


def a_slice(size: str) -> tuple[Gemma3, list[Case]]:
    """A local and a global layer, four of the tower's, and a small vocabulary, of random weights large enough
    that attention picks and every norm matters."""
    config = small_config() if size == "toy" else Gemma3Config.named(size)
    assert config.vision is not None
    text = dataclasses.replace(config.text, num_hidden_layers=2, layer_types=(LOCAL, GLOBAL))
    if size != "toy":
        text = dataclasses.replace(text, vocab_size=8192)
    tower = dataclasses.replace(config.vision, num_hidden_layers=min(4, config.vision.num_hidden_layers))
    config = dataclasses.replace(config, text=text, vision=tower)
    model = Gemma3(config, device="meta").to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            weight.copy_(noise * weight[0].numel() ** -0.5)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.copy_(0.3 * noise)
        elif name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            weight.copy_(8 + 0.2 * noise)  # else a token foretells itself, as the head is the embedding
        else:
            weight.copy_(0.2 * noise + float("layer_norm" in name and name.endswith("weight")))
    ids = torch.randint(3, min(250, text.vocab_size), (text.sliding_window * 2 + 400,), generator=generator)
    return model.eval(), cases(config, ids, 2)


def cases(config: Gemma3Config, ids: Tensor, first: int) -> list[Case]:
    """Texts shorter and longer than the window; pictures in both, in the longer one also past its window."""
    assert config.vision is not None
    window, size, tokens = config.text.sliding_window, config.vision.image_size, config.mm_tokens_per_image
    short, long = max(window // 2, tokens + STEPS + 8), window + max(window // 3, tokens + STEPS + 16)
    generator = torch.Generator().manual_seed(1)
    made = []
    for length, places in ((short, ()), (long, ()), (short, (4,)), (long, (4, long - STEPS - tokens - 4))):
        own = torch.cat([torch.tensor([first]), ids[: length - 1]])[None].clone()
        for place in places:
            own[0, place : place + tokens] = config.image_token_index
        coarse = torch.rand(len(places), 3, 7, 7, generator=generator) * 2 - 1
        smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic") if places else None
        name = f"{f'{len(places)} pictures' if places else 'text'}, {length} of window {window}"
        made.append(Case(name, own, smooth))
    return made


# --- ways of reading them; each returns float32 logits on the CPU


def whole(model: Gemma3, case: Case) -> Tensor:
    """[T, V]"""
    pixels = None if case.pixels is None else case.pixels.to(model.device, model.dtype)
    return model(case.ids.to(model.device), pixel_values=pixels)[0].float().cpu()


def through_cache(model: Gemma3, case: Case) -> Tensor:
    """[T, V]: the prompt in two pieces, which no picture lies across, then a token at a time."""
    ids, found = case.ids.to(model.device), []
    seen = (ids[0] == model.config.image_token_index).tolist()
    cut = next(i for i in range(case.prefill // 2, case.prefill) if not seen[i])
    cache = KVCache(model.config, 1, ids.shape[1], model.device, model.dtype)
    edges = [0, cut, *range(case.prefill, ids.shape[1] + 1)]
    pictures = None if case.pixels is None else case.pixels.to(model.device, model.dtype)
    per, done = model.config.mm_tokens_per_image, 0
    for start, end in itertools.pairwise(edges):
        count = sum(seen[start:end]) // per
        pixels = pictures[done : done + count] if pictures is not None and count else None
        done += count
        found.append(model(ids[:, start:end], pixel_values=pixels, cache=cache)[0])
    return torch.cat(found).float().cpu()


def forced(runner: TorchRunner, cases: list[Case]) -> list[Tensor]:
    """[T - 1, V] of each case: the engine may only say what the case has."""
    found: list[list[np.ndarray]] = [[] for _ in cases]
    engine = an_engine(runner, cases)
    asked = []
    for case, logits in zip(cases, found, strict=True):
        ids = case.ids[0].tolist()

        def only(said: Any, ids: list[int] = ids, start: int = case.prefill) -> np.ndarray:
            allowed = np.zeros(engine.limit, bool)
            allowed[ids[start + len(said)]] = True
            return allowed

        def keep(_: int, row: np.ndarray, logits: list[np.ndarray] = logits) -> None:
            logits.append(row.copy())

        prompt = a_prompt(runner.config, ids[: case.prefill], case.pixels)
        asked.append(engine.add(prompt, GREEDY, max_new_tokens=STEPS, stop_ids=(), mask=only, inspect=keep))
    run(engine, asked)
    return [torch.from_numpy(np.stack(logits)) for logits in found]


def greedy(runner: TorchRunner, cases: list[Case]) -> list[list[int]]:
    """REPLY ids of each case."""
    engine = an_engine(runner, cases)
    asked = [
        engine.add(
            a_prompt(runner.config, case.ids[0].tolist(), case.pixels),
            GREEDY,
            max_new_tokens=REPLY,
            stop_ids=(),
        )
        for case in cases
    ]
    run(engine, asked)
    return [sequence.ids for sequence in asked]


def an_engine(runner: TorchRunner, cases: list[Case]) -> Engine:
    """For all cases at once."""
    tokens = sum(case.ids.shape[1] + REPLY + 64 for case in cases)
    return Engine(runner, max_sequences=len(cases), cache_tokens=tokens, prefix_cache=False)


def a_prompt(config: Gemma3Config, ids: list[int], pixels: Tensor | None) -> Prompt:
    """With its pictures."""
    views = [] if pixels is None else list(pixels.float().numpy())
    return Prompt(ids, tuple(Picture(view, hashlib.sha256(view.tobytes()).digest()) for view in views))


def run(engine: Engine, asked: list[Any]) -> None:
    """To the end."""
    while not all(sequence.finished for sequence in asked):
        engine.step()
    for sequence in asked:
        if sequence.error is not None:
            raise sequence.error.__cause__ or sequence.error


if __name__ == "__main__":
    sys.exit(main())
