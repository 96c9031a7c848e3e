"""Pages of a PDF as pictures (pypdfium2, an extra: pip install 'seavlm[documents]').

They are drawn in a process of their own, which may neither hang nor take the caller down with it.
"""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys

from PIL import Image

from seavlm.errors import SeavlmError

LONG_SIDE = 1792  # pixels: twice what a view has, for pan & scan
MAX_BYTES = 32 * 1024 * 1024
SECONDS = 30.0
MEMORY = 4 * 2**30  # bytes of addresses
_SIZE = struct.Struct("<II")


def pages(data: bytes, most: int, *, seconds: float = SECONDS) -> list[Image.Image]:
    """All pages, in order, RGB on white. SeavlmError for no PDF, a locked one, more than `most` pages, or
    where drawing them takes more than `seconds`."""
    if len(data) > MAX_BYTES:
        raise SeavlmError(
            f"The PDF has {len(data):,} bytes, more than {MAX_BYTES:,}", hint="Send fewer pages."
        )
    if not data.startswith(b"%PDF-"):
        raise SeavlmError("The file is not a PDF", hint="Send pictures as image_url.")
    command = [sys.executable, "-m", "seavlm.image.pdf", str(most), str(int(seconds) + 1)]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise SeavlmError(
            f"The PDF takes more than {seconds:g} s to draw", hint="Send it as pictures."
        ) from None
    if done.returncode == 3:
        message, _, hint = done.stderr.decode("utf-8", "replace").rpartition("\n")
        raise SeavlmError(message, hint=hint)
    if done.returncode != 0:
        raise SeavlmError("The PDF cannot be drawn", hint="Send it as pictures.")
    found, at = [], 0
    while at < len(done.stdout):
        width, height = _SIZE.unpack_from(done.stdout, at)
        at += _SIZE.size
        pixels = done.stdout[at : at + width * height * 3]
        found.append(Image.frombytes("RGB", (width, height), pixels))
        at += len(pixels)
    return found


def _draw(data: bytes, most: int) -> None:
    """Each page to the standard output: width, height, pixels."""
    try:
        import pypdfium2
    except ImportError:
        raise SeavlmError("PDF files need pypdfium2", hint="pip install 'seavlm[documents]'") from None
    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        raise SeavlmError(
            f"The PDF cannot be opened ({error})", hint="Is it whole, and without a password?"
        ) from None
    try:
        count = len(document)
        if count > most:
            raise SeavlmError(f"The PDF has {count} pages, and {most} is the most", hint="Send fewer pages.")
        for page in document:
            width, height = page.get_size()
            if not (0 < width < 20_000 and 0 < height < 20_000) or max(width, height) > 200 * min(
                width, height
            ):
                raise SeavlmError("The PDF has a page of a strange size", hint="Send it as a picture.")
            drawn = page.render(scale=LONG_SIDE / max(width, height)).to_pil().convert("RGB")
            sys.stdout.buffer.write(_SIZE.pack(*drawn.size) + drawn.tobytes())
            page.close()
    except pypdfium2.PdfiumError as error:
        raise SeavlmError(f"The PDF cannot be drawn ({error})", hint="Send it as pictures.") from None


def main() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[2]),) * 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        _draw(sys.stdin.buffer.read(), int(sys.argv[1]))
    except SeavlmError as error:
        sys.stderr.write(f"{error.message}\n{error.hint}")
        sys.exit(3)


if __name__ == "__main__":
    main()
