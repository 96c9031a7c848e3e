"""How near two texts are, for scripts with and without spaces.

Texts are normalised first (`text/normalize.py`), so that spellings that look the same are the same. What a
reader sees as one letter is one unit (extended grapheme clusters, Unicode Annex 29, and with them the Burmese
aa and visarga, which the annex sets apart, and what is stacked below a letter): a Thai or Burmese mark is no
letter of its own. Words need a segmenter where no spaces are written:

| language | words |
|---|---|
| th, km, lo | pythainlp, khmercut, laonlp: `pip install 'seavlm[segment]'`; without them there are none |
| my | syllables: a consonant that is neither killed nor stacked begins one |
| zh | characters |
| the others | between spaces |
"""

from __future__ import annotations

import functools
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import regex

from seavlm.text.normalize import normalize

CHRF_ORDER, CHRF_BETA = 6, 2.0


def clean(text: str) -> str:
    """Normalised, case-folded, single spaces: punctuation stays."""
    return " ".join(unicodedata.normalize("NFC", normalize(text).casefold()).split())


_STACK = "\u1039\u17d2"  # the letter after a Burmese virama or a Khmer coeng stands below the one before
_GRAPHEME = regex.compile(rf"\X\p{{M}}*(?:(?<=[{_STACK}])\X\p{{M}}*)*")


def graphemes(text: str) -> list[str]:
    """What a reader sees as letters."""
    return _GRAPHEME.findall(text)


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Fewest insertions, deletions and replacements that make b of a (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (one != other))
    return row[-1]


def error_rate(reference: Sequence[str], said: Sequence[str]) -> float:
    """Edits over the length of the reference; above 1 where much was added. 0 for two empty ones."""
    return edit_distance(reference, said) / max(1, len(reference)) if reference or said else 0.0


def grapheme_error_rate(reference: str, said: str, *, spaces: bool = True) -> float:
    """CER, counted in graphemes. spaces=False: they say nothing, as in Thai."""
    units = [graphemes(clean(text) if spaces else clean(text).replace(" ", "")) for text in (reference, said)]
    return error_rate(*units)


def chrf(references: Sequence[str], said: str, *, word_order: int = 0) -> float:
    """chrF2 of a sentence in 0..1: the F-score of character n-grams up to 6, recall counting double.

    Popovic 2015. Spaces are left out, orders that either text is too short for do not count (as in
    sacreBLEU), and of several references the best one does. word_order=2 is chrF++ (Popovic 2017), which
    counts words and pairs of them beside: what stands between spaces, punctuation at their ends apart.
    """
    return max((_chrf(reference, said, word_order) for reference in references), default=0.0)


def _chrf(reference: str, said: str, word_order: int) -> float:
    texts = [unicodedata.normalize("NFC", normalize(text)) for text in (reference, said)]
    letters = ["".join(text.split()) for text in texts]
    words = [_between_spaces(text) for text in texts]
    precisions, recalls = [], []
    orders: list[tuple[Sequence[Sequence[str]], int]]
    orders = [(letters, order) for order in range(1, CHRF_ORDER + 1)]
    orders += [(words, order) for order in range(1, word_order + 1)]
    for pair, order in orders:
        wanted, found = (Counter(_grams(units, order)) for units in pair)
        if wanted and found:
            shared = (wanted & found).total()
            precisions.append(shared / found.total())
            recalls.append(shared / wanted.total())
    if not precisions or not any(precisions):
        return 0.0
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return (1 + CHRF_BETA**2) * p * r / (CHRF_BETA**2 * p + r)


def _grams(units: Sequence[str], order: int) -> list[tuple[str, ...]]:
    return [tuple(units[i : i + order]) for i in range(len(units) - order + 1)]


def _between_spaces(text: str) -> list[str]:
    found: list[str] = []
    for word in text.split():
        if len(word) > 1 and word[-1] in string.punctuation:
            found += [word[:-1], word[-1]]
        elif len(word) > 1 and word[0] in string.punctuation:
            found += [word[0], word[1:]]
        else:
            found.append(word)
    return found


def f1(reference: Sequence[str], said: Sequence[str]) -> float:
    """The F1 of the words that two texts share, in any order (SQuAD, Rajpurkar et al. 2016)."""
    shared = (Counter(reference) & Counter(said)).total()
    return 2 * shared / max(1, len(reference) + len(said))


def rouge_l(reference: Sequence[str], said: Sequence[str]) -> float:
    """The F1 of the longest common subsequence of words (Lin 2004)."""
    row = [0] * (len(said) + 1)
    for one in reference:
        before = 0
        for j, other in enumerate(said, 1):
            before, row[j] = row[j], before + 1 if one == other else max(row[j], row[j - 1])
    return 2 * row[-1] / max(1, len(reference) + len(said))


def words(text: str, language: str) -> list[str] | None:
    """The words of a text, without punctuation; None where the language's segmenter is not installed."""
    cleaned = clean(text)
    if language == "zh":
        pieces = graphemes(cleaned)
    elif language == "my":
        pieces = burmese_syllables(cleaned)
    elif language in _SEGMENTERS:
        segment = _segmenter(language)
        if segment is None:
            return None
        pieces = segment(cleaned)
    else:
        pieces = cleaned.split()
    stripped = ("".join(c for c in piece if unicodedata.category(c)[0] not in "PSZC") for piece in pieces)
    return [piece for piece in stripped if piece]


def burmese_syllables(text: str) -> list[str]:
    """A syllable begins at a consonant, or an independent vowel, that no asat kills and nothing stacks."""
    found: list[str] = []
    for previous, letter, rest in _around(text):
        killed = rest[:1] in ("\u103a", "\u1039") or rest[:2] == "\u1037\u103a"
        starts = "\u1000" <= letter <= "\u102a" and not killed and previous != "\u1039"
        if starts or not found or letter.isspace() or previous.isspace():
            found.append("")
        found[-1] += letter
    return found


def _around(text: str) -> list[tuple[str, str, str]]:
    pairs = pairwise(["", *text])
    return [(before, letter, text[i + 1 : i + 3]) for i, (before, letter) in enumerate(pairs)]


def _thai() -> Callable[[str], list[str]]:
    from pythainlp.tokenize import word_tokenize

    return functools.partial(word_tokenize, engine="newmm", keep_whitespace=False)


def _khmer() -> Callable[[str], list[str]]:
    from khmercut import tokenize

    return tokenize


def _lao() -> Callable[[str], list[str]]:
    from laonlp.tokenize import word_tokenize

    return word_tokenize


_SEGMENTERS = {"th": _thai, "km": _khmer, "lo": _lao}


@functools.cache
def _segmenter(language: str) -> Callable[[str], list[str]] | None:
    try:
        return _SEGMENTERS[language]()
    except ImportError:
        return None


def likeness(references: Sequence[str], said: str, language: str, *, spaces: bool) -> dict[str, float]:
    """All of them, each against the reference it likes best: chrf, cer, and wer and rouge_l where words are
    known."""
    found = {
        "chrf": chrf(references, said),
        "cer": min(grapheme_error_rate(reference, said, spaces=spaces) for reference in references),
    }
    split = words(said, language)
    if split is not None:
        known = [words(reference, language) or [] for reference in references]
        found["wer"] = min(error_rate(one, split) for one in known)
        found["rouge_l"] = max(rouge_l(one, split) for one in known)
    return found


def graded(
    kind: str, references: Sequence[str], said: str, language: str, *, spaces: bool
) -> dict[str, float]:
    """The measures of a text that is graded; the first of them is the grade, in 0..1.

    caption: chrF, and the others of `likeness`; translation: chrF++; summary: ROUGE-L; answer: F1. Where no
    segmenter is installed, summaries and answers are compared by graphemes.
    """
    if kind == "caption":
        return likeness(references, said, language, spaces=spaces)
    if kind == "translation":
        return {"chrf++": chrf(references, said, word_order=2), "chrf": chrf(references, said)}
    split = [_units(text, language) for text in (said, *references)]
    if kind == "summary":
        best = max(rouge_l(reference, split[0]) for reference in split[1:])
        return {"rouge_l": best, "chrf": chrf(references, said)}
    return {
        "f1": max(f1(reference, split[0]) for reference in split[1:]),
        "exact": float(split[0] in split[1:]),
    }


def _units(text: str, language: str) -> list[str]:
    found = words(text, language)
    return graphemes(clean(text).replace(" ", "")) if found is None else found
