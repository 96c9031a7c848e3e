"""The one error that users see: a sentence that says what is wrong, and a hint that says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SeavlmError(Exception):
    """A problem a user can act on. `str(error)` is one line: the message, then the hint."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message = message.rstrip(".")
        self.hint = hint
        end = "" if self.message.endswith("?") else "."  # as `nearest` ends
        super().__init__(f"{self.message}{end} {hint}".strip())


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' for the known names closest to `word`, or '' when none is close."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
