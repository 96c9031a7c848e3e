"""A model, its tokenizer and what is needed to ask it something.

    vlm = load("nano")
    reply = vlm.generate([{"role": "user", "content": [
        {"type": "image", "path": "picture.png"}, {"type": "text", "text": "ນີ້ແມ່ນຫຍັງ?"}]}])
    reply.text

One way for an answer to be made: messages -> ids and pixels (`prompt`) -> the engine (`engine.py`) -> text.

Shapes: T tokens, V vocabulary rows.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seavlm.engine import kernels
from seavlm.engine.engine import MAX_SEQUENCES, Engine
from seavlm.engine.quantize import Packed, StoredRows, is_quantized, map_weights, pack_decoder
from seavlm.engine.runner import Runner
from seavlm.engine.sampler import Sampling, log_probabilities
from seavlm.engine.sequence import Picture, Prompt, TokenChance
from seavlm.engine.sequence import Sequence as Request
from seavlm.errors import SeavlmError, nearest
from seavlm.image.decode import MAX_PIXELS, load_part
from seavlm.image.preprocess import pan_and_scan as crops_of
from seavlm.image.preprocess import preprocess
from seavlm.model.config import Gemma3Config
from seavlm.text.chat import Message, encode_chat, image_parts, normalize_messages
from seavlm.text.normalize import normalize
from seavlm.text.tokenizer import Tokenizer
from seavlm.weights.refs import resolve, unwritten

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from seavlm.merge.stream import Merged
    from seavlm.model.gemma3 import Gemma3

DTYPES = ("float32", "bfloat16")
MAX_PIXELS_IN_ALL = 4 * MAX_PIXELS  # of the pictures of a prompt
FETCH_SECONDS = 30.0  # for those of a prompt that come from the web
QUANTIZE = ("int8", "stored", "int4")


@dataclass(frozen=True)
class Reply:
    """An answer. `token_ids` are the ids of the text, without the stop token; `seconds` is wall time."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop": the model ended its turn; "length": max_new_tokens or the context was full
    prompt_tokens: int
    seconds: float
    logprobs: list[TokenChance] = field(default_factory=list)  # a token each, if they were asked for


def load(
    ref: str | Path | Merged,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    speculate: bool | str | Path = False,
    **engine: Any,
) -> VLM:
    """Load a model by reference: a directory, a .gguf file, a hub id or a built-in name such as "nano".

    Also what no file holds, made tensor by tensor: a merge recipe ("merge.yaml"), a delta at a share
    ("out/delta@0.3"), or a `merge.stream.Merged`.
    device: "auto" takes a CUDA GPU where there is one. dtype: "auto" is bfloat16 on a GPU, float32 on a CPU.
    quantize: on the CPU "int8" rounds weights and activations (`seavlm.engine.int8`): faster, in a quarter of
    the memory, and not quite the same replies; "stored" takes a .gguf file's weights as they are. On a GPU
    "int8" and "int4" round the weights (`seavlm.engine.weight_only`), read into the CPU's memory first; int4
    is for models of 4B and more.
    speculate: guess tokens ahead, for the same reply sooner (`seavlm.engine.speculate`): "lookup" (or True)
    from the text so far, or a reference of a smaller model of the same words. On a CPU that one is rounded to
    int8, which changes guesses and no reply: a model may well guess for itself.
    engine: options of `Engine`, such as cache_tokens or max_sequences.
    """
    if quantize not in (None, *QUANTIZE):
        hint = f"Use one of {', '.join(QUANTIZE)}, or leave it out.{nearest(quantize, QUANTIZE)}"
        raise SeavlmError(f"unknown quantisation {quantize!r}", hint=hint)
    source = opened(ref) if isinstance(ref, str | Path) else ref
    if isinstance(source, Path) and is_quantized(source):
        if device not in ("auto", "cpu"):
            raise SeavlmError(f"{source} is for the CPU, not for {device}", hint="Use --device cpu.")
        if quantize or str(dtype) != "auto":
            raise SeavlmError(f"{source} is quantised already", hint="Leave quantize and dtype out.")
        runner: Runner = _mapped(source)
    elif quantize and (device == "cpu" or pick_device(device) == "cpu"):
        if quantize == "int4":
            raise SeavlmError("int4 is for a GPU", hint="On the CPU use int8, or stored for a .gguf file.")
        runner = _quantized(source, quantize)
    else:
        if quantize == "stored":
            raise SeavlmError("stored is for the CPU", hint="Use int8 or int4, or --device cpu.")
        runner = _plain(source, device, dtype, quantize)
    home, spec = (source, None) if isinstance(source, Path) else (source.home, source.spec)
    tokenizer = Tokenizer.from_gguf(home) if home.suffix == ".gguf" else Tokenizer.from_dir(home, spec=spec)
    if isinstance(speculate, bool) or speculate == "lookup":
        engine["speculate"] = bool(speculate)
    else:
        engine["speculate"] = _drafting(speculate, runner.device, engine.get("max_sequences", MAX_SEQUENCES))
    name = str(ref) if isinstance(ref, str | Path) else ""
    return VLM(runner, tokenizer, name=name, generation=_generation_config(home), **engine)


def refilled(vlm: VLM, checkpoint: Merged, names: Collection[str]) -> VLM | None:
    """What `load` would give, made of `vlm`, from whose checkpoint this one differs in `names` alone: those
    are written over in memory, and `vlm` is not to be used again. None where weights are packed.
    """
    from seavlm.engine.torch_runner import TorchRunner
    from seavlm.weights.checkpoint import load_into

    if not isinstance(vlm.runner, TorchRunner):
        return None
    load_into(vlm.runner.model, checkpoint, names=names)
    # A new engine: the old one remembers what texts and pictures were to the old weights.
    return VLM(vlm.runner, vlm.tokenizer, name=vlm.name, generation=vlm.generation)


def opened(ref: str | Path) -> Path | Merged:
    """The path of a model on disk (`resolve`), or the merge that a recipe or a delta stands for."""
    found = unwritten(ref)
    if found is None:
        return resolve(ref)
    from seavlm.merge.unwritten import open_unwritten  # the one thing that this room has from there

    return open_unwritten(found)


def _drafting(ref: str | Path, device: str, max_sequences: int) -> Engine:
    """The engine of a draft model, whose pages remember the text of so many sequences."""
    source = opened(ref)
    plain = (
        kernels.library() is None or device != "cpu" or (isinstance(source, Path) and is_quantized(source))
    )
    return load(source, device=device, quantize=None if plain else "int8", max_sequences=max_sequences).engine


def _plain(source: Path | Merged, device: str, dtype: str | torch.dtype, quantize: str | None) -> Runner:
    """The runner of the PyTorch model, or of our kernels for a GPU. The model's file is closed before the
    tokenizer is read, to save memory."""
    import torch

    from seavlm.engine.torch_runner import TorchRunner
    from seavlm.model.gemma3 import Gemma3
    from seavlm.weights.checkpoint import load_into, open_checkpoint

    place = torch.device(pick_device(device))
    kind = pick_dtype(dtype, place)
    if quantize and place.type != "cuda":
        raise SeavlmError(
            f"{quantize} is for a CPU or a CUDA GPU, not for {place}", hint="Leave quantize out."
        )
    if quantize and kind != torch.bfloat16:
        raise SeavlmError(f"{quantize} on a GPU goes with bfloat16, not {kind}", hint="Leave dtype out.")
    ours: Any = None
    if place.type == "cuda":
        try:
            from seavlm.engine.gpu import GpuRunner as ours
        except (ImportError, AttributeError) as error:
            if quantize:
                hint = "Install it: pip install triton"
                raise SeavlmError(f"{quantize} on a GPU needs Triton ({error})", hint=hint) from None
    checkpoint = open_checkpoint(source) if isinstance(source, Path) else source
    model = Gemma3(checkpoint.config, device="meta", dtype=kind)
    # What is rounded goes to the GPU layer by layer, and never all of it.
    load_into(model, checkpoint, dtype=kind, device=torch.device("cpu") if quantize else place)
    if ours is None:
        return TorchRunner(model)
    runner = ours(model, device=place, quantize=quantize)
    try:
        runner.try_out()
    except Exception as error:
        name = torch.cuda.get_device_name(place)
        if quantize:
            raise SeavlmError(f"{quantize} does not run on this GPU, {name}: {error}") from error
        warnings.warn(f"our kernels do not run on {name}, PyTorch's are used: {error}", stacklevel=3)
        return TorchRunner(model)
    return runner


def _quantized(source: Path | Merged, quantize: str) -> Runner:
    """The runner of our CPU kernels, weights rounded now."""
    from seavlm.engine.int8 import Int8Runner, library_for
    from seavlm.weights.checkpoint import open_checkpoint

    if quantize == "stored" and (not isinstance(source, Path) or source.suffix != ".gguf"):
        what = source if isinstance(source, Path) else "a merge"
        raise SeavlmError(f"{what} holds plain weights", hint="Use int8; stored is for .gguf files.")
    checkpoint = open_checkpoint(source) if isinstance(source, Path) else source
    library_for(checkpoint.config)
    vision = None
    if checkpoint.config.vision is not None:
        from seavlm.engine.vision import Eyes, Int8Vision

        vision = Int8Vision(Eyes(checkpoint))
    weights = dict(pack_decoder(checkpoint, stored=quantize == "stored"))
    return Int8Runner(checkpoint.config, weights, vision=vision)


def _mapped(path: Path) -> Runner:
    """The runner of our CPU kernels over a directory that `seavlm quantize` wrote."""
    from seavlm.engine.int8 import Int8Runner

    config = Gemma3Config.from_dir(path)
    vision = None
    if config.vision is not None:
        from seavlm.engine.vision import Int8Vision, saved_eyes

        vision = Int8Vision(saved_eyes(path, config))
    weights, stored = map_weights(path), None
    if "head.rotation" in weights:
        stored = StoredRows(path, Packed.stored(weights, "embedding"), "embedding")
    return Int8Runner(config, weights, vision=vision, stored=stored)


def pick_device(device: str) -> str:
    """ "auto" or a device name of torch, checked."""
    import torch

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
    import torch

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
    return torch.float32 if name == "float32" else torch.bfloat16


class VLM:
    """A loaded model. Not for several threads at once."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        name: str = "",
        generation: Mapping[str, Any] | None = None,
        **engine: Any,
    ) -> None:
        self.runner, self.tokenizer, self.config, self.name = runner, tokenizer, runner.config, name
        self.generation = dict(generation or {})
        if tokenizer.vocab_size > self.config.text.vocab_size:
            raise SeavlmError(
                f"{name or 'the model'} has {self.config.text.vocab_size} embedding rows for a tokenizer of "
                f"{tokenizer.vocab_size} tokens",
                hint="Use the tokenizer that belongs to the model.",
            )
        self.engine = Engine(runner, tokenizer, name=name or "the model", **engine)

    @property
    def model(self) -> Gemma3:
        """The PyTorch model, where that is what runs."""
        model = getattr(self.runner, "model", None)
        if model is None or getattr(self.runner, "quantized", False):
            raise SeavlmError(f"{self.name} is quantised", hint="Load it without quantize.")
        return model

    def generate(self, messages: Sequence[Message], **options: Any) -> Reply:
        """Answer a conversation (options: `generate_batch`). A last assistant message is continued."""
        return self.generate_batch([messages], **options)[0]

    def generate_batch(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int = 256,
        seed: int | None = None,
        pan_and_scan: bool = False,
        allow_urls: bool = False,
        **sampling: Any,
    ) -> list[Reply]:
        """Answer several conversations at once, each as if it were alone.

        sampling: the fields of `Sampling`, such as temperature (0 is greedy), top_k, top_p, stop or logprobs;
        by default the model's own (generation_config.json), else Gemma's. seed: makes sampling repeatable;
        conversation i uses seed + i. pan_and_scan: look at crops of wide and tall pictures too. allow_urls:
        pictures may come from the web.
        """
        prompts = [
            self.prompt(messages, pan_and_scan=pan_and_scan, allow_urls=allow_urls)
            for messages in conversations
        ]
        return self._replies(prompts, max_new_tokens, seed, sampling)

    def complete(
        self, text: str, *, max_new_tokens: int = 256, seed: int | None = None, **sampling: Any
    ) -> Reply:
        """Continue a text, without any conversation around it: what base models are made for."""
        prompt = Prompt([self.tokenizer.bos_id, *self.tokenizer.encode(normalize(text))])
        return self._replies([prompt], max_new_tokens, seed, sampling)[0]

    def stream(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int = 256,
        pan_and_scan: bool = False,
        allow_urls: bool = False,
        **sampling: Any,
    ) -> Iterator[str]:
        """The reply in pieces as they come, each of whole graphemes; joined they are `generate`'s text."""
        prompt = self.prompt(messages, pan_and_scan=pan_and_scan, allow_urls=allow_urls)
        request = self.engine.add(prompt, self.sampling(**sampling), max_new_tokens=max_new_tokens)
        try:
            while not request.finished:
                self.engine.step()
                if piece := request.take_text():
                    yield piece
        finally:
            self.engine.cancel(request)  # whoever reads has gone
        if request.error is not None:
            raise request.error

    def logits(
        self, messages: Sequence[Message], *, pan_and_scan: bool = False, allow_urls: bool = False
    ) -> Tensor:
        """What the model thinks at every position of the prompt: [T, V], float32."""
        import torch

        found: list[np.ndarray] = []
        prompt = self.prompt(messages, pan_and_scan=pan_and_scan, allow_urls=allow_urls)
        request = self.engine.add(
            prompt, max_new_tokens=0, inspect=lambda position, logits: found.append(logits.copy())
        )
        self._run([request])
        return torch.from_numpy(np.stack(found))

    def rank(self, messages: Sequence[Message], choices: Sequence[str], **options: Any) -> list[float]:
        """How likely each of `choices` is as the whole reply (see `rank_batch`)."""
        return self.rank_batch([messages], [choices], **options)[0]

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
        encoded = [[self.tokenizer.encode(normalize(text).strip()) for text in texts] for texts in choices]
        for texts, ids in zip(choices, encoded, strict=True):
            if not ids or not all(ids):
                raise SeavlmError(f"cannot rank {list(texts)!r}", hint="Give one or more texts, none empty.")
        prompts = [
            self.prompt(messages, pan_and_scan=pan_and_scan, allow_urls=allow_urls)
            for messages in conversations
        ]
        totals = [[0.0] * len(several) for several in encoded]
        self._run(
            self._score(prompt, choice, total, place)
            for prompt, several, total in zip(prompts, encoded, totals, strict=True)
            for place, choice in enumerate(several)
        )
        return totals

    def log_likelihoods(self, texts: Sequence[str]) -> list[float]:
        """Natural log of the probability of each text, from the beginning of a sequence on."""
        totals = [[0.0] for _ in texts]
        self._run(
            self._add_text(self.tokenizer.encode(normalize(text)), total)
            for text, total in zip(texts, totals, strict=True)
        )
        return [total[0] for total in totals]

    def _add_text(self, ids: list[int], total: list[float]) -> Request:
        def add(position: int, logits: np.ndarray) -> None:
            if position < len(ids):
                total[0] += float(log_probabilities(logits)[ids[position]])

        prompt = Prompt([self.tokenizer.bos_id, *ids])
        return self.engine.add(prompt, max_new_tokens=0, inspect=add, inspect_from=0)

    def _score(self, prompt: Prompt, ids: list[int], totals: list[float], place: int) -> Request:
        """Read a prompt and a reply, and add to totals[place] the log-probabilities of the reply and its
        end."""
        start = len(prompt.ids) - 1  # the position that foretells the reply's first token
        then = [*ids, self.tokenizer.end_of_turn_id]

        def add(position: int, logits: np.ndarray) -> None:
            totals[place] += float(log_probabilities(logits)[then[position - start]])

        return self.engine.add(
            Prompt(prompt.ids + ids, prompt.pictures), max_new_tokens=0, inspect=add, inspect_from=start
        )

    # --- messages -> what the model reads

    def prompt(
        self,
        messages: Sequence[Message],
        *,
        pan_and_scan: bool = False,
        allow_urls: bool = False,
        allow_files: bool = True,
    ) -> Prompt:
        """The ids and pictures of a conversation, up to where the reply begins.

        pan_and_scan: of all pictures; of one, where its part says {"detail": "high"}. allow_urls,
        allow_files: where pictures may come from.
        """
        messages = normalize_messages(messages)
        parts = image_parts(messages)
        vision = self.config.vision
        if parts and vision is None:
            raise SeavlmError(
                f"{self.name or 'this model'} reads text only, and the messages hold {len(parts)} "
                f"picture{'s' * (len(parts) > 1)}",
                hint="Use a model with a vision tower, for example nano.",
            )
        views, counts = list[np.ndarray](), []
        pixels_left, until = MAX_PIXELS_IN_ALL, time.monotonic() + FETCH_SECONDS
        for part in parts:
            image = load_part(
                part,
                allow_urls=allow_urls,
                allow_files=allow_files,
                max_pixels=min(MAX_PIXELS, pixels_left),
                timeout_s=until - time.monotonic(),
            )
            pixels_left -= image.width * image.height
            crops = crops_of(image) if pan_and_scan or part.get("detail") == "high" else []
            if vision is not None:  # one after the other, as they are large
                views.extend(preprocess([image, *crops], vision.image_size))
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
        pictures = []
        for pixels in views:
            digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
            pictures.append(Picture(pixels, digest))
        return Prompt(ids, tuple(pictures))

    def sampling(self, **given: Any) -> Sampling:
        """What was given, else what the model's makers chose."""
        known = Sampling.__dataclass_fields__
        for name in given:
            if name not in known:
                raise SeavlmError(
                    f"unknown option {name!r}", hint=f"Known: {', '.join(known)}.{nearest(name, known)}"
                )
        return Sampling.from_config(self.generation, **given)

    # --- what the model reads -> ids

    def _replies(
        self, prompts: Sequence[Prompt], max_new_tokens: int, seed: int | None, sampling: Mapping[str, Any]
    ) -> list[Reply]:
        requests = self._run(
            self.engine.add(
                prompt,
                self.sampling(**sampling, seed=None if seed is None else seed + number),
                max_new_tokens=max_new_tokens,
            )
            for number, prompt in enumerate(prompts)
        )
        return [
            Reply(
                request.text,
                request.ids,
                request.finish_reason or "",
                len(request.prompt.ids),
                request.last_token_at - request.started,
                request.logprobs,
            )
            for request in requests
        ]

    def _run(self, adding: Iterable[Request]) -> list[Request]:
        """Add all, and work until all have ended; the first error is raised, and leaves nothing behind."""
        requests: list[Request] = []
        try:
            for request in adding:
                requests.append(request)
            while not all(request.finished for request in requests):
                self.engine.step()
        finally:
            for request in requests:
                self.engine.cancel(request)
        for request in requests:
            if request.error is not None:
                raise request.error
        return requests


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
