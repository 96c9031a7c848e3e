"""The decoder: blocks with four norms, five local layers to one global.

Shapes: B batch, T tokens, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seavlm.model.attention import Attention, Cache, Layout, Mask, make_mask
from seavlm.model.config import TextConfig
from seavlm.model.layers import MLP, RMSNorm, inverse_frequencies, rope_tables


class DecoderLayer(nn.Module):
    """Attention and MLP, each normed before and, unlike in most models, once more before its residual add."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(width, eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.pre_feedforward_layernorm = RMSNorm(width, eps)
        self.mlp = MLP(width, config.intermediate_size)
        self.post_feedforward_layernorm = RMSNorm(width, eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Cache | None) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope, mask, cache))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Decoder(nn.Module):
    """Embeddings [B, T, C] -> final hidden states [B, T, C] (after the last norm).

    recompute: in training keep each layer's input only, and compute the layer again in the backward pass.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config, self.recompute = config, False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # Not buffers: a module built on meta and filled from a checkpoint must not lose them.
        self._inv_freq = {torch.device("cpu"): self.inverse_frequencies()}
        self.reset_parameters()

    def inverse_frequencies(self) -> dict[str, Tensor]:
        """Kind of layer -> fp32 [D/2], on the CPU."""
        config = self.config
        return {kind: inverse_frequencies(config.head_dim, *config.rope(kind)) for kind in config.kinds}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights: normal with the config's initializer_range."""
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=self.config.initializer_range)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings times sqrt(width), the factor rounded to the weights' dtype as in training."""
        weight = self.embed_tokens.weight
        return self.embed_tokens(input_ids) * torch.tensor(self.config.hidden_size**0.5, dtype=weight.dtype)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        if cache is not None:
            cache.extend(layout)
        if x.device not in self._inv_freq:
            at_cpu = self._inv_freq[torch.device("cpu")]
            self._inv_freq[x.device] = {kind: table.to(x.device) for kind, table in at_cpu.items()}
        ropes, masks = {}, {}  # one per kind of layer, not one per layer
        for kind, inv_freq in self._inv_freq[x.device].items():
            ropes[kind] = rope_tables(layout.positions, inv_freq, x.dtype)
            masks[kind] = make_mask(layout, kind, self.config.window(kind), cache)
        for kind, layer in zip(self.config.layer_types, self.layers, strict=True):
            given = x, ropes[kind], masks[kind], cache
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(*given)
        return self.norm(x)
