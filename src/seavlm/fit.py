"""How much memory a model will take on this machine's CPU, before it is run.

For inference to within a twentieth, mostly; benchmarks/fit.json has what was said
and what was taken. Fine-tuning takes more than is said where the allocator keeps what is freed.

    found = fit(Path("out/small"), context=4096, batch=8)
    found.peak, found.parts                       # bytes; what for

Weights, pages, and the memory of a step follow from shapes. What Python, its libraries and the tokenizer take
is not a matter of shapes: a process that loads only these is started and asked.

Shapes: R rows of a step, C width, F feed-forward width, H heads, G KV heads, D head dim, V vocabulary rows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from seavlm.doctor import available_memory
from seavlm.engine.bench import lines_of
from seavlm.engine.engine import pool_sizes
from seavlm.engine.int8 import Int8Runner, head_bytes
from seavlm.engine.pages import BLOCK
from seavlm.engine.quantize import BITS, EIGHT, is_quantized, kind_of, map_weights
from seavlm.engine.runner import page_bytes, physical_memory
from seavlm.errors import SeavlmError, nearest
from seavlm.model.config import GLOBAL, LOCAL, Gemma3Config

TORCH_ROWS = 2048  # TorchRunner.rows, without importing PyTorch


@dataclass(frozen=True)
class Fit:
    """Bytes. parts: name -> bytes while it runs; they add up to `running`. loading: the most before that."""

    parts: dict[str, int]
    loading: int
    available: int

    @property
    def running(self) -> int:
        return sum(self.parts.values())

    @property
    def peak(self) -> int:
        return max(self.running, self.loading)

    @property
    def fits(self) -> bool:
        return self.peak <= self.available


def fit(
    path: Path,
    *,
    context: int = 4096,
    batch: int = 1,
    images: int = 0,
    quantize: str | None = None,
    dtype: str = "float32",
    train: str | None = None,
    lora_rank: int = 16,
    recompute: bool = False,
) -> Fit:
    """Peak memory of `batch` requests of `context` tokens each (reply included), `images` pictures in each.

    quantize, dtype: as `seavlm.load` takes them. train: "full" or "lora", of fine-tuning instead: `batch`
    packed rows of `context` tokens in a pass (`train.micro_rows`, `train.max_seq_len`), the tower frozen;
    recompute: with `train.recompute`. On a CPU. SeavlmError for what the model cannot do.
    """
    packed = is_quantized(path)
    if train is not None:
        if train not in ("lora", "full"):
            raise SeavlmError(f"--train {train}", hint=f"Use lora or full.{nearest(train, ['lora', 'full'])}")
        if packed or quantize:
            raise SeavlmError("quantised weights cannot be trained", hint="Give a model with plain weights.")
        rank = lora_rank if train == "lora" else None
        return _training(
            path,
            context=context,
            batch=batch,
            images=images,
            dtype=dtype,
            rank=rank,
            recompute=recompute,
        )
    if quantize not in (None, "int8", "stored"):
        raise SeavlmError(f"--quantize {quantize} does not run on the CPU", hint="Use int8 or stored.")
    config = Gemma3Config.from_dir(path) if packed else _config(path)
    _check(config, context, images)
    kernels = packed or quantize is not None
    torch = config.vision is not None
    base = _process(path, torch=torch, pictures=images > 0, quantize=quantize, dtype=dtype)
    weights, loading = _weights(path, config, packed, quantize, dtype)
    rows = min(context * batch, (Int8Runner.rows if kernels else TORCH_ROWS) + batch)
    parts = {
        "Python, libraries, tokenizer": base["after"],
        "weights": weights,
        "pages of the KV cache": sum(_pages(config, context, batch, kernels, dtype)),
        "a step": _step_int8(config, rows, batch, packed)
        if kernels
        else _step_torch(config, rows, batch, context, dtype),
    }
    if images:
        parts["pictures"] = _vision(config, kernels)
    tokenizer = base["peak"] - base["before"]
    loading = max(base["before"] + loading, base["before"] + (0 if packed else weights) + tokenizer)
    return Fit(parts, loading, available_memory())


def _training(
    path: Path,
    *,
    context: int,
    batch: int,
    images: int,
    dtype: str,
    rank: int | None,
    recompute: bool,
) -> Fit:
    """Of fine-tuning with AdamW."""
    from seavlm.train.memory import training_memory

    config = _config(path)
    _check(config, context, images)
    base = _process(path, torch=True, pictures=images > 0, quantize=None, dtype=dtype, train=True)
    found = training_memory(
        config,
        rows=batch,
        tokens=context,
        images=images,
        dtype=dtype,
        lora_rank=rank,
        recompute=recompute,
    )
    parts = {
        "Python, libraries, tokenizer": base["after"],
        "weights": found.weights,
        "moments of AdamW": found.moments,
        "gradients": found.gradients,  # of the passes before, as a step has several
        "a pass, or a checkpoint": max(
            found.activations + found.loss, found.tied, found.moments - found.gradients
        ),
    }
    return Fit(parts, base["before"] + _weights(path, config, False, None, "float32")[1], available_memory())


def what_would_fit(path: Path, **given: Any) -> list[str]:
    """Changes to what `fit` was given, each alone, that bring the peak under what is free."""
    changes: list[tuple[str, dict[str, Any]]] = []
    if not is_quantized(path):
        if given.get("train") and not given.get("recompute"):
            changes.append(("--recompute", {"recompute": True}))
        if given.get("train") == "full":
            changes.append(("--train lora", {"train": "lora"}))
        if given.get("quantize") is None and given.get("train") is None:
            changes.append(("--quantize int8", {"quantize": "int8"}))
        if path.suffix == ".gguf" and given.get("quantize") != "stored" and given.get("train") is None:
            changes.append(("--quantize stored", {"quantize": "stored"}))
        if given.get("dtype") == "float32" and given.get("quantize") is None:
            changes.append(("--dtype bfloat16", {"dtype": "bfloat16"}))
    for name in ("batch", "context"):
        size = given.get(name, 1) // 2
        while size >= (1 if name == "batch" else 512):
            if fit(path, **(given | {name: size})).fits:
                changes.append((f"--{name} {size}", {name: size}))
                break
            size //= 2
    found = [(text, fit(path, **(given | change))) for text, change in changes]
    lines = [f"{text}: {one.peak / 2**20:,.0f} MiB" for text, one in found if one.fits]
    return lines or ["Nothing that seavlm can change would make it fit here: take a smaller model."]


def _check(config: Gemma3Config, context: int, images: int) -> None:
    """SeavlmError for what the model cannot do."""
    if context > config.text.max_position_embeddings:
        raise SeavlmError(
            f"the model reads at most {config.text.max_position_embeddings:,} tokens, not {context:,}",
            hint="Give a smaller --context.",
        )
    if images and config.vision is None:
        raise SeavlmError("this model is text-only", hint="Leave out --images.")


def _config(path: Path) -> Gemma3Config:
    from seavlm.weights.checkpoint import open_checkpoint

    return open_checkpoint(path).config


def _itemsize(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 4


@cache
def _process(
    path: Path, *, torch: bool, pictures: bool, quantize: str | None, dtype: str, train: bool = False
) -> dict[str, int]:
    """Bytes of a process with everything but the model: `before` and `after` the tokenizer, `peak` meanwhile.

    Libraries are mapped, and take memory as they are used: where there is a tower, the small built-in model
    answers.
    """
    lines = ["import json, sys, gc", "from pathlib import Path", "from seavlm.engine.vlm import load"]
    lines += ["import seavlm.engine.int8, seavlm.fit as fit", "from seavlm.text.tokenizer import Tokenizer"]
    if torch:
        options = {"quantize": "int8"} if quantize else {"dtype": dtype}
        part = "{'type': 'image', 'image': Image.new('RGB', (64, 64))}, " if pictures else ""
        lines += ["from PIL import Image"] if pictures else []
        lines += [f"vlm = load('nano', **{options})"]
        lines += [f"words = [{part}{{'type': 'text', 'text': 'a'}}]"]
        lines += ["vlm.generate([{'role': 'user', 'content': words}], max_new_tokens=2)"]
        lines += ["del vlm", "gc.collect()"]
    elif not is_quantized(path):
        lines += ["import torch, seavlm.engine.torch_runner, seavlm.engine.vision, seavlm.weights.checkpoint"]
    if train:
        lines += ["import seavlm.train.sft, seavlm.data.samples, matplotlib.figure"]
    if path.suffix == ".gguf":
        lines += ["import gguf", "from gguf.quants import dequantize"]
    made = "Tokenizer.from_gguf(path)" if path.suffix == ".gguf" else "Tokenizer.from_dir(path)"
    lines += ["path = Path(sys.argv[1])", "before = fit.resident()", f"tokenizer = {made}"]
    lines += ["tokenizer.encode('a')"]
    lines += ["print(json.dumps(dict(before=before, after=fit.resident(), peak=fit.resident('VmHWM'))))"]
    command = [sys.executable, "-c", "\n".join(lines), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SeavlmError(f"the tokenizer of {path} does not load: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def resident(what: str = "VmRSS") -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far. OSError where the system does not say."""
    for line in lines_of(Path("/proc/self/status")):
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {what} in /proc/self/status")


def _weights(
    path: Path, config: Gemma3Config, packed: bool, quantize: str | None, dtype: str
) -> tuple[int, int]:
    """Bytes that stay, and the most while they are loaded."""
    if packed:
        arrays = map_weights(path)
        mapped = sum(array.nbytes for array in arrays.values())
        if "head.rotation" in arrays:  # the embedding is not mapped
            mapped -= sum(array.nbytes for name, array in arrays.items() if name.startswith("embedding."))
        tower = path / "vision.safetensors"
        return mapped + (_tower_int8(config) if tower.exists() else 0), 0
    from seavlm.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
    text = {name: shape for name, shape in shapes.items() if name.startswith("language_model.")}
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    on_disk = sum(file.stat().st_size for file in files)
    largest = max(prod(shape) for shape in shapes.values())
    if quantize is None:
        held = sum(prod(shape) for shape in shapes.values()) * _itemsize(dtype)
        largest *= 4 + _itemsize(dtype)  # of a .gguf file: dequantised, and then its copy
        return held, on_disk + (max(held, largest) if path.is_file() else held)
    held = sum(_packed_bytes(path, checkpoint, name, shape, quantize) for name, shape in text.items())
    if config.vision is not None:
        held += _tower_int8(config)
    return held, held + on_disk


def _packed_bytes(path: Path, checkpoint: object, name: str, shape: tuple[int, ...], quantize: str) -> int:
    """Of one tensor as the kernels hold it: 8.5 bits a weight, or what its GGUF type comes to."""
    if len(shape) < 2:
        return prod(shape) * 4
    kind = kind_of(checkpoint.blocks(name)[0]) if quantize == "stored" else EIGHT  # type: ignore[attr-defined]
    return int(prod(shape) * BITS[kind] / 8)


def _pages(config: Gemma3Config, context: int, batch: int, kernels: bool, dtype: str) -> Iterator[int]:
    """Bytes of the pages that are written, of each kind of layer: one after the other is filled, also those
    that a local layer's window has left behind (the prefix cache keeps them), until the pool has no more."""
    size = head_bytes(config) if kernels else config.text.head_dim * _itemsize(dtype)
    bytes_of = {kind: page_bytes(config, kind, size) for kind in (GLOBAL, LOCAL)}
    rows = Int8Runner.rows if kernels else TORCH_ROWS
    pool = pool_sizes(config, bytes_of, physical_memory() // 4, rows=rows)
    for kind in (GLOBAL, LOCAL):
        yield min(pool[kind], batch * -(-context // BLOCK)) * bytes_of[kind]


def _step_int8(config: Gemma3Config, rows: int, batch: int, stored_rows: bool) -> int:
    """The kernels' scratch memory and the logits."""
    t = config.text
    heads, kv = t.num_attention_heads, t.num_key_value_heads
    floats = (heads + 2 * kv) * t.head_dim + heads * t.head_dim + 3 * t.hidden_size + t.intermediate_size
    floats += 2 * t.head_dim  # cos and sin of both kinds
    widest = max(t.intermediate_size, heads * t.head_dim, t.hidden_size)
    act = widest + widest // 32 * 16
    if stored_rows:  # blocks of 16 rows of the embedding, 8.5 bits a weight
        act += 17 * t.hidden_size
    queries = heads * (t.head_dim + 48)
    return rows * (4 * floats + act + queries) + batch * t.vocab_size * 4


def _step_torch(config: Gemma3Config, rows: int, batch: int, context: int, dtype: str) -> int:
    """What PyTorch holds at once in a layer of a long chunk, and the logits."""
    t, size = config.text, _itemsize(dtype)
    keys = min(context, rows + t.sliding_window) if context > rows else context
    layer = (
        rows * (2 * t.intermediate_size + 3 * t.hidden_size + 4 * t.num_attention_heads * t.head_dim) * size
    )
    gathered = 2 * batch * keys * t.num_attention_heads * t.head_dim * size
    return layer + gathered + batch * t.vocab_size * (4 + size)


def _tower_int8(config: Gemma3Config) -> int:
    """The tower as vision.cpp holds it: two bytes a weight and a scale for each 128."""
    v = config.vision
    assert v is not None
    layer = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
    rest = 3 * v.patch_size**2 * v.hidden_size + v.hidden_size * config.text.hidden_size
    patches = (v.image_size // v.patch_size) ** 2
    return int(v.num_hidden_layers * layer * (2 + 4 / 128)) + 4 * (rest + patches * v.hidden_size)


def _vision(config: Gemma3Config, kernels: bool) -> int:
    """Pixels and the tower's activations of one picture."""
    v = config.vision
    assert v is not None
    patches = (v.image_size // v.patch_size) ** 2
    floats = patches * (6 * v.hidden_size + 2 * v.intermediate_size)
    if not kernels:
        floats += patches * patches  # of one head at a time
    return 4 * (floats + 3 * v.image_size**2)
