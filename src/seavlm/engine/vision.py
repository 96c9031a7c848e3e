"""Gemma 3's vision tower in int8, on the CPU: pictures in, soft tokens out, as `Gemma3.encode_images`.

The encoder's matrices and attention are int8 (kernels/vision.cpp); patches, the last norm and the projector,
a hundredth of the work, stay as they were.

Shapes: N pictures, S pixels a side, T patches, V tower width, M soft tokens a picture, C decoder width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from seavlm.engine import kernels
from seavlm.errors import SeavlmError
from seavlm.model.config import Gemma3Config
from seavlm.model.gemma3 import Gemma3
from seavlm.model.vision import Projector, VisionTower
from seavlm.weights.checkpoint import Checkpoint, load_into

LANES, GROUP = 48, 128  # rows and columns of a packed matrix are multiples of these


class Eyes(nn.Module):
    """The part of `Gemma3` that sees, on its own, filled from a checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.config = checkpoint.config
        assert self.config.vision is not None
        with torch.device("meta"):
            self.vision_tower = VisionTower(self.config.vision)
            self.multi_modal_projector = Projector(self.config, self.config.vision)
        load_into(self, Part(checkpoint, list(dict(self.named_parameters()))), dtype=torch.float32)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch's own threads beside the kernels' wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Part:
    """Some tensors of a checkpoint."""

    def __init__(self, whole: Checkpoint, names: list[str]) -> None:
        self.path, self.config = whole.path, whole.config
        self.shape, self.dtype, self.get = whole.shape, whole.dtype, whole.get
        self.names = lambda: names


class Tensors:
    """Tensors in memory, as a checkpoint."""

    def __init__(self, path: Path, config: Gemma3Config, tensors: dict[str, Tensor]) -> None:
        self.path, self.config, self.tensors = path, config, tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def get(self, name: str) -> Tensor:
        return self.tensors[name]


def saved_eyes(folder: Path, config: Gemma3Config) -> Eyes:
    """The tower and projector that `seavlm quantize` kept."""
    path = folder / "vision.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SeavlmError(f"{path} cannot be read ({error})", hint="Quantise it again.") from None
    return Eyes(Tensors(path, config, tensors))


class Int8Vision(nn.Module):
    """Takes over the vision tower and projector of a loaded `Gemma3`; the encoder's fp32 weights are given up
    layer by layer.

    Raises SeavlmError when the kernels were not built, or the model is text-only.
    """

    def __init__(self, model: Gemma3 | Eyes, threads: int | None = None) -> None:
        super().__init__()
        lib = kernels.required()
        config = model.config.vision
        if config is None:
            raise SeavlmError("this model is text-only", hint="Use a model with a vision tower.")
        self.lib, self.config, self.tokens = lib, config, model.config.mm_tokens_per_image
        self.pace = kernels.pace(threads)
        self.vision_tower, self.multi_modal_projector = model.vision_tower, model.multi_modal_projector
        self._kept: list[Tensor] = []  # what the structures point at
        layers = []
        encoder: Any = self.vision_tower.encoder
        for layer in encoder.layers:
            attention, mlp = layer.self_attn, layer.mlp
            layers.append(
                kernels.VisionLayer(
                    self._pack(attention.q_proj, attention.k_proj, attention.v_proj),
                    self._pack(attention.out_proj),
                    self._pack(mlp.fc1),
                    self._pack(mlp.fc2),
                    *self._norm(layer.layer_norm1),
                    *self._norm(layer.layer_norm2),
                )
            )
            for linear in (*attention.children(), *mlp.children()):
                linear.weight = linear.bias = None
        self._layers = (kernels.VisionLayer * len(layers))(*layers)
        self._model = kernels.Vision(
            self._layers, len(layers), config.hidden_size, config.num_attention_heads,
            config.intermediate_size, config.layer_norm_eps,
        )  # fmt: skip
        self.float()  # what is left, should the model have come in bfloat16

    @property
    def weight_bytes(self) -> int:
        """Of the encoder, as packed."""
        return sum(tensor.nbytes for tensor in self._kept)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [3, S, S] -> [M, C]"""
        return self.encode_images(torch.from_numpy(pixels)[None])[0].numpy()

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, M, C] in fp32, one picture after the other."""
        self.vision_tower.check(pixel_values)
        width = self.config.hidden_size
        tower, projector = self.vision_tower, self.multi_modal_projector
        found = torch.empty(len(pixel_values), self.tokens, projector.mm_input_projection_weight.shape[1])
        with kernels.ONE_AT_A_TIME, _one_thread():
            for i, picture in enumerate(pixel_values):
                x = F.pad(tower.embeddings(picture[None])[0], (0, -width % 16)).contiguous()  # [T, V]
                with self.pace.step() as threads:
                    self.lib.seavlm_vision_forward(self._model, x.data_ptr(), len(x), threads)
                found[i] = projector(projector.pool(tower.post_layernorm(x[None, :, :width])))[0]
        return found

    def _keep(self, tensor: Tensor) -> int:
        """The address of a tensor that lives as long as the model."""
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _norm(self, norm: Any) -> tuple[int, int]:
        """The addresses of weight and bias, with zeros up to a multiple of 16."""
        weight, bias = (F.pad(p.detach().float(), (0, -len(p) % 16)) for p in (norm.weight, norm.bias))
        return self._keep(weight), self._keep(bias)

    @torch.no_grad()
    def _pack(self, *parts: Any) -> kernels.VisionMatrix:
        """The rows of some linear layers as one matrix."""
        source = torch.cat([part.weight.float() for part in parts]).contiguous()
        bias = torch.cat([part.bias.float() for part in parts])
        rows, columns = source.shape
        n, k = rows + -rows % LANES, columns + -columns % GROUP
        q, rest = torch.empty(n, k, dtype=torch.uint8), torch.empty(n, k, dtype=torch.int8)
        scale = torch.empty(n, k // GROUP)
        self.lib.seavlm_vision_pack(
            source.data_ptr(), rows, columns, n, k, q.data_ptr(), rest.data_ptr(), scale.data_ptr(),
            self.pace.threads,
        )  # fmt: skip
        bias = F.pad(bias, (0, n - rows))
        return kernels.VisionMatrix(*map(self._keep, (q, rest, scale, bias)), n, k)
