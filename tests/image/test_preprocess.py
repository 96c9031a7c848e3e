from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from seavlm.image.augment import augment
from seavlm.image.preprocess import pan_and_scan, preprocess

SIZES = [(1, 1), (3, 2), (64, 64), (112, 112), (128, 97), (500, 333), (37, 900), (1200, 300), (896, 896)]


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    return Image.fromarray(
        np.random.default_rng(seed).integers(256, size=(height, width, 3)).astype(np.uint8)
    )


@pytest.mark.parametrize("side", [28, 112, 896])
def test_pixels_equal_transformers_bit_for_bit(side):
    images = [noise(size, seed) for seed, size in enumerate(SIZES)]
    golden = Gemma3ImageProcessorPil(size={"height": side, "width": side})
    theirs = golden(images, return_tensors="pt")["pixel_values"]
    ours = torch.from_numpy(preprocess(images, side))
    assert ours.shape == (len(SIZES), 3, side, side) and ours.dtype == theirs.dtype == torch.float32
    assert torch.equal(ours, theirs)


def test_values():
    pixels = torch.from_numpy(preprocess([Image.new("RGB", (5, 5), (0, 127, 255))], 4))
    assert pixels[0, 0].eq(-1).all() and pixels[0, 2].eq(1).all()
    assert pixels[0, 1].sub(127 / 127.5 - 1).abs().max() < 1e-6
    assert preprocess([], 8).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    "options", [{}, {"min_crop_size": 100, "max_num_crops": 6, "min_ratio_to_activate": 1.0}]
)
def test_pan_and_scan_equals_transformers(options):
    golden = Gemma3ImageProcessorPil()
    named = {"min_crop_size": 256, "max_num_crops": 4, "min_ratio_to_activate": 1.2, **options}
    theirs_options = {f"pan_and_scan_{key}": value for key, value in named.items()}
    rng = np.random.default_rng(3)
    sizes = [
        (256, 256),
        (512, 256),
        (513, 256),
        (614, 512),
        (615, 512),
        (256, 1100),
        (1024, 400),
        (2000, 333),
        (100, 110),
    ]
    sizes += [(int(w), int(h)) for w, h in rng.integers(150, 1300, size=(40, 2))]
    cut = 0
    for width, height in sizes:
        image = noise((width, height))
        theirs = golden.pan_and_scan(np.asarray(image).transpose(2, 0, 1), **theirs_options)
        ours = pan_and_scan(image, **options)
        assert len(ours) == len(theirs), (width, height)
        for mine, yours in zip(ours, theirs, strict=True):
            assert np.array_equal(np.asarray(mine).transpose(2, 0, 1), yours)
        cut += bool(ours)
    assert 10 < cut < len(sizes)


def test_pan_and_scan_pixels_equal_transformers():
    image = noise((1000, 420))
    golden = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    theirs = golden(
        [image],
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=256,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
        return_tensors="pt",
    )
    crops = pan_and_scan(image)
    assert theirs["num_crops"].tolist() == [len(crops)] == [2]
    assert torch.equal(torch.from_numpy(preprocess([image, *crops], 56)), theirs["pixel_values"])


# --- augmentation -------------------------------------------------------------------------------------------


def drawing() -> Image.Image:
    image = Image.new("RGB", (128, 128), "white")
    image.paste((200, 30, 40), (32, 40, 96, 100))
    return image


def test_augment_is_a_pure_function_of_picture_and_generator():
    image = drawing()
    before = image.tobytes()
    first, again, other = (augment(image, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert image.tobytes() == before
    assert first.mode == "RGB" and first.size == image.size


def test_augment_is_mild_and_varied():
    """What is in the middle stays there and stays reddish; the views differ."""
    views = [np.asarray(augment(drawing(), np.random.default_rng(seed))).astype(int) for seed in range(60)]
    middle = np.array([view[54:74, 54:74].mean(axis=(0, 1)) for view in views])
    assert (middle[:, 0] > middle[:, 1] + 40).all() and (middle[:, 0] > middle[:, 2] + 40).all()
    assert len({view.tobytes() for view in views}) == len(views)
    corners = np.array([view[2, 2] for view in views])
    assert 0.2 < (corners.min(axis=1) > 235).mean() < 0.95  # white often, not always


def test_augment_flip_is_an_option():
    image = Image.new("RGB", (64, 64), "white")
    image.paste("black", (0, 0, 20, 64))  # dark on the left

    def dark_right(flip: bool) -> int:
        views = [
            np.asarray(augment(image, np.random.default_rng(s), flip=flip)).mean(axis=(0, 2))
            for s in range(60)
        ]
        return sum(view[48:].mean() < view[:16].mean() for view in views)

    assert dark_right(flip=False) == 0
    assert 15 < dark_right(flip=True) < 45


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P"])
def test_augment_takes_other_modes(mode):
    out = augment(drawing().convert(mode), np.random.default_rng(0))
    assert out.mode == "RGB" and out.size == (128, 128)


def test_transparent_pictures_get_the_background():
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    colours = {augment(clear, np.random.default_rng(seed)).getpixel((16, 16)) for seed in range(20)}
    assert len(colours) > 5 and all(sum(colour) > 60 for colour in colours)


def test_augment_is_fast():
    image, rng = drawing(), np.random.default_rng(0)
    augment(image, rng)
    times = []
    for _ in range(100):
        start = time.perf_counter()
        augment(image, rng)
        times.append(time.perf_counter() - start)
    assert sorted(times)[len(times) // 2] < 0.010  # 3 ms on an idle machine; tests share theirs
