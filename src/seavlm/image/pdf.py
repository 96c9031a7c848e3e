"""Pages of a PDF as pictures (pypdfium2, an extra: pip install 'seavlm[documents]')."""

from __future__ import annotations

import threading

from PIL import Image

from seavlm.errors import SeavlmError

LONG_SIDE = 1792  # pixels: twice what a view has, for pan & scan
MAX_BYTES = 32 * 1024 * 1024
_lock = threading.Lock()  # PDFium is not for several threads


def pages(data: bytes, most: int) -> list[Image.Image]:
    """All pages, in order, RGB on white. SeavlmError for no PDF, a locked one, or more than `most`."""
    try:
        import pypdfium2
    except ImportError:
        raise SeavlmError("PDF files need pypdfium2", hint="pip install 'seavlm[documents]'") from None
    if len(data) > MAX_BYTES:
        raise SeavlmError(
            f"The PDF has {len(data):,} bytes, more than {MAX_BYTES:,}", hint="Send fewer pages."
        )
    if not data.startswith(b"%PDF-"):
        raise SeavlmError("The file is not a PDF", hint="Send pictures as image_url.")
    with _lock:
        try:
            document = pypdfium2.PdfDocument(data)
        except pypdfium2.PdfiumError as error:
            raise SeavlmError(
                f"The PDF cannot be opened ({error})", hint="Is it whole, and without a password?"
            ) from None
        try:
            count = len(document)
            if count > most:
                raise SeavlmError(
                    f"The PDF has {count} pages, and {most} is the most", hint="Send fewer pages."
                )
            found = []
            for page in document:
                width, height = page.get_size()
                if not (0 < width < 20_000 and 0 < height < 20_000) or max(width, height) > 200 * min(
                    width, height
                ):
                    raise SeavlmError("The PDF has a page of a strange size", hint="Send it as a picture.")
                found.append(page.render(scale=LONG_SIDE / max(width, height)).to_pil().convert("RGB"))
                page.close()
            return found
        except pypdfium2.PdfiumError as error:
            raise SeavlmError(f"The PDF cannot be drawn ({error})", hint="Send it as pictures.") from None
        finally:
            document.close()
