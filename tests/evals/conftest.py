"""What a suite asks is pinned by its version, in suites.json: suite -> version -> SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from seavlm.evals import suites
from seavlm.evals.tasks import fingerprint
from seavlm.text.language import LANGUAGES

VERSIONS = Path(__file__).with_name("suites.json")


@pytest.fixture
def same_as_before() -> Callable[[str, Path | None], None]:
    """Whoever changes a suite, or what an adapter makes of its rows, steps the version and adds a line."""

    def check(name: str, folder: Path | None) -> None:
        suite = suites.load_suite(name)
        known = json.loads(VERSIONS.read_text(encoding="utf-8")).get(name, {})
        if suite.include:  # nothing but others, which are pinned themselves
            assert not suite.tasks
            labels = " ".join(suites.load_suite(other).label for other in suite.include)
            found = hashlib.sha256(labels.encode()).hexdigest()
        else:
            questions = suites.ask(name, data=folder).questions
            # Without the bytes of the pictures: another Pillow may compose others.
            found = fingerprint([replace(question, image_sha256=()) for question in questions])
            if folder is None and name != "retention":
                assert suite.size == f"{len(questions) // len(LANGUAGES)} questions a language"
        assert known.get(suite.version) == found, (
            f"{suite.label} asks something else than before. Give it the next version, say in its changes "
            f"what is new, and add to {VERSIONS.name}: {name!r}: {{..., {suite.version!r}: {found!r}}}"
        )
        assert list(known)[-1] == suite.version and set(known) <= set(suite.changes)

    return check
