"""SigLIP's vision tower as Gemma 3 uses it, and the projector that turns patches into soft tokens.

Shapes: N pictures, S pixels a side, P patches, V tower width, M soft tokens a picture, C decoder width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seavlm.errors import SeavlmError
from seavlm.model.config import Gemma3Config, VisionConfig
from seavlm.model.layers import RMSNorm


class VisionEmbeddings(nn.Module):
    """Square patches, each projected to the width, plus a learned position."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch)
        self.position_embedding = nn.Embedding(config.num_patches, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(
            pixel_values.to(self.patch_embedding.weight.dtype)
        )  # [N, V, side, side]
        return patches.flatten(2).transpose(1, 2) + self.position_embedding.weight


class VisionAttention(nn.Module):
    """Every patch looks at every patch; biases everywhere."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = (self.num_heads, -1)
        q = self.q_proj(x).unflatten(-1, heads).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, heads).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionLayer(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class VisionTower(nn.Module):
    """Pixels [N, 3, S, S] (RGB, (x / 255 - 0.5) / 0.5) -> patch features [N, P, V]; no pooling head.

    Patches run row by row from the top left. Any other picture size raises SeavlmError: positions are learned
    for exactly this one. Fresh weights are ready for training from scratch.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights: Xavier matrices, zero biases, positions of norm one."""
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(part.weight.flatten(1))
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=self.config.hidden_size**-0.5)

    def check(self, pixel_values: Tensor) -> None:
        """SeavlmError for pictures of any other shape than [N, 3, S, S]."""
        size = self.config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise SeavlmError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected (N, 3, {size}, {size})",
                hint=f"Resize the pictures to {size}x{size} RGB.",
            )

    def forward(self, pixel_values: Tensor) -> Tensor:
        self.check(pixel_values)
        return self.post_layernorm(self.encoder(self.embeddings(pixel_values)))


class Projector(nn.Module):
    """Patch features -> soft tokens: average pool, RMSNorm, one matrix (stored [V, C], used as x @ W)."""

    def __init__(self, config: Gemma3Config, vision: VisionConfig) -> None:
        super().__init__()
        self.side, self.pool_size = vision.patches_per_side, config.pool_size
        self.mm_input_projection_weight = nn.Parameter(
            torch.empty(vision.hidden_size, config.text.hidden_size)
        )
        self.mm_soft_emb_norm = RMSNorm(vision.hidden_size, vision.layer_norm_eps)
        nn.init.normal_(self.mm_input_projection_weight, std=config.text.initializer_range)

    def pool(self, features: Tensor) -> Tensor:
        """[N, P, V] -> [N, M, V]: means of pool_size x pool_size squares of patches."""
        grid = features.transpose(1, 2).unflatten(2, (self.side, self.side))
        return F.avg_pool2d(grid, self.pool_size).flatten(2).transpose(1, 2)

    def forward(self, pooled: Tensor) -> Tensor:
        """[N, M, V] -> [N, M, C]"""
        return self.mm_soft_emb_norm(pooled) @ self.mm_input_projection_weight
