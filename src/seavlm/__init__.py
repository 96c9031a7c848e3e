"""seavlm: build, measure and run Southeast-Asian vision-language models on Gemma 3.

import seavlm

vlm = seavlm.load("nano")
reply = vlm.generate([{"role": "user", "content": [
    {"type": "image", "path": "picture.png"}, {"type": "text", "text": "ນີ້ແມ່ນຫຍັງ?"}]}])
print(reply.text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["SeavlmError", "__version__", "load", "pipeline"]

if TYPE_CHECKING:
    from seavlm.engine.pipeline import pipeline
    from seavlm.engine.vlm import load
    from seavlm.errors import SeavlmError

_WHERE = {
    "load": "seavlm.engine.vlm",
    "pipeline": "seavlm.engine.pipeline",
    "SeavlmError": "seavlm.errors",
}


def __getattr__(name: str) -> Any:
    """Find the public names when they are asked for: `import seavlm` pays for no torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'seavlm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
