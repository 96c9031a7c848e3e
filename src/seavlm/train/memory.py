"""What a forward and backward pass of `sft.py` holds in memory, found without taking any.

The model is built of fake tensors, which have shapes and no data, and goes through the real forward pass;
autograd says what it would keep for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from seavlm.model.config import Gemma3Config
from seavlm.model.gemma3 import Gemma3
from seavlm.model.lora import add_adapters
from seavlm.train.loss import ROWS
from seavlm.train.sft import freeze


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes."""

    weights: int
    gradients: int
    moments: int  # of AdamW
    activations: int  # what autograd keeps of the layers; with recompute their inputs, and all of one layer
    loss: int  # a chunk's logits, twice more in its logsumexp, and the gradients before the backward pass
    tied: int  # a second gradient of the embedding while both its uses are added up


def training_memory(
    config: Gemma3Config,
    *,
    rows: int,
    tokens: int,
    images: int,
    dtype: str,
    lora_rank: int | None,
    recompute: bool = False,
) -> TrainingMemory:
    """Of a pass of `rows` packed rows (`train.micro_rows`) of `tokens` tokens (`train.max_seq_len`), with
    `images` pictures each, all tokens supervised, the tower frozen and its features cached."""
    bf16 = dtype == "bfloat16"
    with FakeTensorMode():
        model = Gemma3(config)
        model.language_model.recompute = recompute
        trained = freeze(model, ["vision_tower"])
        if lora_rank:
            trained = add_adapters(model, trained, lora_rank, 1.0, torch.bfloat16 if bf16 else None)
        weights = sum(p.nbytes for p in model.parameters())
        gradients = sum(p.nbytes for p in trained.values())
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if (storage := tensor.untyped_storage()._cdata) not in own:
                kept[storage] = tensor  # held, so that no other takes its number
            return tensor

        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        size, count = config.mm_tokens_per_image, rows * images
        for i in range(images):
            ids[:, i * size : (i + 1) * size] = config.image_token_index
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            seen = None
            if count and config.vision is not None:
                seen = model.project_images(torch.zeros(count, size, config.vision.hidden_size))
            hidden = model(
                ids,
                image_embeds=seen,
                position_ids=torch.arange(tokens).expand(rows, tokens),
                segment_ids=torch.zeros_like(ids),
                return_hidden=True,
                check=False,
            )
        activations = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) + hidden.nbytes
        head = model.language_model.embed_tokens.weight
    if recompute:
        one, two = (
            training_memory(
                _first(config, n), rows=rows, tokens=tokens, images=images, dtype=dtype, lora_rank=lora_rank
            ).activations
            for n in (1, 2)
        )
        activations += two - one
    chunk = min(ROWS, rows * tokens) * config.text.vocab_size
    copy = head.numel() * 2 if bf16 else 0
    loss = 3 * chunk * 4 + copy + rows * tokens * config.text.hidden_size * (2 if bf16 else 4)
    tied = 0
    if head.requires_grad:
        tied = head.nbytes
        loss += head.nbytes + copy
    return TrainingMemory(weights, gradients, 2 * gradients, activations, loss, tied)


def _first(config: Gemma3Config, layers: int) -> Gemma3Config:
    """The model with so many layers, of the kinds of its first ones."""
    kinds = (config.text.layer_types * layers)[:layers]
    return replace(config, text=replace(config.text, num_hidden_layers=len(kinds), layer_types=kinds))
