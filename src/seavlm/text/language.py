"""The eleven languages: names, scripts, option letters, digits, and a light check of what a text is in.

The check reads scripts, not words. It settles Burmese, Khmer, Lao, Tamil, Thai and Mandarin; among the
languages in Latin letters it only knows Vietnamese, by its diacritics: English, Indonesian, Malay and Tagalog
stay together.
"""

import unicodedata
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from seavlm.text.normalize import normalize

ASCII_DIGITS = "0123456789"


@dataclass(frozen=True)
class Language:
    """One language. `script` is its ISO 15924 code."""

    code: str
    english_name: str
    native_name: str
    script: str
    option_letters: str = "ABCD"  # the four letters that mark the answers of a multiple-choice question
    digits: str = ASCII_DIGITS  # 0-9 as everyday writing has them (Tamil and Mandarin: ASCII)


LANGUAGES: dict[str, Language] = {
    language.code: language
    for language in (
        Language("my", "Burmese", "မြန်မာ", "Mymr", "ကခဂဃ", "၀၁၂၃၄၅၆၇၈၉"),
        Language("en", "English", "English", "Latn"),
        Language("id", "Indonesian", "Bahasa Indonesia", "Latn"),
        Language("km", "Khmer", "ខ្មែរ", "Khmr", "កខគឃ", "០១២៣៤៥៦៧៨៩"),
        Language("lo", "Lao", "ລາວ", "Laoo", "ກຂຄງ", "໐໑໒໓໔໕໖໗໘໙"),
        Language("ms", "Malay", "Bahasa Melayu", "Latn"),
        Language("zh", "Mandarin", "中文", "Hans"),
        Language("tl", "Tagalog", "Tagalog", "Latn"),
        Language("ta", "Tamil", "தமிழ்", "Taml", "அஆஇஈ"),
        Language("th", "Thai", "ไทย", "Thai", "กขคง", "๐๑๒๓๔๕๖๗๘๙"),
        Language("vi", "Vietnamese", "Tiếng Việt", "Latn"),
    )
}
GLOBAL_LANGUAGES = ("en", "zh")
REGIONAL_LANGUAGES = tuple(code for code in LANGUAGES if code not in GLOBAL_LANGUAGES)

# Blocks whose letters and marks decide the script; both ends belong to the block.
_BLOCKS = (
    (0x0E00, 0x0E7F, "Thai"),
    (0x0E80, 0x0EFF, "Laoo"),
    (0x1000, 0x109F, "Mymr"),
    (0xA9E0, 0xA9FF, "Mymr"),
    (0xAA60, 0xAA7F, "Mymr"),
    (0x1780, 0x17FF, "Khmr"),
    (0x19E0, 0x19FF, "Khmr"),
    (0x0B80, 0x0BFF, "Taml"),
    (0x3400, 0x4DBF, "Hans"),
    (0x4E00, 0x9FFF, "Hans"),
    (0xF900, 0xFAFF, "Hans"),
    (0x20000, 0x323AF, "Hans"),
    (0x3040, 0x30FF, "Jpan"),
    (0xAC00, 0xD7A3, "Kore"),
)
# Marks that, of the five languages in Latin letters, only Vietnamese uses: breve, horn, hook above, dot
# below.
_VIETNAMESE_MARKS = frozenset("\u0306\u031b\u0309\u0323")
# Words of unaccented Latin text after which Vietnamese is ruled out: a Vietnamese sentence that long has
# marks.
_VIETNAMESE_PLAIN_WORDS = 5


def _script_of_letter(letter: str) -> str | None:
    """The script of one letter or mark, None for what no script owns (digits, punctuation, emoji)."""
    point = ord(letter)
    if unicodedata.category(letter)[0] not in "LM":
        return None
    for first, last, script in _BLOCKS:
        if first <= point <= last:
            return script
    if unicodedata.category(letter)[0] == "M":
        return None
    name = unicodedata.name(letter, "")
    if name.startswith(("LATIN ", "FULLWIDTH LATIN ")):
        return "Latn"
    return "Zzzz"  # a letter of a script that none of the eleven languages uses


def script_of(text: str) -> str | None:
    """The ISO 15924 script most letters of `text` are in; None when it has no letters.

    Letters and marks are counted, digits and punctuation are not. Han is reported as "Hans" (traditional
    characters too); a script outside the eleven languages as "Jpan", "Kore" or "Zzzz".
    """
    counts = Counter(script for letter in text if (script := _script_of_letter(letter)) is not None)
    if not counts:
        return None
    # A Japanese text may hold more Han than kana: any sizeable share of kana decides.
    if counts["Jpan"] * 4 >= counts["Hans"] > 0:
        return "Jpan"
    return counts.most_common(1)[0][0]


def _looks_vietnamese(text: str) -> bool:
    decomposed = unicodedata.normalize("NFD", normalize(text).lower())
    if "đ" in decomposed or any(mark in _VIETNAMESE_MARKS for mark in decomposed):
        return True
    # ấ, ề, ỗ ...: two marks on one letter
    pairs = pairwise(decomposed)
    return any(unicodedata.combining(a) and unicodedata.combining(b) for a, b in pairs)


def plausible_languages(text: str) -> set[str]:
    """Codes of the languages `text` may be in, judged by script alone; empty when none fits or no letters.

    Latin text gives {"vi"} when it has Vietnamese letters, else en, id, ms, tl, and vi as well while the text
    is short (fewer than five words) or carries an accent.
    """
    script = script_of(text)
    if script != "Latn":
        return {code for code, language in LANGUAGES.items() if language.script == script}
    if _looks_vietnamese(text):
        return {"vi"}
    found = {code for code, language in LANGUAGES.items() if language.script == "Latn"}
    if len(text.split()) >= _VIETNAMESE_PLAIN_WORDS and text.isascii():
        found.discard("vi")
    return found


def detect(text: str) -> str | None:
    """The language of `text` when its script leaves only one, else None."""
    found = plausible_languages(text)
    return found.pop() if len(found) == 1 else None


def to_native_digits(text: str, code: str) -> str:
    """`text` with ASCII digits written as the language `code` writes them."""
    return text.translate(str.maketrans(ASCII_DIGITS, LANGUAGES[code].digits))


def to_ascii_digits(text: str) -> str:
    """`text` with every decimal digit of any script (Thai, Burmese, Khmer, Lao, Tamil, full-width) as 0-9."""
    return "".join(
        str(unicodedata.decimal(letter)) if unicodedata.category(letter) == "Nd" else letter
        for letter in text
    )
