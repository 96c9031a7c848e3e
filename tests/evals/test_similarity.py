"""How near two texts are: held against known figures, and in scripts without spaces."""

import importlib.util

import pytest

from seavlm.evals import similarity
from seavlm.evals.similarity import (
    burmese_syllables,
    chrf,
    edit_distance,
    error_rate,
    f1,
    grapheme_error_rate,
    graphemes,
    likeness,
    rouge_l,
    words,
)


def test_edits() -> None:
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3
    assert error_rate(list("abc"), []) == 1 and error_rate([], []) == 0 and error_rate(["a"], ["b"] * 3) == 3
    # Counted in what a reader sees: กี่ is one letter of three code points.
    assert graphemes("กี่คน") == ["กี่", "ค", "น"]
    # Unicode sets the Burmese aa and visarga apart, nobody reads them so; stacked letters are one.
    assert graphemes("မြန်မာစကား") == ["မြ", "န်", "မာ", "စ", "ကား"]
    assert graphemes("မင်္ဂလာပါ") == ["မ", "င်္ဂ", "လာ", "ပါ"] and graphemes("ស្រី") == ["ស្រី"]
    assert grapheme_error_rate("စကား", "စက") == 0.5
    assert grapheme_error_rate("กี่คน", "กีคน") == pytest.approx(1 / 3)
    assert grapheme_error_rate("Xin  chào", "xin chào") == 0
    assert grapheme_error_rate("ສະບາຍ ດີ", "ສະບາຍດີ", spaces=False) == 0


@pytest.mark.parametrize(
    ("reference", "said", "expected"),
    [
        ("The cat sat on the mat.", "The cat is on the mat.", 64.582),
        ("แมวนอนอยู่บนโต๊ะ", "แมวหลับบนโต๊ะ", 32.624),
        ("một con mèo", "hai con chó đen", 11.279),
        ("ab", "abcd", 78.125),
    ],
)
def test_chrf_is_sacrebleus(reference: str, said: str, expected: float) -> None:
    """Figures of sacreBLEU 2.6, sentence_chrf."""
    assert chrf([reference], said) * 100 == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("reference", "said", "expected"),
    [
        ("The cat sat on the mat.", "The cat is on the mat.", 67.493),
        ("แมวนอนอยู่บนโต๊ะ", "แมวหลับบนโต๊ะ", 27.963),
        ('"Now," he said, (yes).', '"Now" he says (yes)', 35.138),
        ("ab", "abcd", 52.083),
    ],
)
def test_chrf_with_words_is_sacrebleus(reference: str, said: str, expected: float) -> None:
    """Figures of sacreBLEU 2.6, sentence_chrf(word_order=2)."""
    assert chrf([reference], said, word_order=2) * 100 == pytest.approx(expected, abs=0.01)


def test_the_best_reference_counts() -> None:
    assert chrf(["xyz", "a cat"], "a cat") == 1 and chrf(["a cat"], "") == 0 and chrf([], "a") == 0


def test_rouge() -> None:
    assert rouge_l(["the", "cat", "sat"], ["the", "cat", "on", "a", "mat", "sat"]) == pytest.approx(2 * 3 / 9)
    assert rouge_l([], []) == 0
    # rouge_score 0.1.2
    one, other = (words(text, "en") for text in ("The cat sat on the mat.", "The cat is on the mat."))
    assert rouge_l(one or [], other or []) == pytest.approx(0.83333, abs=1e-5)
    assert f1(["a", "b", "b"], ["b", "c"]) == pytest.approx(2 / 5) and f1([], ["a"]) == 0


def test_words_without_spaces() -> None:
    assert words("Con mèo, ngủ.", "vi") == ["con", "mèo", "ngủ"]
    assert words("猫在桌上。", "zh") == list("猫在桌上")
    assert burmese_syllables("မြန်မာစကား") == ["မြန်", "မာ", "စ", "ကား"]
    assert words("မင်္ဂလာပါ။", "my") == ["မင်္ဂ", "လာ", "ပါ"]


@pytest.mark.parametrize(
    ("code", "package", "text", "expected"),
    [
        ("th", "pythainlp", "มนุษย์ทั้งหลายเกิดมา", ["มนุษย์", "ทั้งหลาย", "เกิด", "มา"]),
        ("km", "khmercut", "មនុស្សទាំងអស់កើតមក", ["មនុស្ស", "ទាំងអស់", "កើត", "មក"]),
        ("lo", "laonlp", "ມະນຸດທຸກຄົນ", ["ມະນຸດ", "ທຸກ", "ຄົນ"]),
    ],
)
def test_segmenters(code: str, package: str, text: str, expected: list[str]) -> None:
    if importlib.util.find_spec(package) is None:  # an extra: seavlm[segment]
        assert words(text, code) is None
        assert set(likeness([text], text, code, spaces=False)) == {"chrf", "cer"}
    else:
        assert words(text, code) == expected
        assert likeness([text], text, code, spaces=False)["wer"] == 0


def test_without_a_segmenter_there_are_no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError

    similarity._segmenter.cache_clear()
    monkeypatch.setitem(similarity._SEGMENTERS, "th", missing)
    assert words("มนุษย์", "th") is None
    similarity._segmenter.cache_clear()
