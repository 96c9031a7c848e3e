"""Bytes to a picture, safely: format and size are read from the header before anything is decoded.

What comes out is always RGB, upright (EXIF orientation applied) and opaque (flattened on white).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from seavlm.errors import SeavlmError

FORMATS = ["PNG", "JPEG", "WEBP", "GIF"]  # what Pillow calls them; the first frame of an animation is taken
with contextlib.suppress(ImportError):  # what telephones write; an extra: pip install 'seavlm[documents]'
    from pillow_heif import register_heif_opener

    register_heif_opener()
    FORMATS.append("HEIF")
MAX_BYTES = 32 * 1024 * 1024
MAX_PIXELS = 64_000_000
MAX_SIDE = 16_384
MAX_SCANS = 100  # of a JPEG: each goes over all pixels again, and takes a few bytes
MAX_ASPECT = 200  # long side : short side; a thinner picture is a line once it is resized to a square

_SUPPORTED = "Pictures are read from PNG, JPEG, WebP and GIF, and HEIC with pip install 'seavlm[documents]'."
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")  # an `image` text that is no file may be this
SOURCES = ("image", "path", "url", "base64", "bytes", "image_url")


def decode(
    data: bytes | bytearray | Image.Image | str | Path,
    *,
    max_pixels: int = MAX_PIXELS,
    max_side: int = MAX_SIDE,
    max_bytes: int = MAX_BYTES,
) -> Image.Image:
    """The picture in `data` (encoded bytes, a file, or a PIL image) as RGB, upright, on white.

    Raises SeavlmError, before decoding, for other formats, a single pixel, more than `max_bytes` encoded,
    more than `max_pixels`, a side above `max_side` or a ratio of sides above 200; and for damaged data.
    """
    if isinstance(data, Image.Image):
        name, image = "The picture", data
    else:
        if isinstance(data, str | Path):
            name, raw = str(data), _read_file(Path(data), max_bytes)
        else:
            name, raw = "The picture", bytes(data)
        if len(raw) > max_bytes:
            raise SeavlmError(
                f"{name} has {len(raw):,} bytes, more than {max_bytes:,}", hint="Make it smaller."
            )
        image = _open(raw, name)
    _check_size(image.size, name, max_pixels, max_side)
    try:
        image.load()
    except Exception as error:  # decoders raise many kinds: OSError, SyntaxError, ValueError, zlib.error, ...
        raise SeavlmError(
            f"{name} is damaged: its {image.format or 'image'} data cannot be decoded ({_one_line(error)})",
            hint="Save or download it again.",
        ) from error
    with contextlib.suppress(Exception):  # a broken EXIF block says nothing; the pixels are fine
        image = ImageOps.exif_transpose(image)
    return _flatten(image)


def load_part(
    part: Mapping[str, Any],
    *,
    allow_urls: bool = False,
    allow_files: bool = True,
    max_pixels: int = MAX_PIXELS,
    max_side: int = MAX_SIDE,
    max_bytes: int = MAX_BYTES,
    timeout_s: float = math.inf,
) -> Image.Image:
    """The picture of a message part, decoded. The source is one of these keys:

    `image`: a PIL image, bytes, a path, a data: URI, base64, or a row's {"bytes": ..., "path": ...}; `path`:
    a file; `base64`: base64 text; `bytes`; `url`: data: or http(s); `image_url`: {"url": ...} or a text.
    http(s) needs `allow_urls`, and has `timeout_s` seconds, and never more than `fetch` gives it; a server
    that must not read its own disk passes `allow_files=False`.
    """
    limits = {"max_pixels": max_pixels, "max_side": max_side, "max_bytes": max_bytes}
    kind, source = next(((key, part[key]) for key in SOURCES if part.get(key) is not None), ("", None))
    if isinstance(
        source, Mapping
    ):  # {"url": ...} of image_url, {"bytes": ..., "path": ...} of a data set's row
        kind, source = next(
            ((key, source[key]) for key in SOURCES if source.get(key) is not None), ("", None)
        )
    if source is None:
        raise SeavlmError(
            "An image part has no picture", hint=f"Give it one of the keys {', '.join(SOURCES)}."
        )
    if isinstance(source, Image.Image | bytes | bytearray):
        return decode(source, **limits)
    if not isinstance(source, str | Path):
        raise SeavlmError(
            f"An image part's {kind!r} is of type {type(source).__name__}",
            hint="Give a text, bytes or a PIL image.",
        )

    text = str(source)
    if text[:5].lower() == "data:":
        return decode(_from_data_uri(text, max_bytes), **limits)
    if kind != "path" and text[:8].lower().startswith(("http://", "https://")):
        if not allow_urls:
            raise SeavlmError(
                "Fetching pictures from URLs is off", hint="Allow URLs, or send the picture itself."
            )
        from seavlm.image.fetch import TIMEOUT_S, fetch

        return decode(fetch(text, max_bytes=max_bytes, timeout_s=min(timeout_s, TIMEOUT_S)), **limits)
    if kind in ("url", "image_url"):
        raise SeavlmError(
            f"The image URL {_short(text)} is neither http(s) nor data:",
            hint="Give a file with the key 'path'.",
        )
    if kind == "base64" or (kind == "image" and _BASE64.fullmatch(text) and not _is_file(text)):
        return decode(_from_base64(text, max_bytes), **limits)
    if not allow_files:
        raise SeavlmError("Pictures from files are off", hint="Send the picture itself, as a data: URI.")
    return decode(Path(text), **limits)


def _open(raw: bytes, name: str) -> Image.Image:
    """Reads the header. No pixel is decoded yet."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of bombs by its own limit; ours is checked next.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(raw), formats=FORMATS)
        if image.format in ("JPEG", "MPO") and raw.count(b"\xff\xda") > MAX_SCANS:
            raise ValueError("too many scans")
        return image
    except Image.DecompressionBombError as error:
        raise SeavlmError(f"{name} has far too many pixels", hint="Make it smaller.") from error
    except UnidentifiedImageError as error:
        start = "nothing: it is empty" if not raw else repr(raw[:12])[1:]
        raise SeavlmError(
            f"{name} is not a picture that can be read: it begins with {start}", hint=_SUPPORTED
        ) from error
    except Exception as error:
        raise SeavlmError(
            f"{name} is damaged: {_one_line(error)}", hint="Save or download it again."
        ) from error


def _check_size(size: tuple[int, int], name: str, max_pixels: int, max_side: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise SeavlmError(
            f"{name} is {width}x{height} pixels: it is empty", hint="Give a picture with pixels."
        )
    if width == height == 1:
        raise SeavlmError(
            f"{name} is a single pixel (1x1), on which nothing can be seen",
            hint="Web pages hold such files as place-holders or to count visitors: give the real picture.",
        )
    if width > max_side or height > max_side:
        raise SeavlmError(
            f"{name} is {width}x{height} pixels; a side may have {max_side:,} at most",
            hint="Make it smaller.",
        )
    if width * height > max_pixels:
        raise SeavlmError(
            f"{name} is {width}x{height}, {width * height:,} pixels; {max_pixels:,} is the most",
            hint="Make it smaller.",
        )
    if max(size) > MAX_ASPECT * min(size):
        raise SeavlmError(
            f"{name} is {width}x{height} pixels, thinner than 1:{MAX_ASPECT}",
            hint="Crop it to the part that matters.",
        )


def _flatten(image: Image.Image) -> Image.Image:
    """RGB on white, whatever the mode: palette, grey, CMYK, 16 bits, with or without transparency."""
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grey: Pillow's own conversion clips at 255 where it should scale.
        levels = np.divide(np.asarray(image), 257, dtype=np.float32)
        levels += 0.5
        image = Image.fromarray(np.clip(levels, 0, 255, out=levels).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    flat = image.convert("RGB")  # a copy in any case: no format, no open file
    flat.info = {}
    return flat


def _read_file(path: Path, max_bytes: int) -> bytes:
    try:
        if path.is_dir():
            raise SeavlmError(f"{path} is a directory", hint="Give one picture.")
        size = path.stat().st_size
        if size > max_bytes:
            raise SeavlmError(f"{path} has {size:,} bytes, more than {max_bytes:,}", hint="Make it smaller.")
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise SeavlmError(f"There is no file {path}", hint="Check the path.") from error
    except (OSError, ValueError) as error:
        raise SeavlmError(
            f"{_short(str(path))} cannot be read: {_one_line(error)}", hint="Check the path."
        ) from error


def _from_data_uri(uri: str, max_bytes: int) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise SeavlmError(f"The data URI {_short(uri)} is not base64", hint="Write data:image/png;base64,...")
    return _from_base64(body, max_bytes)


def _from_base64(text: str, max_bytes: int) -> bytes:
    if len(text) > max_bytes * 4 // 3 + 4096:
        raise SeavlmError(f"A picture in base64 has more than {max_bytes:,} bytes", hint="Make it smaller.")
    text = "".join(text.split())
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SeavlmError(
            f"The picture {_short(text)} is not base64", hint="Encode its bytes again."
        ) from error


def _is_file(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _short(text: str) -> str:
    return ascii(text if len(text) <= 48 else text[:45] + "...")
