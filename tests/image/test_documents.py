"""PDF pages and HEIC photographs."""

from __future__ import annotations

import io

import pytest
from PIL import Image, ImageDraw

from seavlm.errors import SeavlmError
from seavlm.image.decode import decode
from seavlm.image.pdf import LONG_SIDE, pages


def a_pdf(count: int = 2) -> bytes:
    """Pages of colours, as Pillow writes them."""
    pytest.importorskip("pypdfium2")
    made = [Image.new("RGB", (300, 400), color) for color in ("red", "blue", "green")[:count]]
    out = io.BytesIO()
    made[0].save(out, "PDF", save_all=True, append_images=made[1:])
    return out.getvalue()


def test_pages_become_pictures_in_order() -> None:
    red, blue = pages(a_pdf(), most=5)
    assert red.mode == "RGB" and max(red.size) in (LONG_SIDE, LONG_SIDE + 1)
    assert red.getpixel((50, 50))[0] > 200 and blue.getpixel((50, 50))[2] > 200


@pytest.mark.parametrize(
    ("data", "said"), [(b"", "not a PDF"), (b"hello", "not a PDF"), (b"%PDF-1.7 nothing", "cannot be opened")]
)
def test_what_is_no_pdf_is_refused(data: bytes, said: str) -> None:
    pytest.importorskip("pypdfium2")
    with pytest.raises(SeavlmError, match=said):
        pages(data, most=5)


def test_too_many_pages_are_refused() -> None:
    with pytest.raises(SeavlmError, match="3 pages, and 2 is the most"):
        pages(a_pdf(3), most=2)


def test_drawing_may_not_take_for_ever() -> None:
    with pytest.raises(SeavlmError, match="takes more than"):
        pages(a_pdf(), most=5, seconds=0.01)


def test_a_telephones_photograph_is_read() -> None:
    heif = pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (64, 48), "red")
    ImageDraw.Draw(image).rectangle((0, 0, 31, 47), fill="blue")
    out = io.BytesIO()
    heif.from_pillow(image).save(out, quality=95)
    found = decode(out.getvalue())
    assert found.size == (64, 48) and found.getpixel((5, 20))[2] > 200 and found.getpixel((60, 20))[0] > 200
