"""transformers' `pipeline("image-text-to-text", ...)` on our engine: a card's snippet, the import changed.

from seavlm import pipeline

pipe = pipeline("image-text-to-text", model="nano", device="cpu", torch_dtype=torch.float32)
output = pipe(text=messages, max_new_tokens=64)
output[0]["generated_text"][-1]["content"]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from seavlm.engine.vlm import VLM, load
from seavlm.errors import SeavlmError, nearest

TASK = "image-text-to-text"
BATCH_SIZE = 8
# generate's arguments that mean the same to us, and those that only ask for what we do anyway
_OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "pan_and_scan", "allow_urls")
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "use_cache": (True,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "cache_implementation": (None, "static", "dynamic", "hybrid"),
    "disable_compile": (True, False),
}


def pipeline(
    task: str = TASK,
    model: str | Path | VLM = "nano",
    *,
    device: str | int | torch.device | None = None,
    torch_dtype: str | torch.dtype | None = None,
    dtype: str | torch.dtype | None = None,
    allow_urls: bool = False,
    **options: Any,
) -> Pipeline:
    """A callable as transformers makes it. Only "image-text-to-text" exists here.

    model: any reference `seavlm.load` takes, or a loaded VLM. device: "cuda", "cpu", 0 (the first GPU), -1
    (the CPU). allow_urls: pictures may be fetched from the web. Further options are every call's defaults.
    """
    if task != TASK:
        raise SeavlmError(f"there is no pipeline for {task!r}.{nearest(task, [TASK])}", hint=f"Use {TASK!r}.")
    options.pop("device_map", None)  # one device is all there is to map
    if isinstance(device, int):
        device = "cpu" if device < 0 else f"cuda:{device}"
    if not isinstance(model, VLM):
        model = load(model, device=str(device or "auto"), dtype=torch_dtype or dtype or "auto")
    return Pipeline(model, {"allow_urls": allow_urls, **options})


class Pipeline:
    """Conversations in, transformers' nested dictionaries out."""

    task = TASK

    def __init__(self, model: VLM, defaults: Mapping[str, Any] | None = None) -> None:
        self.model = model
        self.tokenizer = model.tokenizer
        self.device = torch.device(model.runner.device)
        self.defaults = dict(defaults or {})

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        *,
        return_full_text: bool = True,
        generate_kwargs: Mapping[str, Any] | None = None,
        batch_size: int = BATCH_SIZE,
        **options: Any,
    ) -> Any:
        """Answer one conversation (-> a list of one dict) or a list of them (-> a list of such lists).

        text: messages, or a list of conversations (as the first argument too, as in transformers); or a plain
        string with `images`, which becomes one user turn. Each dict has "input_text" and "generated_text":
        the messages with the reply appended, or the reply alone with return_full_text=False.
        Options: max_new_tokens, do_sample, temperature, top_k, top_p, seed, pan_and_scan, allow_urls; they
        may come in generate_kwargs.
        """
        settings = self._settings({**self.defaults, **(generate_kwargs or {}), **options})
        conversations, plain, single = _conversations(images, text)
        replies = []
        for start in range(0, len(conversations), batch_size):
            replies += self.model.generate_batch(conversations[start : start + batch_size], **settings)
        outputs = []
        for number, (conversation, reply) in enumerate(zip(conversations, replies, strict=True)):
            given = plain[number] if plain else conversation
            outputs.append(
                [{"input_text": given, "generated_text": _generated(given, reply.text, return_full_text)}]
            )
        return outputs[0] if single else outputs

    def _settings(self, options: dict[str, Any]) -> dict[str, Any]:
        do_sample = options.pop("do_sample", None)
        for key, fine in _HARMLESS.items():
            if key in options and options.pop(key) not in fine:
                raise SeavlmError(f"{key} is not supported", hint=f"Leave {key} out.")
        for key in options:
            if key not in _OPTIONS:
                known = [*_OPTIONS, "do_sample", "return_full_text", "generate_kwargs"]
                raise SeavlmError(
                    f"the pipeline has no option {key!r}",
                    hint=nearest(key, known).strip() or f"Known: {', '.join(known)}.",
                )
        if do_sample is False:
            options["temperature"] = 0.0
        elif do_sample and not self.model.generation.get("do_sample", True):
            options.setdefault("temperature", 1.0)
        return options


def _generated(given: Any, reply: str, full: bool) -> Any:
    if not full:
        return reply
    if isinstance(given, str):
        return given + reply
    if given[-1]["role"] == "assistant":  # it was continued, not answered
        content = given[-1]["content"]
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content)
        return [*given[:-1], {**given[-1], "content": content + reply}]
    return [*given, {"role": "assistant", "content": reply}]


def _conversations(images: Any, text: Any) -> tuple[list[Any], list[str], bool]:
    """(conversations, the plain texts they were made from, whether a single one was given)."""
    if text is None:
        images, text = None, images
    if text is None:
        raise SeavlmError("nothing was given to the pipeline", hint="Call it with text=messages.")
    if _is_chat(text) or (isinstance(text, Sequence) and text and all(_is_chat(chat) for chat in text)):
        if images is not None:
            raise SeavlmError(
                "messages and images were both given",
                hint='Put each picture inside its message: {"type": "image", "path": "picture.png"}.',
            )
        return ([text], [], True) if _is_chat(text) else (list(text), [], False)
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, Sequence) or not all(isinstance(t, str) for t in texts) or not texts:
        raise SeavlmError(
            "the pipeline was given neither messages nor text",
            hint='Call pipe(text=[{"role": "user", "content": [...]}]).',
        )
    if isinstance(text, str):
        groups = [list(images) if isinstance(images, list | tuple) else [] if images is None else [images]]
    else:
        groups = (
            [[] for _ in texts]
            if images is None
            else [list(group) if isinstance(group, list | tuple) else [group] for group in images]
        )
    if len(groups) != len(texts):
        raise SeavlmError(f"{len(texts)} texts came with {len(groups)} images", hint="Give one image a text.")
    made = []
    for pictures, words in zip(groups, texts, strict=True):
        parts = [{"type": "image", "image": picture} for picture in pictures]
        made.append([{"role": "user", "content": [*parts, {"type": "text", "text": words}]}])
    return made, list(texts), isinstance(text, str)


def _is_chat(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(m, Mapping) for m in value)
