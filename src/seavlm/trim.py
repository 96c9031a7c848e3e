"""A checkpoint with a smaller vocabulary: tokenizer, embedding and ids in the configs shrink together.

The other weights are copied. The embedding is 5 % of the parameters of a 27B model and 60 % of a 270M one's:
small models for a few languages gain most.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seavlm.errors import SeavlmError
from seavlm.model.config import Gemma3Config
from seavlm.text.normalize import normalize
from seavlm.text.trim import trim_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from seavlm.weights.checkpoint import Checkpoint

GENERATION = "generation_config.json"


def trim_checkpoint(src: str | Path, out_dir: str | Path, texts: Iterable[str]) -> list[int]:
    """Writes to `out_dir` the checkpoint `src` (directory or .gguf file) with the vocabulary `texts` need.

    Each text is kept as it is and as `normalize` writes it. A Hugging Face directory comes out, whole or not
    at all; `out_dir` must be new or empty. Returns the kept old ids in the order of the new ones; the model
    gives each kept token the logit it gave before.
    """
    from seavlm.weights.checkpoint import open_checkpoint, save_checkpoint

    source, out = Path(src), Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SeavlmError(f"{out} exists already", hint="Choose another directory, or remove it.")
    checkpoint = open_checkpoint(source)
    partial = out.with_name(f"{out.name}.trim-{os.getpid()}")
    try:
        kept = trim_tokenizer(source, partial, (form for text in texts for form in {text, normalize(text)}))
        new_id = {old: new for new, old in enumerate(kept)}
        config = trim_config(checkpoint.config, new_id)
        save_checkpoint(partial, config, _tensors(checkpoint, kept))  # beside the tokenizer's files
        if source.is_dir() and (source / GENERATION).is_file():
            generation = _trim_generation(source / GENERATION, new_id)
            (partial / GENERATION).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, out)  # an empty directory gives way
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return kept


def trim_config(config: Gemma3Config, new_id: Mapping[int, int]) -> Gemma3Config:
    """`config` with the number of kept rows and the new numbers of its special tokens."""
    return dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, vocab_size=len(new_id)),
        image_token_index=new_id[config.image_token_index],
        boi_token_index=new_id[config.boi_token_index],
        eoi_token_index=new_id[config.eoi_token_index],
        pad_token_id=new_id[config.pad_token_id],
        bos_token_id=new_id[config.bos_token_id],
        eos_token_ids=tuple(new_id[i] for i in config.eos_token_ids),
    )


def _tensors(checkpoint: Checkpoint, kept: list[int]) -> Iterator[tuple[str, Tensor]]:
    from seavlm.weights.names import EMBEDDING

    for name in checkpoint.names():
        tensor = checkpoint.get(name)
        if name == EMBEDDING:
            # Text-only models have no row for <image_soft_token>, the last id; any row will do, none is read.
            last = len(tensor) - 1
            tensor = tensor[[min(old, last) for old in kept]]
        yield name, tensor


def _trim_generation(path: Path, new_id: Mapping[int, int]) -> dict[str, Any]:
    """generation_config.json with new ids; ids whose tokens are gone are left out."""
    generation: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key, value in list(generation.items()):
        if key.endswith("_token_id") and isinstance(value, list):
            generation[key] = [new_id[i] for i in value if i in new_id]
        elif key.endswith("_token_id") and value is not None:
            generation[key] = new_id.get(value)
    return generation
