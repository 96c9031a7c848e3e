"""Tensor names and shapes: one canonical set inside, the Hugging Face and GGUF spellings outside.

Inside the house a tensor has the name of the module's parameter
(`language_model.layers.0.mlp.up_proj.weight`). On disk Gemma 3 goes by several prefixes, depending on who
wrote it:

    Google's, 4B and up    language_model.model.*   vision_tower.vision_model.*    multi_modal_projector.*
    transformers 5         language_model.model.*   vision_tower.*                 multi_modal_projector.*
    transformers 4.52+     model.language_model.*   model.vision_tower[.vision_model].*   and so on
    text only              model.*

All are read; Google's is written: transformers, vLLM, mergekit and llama.cpp's converter all know it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seavlm.model.config import Gemma3Config, VisionConfig

EMBEDDING = "language_model.embed_tokens.weight"
HEAD = "lm_head.weight"  # canonical name of a tied duplicate of EMBEDDING; never a parameter of the model

# (prefix on disk, canonical prefix); the first that fits is taken, so the longer ones come first.
_FROM_DISK = (
    ("model.vision_tower.vision_model.", "vision_tower."),
    ("vision_tower.vision_model.", "vision_tower."),
    ("model.vision_tower.", "vision_tower."),
    ("vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("multi_modal_projector.", "multi_modal_projector."),
    ("language_model.lm_head.", "lm_head."),
    ("model.lm_head.", "lm_head."),
    ("lm_head.", "lm_head."),
    ("model.language_model.", "language_model."),
    ("language_model.model.", "language_model."),
    ("language_model.", "language_model."),
    ("model.", "language_model."),
)
# Tables that older versions stored though they follow from the config.
_DERIVED = (".rotary_emb.inv_freq", ".embeddings.position_ids")


def from_disk(name: str) -> str | None:
    """The canonical name of a tensor in a checkpoint, of any of the prefix families above.

    None for stored tables that follow from the config. A name of no known family comes back as it is, so that
    the caller can list it as unexpected. Canonical names map to themselves.
    """
    if name.endswith(_DERIVED):
        return None
    for prefix, canonical in _FROM_DISK:
        if name.startswith(prefix):
            return canonical + name.removeprefix(prefix)
    return name


def to_disk(name: str, *, vision: bool) -> str:
    """The name of the canonical `name` in Google's own files.

    vision: whether the model has a vision tower (Gemma3ForConditionalGeneration) or is text only
    (Gemma3ForCausalLM).
    """
    if name.startswith("language_model."):
        rest = name.removeprefix("language_model.")
        return f"language_model.model.{rest}" if vision else f"model.{rest}"
    if name.startswith("vision_tower."):
        return f"vision_tower.vision_model.{name.removeprefix('vision_tower.')}"
    return name


_GGUF = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": "language_model.norm.weight",
    "output.weight": HEAD,
}
_GGUF_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_TO_GGUF = {canonical: name for name, canonical in _GGUF.items()}
_TO_GGUF_BLOCK = {canonical: name for name, canonical in _GGUF_BLOCK.items()}


def from_gguf(name: str) -> str:
    """The canonical name of a tensor of a llama.cpp `gemma3` file; an unknown name comes back as it is."""
    if name in _GGUF:
        return _GGUF[name]
    block, _, rest = name.partition(".")[2].partition(".")
    kind, _, suffix = rest.rpartition(".")
    if name.startswith("blk.") and block.isdigit() and suffix == "weight" and kind in _GGUF_BLOCK:
        return f"language_model.layers.{int(block)}.{_GGUF_BLOCK[kind]}.weight"
    return name


def to_gguf(name: str) -> str:
    """The llama.cpp name of a canonical text tensor; any other name comes back as it is."""
    if name in _TO_GGUF:
        return _TO_GGUF[name]
    layer, _, rest = name.removeprefix("language_model.layers.").partition(".")
    kind = rest.removesuffix(".weight")
    if name.startswith("language_model.layers.") and kind in _TO_GGUF_BLOCK:
        return f"blk.{layer}.{_TO_GGUF_BLOCK[kind]}.weight"
    return name


def is_text_norm(name: str) -> bool:
    """Whether `name` is one of the RMSNorm weights of the decoder, which GGUF stores with 1 added."""
    return name.startswith("language_model.") and name.endswith("norm.weight")


def shapes(config: Gemma3Config) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of a model, in the order in which they are written.

    Linear weights are [out, in]; the projector's is [vision width, text width] as Gemma stores it.
    """
    text, vision = config.text, config.vision
    width, ffn, head = text.hidden_size, text.intermediate_size, text.head_dim
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (queries, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, queries),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "post_attention_layernorm.weight": (width,),
        "pre_feedforward_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (ffn, width),
        "mlp.up_proj.weight": (ffn, width),
        "mlp.down_proj.weight": (width, ffn),
        "post_feedforward_layernorm.weight": (width,),
    }
    result: dict[str, tuple[int, ...]] = {}
    if vision is not None:
        result |= _vision_shapes(vision)
        result["multi_modal_projector.mm_soft_emb_norm.weight"] = (vision.hidden_size,)
        result["multi_modal_projector.mm_input_projection_weight"] = (vision.hidden_size, width)
    result[EMBEDDING] = (text.vocab_size, width)
    for i in range(text.num_hidden_layers):
        result |= {f"language_model.layers.{i}.{name}": shape for name, shape in layer.items()}
    result["language_model.norm.weight"] = (width,)
    return result


def _vision_shapes(vision: VisionConfig) -> dict[str, tuple[int, ...]]:
    width, ffn, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    layer: dict[str, tuple[int, ...]] = {}
    for name, shape in {
        "layer_norm1": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width, width),
        "self_attn.v_proj": (width, width),
        "self_attn.out_proj": (width, width),
        "layer_norm2": (width,),
        "mlp.fc1": (ffn, width),
        "mlp.fc2": (width, ffn),
    }.items():
        layer |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    result: dict[str, tuple[int, ...]] = {
        "vision_tower.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "vision_tower.embeddings.patch_embedding.bias": (width,),
        "vision_tower.embeddings.position_embedding.weight": (vision.num_patches, width),
    }
    for i in range(vision.num_hidden_layers):
        result |= {f"vision_tower.encoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    result["vision_tower.post_layernorm.weight"] = (width,)
    result["vision_tower.post_layernorm.bias"] = (width,)
    return result
