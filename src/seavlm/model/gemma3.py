"""Gemma 3: pictures and token ids in, logits out.

Shapes: B batch, T tokens, N pictures, S pixels a side, M soft tokens a picture, C width, V vocabulary rows.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seavlm.errors import SeavlmError
from seavlm.model.attention import Cache, make_layout
from seavlm.model.config import Gemma3Config
from seavlm.model.decoder import Decoder
from seavlm.model.vision import Projector, VisionTower


class Gemma3(nn.Module):
    """The model, for any `Gemma3Config`: with a vision tower and projector, or text-only.

    `device="meta"` builds it without memory, to be filled by `seavlm.weights.checkpoint.load_into`. Elsewhere
    the weights are random and ready for training. float16 is refused: Gemma 3's activations exceed its range.
    """

    def __init__(
        self,
        config: Gemma3Config,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_dtype(dtype)
        self.config = config
        with torch.device(device) if device is not None else contextlib.nullcontext():
            self.language_model = Decoder(config.text)
            if config.vision is not None:
                self.vision_tower = VisionTower(config.vision)
                self.multi_modal_projector = Projector(config, config.vision)
        if dtype is not None:
            self.to(dtype)

    @property
    def device(self) -> torch.device:
        return self.language_model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.embed_tokens.weight.dtype

    def pool_images(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, M, tower width]: what a frozen tower computes, worth caching in training."""
        if self.config.vision is None:
            raise SeavlmError(
                "this model is text-only and was given pictures", hint="Use a model with a vision tower."
            )
        return self.multi_modal_projector.pool(self.vision_tower(pixel_values))

    def project_images(self, pooled: Tensor) -> Tensor:
        """[N, M, tower width] -> [N, M, C]: soft tokens as the decoder takes them (not scaled)."""
        return self.multi_modal_projector(pooled)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, M, C]"""
        return self.project_images(self.pool_images(pixel_values))

    def forward(
        self,
        input_ids: Tensor,
        *,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        logits_mask: Tensor | None = None,
        last_only: bool = False,
        return_hidden: bool = False,
        check: bool | None = None,
    ) -> Tensor:
        """Logits, in the model's dtype: [B, T, V]; with `last_only` [B, 1, V] of the last column; with
        `logits_mask` (bool [B, T]) [n, V] of the n positions where it is True, row by row: what a loss needs.
        With `return_hidden` the final hidden states of the same positions, C in place of V: a loss over a
        large vocabulary applies the head to a few of them at a time.

        input_ids       int [B, T]. With pictures, each one has M ids of config.image_token_index in one run.
        pixel_values    [N, 3, S, S], or image_embeds [N, M, C] from `encode_images`: pictures in reading
                        order, row after row. Each lies whole in one call, never split over prefill chunks.
        attention_mask  [B, T], 0 for padding, on either side. Only for the new tokens, also with a cache.
        segment_ids     int [B, T]: samples packed in one row, each a run of one number of its own that does
                        not come back. -1 is padding (any other unused number does as well).
        position_ids    int [B, T]; by default 0, 1, 2.. in each sequence, padding not counted, going on from
                        the cache. They decide visibility too, so they must rise within a sequence.
        cache           see `seavlm.model.attention.Cache`; the new tokens are appended to it.
        check           look into the tensors for ids out of range and pictures that do not fit. By default
                        only on the CPU: elsewhere looking means waiting for the device.

        Logits cover all V rows; those past the tokenizer's vocabulary (untrained in 4B and up) are the
        sampler's to exclude. Raises SeavlmError for inputs that do not fit.
        """
        check_dtype(self.dtype)
        if input_ids.ndim != 2 or not input_ids.numel() or input_ids.dtype not in (torch.int64, torch.int32):
            raise SeavlmError(
                f"input_ids has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}",
                hint="Expected integers of shape (batch, tokens), at least one.",
            )
        given = {"position_ids": position_ids, "segment_ids": segment_ids}
        for name, x in {**given, "attention_mask": attention_mask, "logits_mask": logits_mask}.items():
            if x is not None and x.shape != input_ids.shape:
                raise SeavlmError(
                    f"{name} has shape {tuple(x.shape)}, input_ids {tuple(input_ids.shape)}",
                    hint="They must be equal.",
                )
        if pixel_values is not None:
            if image_embeds is not None:
                raise SeavlmError("both pixel_values and image_embeds were given", hint="Give one of them.")
            image_embeds = self.encode_images(pixel_values)
        check_images(self.config, image_embeds)
        if check is None:
            check = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if check:
            check_ids(self.config, input_ids, 0 if image_embeds is None else len(image_embeds))

        is_image = None
        if image_embeds is None:
            x = self.language_model.embed(input_ids)
        else:
            is_image = input_ids == self.config.image_token_index
            # the placeholder's own id may have no row at all
            x = self.language_model.embed(input_ids.masked_fill(is_image, 0))
            x = x.masked_scatter(is_image[..., None], image_embeds.to(x.dtype))
        layout = make_layout(
            input_ids,
            position_ids=position_ids,
            segment_ids=segment_ids,
            attention_mask=attention_mask,
            is_image=is_image,
            cache=cache,
        )
        x = self.language_model(x, layout, cache)
        if logits_mask is not None:
            x = x[logits_mask.bool()]
        elif last_only:
            x = x[:, -1:]
        if return_hidden:
            return x
        return F.linear(x, self.language_model.embed_tokens.weight)  # the head is the embedding


def check_images(config: Gemma3Config, image_embeds: Tensor | None) -> None:
    """Image embeddings are [N, M, C], and the model can see."""
    if image_embeds is None:
        return
    if config.vision is None:
        raise SeavlmError(
            "this model is text-only and was given pictures", hint="Use a model with a vision tower."
        )
    tokens, width = config.mm_tokens_per_image, config.text.hidden_size
    if image_embeds.ndim != 3 or tuple(image_embeds.shape[1:]) != (tokens, width):
        raise SeavlmError(
            f"image_embeds has shape {tuple(image_embeds.shape)}, expected (N, {tokens}, {width})",
            hint="Make them with encode_images.",
        )


def check_ids(config: Gemma3Config, input_ids: Tensor, num_images: int) -> None:
    """Ids within the vocabulary; placeholders for just `num_images` pictures, each whole in its row."""
    ids, per_image = input_ids, config.mm_tokens_per_image
    if config.vision is not None:
        is_image = input_ids == config.image_token_index
        counts = is_image.sum(dim=1).tolist()
        if sum(counts) != num_images * per_image:
            raise SeavlmError(
                f"{sum(counts)} image placeholder tokens in input_ids, but {num_images} pictures "
                f"of {per_image} tokens each need {num_images * per_image}",
                hint="Give as many pictures as the messages have image parts.",
            )
        for row, count in enumerate(counts):
            if count % per_image:
                raise SeavlmError(
                    f"row {row} has {count} image placeholder tokens, not a multiple of {per_image}",
                    hint="A picture must lie whole in one row and one call.",
                )
        ids = input_ids.masked_fill(is_image, 0)
    rows = config.text.vocab_size
    low, high = (int(x) for x in ids.aminmax()) if ids.numel() else (0, 0)
    if low < 0 or high >= rows:
        wrong = low if low < 0 else high
        raise SeavlmError(
            f"token id {wrong} is outside the vocabulary of {rows} rows",
            hint="Was the text tokenised with another model's tokenizer?",
        )


def check_dtype(dtype: torch.dtype | None) -> None:
    """Refuse float16."""
    if dtype == torch.float16:
        raise SeavlmError(
            "float16 overflows in Gemma 3: its activations exceed 65504, the largest float16 number",
            hint="Use bfloat16 or float32.",
        )
