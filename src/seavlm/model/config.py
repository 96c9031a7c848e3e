"""Gemma 3's shape, as plain dataclasses, read from and written to Hugging Face's `config.json`.

No torch in here: a command can look at a checkpoint's size without waiting for an import.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seavlm.errors import SeavlmError, nearest

LOCAL = "sliding_attention"
GLOBAL = "full_attention"
PATTERN = 6  # every sixth layer is global, unless the config says otherwise

# What Gemma 3 does not have. A config that asks for one of these is another model: better refused
# than run wrongly.
_FIXED_TEXT: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0, None),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
    "tie_word_embeddings": (True, None),
}
_FIXED_VISION: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "num_channels": (3,),
    "attention_dropout": (0, 0.0, None),
}


def layer_pattern(num_layers: int, every: int = PATTERN) -> tuple[str, ...]:
    """The kind of each layer: layer i is global iff (i + 1) % every == 0."""
    return tuple(LOCAL if (i + 1) % every else GLOBAL for i in range(num_layers))


@dataclass(frozen=True)
class TextConfig:
    """The decoder. Defaults are those of transformers' class, which sparse published configs lean on."""

    vocab_size: int = 262_208
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    query_pre_attn_scalar: float = 256  # scores are multiplied by query_pre_attn_scalar ** -0.5
    sliding_window: int = 4096  # keys a query of a local layer sees, itself included
    layer_types: tuple[str, ...] = ()  # one of LOCAL, GLOBAL per layer; () stands for the 5:1 pattern
    rope_theta: float = 1_000_000.0  # global layers
    rope_factor: float = 1.0  # global layers: frequencies are divided by it (8 for 4B and up)
    rope_local_theta: float = 10_000.0  # local layers, never scaled
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 131_072
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        _positive(self, "text_config", "vocab_size hidden_size intermediate_size num_hidden_layers head_dim")
        _positive(self, "text_config", "num_attention_heads num_key_value_heads sliding_window")
        _positive(self, "text_config", "max_position_embeddings query_pre_attn_scalar rope_theta rope_factor")
        _positive(self, "text_config", "rope_local_theta rms_norm_eps")
        if not self.layer_types:
            object.__setattr__(self, "layer_types", layer_pattern(self.num_hidden_layers))
        if len(self.layer_types) != self.num_hidden_layers:
            raise SeavlmError(
                f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers",
                hint="Give one kind per layer, or leave layer_types out.",
            )
        for kind in self.layer_types:
            if kind not in (LOCAL, GLOBAL):
                raise SeavlmError(
                    f"unknown layer type {kind!r}.{nearest(kind, [LOCAL, GLOBAL])}",
                    hint=f"Layers are {LOCAL} or {GLOBAL}.",
                )
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        _divides(kv_heads, heads, "num_key_value_heads", "num_attention_heads")
        # Not needed by the mathematics, but transformers refuses to load a config that breaks it.
        _divides(heads, self.hidden_size, "num_attention_heads", "hidden_size")
        _divides(2, self.head_dim, "2", "head_dim")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of layer this decoder has, each once."""
        return tuple(sorted(set(self.layer_types)))

    def window(self, kind: str) -> int | None:
        """Keys visible to a query in a layer of this kind (None: all that came before)."""
        return self.sliding_window if kind == LOCAL else None

    def rope(self, kind: str) -> tuple[float, float]:
        """(theta, factor) of the rotary embedding in layers of this kind."""
        return (self.rope_local_theta, 1.0) if kind == LOCAL else (self.rope_theta, self.rope_factor)


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP tower. Defaults are those of transformers' class, not Gemma's (see `Gemma3Config.named`)."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224  # pixels a side
    patch_size: int = 16  # pixels a side
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _positive(
            self, "vision_config", "hidden_size intermediate_size num_hidden_layers num_attention_heads"
        )
        _positive(self, "vision_config", "image_size patch_size layer_norm_eps")
        _divides(
            self.num_attention_heads, self.hidden_size, "vision num_attention_heads", "vision hidden_size"
        )
        if self.image_size < self.patch_size:
            raise SeavlmError(f"image_size {self.image_size} is smaller than patch_size {self.patch_size}")

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.patches_per_side**2


@dataclass(frozen=True)
class Gemma3Config:
    """A whole model: decoder, and for picture models the tower and the ids that stand for pictures.

    `vision` is None for text-only models. `dtype` names the stored one ("bfloat16", "float32").
    Special ids differ between vocabularies (a trimmed one has its own), so they are always read from here.
    """

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig | None = None
    mm_tokens_per_image: int = 256
    image_token_index: int = 262_144
    boi_token_index: int = 255_999
    eoi_token_index: int = 256_000
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_ids: tuple[int, ...] = (1, 106)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.vision is None:
            return
        side, tokens = self.vision.patches_per_side, math.isqrt(max(self.mm_tokens_per_image, 0))
        if tokens < 1 or tokens**2 != self.mm_tokens_per_image or side % tokens:
            raise SeavlmError(
                f"mm_tokens_per_image {self.mm_tokens_per_image} does not fit {side}x{side} patches",
                hint="It must be a square whose side divides the patches per side.",
            )

    @property
    def pool_size(self) -> int:
        """Side of the square of patches that is averaged into one token."""
        if self.vision is None:
            raise SeavlmError("a text-only model has no pictures to pool")
        return self.vision.patches_per_side // math.isqrt(self.mm_tokens_per_image)

    @classmethod
    def named(cls, size: str) -> Gemma3Config:
        """One of Google's sizes: "270m", "1b" (text-only), "4b", "12b", "27b"."""
        if size.lower() not in _SIZES:
            raise SeavlmError(
                f"unknown Gemma 3 size {size!r}.{nearest(size.lower(), _SIZES)}",
                hint=f"Sizes: {', '.join(_SIZES)}.",
            )
        layers, width, ffn, heads, kv_heads, head_dim, scalar = _SIZES[size.lower()]
        small = size.lower() in ("270m", "1b")
        text = TextConfig(
            vocab_size=262_144 if small else 262_208,
            hidden_size=width,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            query_pre_attn_scalar=scalar,
            sliding_window=512 if small else 1024,
            rope_factor=1.0 if small else 8.0,
            max_position_embeddings=32_768 if small else 131_072,
        )
        siglip = VisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            image_size=896,
            patch_size=14,
        )
        return cls(text=text, vision=None if small else siglip, dtype="bfloat16")

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
    ) -> Gemma3Config:
        """From the content of `config.json` (and of `generation_config.json`, which knows the stop ids).

        Reads picture models ("gemma3") and text-only ones ("gemma3_text"), transformers 5's
        `rope_parameters` as well as the older `rope_theta` keys. Missing keys take transformers' defaults.
        """
        model_type = config.get("model_type", "gemma3" if "text_config" in config else "gemma3_text")
        if model_type not in ("gemma3", "gemma3_text"):
            raise SeavlmError(
                f"model_type {model_type!r} is not Gemma 3",
                hint="Known: gemma3, gemma3_text.",
            )
        multimodal = model_type == "gemma3"
        text = dict(config.get("text_config") or {}) if multimodal else dict(config)
        ids = {
            **text,
            **{k: v for k, v in config.items() if v is not None},
        }  # outer level wins
        eos = (generation_config or {}).get("eos_token_id")
        if eos is None:
            eos = ids.get("eos_token_id")
        if eos is None:
            eos = cls.eos_token_ids
        dtype = next((c[k] for c in (config, text) for k in ("dtype", "torch_dtype") if c.get(k)), cls.dtype)
        return cls(
            text=_read_text(text),
            vision=_read_vision(config.get("vision_config") or {}) if multimodal else None,
            mm_tokens_per_image=_get(config, "mm_tokens_per_image", cls.mm_tokens_per_image),
            image_token_index=_get(
                config, "image_token_index", _get(config, "image_token_id", cls.image_token_index)
            ),
            boi_token_index=_get(
                config, "boi_token_index", _get(config, "boi_token_id", cls.boi_token_index)
            ),
            eoi_token_index=_get(
                config, "eoi_token_index", _get(config, "eoi_token_id", cls.eoi_token_index)
            ),
            pad_token_id=_get(ids, "pad_token_id", cls.pad_token_id),
            bos_token_id=_get(ids, "bos_token_id", cls.bos_token_id),
            eos_token_ids=tuple(eos) if isinstance(eos, Iterable) else (int(eos),),
            dtype=str(dtype).removeprefix("torch."),
        )

    @classmethod
    def from_dir(cls, directory: str | Path) -> Gemma3Config:
        """From a checkpoint directory's `config.json` and, where there is one, `generation_config.json`."""
        path = Path(directory) / "config.json"
        generation = path.with_name("generation_config.json")
        return cls.from_dict(_read_json(path), _read_json(generation) if generation.exists() else None)

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`, as transformers 5.23 and older readers take it."""
        special = {
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids),
            "dtype": self.dtype,
        }
        text = {"model_type": "gemma3_text", **_write_text(self.text), **special}
        if self.vision is None:
            return {"architectures": ["Gemma3ForCausalLM"], **text}
        vision = {
            "model_type": "siglip_vision_model",
            **{key: getattr(self.vision, key) for key in _keys(VisionConfig)},
            "num_channels": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "vision_use_head": False,  # the pooling head of SigLIP is not part of Gemma 3
            "dtype": self.dtype,
        }
        return {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "text_config": text,
            "vision_config": vision,
            "mm_tokens_per_image": self.mm_tokens_per_image,
            "image_token_index": self.image_token_index,
            "boi_token_index": self.boi_token_index,
            "eoi_token_index": self.eoi_token_index,
            "initializer_range": self.text.initializer_range,
            "tie_word_embeddings": True,
            **special,
        }


# size: layers, width, ffn, heads, kv heads, head dim, query scalar
_SIZES: dict[str, tuple[int, int, int, int, int, int, int]] = {
    "270m": (18, 640, 2048, 4, 1, 256, 256),
    "1b": (26, 1152, 6912, 4, 1, 256, 256),
    "4b": (34, 2560, 10240, 8, 4, 256, 256),
    "12b": (48, 3840, 15360, 16, 8, 256, 256),
    "27b": (62, 5376, 21504, 32, 16, 128, 168),
}


def _read_text(raw: dict[str, Any]) -> TextConfig:
    _refuse_other(raw, _FIXED_TEXT, "text_config")
    rope = raw.get("rope_parameters") or {}
    # transformers: the old `rope_scaling` describes the global layers only
    full = {**(rope.get(GLOBAL) or {}), **(raw.get("rope_scaling") or {})}
    local = rope.get(LOCAL) or {}
    for kind, given, known in ((GLOBAL, full, ("default", "linear")), (LOCAL, local, ("default",))):
        rope_type = given.get("rope_type", given.get("type", "default"))
        if rope_type not in known:
            raise SeavlmError(
                f"rope type {rope_type!r} of {kind} is not Gemma 3's", hint=f"Known: {', '.join(known)}."
            )
    linear = full.get("rope_type", full.get("type", "default")) == "linear"
    if linear and "factor" not in full:
        raise SeavlmError("rope type linear without a factor", hint='Add "factor": 8.0 to the config.')
    layers = _get(raw, "num_hidden_layers", TextConfig.num_hidden_layers)
    every = _get(raw, "sliding_window_pattern", _get(raw, "_sliding_window_pattern", PATTERN))
    return TextConfig(
        **{
            key: raw[key]
            for key in _keys(TextConfig)
            if raw.get(key) is not None and not key.startswith("rope")
        }
        | {
            "layer_types": tuple(raw.get("layer_types") or layer_pattern(layers, every)),
            "rope_theta": full.get("rope_theta", _get(raw, "rope_theta", TextConfig.rope_theta)),
            "rope_local_theta": local.get(
                "rope_theta", _get(raw, "rope_local_base_freq", TextConfig.rope_local_theta)
            ),
            "rope_factor": float(full["factor"]) if linear else 1.0,
        }
    )


def _write_text(text: TextConfig) -> dict[str, Any]:
    scaling = {"rope_type": "linear", "factor": text.rope_factor} if text.rope_factor != 1.0 else None
    written = {key: getattr(text, key) for key in _keys(TextConfig) if not key.startswith("rope")}
    written["layer_types"] = list(text.layer_types)
    every = text.layer_types.index(GLOBAL) + 1 if GLOBAL in text.layer_types else 0
    if every and layer_pattern(text.num_hidden_layers, every) == text.layer_types:
        written["sliding_window_pattern"] = every  # older readers derive the kinds from it
    return written | {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "rope_parameters": {
            GLOBAL: {**(scaling or {"rope_type": "default"}), "rope_theta": text.rope_theta},
            LOCAL: {"rope_type": "default", "rope_theta": text.rope_local_theta},
        },
        "rope_theta": text.rope_theta,  # these three: for readers older than transformers 5
        "rope_local_base_freq": text.rope_local_theta,
        "rope_scaling": scaling,
    }


def _read_vision(raw: Mapping[str, Any]) -> VisionConfig:
    _refuse_other(raw, _FIXED_VISION, "vision_config")
    return VisionConfig(**{key: raw[key] for key in _keys(VisionConfig) if raw.get(key) is not None})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SeavlmError(f"no {path.name} in {path.parent}", hint="Is this a model directory?") from None
    except ValueError as error:
        raise SeavlmError(f"{path} is not valid JSON: {error}") from None


def _keys(dataclass_type: Any) -> tuple[str, ...]:
    return tuple(dataclass_type.__dataclass_fields__)


def _get(raw: Mapping[str, Any], key: str, default: Any) -> Any:
    """A key's value; a null counts as missing."""
    value = raw.get(key)
    return default if value is None else value


def _id(raw: Mapping[str, Any], name: str, default: int) -> int:
    """A special id, under its old name (_index) or its new one (_id)."""
    return _get(raw, f"{name}_index", _get(raw, f"{name}_id", default))


def _refuse_other(raw: Mapping[str, Any], fixed: dict[str, tuple[Any, ...]], where: str) -> None:
    for key, allowed in fixed.items():
        if key in raw and raw[key] not in allowed:
            raise SeavlmError(
                f"{where}.{key} is {raw[key]!r}, which Gemma 3 does not have",
                hint=f"Expected {allowed[0]!r}.",
            )


def _positive(config: object, where: str, names: str) -> None:
    for name in names.split():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise SeavlmError(f"{where}.{name} is {value!r}", hint="It must be a number above zero.")


def _divides(divisor: int, number: int, divisor_name: str, number_name: str) -> None:
    if number % divisor:
        named = f"{divisor_name} {divisor}" if divisor_name != str(divisor) else divisor_name
        raise SeavlmError(f"{number_name} {number} is not a multiple of {named}")
