"""Pictures to pixel values, as Gemma 3's processor makes them, and pan & scan.

The golden backend is PIL: values equal transformers' `Gemma3ImageProcessorPil` bit for bit. Its torchvision
sibling resizes a little differently (antialiasing in floating point) and is not followed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

MEAN = STD = 0.5
# Byte -> value: / 255 in float64, then (x - mean) / std in float32, the reference's order of roundings.
_VALUES = ((np.arange(256) * (1 / 255)).astype(np.float32) - np.float32(MEAN)) / np.float32(STD)


def preprocess(images: Sequence[Image.Image], image_size: int) -> np.ndarray:
    """RGB pictures of any size -> float32 [N, 3, S, S] in [-1, 1].

    Each is resized to S x S bilinearly without keeping its aspect ratio, as Gemma 3 was trained.
    """
    out = np.empty((len(images), 3, image_size, image_size), dtype=np.float32)
    for place, image in zip(out, images, strict=True):
        square = image.convert("RGB").resize((image_size, image_size), Image.Resampling.BILINEAR)
        np.take(_VALUES, np.asarray(square).transpose(2, 0, 1), out=place)
    return out


def pan_and_scan(
    image: Image.Image,
    *,
    min_crop_size: int = 256,
    max_num_crops: int = 4,
    min_ratio_to_activate: float = 1.2,
) -> list[Image.Image]:
    """The crops of an elongated picture, left to right or top to bottom; [] where there is nothing to gain.

    The long side is cut into round(ratio) parts, between 2 and `max_num_crops`, none below `min_crop_size`.
    The model sees the whole picture first and these after it. Follows transformers'
    `Gemma3ImageProcessorPil`.
    """
    width, height = image.size
    long, short = max(width, height), min(width, height)
    if long / short < min_ratio_to_activate:
        return []
    crops = min(math.floor(long / min_crop_size), math.floor(long / short + 0.5))  # half rounds up
    crops = min(max_num_crops, max(2, crops))
    across, down = (crops, 1) if width >= height else (1, crops)
    crop_width, crop_height = math.ceil(width / across), math.ceil(height / down)
    if min(crop_width, crop_height) < min_crop_size:
        return []
    return [
        image.crop((left, top, min(left + crop_width, width), min(top + crop_height, height)))
        for top, left in itertools.product(range(0, height, crop_height), range(0, width, crop_width))
    ]
