from __future__ import annotations

import pytest

from seavlm.text.language import (
    GLOBAL_LANGUAGES,
    LANGUAGES,
    REGIONAL_LANGUAGES,
    detect,
    plausible_languages,
    script_of,
    to_ascii_digits,
    to_native_digits,
)


def test_the_eleven():
    assert list(LANGUAGES) == ["my", "en", "id", "km", "lo", "ms", "zh", "tl", "ta", "th", "vi"]
    assert GLOBAL_LANGUAGES == ("en", "zh")
    assert set(REGIONAL_LANGUAGES) == set(LANGUAGES) - {"en", "zh"} and len(REGIONAL_LANGUAGES) == 9
    for language in LANGUAGES.values():
        assert len(set(language.option_letters)) == 4
        assert [to_ascii_digits(digit) for digit in language.digits] == list("0123456789")
        assert script_of(language.native_name) == language.script
        assert script_of(language.option_letters) in (language.script, "Latn")


@pytest.mark.parametrize("code", LANGUAGES)
def test_script_and_language_of_real_text(code, article1):
    text = article1[code]
    assert script_of(text) == LANGUAGES[code].script
    assert code in plausible_languages(text)
    if LANGUAGES[code].script != "Latn" or code == "vi":
        assert detect(text) == code
    else:
        assert plausible_languages(text) == {"en", "id", "ms", "tl"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", set()),
        ("12 + 3!", set()),
        ("Привет", set()),
        ("これは猫です", set()),
        ("猫が好き。日本語", set()),
        ("quả táo", {"vi"}),
        ("con mèo", {"en", "id", "ms", "tl", "vi"}),  # è alone may be French loan or name
        ("apple", {"en", "id", "ms", "tl", "vi"}),
        ("The apple is on a table", {"en", "id", "ms", "tl"}),
        ("แอปเปิล (apple)", {"th"}),
        ("iPhone ສີແດງ ສີຂາວ", {"lo"}),
        ("蘋果", {"zh"}),
    ],
)
def test_plausible_languages(text, expected):
    assert plausible_languages(text) == expected


def test_digits():
    assert to_native_digits("2026", "km") == "២០២៦"
    assert to_native_digits("2026", "vi") == "2026"
    assert to_ascii_digits("๒ ၃ ៤ ໕ ௬ ７ x") == "2 3 4 5 6 7 x"
