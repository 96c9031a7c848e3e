from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seavlm.errors import SeavlmError
from seavlm.image.decode import decode, load_part


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 6 % 256, y * 8 % 256, (x + y) * 3 % 256], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(64)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 98}, 12),
        ("WEBP", {"quality": 95}, 25),
    ],
)
def test_formats(format, options, tolerance):
    picture = decode(encoded(gradient(), format, **options))
    assert picture.mode == "RGB" and picture.size == (40, 30)
    difference = np.abs(np.asarray(picture).astype(int) - np.asarray(gradient()).astype(int))
    assert difference.max() <= tolerance
    assert not picture.info and getattr(picture, "format", None) is None


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format):
    red, blue = (Image.new("RGB", (20, 20), colour) for colour in ("red", "blue"))
    data = encoded(red, format, save_all=True, append_images=[blue], duration=50, lossless=True)
    picture = decode(data)
    assert picture.size == (20, 20)
    assert picture.getpixel((10, 10)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = gradient()
    inverse = {
        1: [], 2: ["FLIP_LEFT_RIGHT"], 3: ["ROTATE_180"], 4: ["FLIP_TOP_BOTTOM"], 5: ["TRANSPOSE"],
        6: ["ROTATE_90"], 7: ["TRANSVERSE"], 8: ["ROTATE_270"],
    }  # fmt: skip
    stored = upright
    for operation in inverse[orientation]:
        stored = stored.transpose(Image.Transpose[operation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(decode(encoded(stored, "PNG", exif=exif))), np.asarray(upright))


def test_broken_exif_is_ignored():
    assert decode(encoded(gradient(), "PNG", exif=b"Exif\x00\x00garbage!")).size == (40, 30)


def test_transparency_is_flattened_on_white():
    rgba = Image.new("RGBA", (4, 1), (255, 0, 0, 255))
    for x, alpha in enumerate((0, 128, 255, 0)):
        rgba.putpixel((x, 0), (255, 0, 0, alpha))
    expected = [(255, 255, 255), (255, 127, 127), (255, 0, 0), (255, 255, 255)]
    for data in (rgba, encoded(rgba, "PNG"), encoded(rgba, "WEBP", lossless=True, exact=True)):
        flat = decode(data)
        assert [flat.getpixel((x, 0)) for x in range(4)] == expected
    grey = Image.new("LA", (2, 1), (0, 0))
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([9, 9, 9])
    for data in (
        encoded(grey, "PNG"),
        encoded(palette, "PNG", transparency=0),
        encoded(palette, "GIF", transparency=0),
    ):
        assert decode(data).getpixel((0, 0)) == (255, 255, 255)


def test_other_modes():
    assert decode(encoded(Image.new("1", (2, 2), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(Image.new("L", (2, 2), 77), "PNG")).getpixel((0, 0)) == (77, 77, 77)
    assert decode(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")).getpixel((4, 4)) == (
        255,
        255,
        255,
    )
    deep = Image.fromarray(np.array([[0, 128 * 257, 65535]], dtype=np.uint16))
    assert np.asarray(decode(encoded(deep, "PNG")))[0, :, 0].tolist() == [0, 128, 255]


def test_tiny_pictures_are_fine():
    assert decode(encoded(Image.new("RGB", (1, 2), "blue"), "PNG")).getpixel((0, 1)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "it is empty"),
        (b"hello, I am a text", "not a picture that can be read: it begins with 'hello, I am '"),
        (b"\x89PNG\r\n\x1a\n", "not a picture|damaged"),
        (encoded(gradient(300, 300), "PNG")[:400], "damaged"),
        (encoded(gradient(300, 300), "JPEG")[:-400], "damaged"),
        (encoded(gradient(), "WEBP")[:-50], "damaged|not a picture"),
        (encoded(gradient(), "GIF")[:900], "damaged"),
        (encoded(gradient(), "BMP"), "not a picture that can be read"),
        (encoded(gradient(), "TIFF"), "not a picture that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture that can be read"),
        (png_header(1, 20_000), "1x20000 pixels; a side may have 16,384"),
        (png_header(1, 1000), "thinner than 1:200"),
        (encoded(Image.new("RGB", (1, 1)), "PNG"), "a single pixel"),
        (png_header(16_000, 16_000), "256,000,000 pixels; 64,000,000 is the most|far too many"),
        (png_header(12_000, 12_000), "144,000,000 pixels; 64,000,000 is the most"),
        (png_header(2**31 - 1, 2**31 - 1), "far too many|a side may have"),
        (png_header(0, 10), "empty|damaged|not a picture"),
        (png_header(100, 100), "damaged"),
    ],
    ids=range(18),
)
def test_bad_data_gives_one_line(data, expected):
    with pytest.raises(SeavlmError, match=expected) as caught:
        decode(data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert caught.value.hint


def test_bombs_are_refused_before_decoding(monkeypatch):
    def never(*args):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    with pytest.raises(SeavlmError, match="is the most"):
        decode(png_header(9000, 9000))


def test_limits_are_parameters():
    data = encoded(gradient(), "PNG")
    with pytest.raises(SeavlmError, match="1,200 pixels; 1,000"):
        decode(data, max_pixels=1000)
    with pytest.raises(SeavlmError, match="a side may have 39"):
        decode(data, max_side=39)
    with pytest.raises(SeavlmError, match="more than 100"):
        decode(data, max_bytes=100)
    with pytest.raises(SeavlmError, match="1,200 pixels"):
        decode(gradient(), max_pixels=1000)


def test_every_cut_of_a_file_is_an_error_or_a_picture():
    for format in ("PNG", "JPEG", "WEBP", "GIF"):
        data = encoded(gradient(16, 12), format)
        for size in range(0, len(data), 7):
            try:
                assert decode(data[:size]).size == (16, 12)
            except SeavlmError as error:
                assert "\n" not in str(error)


# --- message parts ------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "ຮູບ.png"
    gradient().save(path)
    return path


def test_all_ways_to_give_a_picture(file):
    raw = file.read_bytes()
    text = base64.b64encode(raw).decode()
    uri = f"data:image/png;base64,{text}"
    parts = [
        {"image": gradient()},
        {"image": raw},
        {"image": str(file)},
        {"image": file},
        {"image": uri},
        {"image": text},
        {"image": {"bytes": raw, "path": None}},
        {"image": {"bytes": None, "path": str(file)}},
        {"path": str(file)},
        {"path": file},
        {"base64": text},
        {"base64": "\n".join(text[i : i + 76] for i in range(0, len(text), 76))},
        {"bytes": raw},
        {"url": uri},
        {"image_url": {"url": uri, "detail": "low"}},
        {"image_url": uri},
        {"image_url": None, "image": None, "path": str(file)},
    ]
    for part in parts:
        assert np.array_equal(np.asarray(load_part({"type": "image", **part})), np.asarray(gradient())), part


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({}, "has no picture"),
        ({"image": None}, "has no picture"),
        ({"image": {}}, "has no picture"),
        ({"image": 3}, "'image' is of type int"),
        ({"image_url": {"url": 5}}, "'url' is of type int"),
        ({"image": "nowhere.png"}, r"There is no file nowhere\.png"),
        ({"path": "http://127.0.0.1/a.png"}, "There is no file"),
        ({"path": "a\0b"}, "cannot be read"),
        ({"path": "/" + "x" * 5000}, "cannot be read"),
        ({"path": "/"}, "is a directory"),
        ({"url": "file:///etc/passwd"}, r"neither http\(s\) nor data:"),
        ({"url": "ftp://example.org/a.png"}, r"neither http\(s\) nor data:"),
        ({"image_url": {"url": "/etc/passwd"}}, r"neither http\(s\) nor data:"),
        ({"url": "https://example.org/a.png"}, "URLs is off"),
        ({"image": "http://example.org/a.png"}, "URLs is off"),
        ({"url": "data:image/png,raw"}, "not base64"),
        ({"url": "data:image/png;base64,####"}, "not base64"),
        ({"url": "data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode()}, "not a picture"),
        ({"base64": "aGVsbG8="}, "not a picture"),
        ({"base64": "ກ"}, "not base64"),
    ],
)
def test_bad_parts_give_one_line(part, expected):
    with pytest.raises(SeavlmError, match=expected) as caught:
        load_part({"type": "image", **part})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(part.get("path", "")))


def test_files_can_be_off(file):
    for part in ({"path": str(file)}, {"image": str(file)}, {"image": file}, {"image": {"path": str(file)}}):
        with pytest.raises(SeavlmError, match="files are off"):
            load_part(part, allow_files=False)
    assert load_part({"image": gradient()}, allow_files=False).size == (40, 30)


def test_long_base64_is_refused_before_it_is_decoded():
    with pytest.raises(SeavlmError, match="more than 1,000 bytes"):
        load_part({"base64": "A" * 100_000}, max_bytes=1000)


def test_text_file_called_png(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("not a picture")
    with pytest.raises(SeavlmError, match=r"notes\.png is not a picture that can be read"):
        decode(path)
