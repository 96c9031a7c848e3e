"""A model from nothing: a trimmed tokenizer, a tower that was taught to see (here, or as a part of another
model), a decoder of fresh weights.

run(cfg, out=..., seed=...)
    out/model/          a Hugging Face directory, ready for `seavlm.train.sft`
    out/tower/          the tower's checkpoint and the teacher's features, to go on after a stop
    out/manifest.json
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seavlm import manifest
from seavlm.carbon import Meter
from seavlm.data.pictures import load_pictures
from seavlm.data.tasks import corpus_texts
from seavlm.errors import SeavlmError
from seavlm.model.config import Gemma3Config, TextConfig, VisionConfig
from seavlm.model.gemma3 import Gemma3
from seavlm.recipe import Init
from seavlm.text.tokenizer import Tokenizer
from seavlm.text.trim import trim_tokenizer
from seavlm.weights.checkpoint import open_checkpoint, save_checkpoint
from seavlm.weights.refs import resolve


def run(cfg: Init, *, out: Path, seed: int, progress: bool = True) -> dict[str, Any]:
    """Write `out`/model; returns the metrics that the manifest holds. Goes on from its checkpoints."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    source = open_checkpoint(resolve(cfg.tower)) if cfg.tower else None
    vision = source.config.vision if source else None
    if source is not None and vision is None:
        raise SeavlmError(f"init: {cfg.tower} has no vision tower", hint="Name a model that sees.")
    try:
        vision, text = (
            vision or VisionConfig(**(cfg.vision or {})),
            TextConfig(**{"vocab_size": 1, **cfg.text}),
        )
    except TypeError as error:
        hint = "text and vision take the fields of seavlm.model.config's TextConfig and VisionConfig."
        raise SeavlmError(f"init: {error}", hint=hint) from None
    with Meter(region=cfg.region, watts=cfg.watts, cores=torch.get_num_threads()) as meter:
        metrics: dict[str, Any] = {"tower": _history(Path(resolve(cfg.tower)))} if cfg.tower else {}
        tower = None
        if cfg.distill is not None:
            from seavlm.data.drawings import load_drawings
            from seavlm.train.distill import distill

            keys = [concept.key for concept in load_pictures().concepts]
            focus = [concept.key for concept in load_pictures().select(cfg.distill.focus)]
            drawings = load_drawings()
            tower, metrics["tower"] = distill(
                cfg.distill, vision, drawings, keys, focus, out / "tower", seed, progress
            )

        partial = out / f"model.tmp-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            trim_tokenizer(resolve(cfg.tokenizer), partial, corpus_texts(concepts=cfg.concepts))
            tokenizer = Tokenizer.from_dir(partial)
            config = Gemma3Config(
                text=dataclasses.replace(text, vocab_size=tokenizer.vocab_size),
                vision=vision,
                mm_tokens_per_image=cfg.mm_tokens_per_image,
                image_token_index=tokenizer.image_id,
                boi_token_index=tokenizer.boi_id,
                eoi_token_index=tokenizer.eoi_id,
                pad_token_id=tokenizer.pad_id,
                bos_token_id=tokenizer.bos_id,
                eos_token_ids=(tokenizer.eos_id, tokenizer.end_of_turn_id),
            )
            torch.manual_seed(seed)
            model = Gemma3(config, dtype=torch.float32)
            fresh_decoder(model)
            if source is not None:
                for name, parameter in model.named_parameters():
                    if name.startswith("vision_tower."):
                        parameter.data.copy_(source.get(name))
            elif tower is not None:
                model.vision_tower.load_state_dict(tower.state_dict())
            parameters = ((name, p.detach()) for name, p in model.named_parameters())
            save_checkpoint(partial, config, parameters, dtype=torch.bfloat16)
            shutil.rmtree(out / "model", ignore_errors=True)
            os.replace(partial, out / "model")
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    metrics |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": tokenizer.vocab_size,
        "carbon": meter.report(),
    }
    manifest.write_manifest(
        out,
        stage="init",
        recipe=json.loads(cfg.model_dump_json()),
        seed=seed,
        inputs=inputs(cfg),
        metrics=metrics,
        duration_s=round(time.monotonic() - began, 3),
    )
    return metrics


def _history(model: Path) -> dict[str, Any]:
    """What a model's manifest tells about the making of its tower."""
    try:
        made = json.loads((model / manifest.MANIFEST).read_text(encoding="utf-8"))["init"]["metrics"]
        return {"carbon": made["carbon"], **made["tower"]}
    except (OSError, ValueError, KeyError):
        return {}


def inputs(cfg: Init) -> dict[str, str]:
    """Name -> SHA-256 of what decides the base beside the recipe."""
    return {"tower": manifest.sha256_tree(resolve(cfg.tower))} if cfg.tower else {}


@torch.no_grad()
def fresh_decoder(model: Gemma3) -> None:
    """Matrices normal with std 1/sqrt(fan-in), embeddings with the std that makes the tied head's first
    logits small. What scales a block's two outputs in Gemma 3 are the norms after them, not the matrices:
    they start at 1/sqrt(2 x layers), so that all blocks together add about as much as the token itself.
    """
    depth = model.config.text.num_hidden_layers
    for name, module in model.language_model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif name.endswith(("post_attention_layernorm", "post_feedforward_layernorm")):
            module.get_parameter("weight").fill_((2 * depth) ** -0.5 - 1)  # the norm multiplies by 1 + weight
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
    projector = model.multi_modal_projector.mm_input_projection_weight
    nn.init.normal_(projector, std=projector.shape[0] ** -0.5)
