"""Supervised fine-tuning: the loop, from the base model to the finished one, top to bottom.

    run(cfg, base=..., data=..., out=..., seed=...)
        out/model/          the trained model, a Hugging Face directory
        out/metrics.jsonl   one line an optimizer step
        out/loss.png        the curve
        out/checkpoints/    to go on after a stop (checkpoint.py)
        out/cache/          tokens, and the pictures' features when the tower is frozen
        out/manifest.json   settings, input hashes, figures, energy and carbon; written last

The loss of a step is the sum over its supervised tokens divided by their number, whatever the packing and
however many forward passes the step takes. Weights, moments and sums are fp32; `dtype: bfloat16` runs the
layers in bf16. `lora_rank` trains adapters instead (model/lora.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from seavlm import manifest
from seavlm.carbon import Meter
from seavlm.errors import SeavlmError, nearest
from seavlm.model.config import Gemma3Config
from seavlm.model.gemma3 import Gemma3
from seavlm.model.lora import add_adapters, is_adapter, merged_parameters
from seavlm.recipe import Train
from seavlm.text.tokenizer import Tokenizer
from seavlm.train import checkpoint
from seavlm.train.batches import (
    MicroBatch,
    Samples,
    chosen,
    micro_batches,
    sample_file,
    tokenise_cached,
    usable,
)
from seavlm.train.features import Features, read_pictures, tower_key, view_pixels
from seavlm.train.loss import summed_cross_entropy
from seavlm.train.optim import Optimizers, adamw, in_layers
from seavlm.weights.checkpoint import load_into, open_checkpoint, save_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run(
    cfg: Train,
    *,
    base: str | Path,
    data: str | Path,
    out: str | Path,
    seed: int,
    progress: bool = True,
    base_name: str = "",
) -> dict[str, Any]:
    """Fine-tunes `base` on the samples in `data` and writes `out`; returns the metrics that the manifest
    holds.

    A run that was stopped goes on from its last checkpoint with the same losses, bit for bit, as if it had
    not been (same machine and thread count). Raises SeavlmError for data that cannot be used, and when the
    loss is not finite. base_name: what the manifest calls the base.
    """
    base, out = Path(base), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    console = Console(stderr=True, quiet=not progress)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(seed)
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    )

    # The model: fp32 master weights, those that the freeze list names left alone.
    source = open_checkpoint(base)
    config = source.config
    model = unfilled(cfg, config)
    load_into(model, source, device=device)
    trained = prepare(cfg, model)
    tower_frozen = not any(name.startswith("vision_tower.") for name in trained)

    # The samples, tokenised once.
    path = sample_file(Path(data))
    inputs = {"base": manifest.sha256_tree(base), "data": manifest.sha256_file(path)}
    tokenizer = Tokenizer.from_gguf(base) if base.suffix == ".gguf" else Tokenizer.from_dir(base)
    samples = tokenise_cached(
        path,
        tokenizer,
        config.mm_tokens_per_image,
        key=inputs["base"] + inputs["data"],
        folder=out / "cache",
    )
    usables, left_out = usable(samples, cfg.max_seq_len)
    for reason, count in left_out.items():
        console.print(f"{count} of {len(samples)} samples left out: {reason}")
    if len(samples.image_keys) and config.vision is None:
        raise SeavlmError(
            f"the samples have pictures, but {base} has no vision tower", hint="Choose another base."
        )

    # How long: whole steps, the last one smaller when the samples run out.
    total_samples = cfg.steps * cfg.batch_size if cfg.steps else math.ceil(cfg.epochs * len(usables))
    total_steps = math.ceil(total_samples / cfg.batch_size)

    # The pictures: pooled features computed once where the tower cannot change, else pixels at each step.
    features = None
    if len(samples.image_keys) and tower_frozen and cfg.cache_images:
        features = cache_features(cfg, model, path, samples, out, device, console)
    pixels = None
    if len(samples.image_keys) and features is None:
        pixels = dict(read_pictures(path, samples.image_keys.tolist()))

    # Weight decay on matrices only; norms and biases are not decayed.
    optimizer = make_optimizer(cfg, trained)

    # Go on where an earlier run with the same settings and inputs stopped.
    identity = fingerprint(cfg, inputs, seed, total_steps)
    checkpoints = out / "checkpoints" / identity
    meter = Meter(
        region=cfg.region,
        watts=cfg.watts,
        kg_per_kwh=cfg.carbon_intensity,
        pue=cfg.pue,
        cores=torch.get_num_threads(),
        use_gpus=device.type == "cuda",
    )
    step = 0
    place = checkpoint.latest(checkpoints)
    if place is not None:
        state = checkpoint.load(place, parameters=trained, moments=optimizer.moments)
        step, meter.seconds_before, meter.joules_before = state["step"], state["seconds"], state["joules"]
        console.print(f"going on from step {step} of {total_steps}")
    metrics_file = out / "metrics.jsonl"
    history = truncate_metrics(metrics_file, step)

    with (
        meter,
        metrics_file.open("a", encoding="utf-8") as log,
        live(console, step, total_steps) as show,
        deterministic(),
    ):
        while step < total_steps:
            # One optimizer step.
            started = time.monotonic()
            lr = learning_rate(cfg, step, total_steps)
            optimizer.set_rate(lr / cfg.lr)
            batch = [
                (epoch, int(usables[i]))
                for epoch, i in chosen(len(usables), step, cfg.batch_size, total_samples, seed)
            ]
            passes = list(
                micro_batches(
                    samples,
                    batch,
                    max_seq_len=cfg.max_seq_len,
                    micro_rows=cfg.micro_rows,
                    pad_id=config.pad_token_id,
                    views=cfg.image_views,
                    blend=cfg.blend,
                    seed=seed,
                )
            )
            valid = sum(len(micro.targets) for micro in passes)  # over the whole step, before any division
            losses, norm = gradients(cfg, model, trained, passes, valid, samples, features, pixels, device)
            loss_value, norm_value = float(torch.stack(losses).double().sum()), float(norm)
            if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
                raise not_finite(step + 1, loss_value, norm_value, passes, losses)
            optimizer.step()
            optimizer.zero_grad()  # their memory is the checkpoint's
            step += 1

            # What it did.
            line = {
                "step": step,
                "loss": loss_value,
                "lr": lr,
                "grad_norm": norm_value,
                "samples": len(batch),
                "tokens": sum(micro.tokens for micro in passes),
                "valid_tokens": valid,
                "seconds": round(time.monotonic() - started, 4),
            }
            log.write(json.dumps(line) + "\n")
            log.flush()
            history.append(line)
            show(line)
            if step % cfg.save_every == 0 or step == total_steps:
                state = {"seconds": meter.seconds(), "joules": meter.joules(), "fingerprint": identity}
                checkpoint.save(
                    checkpoints,
                    step=step,
                    parameters=trained,
                    moments=optimizer.moments,
                    state=state,
                    keep_last=cfg.keep_last,
                )

    # The finished model and its papers; the manifest last, as the sign that all of it is there.
    save_checkpoint(
        out / "model",
        config,
        ((name, p.cpu()) for name, p in merged_parameters(model)),
        dtype=DTYPES[cfg.save_dtype],
        copy_from=base if base.is_dir() else None,
    )
    if not base.is_dir():  # a GGUF file holds its tokenizer inside
        tokenizer.save(out / "model")
    plot(history, out / "loss.png")
    metrics = summary(history, model, trained, samples, left_out) | {"carbon": meter.report()}
    manifest.write_manifest(
        out,
        stage="train",
        recipe=cfg.model_dump(mode="json", exclude={"image_cache_dir"}),  # a path of this machine
        seed=seed,
        inputs=inputs,
        metrics=metrics,
        extra={"base": base_name},
        duration_s=round(time.monotonic() - began, 3),
    )
    return metrics


def unfilled(cfg: Train, config: Gemma3Config) -> Gemma3:
    """The model on "meta", each parameter in the dtype that it is held in: fp32, but bf16 for matrices that
    get adapters where no more than that is computed with and saved."""
    model = Gemma3(config, device="meta", dtype=torch.float32)
    if cfg.lora_rank and cfg.dtype == cfg.save_dtype == "bfloat16":
        trained = freeze(model, cfg.freeze)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and f"{name}.weight" in trained:
                module.weight = nn.Parameter(module.weight.detach().bfloat16())
    return model


def prepare(cfg: Train, model: Gemma3) -> dict[str, nn.Parameter]:
    """A filled model for training; returns what is trained of it, by name."""
    model.train()
    model.language_model.recompute = cfg.recompute
    trained = freeze(model, cfg.freeze)
    return add_adapters(model, trained, cfg.lora_rank, cfg.lora_alpha) if cfg.lora_rank else trained


def freeze(model: nn.Module, prefixes: list[str]) -> dict[str, nn.Parameter]:
    """Turns off the gradients of parameters whose names start with one of `prefixes` (whole dotted parts);
    returns the others. SeavlmError for a prefix that fits no parameter, or when nothing is left to train.
    """
    named = dict(model.named_parameters())
    trained = dict(named)
    for prefix in prefixes:
        hit = [name for name in named if name == prefix or name.startswith(prefix + ".")]
        # A text-only model has no tower or projector to freeze: the same recipe still serves it.
        if not hit and prefix not in ("vision_tower", "multi_modal_projector"):
            parts = {".".join(name.split(".")[:k]) for name in named for k in range(1, name.count(".") + 1)}
            raise SeavlmError(
                f"freeze: no parameter is called {prefix!r}",
                hint=f"Names look like {next(iter(named))}.{nearest(prefix, parts)}",
            )
        for name in hit:
            named[name].requires_grad_(False)
            trained.pop(name, None)
    if not trained:
        raise SeavlmError("every parameter is frozen: nothing to train", hint="Shorten train.freeze.")
    return trained


def make_optimizer(cfg: Train, trained: dict[str, nn.Parameter]) -> Optimizers:
    """The recipe's optimizer over the trained parameters."""
    muon = [p for name, p in trained.items() if cfg.optimizer == "muon" and in_layers(name, p)]
    taken = set(muon)
    matrices = [p for p in trained.values() if p.ndim >= 2 and p not in taken]
    others = [p for p in trained.values() if p.ndim < 2]
    adam = adamw([(matrices, cfg.weight_decay), (others, 0.0)], cfg.lr, cfg.betas, cfg.eps)
    if not muon:
        return Optimizers((adam, cfg.lr))
    return Optimizers((torch.optim.Muon(muon, cfg.muon_lr, cfg.weight_decay), cfg.muon_lr), (adam, cfg.lr))


def learning_rate(cfg: Train, step: int, total: int) -> float:
    """The rate of step `step` (from 0): up in a line over the first warmup_ratio of the steps, then down to
    min_lr_ratio x lr at `total` by the schedule. The first step's rate is not zero."""
    warmup = round(cfg.warmup_ratio * total)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)  # 1 after warm-up, 0 at the end
    shape = {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[cfg.schedule]
    return cfg.lr * (cfg.min_lr_ratio + (1.0 - cfg.min_lr_ratio) * shape)


def gradients(
    cfg: Train,
    model: Gemma3,
    trained: dict[str, nn.Parameter],
    passes: list[MicroBatch],
    valid: int,
    samples: Samples,
    features: Features | None,
    pixels: dict[str, bytes] | None,
    device: torch.device,
) -> tuple[list[Tensor], Tensor]:
    """Of one optimizer step with `valid` supervised tokens, clipped, left in the parameters; returns each
    pass's part of the loss, and the gradients' norm before clipping."""
    losses = []
    for micro in passes:
        # Around one forward only: autocast keeps its bf16 copies of the weights until it ends.
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            loss = forward_loss(model, micro, samples, features, pixels, device) / valid
        loss.backward()
        losses.append(loss.detach())
    return losses, torch.nn.utils.clip_grad_norm_(trained.values(), cfg.max_grad_norm or math.inf)


def forward_loss(
    model: Gemma3,
    micro: MicroBatch,
    samples: Samples,
    features: Features | None,
    pixels: dict[str, bytes] | None,
    device: torch.device,
) -> Tensor:
    """The summed cross-entropy of one packed forward pass, fp32 scalar."""
    image_embeds = None
    if len(micro.images):
        seen = see(model, samples, micro.images, micro.views, features, pixels).to(device)
        if micro.shares.any():
            others = see(model, samples, micro.others, micro.other_views, features, pixels).to(device)
            share = torch.from_numpy(micro.shares).to(device)[(...,) + (None,) * (seen.ndim - 1)]
            seen = torch.lerp(seen.float(), others.float(), share).to(seen.dtype)
        image_embeds = model.project_images(seen) if features is not None else model.encode_images(seen)
    hidden = model(
        micro.input_ids.to(device),
        image_embeds=image_embeds,
        position_ids=micro.position_ids.to(device),
        segment_ids=micro.segment_ids.to(device),
        logits_mask=micro.logits_mask.to(device),  # only where something is learned
        return_hidden=True,
    )  # [n, width]
    if torch.is_autocast_enabled(device.type):
        hidden = hidden.to(torch.get_autocast_dtype(device.type))
    return summed_cross_entropy(hidden, model.language_model.embed_tokens.weight, micro.targets.to(device))


def see(
    model: Gemma3,
    samples: Samples,
    images: np.ndarray,
    views: np.ndarray,
    features: Features | None,
    pixels: dict[str, bytes] | None,
) -> Tensor:
    """Views of pictures, [N, ...]: the frozen tower's features where they are kept, else the pixels."""
    wanted = [(str(samples.image_keys[i]), int(view)) for i, view in zip(images, views, strict=True)]
    if features is not None:
        return features.get(wanted)
    assert pixels is not None and model.config.vision is not None
    size = model.config.vision.image_size
    return torch.stack([view_pixels(pixels[key], view, size) for key, view in wanted])


def cache_features(
    cfg: Train, model: Gemma3, path: Path, samples: Samples, out: Path, device: torch.device, console: Console
) -> Features:
    """Pooled tower features of every (picture, view) of the samples; computes those not there yet."""
    vision = model.config.vision
    assert vision is not None
    dtype = DTYPES[cfg.dtype]
    folder = Path(cfg.image_cache_dir) if cfg.image_cache_dir else out / "cache" / "images"
    features = Features(
        folder / tower_key(model, dtype), (model.config.mm_tokens_per_image, vision.hidden_size), dtype
    )
    wanted = [(str(key), view) for key in samples.image_keys for view in range(cfg.image_views)]

    @torch.no_grad()
    def compute(batch: list[tuple[bytes, int]]) -> Tensor:
        images = torch.stack([view_pixels(picture, view, vision.image_size) for picture, view in batch])
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            return model.pool_images(images.to(device))

    with Progress(
        TextColumn("pictures through the tower"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("", total=len(features.missing(wanted)))
        features.fill(
            wanted, lambda keys: read_pictures(path, keys), compute, done=lambda n: bar.advance(task, n)
        )
    return features


def fingerprint(cfg: Train, inputs: dict[str, str], seed: int, total_steps: int) -> str:
    """16 hex digits over all that decides the weights: two runs that share them share their checkpoints."""
    bystanders = {
        "enabled", "threads", "device", "save_every", "keep_last", "save_dtype", "image_cache_dir",
        "watts", "carbon_intensity", "region", "pue", "recompute",
    }  # fmt: skip
    if cfg.lora_rank is None:
        bystanders |= {"lora_rank", "lora_alpha"}
    settings = {key: value for key, value in cfg.model_dump(mode="json").items() if key not in bystanders}
    text = json.dumps([settings, inputs, seed, total_steps], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def truncate_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Keeps the lines of steps 1..step (those after the checkpoint will be made again); returns them."""
    kept = []
    if path.exists() and step > 0:
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line cut short by a kill
                line = json.loads(text)
                if line["step"] <= step:
                    kept.append(line)
    checkpoint.write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def not_finite(
    step: int, loss: float, norm: float, passes: list[MicroBatch], losses: list[Tensor]
) -> SeavlmError:
    """The error that names the samples: of the passes whose loss is not finite, else of the whole step."""
    bad = [m for m, value in zip(passes, losses, strict=True) if not bool(torch.isfinite(value))] or passes
    ids = [name for micro in bad for name in micro.sample_ids]
    return SeavlmError(
        f"loss {loss} and gradient norm {norm} at step {step} are not both finite; samples: {', '.join(ids)}",
        hint="Look at these samples, or lower train.lr. The last checkpoint is untouched.",
    )


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic kernels while the loop runs (a kernel that has none warns), as before afterwards."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # a debugging aid that costs time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill


@contextlib.contextmanager
def live(console: Console, done: int, total: int) -> Iterator[Any]:
    """A function that shows a metrics line: a progress bar on a terminal, a line every 30 s elsewhere."""
    recent: deque[dict[str, Any]] = deque(maxlen=20)
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("training", total=total, completed=done)
    spoke = 0.0

    def show(line: dict[str, Any]) -> None:
        nonlocal spoke
        recent.append(line)
        seconds = sum(each["seconds"] for each in recent) or math.inf
        text = (
            f"loss {line['loss']:.3f}  lr {line['lr']:.1e}  "
            f"{sum(each['samples'] for each in recent) / seconds:,.1f} samples/s  "
            f"{sum(each['tokens'] for each in recent) / seconds:,.0f} tokens/s"
        )
        bar.update(task, completed=line["step"], description=text)
        if not console.is_terminal and (time.monotonic() - spoke > 30 or line["step"] == total):
            spoke = time.monotonic()
            left = (total - line["step"]) * seconds / len(recent)
            console.print(f"step {line['step']}/{total}  {text}  ETA {left / 60:.1f} min", highlight=False)

    with bar:
        yield show


def summary(
    history: list[dict[str, Any]],
    model: nn.Module,
    trained: dict[str, nn.Parameter],
    samples: Samples,
    left_out: dict[str, int],
) -> dict[str, Any]:
    """The run in figures. Throughput is that of the optimizer steps alone."""
    seconds = sum(line["seconds"] for line in history) or math.inf
    tail = history[-max(1, len(history) // 10) :]
    return {
        "steps": len(history),
        "samples_seen": sum(line["samples"] for line in history),
        "tokens_seen": sum(line["tokens"] for line in history),
        "supervised_tokens": sum(line["valid_tokens"] for line in history),
        "loss_first": history[0]["loss"],
        "loss_last": float(np.mean([line["loss"] for line in tail])),
        "samples": len(samples),
        "samples_left_out": left_out,
        "pictures": len(samples.image_keys),
        "parameters": sum(p.numel() for name, p in model.named_parameters() if not is_adapter(name)),
        "parameters_trained": sum(p.numel() for p in trained.values()),
        "train_seconds": round(seconds, 3),
        "samples_per_s": round(sum(line["samples"] for line in history) / seconds, 2),
        "tokens_per_s": round(sum(line["tokens"] for line in history) / seconds, 1),
    }


def plot(history: list[dict[str, Any]], path: Path) -> None:
    """loss.png: every step's loss, and its mean over a fortieth of the run."""
    from matplotlib.figure import Figure

    steps = np.array([line["step"] for line in history])
    losses = np.array([line["loss"] for line in history])
    window = max(1, len(losses) // 40)
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#9bb8d3", linewidth=0.8, label="step")
    if window > 1:
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, color="#1f4e79", linewidth=1.6, label=f"mean of {window}")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per supervised token", ylim=(0, None))
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    partial = path.with_name(f".{path.name}.tmp")
    figure.savefig(partial, format="png")
    partial.replace(path)
