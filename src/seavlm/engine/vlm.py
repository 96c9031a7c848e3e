"""A model, its tokenizer and what is needed to ask it something.

    vlm = load("nano")
    reply = vlm.generate([{"role": "user", "content": [
        {"type": "image", "path": "picture.png"}, {"type": "text", "text": "ນີ້ແມ່ນຫຍັງ?"}]}])
    reply.text

One way for an answer to be made: messages -> ids and pixels (`_prompt`) -> image embeddings, remembered by
the pixels' hash (`_embed`) -> prefill, then one token at a time (`_steps`) -> text.

Shapes: B batch, T tokens, V vocabulary rows, N images (views), M tokens an image.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seavlm.engine.cache import KVCache
from seavlm.engine.int8 import Int8Gemma3
from seavlm.engine.sampler import Sampling, choose
from seavlm.errors import SeavlmError, nearest
from seavlm.image.decode import load_part
from seavlm.image.preprocess import pan_and_scan as crops_of
from seavlm.image.preprocess import preprocess
from seavlm.model.config import Gemma3Config
from seavlm.model.gemma3 import Gemma3
from seavlm.text.chat import Message, encode_chat, image_parts, normalize_messages
from seavlm.text.normalize import normalize
from seavlm.text.tokenizer import StreamDecoder, Tokenizer
from seavlm.weights.checkpoint import load_into, open_checkpoint
from seavlm.weights.refs import resolve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EMBEDDING_CACHE_BYTES = 256 * 2**20
VIEWS_PER_PASS = 16  # through the vision tower


@dataclass(frozen=True)
class Reply:
    """An answer. `token_ids` are the ids of the text, without the stop token; `seconds` is wall time."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop": the model ended its turn; "length": max_new_tokens or the context was full
    prompt_tokens: int
    seconds: float


@dataclass(frozen=True)
class Prompt:
    """What the model reads: ids, with a run of soft tokens for each view, and the views [N, 3, S, S]."""

    ids: list[int]
    pixels: Tensor | None = None


def load(
    ref: str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
) -> VLM:
    """Load a model by reference: a directory, a .gguf file, a hub id or a built-in name such as "nano".

    device: "auto" takes a CUDA GPU where there is one. dtype: "auto" is bfloat16 on a GPU, float32 on a CPU.
    quantize: "int8" rounds the decoder's weights and its activations to int8, on the CPU
    (`seavlm.engine.int8`): faster, in a quarter of the memory, and not quite the same replies.
    """
    if quantize not in (None, "int8"):
        raise SeavlmError(f"unknown quantisation {quantize!r}", hint="Use int8, or leave it out.")
    if quantize:
        if device not in ("auto", "cpu"):
            raise SeavlmError(f"int8 runs on the CPU, not on {device}", hint="Use --device cpu.")
        device = "cpu"
    place = torch.device(pick_device(device))
    kind = pick_dtype(dtype, place)
    path = resolve(ref)
    checkpoint = open_checkpoint(path)
    tokenizer = Tokenizer.from_gguf(path) if path.suffix == ".gguf" else Tokenizer.from_dir(path)
    model = Gemma3(checkpoint.config, device=place, dtype=kind)
    load_into(model, checkpoint, dtype=kind, device=place)
    ready = Int8Gemma3(model) if quantize else model
    return VLM(ready, tokenizer, checkpoint.config, name=str(ref), generation=_generation_config(path))


def pick_device(device: str) -> str:
    """ "auto" or a device name of torch, checked."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        hint = f"Use auto, cpu or cuda.{nearest(device, ['auto', 'cpu', 'cuda', 'mps'])}"
        raise SeavlmError(f"unknown device {device!r}", hint=hint) from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise SeavlmError("there is no CUDA device on this machine", hint="Use --device cpu, or auto.")
    return device


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in. SeavlmError for float16, whose range Gemma 3's activations leave."""
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name in ("float16", "half", "fp16"):
        raise SeavlmError(
            "float16 cannot hold Gemma 3's activations (they pass 65504 and become infinite)",
            hint="Use bfloat16 or float32.",
        )
    if name not in DTYPES:
        raise SeavlmError(
            f"unknown dtype {name!r}", hint=f"Use auto, float32 or bfloat16.{nearest(name, DTYPES)}"
        )
    return DTYPES[name]


class VLM:
    """A loaded model. Not for several threads at once."""

    def __init__(
        self,
        model: Gemma3 | Int8Gemma3,
        tokenizer: Tokenizer,
        config: Gemma3Config,
        *,
        name: str = "",
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.config = config
        self.name = name
        self.generation = dict(generation or {})
        self.device, self.dtype = model.device, model.dtype
        self._embeddings: OrderedDict[bytes, Tensor] = OrderedDict()  # pixels' SHA-256 -> [M, hidden]
        if tokenizer.vocab_size > config.text.vocab_size:
            raise SeavlmError(
                f"{name or 'the model'} has {config.text.vocab_size} embedding rows for a tokenizer of "
                f"{tokenizer.vocab_size} tokens",
                hint="Use the tokenizer that belongs to the model.",
            )

    def generate(self, messages: Sequence[Message], **options: Any) -> Reply:
        """Answer a conversation (options: `generate_batch`). A last assistant message is continued."""
        return self.generate_batch([messages], **options)[0]

    def generate_batch(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        pan_and_scan: bool = False,
        allow_urls: bool = False,
    ) -> list[Reply]:
        """Answer several conversations in one batch, each as if it were alone.

        temperature, top_k, top_p: None takes the model's own (generation_config.json, else Gemma's 1.0, 64,
        0.95); temperature 0 is greedy. seed: makes sampling repeatable; conversation i uses seed + i.
        pan_and_scan: look at crops of wide and tall pictures too. allow_urls: pictures may come from the web.
        """
        prompts = [
            self._prompt(messages, pan_and_scan=pan_and_scan, allow_urls=allow_urls)
            for messages in conversations
        ]
        return self._replies(prompts, max_new_tokens, self._sampling(temperature, top_k, top_p, seed))

    def complete(
        self,
        text: str,
        *,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Reply:
        """Continue a text, without any conversation around it: what base models are made for."""
        prompt = Prompt([self.tokenizer.bos_id, *self.tokenizer.encode(normalize(text))])
        return self._replies([prompt], max_new_tokens, self._sampling(temperature, top_k, top_p, seed))[0]

    def stream(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        pan_and_scan: bool = False,
        allow_urls: bool = False,
    ) -> Iterator[str]:
        """The reply in pieces as they come, each of whole graphemes; joined they are `generate`'s text."""
        prompt = self._prompt(messages, pan_and_scan=pan_and_scan, allow_urls=allow_urls)
        decoder = StreamDecoder(self.tokenizer)
        for (token,) in self._steps(
            [prompt], max_new_tokens, self._sampling(temperature, top_k, top_p, seed)
        ):
            if token is not None and token not in self.config.eos_token_ids and (piece := decoder.put(token)):
                yield piece
        if piece := decoder.flush():
            yield piece

    @torch.inference_mode()
    def logits(
        self, messages: Sequence[Message], *, pan_and_scan: bool = False, allow_urls: bool = False
    ) -> Tensor:
        """What the model thinks at every position of the prompt: [T, V], float32."""
        prompt = self._prompt(messages, pan_and_scan=pan_and_scan, allow_urls=allow_urls)
        ids = torch.tensor([prompt.ids], device=self.device)
        return self.model(ids, image_embeds=self._embed([prompt]))[0].float()

    def rank(self, messages: Sequence[Message], choices: Sequence[str], **options: Any) -> list[float]:
        """How likely each of `choices` is as the whole reply (see `rank_batch`)."""
        return self.rank_batch([messages], [choices], **options)[0]

    @torch.inference_mode()
    def rank_batch(
        self,
        conversations: Sequence[Sequence[Message]],
        choices: Sequence[Sequence[str]],
        *,
        pan_and_scan: bool = False,
        allow_urls: bool = False,
    ) -> list[list[float]]:
        """Natural log of the probability that the reply to conversation i is choices[i][j], and ends there.

        The largest is the reply that the model would give were it held to the choices: how multiple choice is
        scored where a free reply may be none of them. Each prompt is read once, whatever the number of
        choices. Raises SeavlmError when there is no choice, or an empty one.
        """
        if len(conversations) != len(choices):
            raise SeavlmError(f"{len(choices)} lists of choices for {len(conversations)} conversations")
        if not conversations:
            return []
        encoded = [[self.tokenizer.encode(normalize(text).strip()) for text in texts] for texts in choices]
        for texts, ids in zip(choices, encoded, strict=True):
            if not ids or not all(ids):
                raise SeavlmError(f"cannot rank {list(texts)!r}", hint="Give one or more texts, none empty.")
        prompts = [
            self._prompt(messages, pan_and_scan=pan_and_scan, allow_urls=allow_urls)
            for messages in conversations
        ]
        flat = [choice for several in encoded for choice in several]
        longest, stop = max(map(len, flat)), self.tokenizer.end_of_turn_id
        logits, cache = self._read(prompts, room=0, expected=longest)
        rows = torch.tensor([i for i, several in enumerate(encoded) for _ in several], device=self.device)

        # Each choice goes on from its prompt: one block of a choice's tokens, padded on the right.
        block = torch.full((len(flat), longest), self.config.pad_token_id)
        then = torch.full_like(block, stop)  # what follows each token
        real = torch.zeros(len(flat), longest, dtype=torch.bool)
        for row, choice in enumerate(flat):
            block[row, : len(choice)] = torch.tensor(choice)
            then[row, : len(choice) - 1] = torch.tensor(choice[1:])
            real[row, : len(choice)] = True
        block, then, real = block.to(self.device), then.to(self.device), real.to(self.device)
        mask = None if real.all() else real
        after = self.model(block, attention_mask=mask, cache=cache.fork(rows, longest), logits_mask=real)
        first = logits.float().log_softmax(-1)[rows, block[:, 0]]
        total = first.index_add(
            0, real.nonzero()[:, 0], after.float().log_softmax(-1).gather(1, then[real][:, None])[:, 0]
        )
        left = iter(total.tolist())
        return [[next(left) for _ in several] for several in encoded]

    # --- messages -> what the model reads

    def _prompt(self, messages: Sequence[Message], *, pan_and_scan: bool, allow_urls: bool) -> Prompt:
        messages = normalize_messages(messages)
        parts = image_parts(messages)
        vision = self.config.vision
        if parts and vision is None:
            raise SeavlmError(
                f"{self.name or 'this model'} reads text only, and the messages hold {len(parts)} "
                f"picture{'s' * (len(parts) > 1)}",
                hint="Use a model with a vision tower, for example nano.",
            )
        views, counts = [], []
        for part in parts:
            image = load_part(part, allow_urls=allow_urls)
            crops = crops_of(image) if pan_and_scan else []
            views += [image, *crops]
            counts.append(1 + len(crops))
        prefilled = bool(messages) and messages[-1]["role"] == "assistant"
        encoded = encode_chat(
            self.tokenizer,
            messages,
            mm_tokens_per_image=self.config.mm_tokens_per_image,
            add_generation_prompt=not prefilled,
            views_per_image=counts,
        )
        ids = encoded.input_ids
        if prefilled:  # the turn is not over: drop what ends it
            ids = ids[: max(i for i, learnt in enumerate(encoded.assistant_mask) if learnt)]
        pixels = preprocess(views, vision.image_size) if vision is not None and views else None
        return Prompt(ids, pixels)

    def _embed(self, prompts: Sequence[Prompt]) -> Tensor | None:
        """Image embeddings of all views of all prompts, [N, M, hidden]; equal pixels are encoded once."""
        pixels = [view for prompt in prompts if prompt.pixels is not None for view in prompt.pixels]
        if not pixels:
            return None
        keys = [hashlib.sha256(view.numpy().tobytes()).digest() for view in pixels]
        found = {key: self._embeddings[key] for key in keys if key in self._embeddings}
        missing = {key: view for key, view in zip(keys, pixels, strict=True) if key not in found}
        todo = list(missing)
        for start in range(0, len(todo), VIEWS_PER_PASS):
            chunk = todo[start : start + VIEWS_PER_PASS]
            stacked = torch.stack([missing[key] for key in chunk]).to(self.device, self.dtype)
            found.update(zip(chunk, self.model.encode_images(stacked), strict=True))
        for key in found:
            self._embeddings[key] = found[key]
            self._embeddings.move_to_end(key)
        size = next(iter(found.values())).nbytes
        while len(self._embeddings) > 1 and len(self._embeddings) * size > EMBEDDING_CACHE_BYTES:
            self._embeddings.popitem(last=False)
        return torch.stack([found[key] for key in keys])

    def _sampling(
        self, temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None
    ) -> Sampling:
        return Sampling.from_config(
            self.generation, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )

    # --- what the model reads -> ids

    def _replies(self, prompts: Sequence[Prompt], max_new_tokens: int, sampling: Sampling) -> list[Reply]:
        began = time.perf_counter()
        ids: list[list[int]] = [[] for _ in prompts]
        reasons = ["length"] * len(prompts)
        seconds = [0.0] * len(prompts)
        for tokens in self._steps(prompts, max_new_tokens, sampling):
            for row, token in enumerate(tokens):
                if token is None:
                    continue
                seconds[row] = time.perf_counter() - began
                if token in self.config.eos_token_ids:
                    reasons[row] = "stop"
                else:
                    ids[row].append(token)
        return [
            Reply(
                self.tokenizer.decode(ids[row]), ids[row], reasons[row], len(prompts[row].ids), seconds[row]
            )
            for row in range(len(prompts))
        ]

    def _steps(
        self, prompts: Sequence[Prompt], max_new_tokens: int, sampling: Sampling
    ) -> Iterator[list[int | None]]:
        """The next token of every row, step after step, stop tokens included; None once a row stopped."""
        if max_new_tokens < 1:
            raise SeavlmError(f"max_new_tokens is {max_new_tokens}", hint="Give 1 or more.")
        if not prompts:
            return
        longest = max(len(prompt.ids) for prompt in prompts)
        steps = min(max_new_tokens, self.config.text.max_position_embeddings - longest)
        streams = sampling.streams(len(prompts))
        limit = min(self.tokenizer.vocab_size, self.config.text.vocab_size)
        picture = self.config.image_token_index  # stands for a picture, which a reply cannot hold
        banned = [picture] if picture < limit else []

        logits, cache = self._read(prompts, room=steps, expected=1)
        running = [True] * len(prompts)
        for step in range(steps):
            tokens = choose(logits, sampling, streams, limit=limit, banned=banned)
            chosen = tokens.tolist()
            yield [token if on else None for token, on in zip(chosen, running, strict=True)]
            running = [
                on and token not in self.config.eos_token_ids
                for token, on in zip(chosen, running, strict=True)
            ]
            if not any(running) or step == steps - 1:
                return
            logits = self._decode(tokens, cache)

    @torch.inference_mode()
    def _read(self, prompts: Sequence[Prompt], *, room: int, expected: int) -> tuple[Tensor, Any]:
        """Prefill: the logits after the prompts, [B, V], and a cache of them with `room` for more tokens.

        Rows end together (padding on the left): the last column is the last token of each. SeavlmError when
        `expected` more tokens would not fit into the context.
        """
        lengths = [len(prompt.ids) for prompt in prompts]
        longest, context = max(lengths), self.config.text.max_position_embeddings
        if longest + expected > context:
            raise SeavlmError(
                f"the prompt has {longest} tokens and {self.name or 'the model'} reads at most "
                f"{context - expected}",
                hint="Shorten the text or send fewer pictures.",
            )
        ids = torch.full((len(prompts), longest), self.config.pad_token_id)
        real = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, longest - lengths[row] :] = torch.tensor(prompt.ids)
            real[row, longest - lengths[row] :] = True
        mask = None if real.all() else real.to(self.device)
        if isinstance(self.model, Int8Gemma3):
            cache: Any = self.model.new_cache(len(prompts), longest + room)
        else:
            cache = KVCache(self.config, len(prompts), longest + room, self.device, self.dtype)
        logits = self.model(
            ids.to(self.device),
            image_embeds=self._embed(prompts),
            attention_mask=mask,
            cache=cache,
            last_only=True,
        )
        return logits[:, -1], cache

    @torch.inference_mode()
    def _decode(self, tokens: Tensor, cache: Any) -> Tensor:
        """Logits after one more token a row, [B, V]; the cache knows where each row goes on."""
        return self.model(tokens[:, None], cache=cache, last_only=True)[:, -1]


def _generation_config(path: Path) -> dict[str, Any]:
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise SeavlmError(
            f"{file} is not readable JSON ({error})", hint="Mend or remove that file."
        ) from None
