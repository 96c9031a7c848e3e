"""One spelling for one text: Unicode NFC, and a rule for every invisible character.

Data, prompts and metrics all go through `normalize`, so that what looks the same has the same ids. It changes
how a text is stored, never how it reads. Where a rule says "kept", the character is dropped everywhere else.

| character | rule |
|---|---|
| U+200B zero-width space | dropped: an optional word break (Thai, Lao, Khmer, Burmese), and costly |
| U+2060 word joiner, U+FEFF byte order mark | dropped |
| U+00AD soft hyphen, U+034F grapheme joiner, U+180E | dropped |
| U+200E/F, U+202A-E, U+2066-9, U+061C direction marks | dropped: none of the languages runs right to left |
| U+2061-4 invisible operators, U+FFF9-B annotations | dropped |
| U+200D zero-width joiner | kept in an emoji sequence, and after a virama of a shaping script |
| U+200C zero-width non-joiner | kept between two letters of a shaping script (Tamil, Khmer ...) |
| U+FE0F, U+FE0E variation selectors | kept after an emoji, where they choose picture or letter |
| U+FE00 - U+FE0D, U+E0100 - U+E01EF selectors | kept after Han, Burmese, Khmer, where fonts use them |
| U+E0020 - U+E007F tags | kept after an emoji (the flags of England, Scotland, Wales) |
| Thai nikhahit + aa, two e; the same in Lao | one am, one ae: drawn alike, typed differently |
| U+17B4, U+17B5 Khmer inherent vowels | dropped: discouraged by Unicode, invisible |
| CR LF, CR, U+2028, U+2029, U+0085 | a newline |
| U+00A0, U+202F, U+2007 and the other spaces of fixed width | a space |
| the 31st and later of marks on one letter | dropped: no writing has so many, and sorting takes forever |
| other control characters (C0, C1) but tab and newline, lone surrogates, noncharacters | dropped |
"""

import re
import unicodedata

import regex

_SPACES = dict.fromkeys([0x00A0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F], " ")
_NEWLINES = dict.fromkeys([0x85, 0x2028, 0x2029], "\n")
_DROPPED: dict[int, None] = dict.fromkeys(
    [
        *(c for c in range(0x20) if c not in (0x09, 0x0A)),
        *(c for c in range(0x7F, 0xA0) if c != 0x85),
        0x00AD,
        0x034F,
        0x061C,
        0x17B4,
        0x17B5,
        0x180E,
        0x200B,
        0x200E,
        0x200F,
        *range(0x202A, 0x202F),
        *range(0x2060, 0x2070),
        *range(0xD800, 0xE000),
        *range(0xFDD0, 0xFDF0),
        0xFEFF,
        *range(0xFFF9, 0xFFFC),
        *(plane | last for plane in range(0, 0x110000, 0x10000) for last in (0xFFFE, 0xFFFF)),
    ]
)
_TABLE: dict[int, str | None] = {**_DROPPED, **_SPACES, **_NEWLINES}

# Characters whose place decides: joiners, variation selectors, tags.
_PLACED = re.compile("[\u200c\u200d\ufe00-\ufe0f\U000e0020-\U000e007f\U000e0100-\U000e01ef]")
# Indic scripts (Devanagari to Sinhala), Tibetan, Burmese, Khmer: joiners choose between two right shapes
# there.
_SHAPING = (
    (0x0900, 0x0DFF),
    (0x0F00, 0x0FFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0xA9E0, 0xA9FF),
    (0xAA60, 0xAA7F),
)
_VIRAMAS = frozenset("\u094d\u09cd\u0a4d\u0acd\u0b4d\u0bcd\u0c4d\u0ccd\u0d4d\u0dca\u1039\u103a\u17d2")
_SELECTED = (
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3400, 0x9FFF),
    (0xA9E0, 0xA9FF),
    (0xAA60, 0xAA7F),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)
_STACKED = regex.compile(r"(\p{M}{30})\p{M}+")
_MODIFIERS = range(0x1F3FB, 0x1F400)  # skin tones
# Sara am = nikhahit + sara aa, with a tone mark that may stand between them; sara ae = two sara e.
_LOOKALIKES = (
    (re.compile("\u0e4d([\u0e48-\u0e4b]?)\u0e32"), "\\1\u0e33"),
    (re.compile("\u0ecd([\u0ec8-\u0ecb]?)\u0eb2"), "\\1\u0eb3"),
    (re.compile("\u0e40\u0e40"), "\u0e41"),
    (re.compile("\u0ec0\u0ec0"), "\u0ec1"),
)


def normalize(text: str) -> str:
    """`text` in NFC with the invisible characters settled by the table above. Idempotent."""
    if text.isascii() and not _has_ascii_control(text):
        return text
    text = _composed(text.replace("\r\n", "\n").replace("\r", "\n").translate(_TABLE))
    if _PLACED.search(text):
        text = _place(text)
    for drawn_alike, spelling in _LOOKALIKES:
        text = drawn_alike.sub(spelling, text)
    return _composed(text)


def _composed(text: str) -> str:
    """NFC, whose time grows with the square of the marks on one letter: so many there may be."""
    return unicodedata.normalize("NFC", _STACKED.sub(r"\1", text))


def _has_ascii_control(text: str) -> bool:
    return any((letter < " " and letter not in "\t\n") or letter == "\x7f" for letter in text)


def _place(text: str) -> str:
    """Drops joiners, selectors and tags which do nothing where they stand."""
    out: list[str] = []
    base = ""  # the last kept character under its selectors, tags and skin tone
    for at, letter in enumerate(text):
        placed = _PLACED.match(letter) is not None
        if placed and not _belongs(letter, out[-1] if out else "", base, text[at + 1 : at + 2]):
            continue
        out.append(letter)
        if not placed and ord(letter) not in _MODIFIERS:
            base = letter
    return "".join(out)


def _belongs(letter: str, previous: str, base: str, after: str) -> bool:
    """Whether an invisible `letter` does something between what was kept so far and the next letter."""
    point = ord(letter)
    if not previous:
        return False
    if letter == "\u200d":
        if previous in _VIRAMAS:
            return _within(previous, _SHAPING)
        return _is_emoji(base) and bool(after) and _is_emoji(after)
    if letter == "\u200c":
        return bool(after) and _within(previous, _SHAPING) and _within(after, _SHAPING)
    if letter in "\ufe0e\ufe0f":
        return _is_emoji(previous) or previous in "#*0123456789"
    if 0xE0020 <= point <= 0xE007F:
        return _is_emoji(base)
    return _within(previous, _SELECTED)


def _is_emoji(letter: str) -> bool:
    """Whether a character can stand in an emoji sequence: a symbol that is drawn as a picture somewhere."""
    if not letter:
        return False
    point = ord(letter)
    return point in (0xA9, 0xAE, 0x203C, 0x2049, 0x2139, 0x3030, 0x303D, 0x3297, 0x3299) or (
        unicodedata.category(letter) in ("So", "Sm", "Sk", "Cn")
        and (0x2100 <= point <= 0x2BFF or point >= 0x1F000)
    )


def _within(letter: str, ranges: tuple[tuple[int, int], ...]) -> bool:
    point = ord(letter)
    return any(first <= point <= last for first, last in ranges)
