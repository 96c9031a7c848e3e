"""`seavlm-parity`: this model beside transformers' Gemma 3, case by case, and a table of what came out.

Small random models are built to bite: T and the pictures are longer than the window, heads * head_dim is not
the width, the query scalar is not head_dim, the global RoPE is scaled, no weight is at its harmless initial
value. Each case compares logits and greedy tokens; `gemma3-270m` does so with real weights. The reference,
transformers, is a development dependency only.

Shapes: B batch, T tokens, V vocabulary rows.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seavlm.engine.cache import KVCache
from seavlm.errors import SeavlmError
from seavlm.model.config import GLOBAL, LOCAL, Gemma3Config, TextConfig, VisionConfig, layer_pattern
from seavlm.model.gemma3 import Gemma3

TOLERANCE = 1e-4  # on fp32 logits
NEW_TOKENS = 16
IMAGE = 290  # the placeholder's id in the small models


@dataclass
class Row:
    """One line of the table."""

    case: str
    difference: float  # largest absolute difference of two logits
    equal: int  # greedy tokens that agree, up to the first that does not, over all rows
    tokens: int  # greedy tokens compared

    @property
    def holds(self) -> bool:
        return self.difference <= TOLERANCE and self.equal == self.tokens


def small_config(layers: Sequence[str] = (LOCAL, GLOBAL), *, vision: bool = True) -> Gemma3Config:
    """A model of a few ten thousand parameters in which no rule of Gemma 3 is idle."""
    text = TextConfig(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=len(layers),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=23,
        sliding_window=7,
        layer_types=tuple(layers),
        rope_factor=8.0,
    )
    if not vision:
        return Gemma3Config(text=text)
    tower = VisionConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=48,
        patch_size=4,
    )
    return Gemma3Config(
        text=text,
        vision=tower,
        mm_tokens_per_image=9,
        image_token_index=IMAGE,
        boi_token_index=288,
        eoi_token_index=289,
    )


def random_model(config: Gemma3Config, seed: int = 0) -> Gemma3:
    """A model with weights large enough that attention picks, and every norm, bias and position matters."""
    model = Gemma3(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(1.5 * noise * weight[0].numel() ** -0.5)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.copy_(0.5 + 0.3 * noise)  # sharp scores
            else:
                weight.add_(0.3 * noise)
    return model


def reference(model: Gemma3) -> Any:
    """transformers' model with the same config and weights."""
    try:
        import transformers
    except ImportError:
        raise SeavlmError(
            "transformers is not installed", hint="It is the reference: pip install transformers"
        ) from None
    # "eager" attention adds an explicit mask: the plainest statement of the rules.
    config = model.config.to_dict() | {"attn_implementation": "eager"}
    if model.config.vision is None:
        hf: Any = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**config))
        weights = {name.replace("language_model.", "model."): w for name, w in model.state_dict().items()}
    else:
        hf = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**config))
        weights = {f"model.{name}": w for name, w in model.state_dict().items()}
    missing, unexpected = hf.load_state_dict(weights, strict=False)
    if unexpected or missing != ["lm_head.weight"]:
        raise SeavlmError(f"transformers has other weights: missing {missing}, unexpected {unexpected}")
    hf.tie_weights()
    return hf.eval()


@torch.no_grad()
def reference_logits(
    hf: Any, ids: Tensor, pixels: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """[B, T, V] of transformers; `mask` marks real tokens, whose positions count from 0."""
    extra: dict[str, Any] = {}
    if pixels is not None:
        extra = {"pixel_values": pixels, "token_type_ids": (ids == IMAGE).long()}
    if mask is not None:
        extra |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return hf(input_ids=ids, **extra).logits


@torch.no_grad()
def reference_greedy(
    hf: Any, ids: Tensor, pixels: Tensor | None = None, mask: Tensor | None = None, *, n: int = NEW_TOKENS
) -> Tensor:
    """[B, n] greedy tokens from transformers' own `generate`, for left-padded `ids`."""
    extra: dict[str, Any] = {}
    if pixels is not None:
        extra = {"pixel_values": pixels, "token_type_ids": (ids == IMAGE).long()}
    hf.generation_config.eos_token_id = None  # n tokens, whatever they are
    mask = torch.ones_like(ids) if mask is None else mask
    whole = hf.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=n, **extra)
    return whole[:, ids.shape[1] :]


@torch.no_grad()
def greedy(
    model: Gemma3,
    ids: Tensor,
    pixels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    n: int = NEW_TOKENS,
    chunks: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Prefill through a KV cache (split at the columns `chunks`), then one token at a time.

    Returns the prompt's logits [B, T, V] and [B, n] greedy tokens. Padding may lie on either side.
    """
    batch, tokens = ids.shape
    cache = KVCache(model.config, batch, tokens + n)
    edges, logits = [0, *chunks, tokens], []
    for start, end in itertools.pairwise(edges):
        logits.append(
            model(
                ids[:, start:end],
                pixel_values=pixels if start == 0 else None,
                attention_mask=None if mask is None else mask[:, start:end],
                cache=cache,
            )
        )
    prompt = torch.cat(logits, dim=1)
    columns = torch.arange(tokens).expand(batch, tokens)
    last = columns.masked_fill(mask == 0, 0).amax(1) if mask is not None else columns[:, -1]
    new = [prompt[torch.arange(batch), last].argmax(-1)]
    while len(new) < n:
        new.append(model(new[-1][:, None], cache=cache)[:, -1].argmax(-1))
    return prompt, torch.stack(new, dim=1)


def compare(
    case: str, ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], mask: Tensor | None
) -> Row:
    """Put (logits, greedy tokens) of both sides into a row; logits only where `mask` has real tokens."""
    difference = (ours[0] - theirs[0]).abs().amax(-1)
    if mask is not None:
        difference = difference[mask.bool()]
    same = (ours[1] == theirs[1]).int().cumprod(dim=1)
    return Row(case, float(difference.max()), int(same.sum()), same.numel())


def text_ids(*shape: int, seed: int = 1) -> Tensor:
    """Random ids that are neither special nor placeholders."""
    return torch.randint(3, 280, shape, generator=torch.Generator().manual_seed(seed))


def with_images(ids: Tensor, *places: tuple[int, int], tokens: int = 9) -> tuple[Tensor, Tensor]:
    """ids with the soft tokens of a picture starting at each (row, column), and as many random pictures."""
    ids = ids.clone()
    for row, column in places:
        ids[row, column : column + tokens] = IMAGE
    pixels = torch.randn(len(places), 3, 48, 48, generator=torch.Generator().manual_seed(2))
    return ids, pixels


def pad(rows: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one batch [B, T], and its mask."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_side=side)
    ones = [torch.ones_like(row) for row in rows]
    return ids, torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)


SIX_TO_ONE = layer_pattern(7)  # five local, one global, one local


def _plain(case: str, config: Gemma3Config, ids: Tensor, pixels: Tensor | None = None) -> Row:
    """One forward over the whole prompt, and greedy tokens."""
    model = random_model(config)
    hf = reference(model)
    with torch.no_grad():
        logits = model(ids, pixel_values=pixels)
    theirs = reference_logits(hf, ids, pixels), reference_greedy(hf, ids, pixels)
    return compare(case, (logits, greedy(model, ids, pixels)[1]), theirs, None)


def local_and_global(case: str) -> Row:
    return _plain(case, small_config(), text_ids(2, 40))


def seven_layers(case: str) -> Row:
    return _plain(case, small_config(SIX_TO_ONE), text_ids(2, 40))


def text_only(case: str) -> Row:
    return _plain(case, small_config(SIX_TO_ONE, vision=False), text_ids(2, 40))


def shorter_than_window(case: str) -> Row:
    return _plain(case, small_config(), text_ids(2, 6))


def one_image(case: str) -> Row:
    return _plain(case, small_config(), *with_images(text_ids(1, 30), (0, 5)))


def only_local(case: str) -> Row:
    return _plain(case, small_config((LOCAL, LOCAL)), *with_images(text_ids(1, 30), (0, 5)))


def only_global(case: str) -> Row:
    return _plain(case, small_config((GLOBAL, GLOBAL)), *with_images(text_ids(1, 30), (0, 5)))


def two_images(case: str) -> Row:
    return _plain(case, small_config(SIX_TO_ONE), *with_images(text_ids(1, 45), (0, 4), (0, 20)))


def uneven_images(case: str) -> Row:
    return _plain(case, small_config(), *with_images(text_ids(3, 45), (0, 4), (0, 14), (2, 30)))


def unscaled_rope(case: str) -> Row:
    config = small_config()
    return _plain(case, replace(config, text=replace(config.text, rope_factor=1.0)), text_ids(1, 40))


def _padded(case: str, side: str) -> Row:
    """Rows of different lengths, with pictures, against transformers with the same padding."""
    ids, pixels = with_images(text_ids(3, 40), (0, 3), (0, 15), (2, 6))
    rows = [ids[0], ids[1, :17], ids[2, :28]]
    model = random_model(small_config(SIX_TO_ONE))
    hf = reference(model)
    batch, mask = pad(rows, side)
    left = pad(rows, "left")  # transformers generates from left-padded rows only
    theirs = reference_logits(hf, batch, pixels, mask), reference_greedy(hf, left[0], pixels, left[1])
    return compare(case, greedy(model, batch, pixels, mask), theirs, mask)


def left_padded(case: str) -> Row:
    return _padded(case, "left")


def right_padded(case: str) -> Row:
    return _padded(case, "right")


def chunked(case: str) -> Row:
    """Prefill in pieces through the cache, against one forward without a cache."""
    ids, pixels = with_images(text_ids(2, 45), (0, 3), (1, 8))
    model = random_model(small_config(SIX_TO_ONE))
    hf = reference(model)
    ours = greedy(model, ids, pixels, chunks=(18, 21, 22, 40))
    return compare(case, ours, (reference_logits(hf, ids, pixels), reference_greedy(hf, ids, pixels)), None)


def packed(case: str) -> Row:
    """Three samples, two with pictures, packed in one row, against each of them alone."""
    ids, pixels = with_images(text_ids(3, 40), (0, 3), (0, 15), (2, 6))
    rows, owned = [ids[0], ids[1, :17], ids[2, :28]], [pixels[:2], None, pixels[2:]]
    model = random_model(small_config(SIX_TO_ONE))
    hf = reference(model)
    segments = torch.cat([torch.full_like(row, i) for i, row in enumerate(rows)])[None]
    with torch.no_grad():
        logits = model(torch.cat(rows)[None], pixel_values=pixels, segment_ids=segments)
    alone = [reference_logits(hf, row[None], own) for row, own in zip(rows, owned, strict=True)]
    theirs = torch.cat(alone, dim=1)
    return compare(case, (logits, logits.argmax(-1)), (theirs, theirs.argmax(-1)), None)


CASES: dict[str, Callable[[str], Row]] = {
    "1 local + 1 global layer, T > window": local_and_global,
    "7 layers (5:1), T > window": seven_layers,
    "text-only model": text_only,
    "T < window": shorter_than_window,
    "no RoPE factor": unscaled_rope,
    "one picture, block > window": one_image,
    "the same, local layers only": only_local,
    "the same, global layers only": only_global,
    "two pictures, text between": two_images,
    "rows with 2, 0 and 1 pictures": uneven_images,
    "left padding, pictures": left_padded,
    "right padding, pictures": right_padded,
    "chunked prefill with cache": chunked,
    "packed row, pictures (argmax)": packed,
}

PROMPTS = {
    "en": "The capital of Indonesia is",
    "id": "Ibu kota Indonesia adalah kota yang",
    "th": "กรุงเทพมหานครเป็นเมืองหลวงของ",
    "vi": "Hà Nội là thủ đô của nước",
    "zh": "新加坡是东南亚的一个",
}


def real_weights(gguf: Path, *, n: int = 64) -> Row:
    """Gemma 3 270M: a GGUF file dequantised to fp32, saved as a Hugging Face directory for transformers.

    n greedy tokens from each of PROMPTS, left-padded into one batch on both sides. Needs 3.5 GB of memory and
    1.1 GB on disk for a while.
    """
    import transformers

    from seavlm.text.tokenizer import Tokenizer
    from seavlm.weights.checkpoint import load_into, open_checkpoint, save_checkpoint

    checkpoint = open_checkpoint(gguf)
    model = Gemma3(checkpoint.config, device="meta")
    load_into(model, checkpoint, dtype=torch.float32)
    tokenizer = Tokenizer.from_gguf(gguf)
    rows = [torch.tensor([tokenizer.bos_id, *tokenizer.encode(text)]) for text in PROMPTS.values()]
    ids, mask = pad(rows, "left")
    ours = greedy(model.eval(), ids, mask=mask, n=n)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model"
        save_checkpoint(out, checkpoint.config, model.state_dict().items(), dtype=torch.float32)
        del model
        hf = transformers.Gemma3ForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        theirs = reference_logits(hf, ids, mask=mask), reference_greedy(hf, ids, mask=mask, n=n)
    return compare(f"gemma3-270m, real weights, {', '.join(PROMPTS)}", ours, theirs, mask)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; exit code 1 when a case does not hold, 2 when one cannot run."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="seavlm-parity", description="Compare seavlm with transformers.")
    parser.add_argument(
        "--gguf", type=Path, help="gemma-3-270m GGUF file (default: the installed gemma3-270m)"
    )
    parser.add_argument("--no-real", action="store_true", help="leave out the real weights")
    args = parser.parse_args(argv)
    table = Table("case", title="seavlm beside transformers, fp32")
    table.add_column("max abs difference", justify="right")
    table.add_column("equal tokens", justify="right")
    console, failed = Console(), False
    rows: list[Row] = []
    try:
        for case, run in CASES.items():
            with console.status(case):
                rows.append(run(case))
        if not args.no_real:
            from seavlm.weights.refs import resolve

            with console.status("gemma3-270m, real weights"):
                rows.append(real_weights(args.gguf or resolve("gemma3-270m")))
    except SeavlmError as error:  # say so, after the cases that did run
        print(error, file=sys.stderr)
        failed = True
    for row in rows:
        style = None if row.holds else "bold red"
        table.add_row(row.case, f"{row.difference:.1e}", f"{row.equal} / {row.tokens}", style=style)
    console.print(table)
    if failed:
        return 2
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
