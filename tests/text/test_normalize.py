from __future__ import annotations

import random
import unicodedata

import pytest

from seavlm.text.language import LANGUAGES
from seavlm.text.normalize import normalize


@pytest.mark.parametrize("code", LANGUAGES)
def test_one_spelling_in_every_language(code, article1):
    text = article1[code]
    clean = normalize(text)
    assert normalize(unicodedata.normalize("NFD", text)) == clean
    assert normalize("\ufeff" + "\u200b".join(text)) == clean  # a zero-width space after each letter
    assert normalize(text.replace(" ", "\u00a0")) == clean
    assert unicodedata.is_normalized("NFC", clean)
    assert normalize(clean) == clean
    assert clean.replace(" ", "") == unicodedata.normalize("NFC", text).replace(" ", "").replace("\u200b", "")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Vie\u0323\u0302t", "Việt"),
        ("Vie\u0302\u0323t", "Việt"),
        ("ກ\u200bຂ", "ກຂ"),
        ("ភាសា\u200bខ្មែរ", "ភាសាខ្មែរ"),
        ("a\u2060b\ufeffc\u00add\u200ee\u202af", "abcdef"),
        ("a\u200db \u200cc", "ab c"),  # joiners do nothing in Latin
        ("ไทย\u200dไทย\u200c", "ไทยไทย"),  # nor in Thai
        ("👨\u200d👩\u200d👧", "👨\u200d👩\u200d👧"),
        ("👩🏽\u200d🚀", "👩🏽\u200d🚀"),
        ("❤\ufe0f\u200d🔥", "❤\ufe0f\u200d🔥"),
        ("🏳\ufe0f\u200d🌈\u200d", "🏳\ufe0f\u200d🌈"),  # the last joins nothing
        ("1\ufe0f\u20e3 a\ufe0f", "1\ufe0f\u20e3 a"),
        ("🏴\U000e0067\U000e0062\U000e007f x\U000e0067", "🏴\U000e0067\U000e0062\U000e007f x"),
        ("க்\u200cஷ", "க்\u200cஷ"),  # keeps the two letters apart
        ("க்\u200dஷ", "க்\u200dஷ"),
        ("க\u200c ஷ", "க ஷ"),
        ("ន\u200cិ", "ន\u200cិ"),
        ("葛\U000e0100x\U000e0100", "葛\U000e0100x"),
        ("a\r\nb\rc\u2028d\u0085e", "a\nb\nc\nd\ne"),
        ("a\u00a0b\u2009c\u3000d", "a b c\u3000d"),  # the ideographic space is seen: it stays
        ("a\x00b\x07\tc\n", "ab\tc\n"),
        ("ក\u17b4ខ\u17b5", "កខ"),
        ("น\u0e4d\u0e32 น\u0e49\u0e4d\u0e32 น\u0e4d\u0e49\u0e32", "น\u0e33 น\u0e49\u0e33 น\u0e49\u0e33"),
        ("ນ\u0ecd\u0eb2 ນ\u0ecd\u0ec9\u0eb2", "ນ\u0eb3 ນ\u0ec9\u0eb3"),
        ("เเม่ ເເມ່", "แม่ ແມ່"),
        ("\ud800x\ufffe", "x"),
        ("", ""),
    ],
)  # fmt: skip
def test_rules(raw, expected):
    assert normalize(raw) == expected
    assert normalize(expected) == expected


def test_idempotent_on_random_text():
    rng = random.Random(1)
    marks = (
        "\u0301\u0302\u0323\u0338\u200b\u200c\u200d\ufe0e\ufe0f\ufe00\U000e0100\U000e0067\u034f\u00ad\u2060"
    )
    letters = "aêđ1#กำแเ\u0e4d\u0e32\u0e48ກຳເ\u0ecd\u0eb2က်္ကြျកំ្រក្កិகெொ்ா中葛👩🏽❤🏴🇹🇭⫝̸≠ \r\n\t\u00a0\u2adc\u212b"
    for _ in range(20_000):
        text = "".join(rng.choices(marks + letters, k=rng.randint(1, 8)))
        once = normalize(text)
        assert normalize(once) == once, text.encode("unicode_escape")
        assert unicodedata.is_normalized("NFC", once), text.encode("unicode_escape")
