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
from seavlm.text.trim import trim_tokenizer

if TYPE_CHECKING:
    import torch

    from seavlm.weights.checkpoint import Checkpoint

EMBEDDING = "language_model.embed_tokens.weight"
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def trim_checkpoint(src: str | Path, out_dir: str | Path, texts: Iterable[str]) -> list[int]:
    """Writes to `out_dir` the checkpoint `src` (directory or .gguf file) with the vocabulary `texts` need.

    A valid Hugging Face directory comes out, whole or not at all; `out_dir` must not exist. Returns the kept
    old ids in the order of the new ones. The model gives each kept token the logit it gave before.
    """
    from seavlm.weights.checkpoint import open_checkpoint, save_checkpoint

    source, out = Path(src), Path(out_dir)
    if out.exists():
        raise SeavlmError(f"{out} exists already", hint="Choose another directory, or remove it.")
    checkpoint = open_checkpoint(source)
    partial = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        kept = trim_tokenizer(source, partial, texts)
        new_id = {old: new for new, old in enumerate(kept)}
        config = trim_config(checkpoint.config, new_id)
        save_checkpoint(partial, config, _tensors(checkpoint, kept))
        _copy_configs(source, partial, new_id)
        os.replace(partial, out)
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
        eos_token_ids=tuple(new_id[i] for i in config.eos_token_ids if i in new_id),
    )


def _tensors(checkpoint: Checkpoint, kept: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
    for name in checkpoint.names():
        tensor = checkpoint.get(name)
        if name == EMBEDDING:
            # Text-only models have no row for <image_soft_token>, the last id; any row will do, none is read.
            last = len(tensor) - 1
            tensor = tensor[[min(old, last) for old in kept]]
        yield name, tensor


def _copy_configs(source: Path, out: Path, new_id: Mapping[int, int]) -> None:
    """The processor's files as they are; generation_config.json with new ids."""
    folder = source if source.is_dir() else source.parent
    for name in _PROCESSOR_FILES:
        if source.is_dir() and (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    path = folder / "generation_config.json"
    if source.is_dir() and path.is_file():
        generation: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key, value in generation.items():
            if key.endswith("_token_id") and value is not None:
                ids = [new_id[i] for i in (value if isinstance(value, list) else [value]) if i in new_id]
                generation[key] = ids if isinstance(value, list) else ids[0]
        (out / path.name).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
