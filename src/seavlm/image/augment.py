"""Another view of a training picture: turned, moved, recoloured, blurred a little, still the same thing."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageFilter

_LUMA = np.array([0.299, 0.587, 0.114])


def augment(image: Image.Image, rng: np.random.Generator, *, flip: bool = False) -> Image.Image:
    """A random mild variation of `image`: RGB, of the same size. A pure function of the picture and `rng`.

    Rotation within 15 degrees, scale 0.75 to 1.1, shift within 8 %; brightness, contrast, saturation, hue; at
    times another background, blur, noise. A picture with transparency is laid on the background; of one
    without, white is taken for it. `flip` also mirrors half of the views (not for flags, letters and what is
    left of what).
    """
    background = _background(rng)
    image = _on_background(image, background, swap_white=rng.random() < 0.3)
    if flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = _move(image, rng)
    image = _recolour(image, rng)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.008 * max(image.size) + 0.3)))
    if rng.random() < 0.3:
        pixels = np.asarray(image).astype(np.float32)
        pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * rng.uniform(2, 10)
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image


def _background(rng: np.random.Generator) -> tuple[int, int, int]:
    """White half of the time, else mostly light colours: what pictures are shown on."""
    if rng.random() < 0.5:
        return (255, 255, 255)
    red, green, blue = (
        rng.integers(256, size=3) * 0.4 + 153 if rng.random() < 0.8 else rng.integers(256, size=3)
    )
    return int(red), int(green), int(blue)


def _on_background(image: Image.Image, colour: tuple[int, int, int], *, swap_white: bool) -> Image.Image:
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        base = Image.new("RGBA", layer.size, colour)
        base.alpha_composite(layer)
        return base.convert("RGB")
    image = image.convert("RGB")
    if swap_white and colour != (255, 255, 255):
        # The closer a pixel is to white, the more it becomes background: no pale rim around the thing.
        pixels = np.asarray(image).astype(np.float32)
        share = np.clip((pixels.min(axis=2, keepdims=True) - 205) / 45, 0, 1)
        pixels += share * (np.array(colour, dtype=np.float32) - pixels)
        image = Image.fromarray(pixels.astype(np.uint8))
    return image


def _move(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turns, scales and shifts about the middle; what comes in from outside has the colour of the corners."""
    width, height = image.size
    angle = math.radians(rng.uniform(-15, 15))
    scale = rng.uniform(0.75, 1.1)
    shift_x, shift_y = rng.uniform(-0.08, 0.08, size=2) * (width, height)
    # PIL wants the map from the new picture's pixels to the old one's.
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    x, y = width / 2, height / 2
    matrix = (
        cos, sin, x - cos * (x + shift_x) - sin * (y + shift_y),
        -sin, cos, y + sin * (x + shift_x) - cos * (y + shift_y),
    )  # fmt: skip
    corners = [image.getpixel((i, j)) for i in (0, width - 1) for j in (0, height - 1)]
    fill = tuple(int(v) for v in np.median(np.array(corners), axis=0))
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR, fillcolor=fill
    )


def _recolour(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue in one 3x4 colour matrix."""
    brightness, contrast, saturation = rng.uniform(0.75, 1.25), rng.uniform(0.75, 1.25), rng.uniform(0.6, 1.4)
    hue = rng.uniform(-0.25, 0.25)  # radians
    # Rotation about the grey axis (1,1,1)/sqrt(3), Rodrigues' formula.
    cos, side = math.cos(hue), math.sin(hue) / math.sqrt(3)
    cross = np.array([[0, -side, side], [side, 0, -side], [-side, side, 0]])
    rotation = cos * np.eye(3) + cross + (1 - cos) / 3
    colour = saturation * np.eye(3) + (1 - saturation) * np.tile(_LUMA, (3, 1))
    matrix = np.column_stack((brightness * contrast * colour @ rotation, np.full(3, 127.5 * (1 - contrast))))
    return image.convert("RGB", tuple(matrix.ravel().tolist()))
