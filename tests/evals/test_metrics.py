"""Replies as models really give them, in the eleven languages, and what is read from them."""

import pytest

from seavlm.evals.metrics import NUMBER_WORDS, Vocabulary, fold, judge, language_ok
from seavlm.evals.tasks import Question
from seavlm.text.language import LANGUAGES, to_native_digits

DOG = {  # "dog face" in CLDR
    "my": "ခွေးရုပ်",
    "en": "dog face",
    "id": "wajah anjing",
    "km": "មុខឆ្កែ",
    "lo": "ໜ້າໝາ",
    "ms": "muka anjing",
    "zh": "狗脸",
    "tl": "mukha ng aso",
    "ta": "நாய் முகம்",
    "th": "หน้าสุนัข",
    "vi": "mặt cún",
}
HOUSE = {
    "my": "အိမ်",
    "en": "house",
    "id": "rumah",
    "km": "ផ្ទះ",
    "lo": "ອາຄານເຮືອນ",
    "ms": "rumah",
    "zh": "房子",
    "tl": "bahay",
    "ta": "வீடு",
    "th": "บ้านเดี่ยว",
    "vi": "ngôi nhà",
}
WHAT = {
    "my": "ဒါဘာလဲ။",
    "en": "What is this?",
    "id": "Apa ini?",
    "km": "នេះជាអ្វី?",
    "lo": "ນີ້ແມ່ນຫຍັງ?",
    "ms": "Apakah ini?",
    "zh": "这是什么?",
    "tl": "Ano ito?",
    "ta": "இது என்ன?",
    "th": "นี่คืออะไร",
    "vi": "Đây là gì?",
}
CODES = list(LANGUAGES)


def name(language: str, answer: dict[str, str] = DOG) -> Question:
    return Question(
        f"n-{language}", "name", language, "dog", f"<image>\n{WHAT[language]}", (answer[language],)
    )


def choose(language: str, options: tuple[str, ...] | None = None, right: int = 1) -> Question:
    options = options or ("x", DOG[language], HOUSE[language], "y")
    letters = tuple(LANGUAGES[language].option_letters)
    return Question(f"c-{language}", "choose", language, "dog", "?", (options[right],), options, letters)


def yesno(language: str, answer: str) -> Question:
    return Question(f"y-{language}", "yesno", language, "dog", "?", (answer,))


def count(language: str, answer: str) -> Question:
    return Question(f"k-{language}", "count", language, "dog", "?", (answer,))


VOCABULARY = Vocabulary.of([name(code, names) for code in CODES for names in (DOG, HOUSE)])


def verdict(question: Question, reply: str) -> str:
    return judge(question, reply, VOCABULARY).verdict


@pytest.mark.parametrize("code", CODES)
def test_a_name_is_read_whatever_surrounds_it(code: str) -> None:
    for reply in (
        DOG[code],
        f" {DOG[code].upper()} \n",
        f"«{DOG[code]}»។",
        f"“{DOG[code]}”。",
        f"{DOG[code]}\u200b။",
    ):
        judged = judge(name(code), reply, VOCABULARY)
        assert (judged.verdict, judged.language_ok) == ("correct", True), reply
    assert verdict(name(code), HOUSE[code]) == "wrong_answer"


@pytest.mark.parametrize("code", CODES)
def test_a_sentence_a_letter_or_nothing_is_not_a_name(code: str) -> None:
    sentence = f"{WHAT[code]} {DOG[code]} {DOG[code]}"
    for reply in (
        "",
        "  ",
        "?!",
        "B",
        LANGUAGES[code].option_letters[1] + ".",
        "3",
        sentence,
        f"{DOG[code]}\n{HOUSE[code]}",
    ):
        assert verdict(name(code), reply) == "wrong_format", reply


def test_a_long_name_is_no_sentence_whatever_else_is_asked() -> None:
    """A verdict is not to hang on how long the names of the other questions happen to be."""
    only = Vocabulary.of([name("vi", HOUSE)])
    assert judge(name("vi"), "bánh trôi Nhật Bản", only).verdict == "wrong_answer"
    assert judge(name("tl"), "isang pulang bahay", Vocabulary.of([name("tl")])).verdict == "wrong_answer"
    for code, said in {"en": "This is a cat", "id": "Ini adalah kucing", "tl": "Ito ay pusa"}.items():
        assert judge(name(code), said, Vocabulary.of([name(code)])).verdict == "wrong_format", said
    assert judge(name("th"), "ในภาพนี้ฉันเห็นแมวตัวหนึ่งนั่งอยู่", only).verdict == "wrong_format"


def test_spaces_between_words_matter_only_where_words_have_spaces() -> None:
    assert verdict(name("th"), "หน้า สุนัข") == "correct"
    assert verdict(name("lo"), "ໜ້າ ໝາ") == "correct"
    assert verdict(name("vi"), "mặtcún") == "wrong_answer"
    assert fold("Mặt  CÚN.", "vi") == fold("mặt cún", "vi")
    assert fold("ma\u0323\u0306t cu\u0301n") == fold("mặt cún")  # decomposed, marks in another order


@pytest.mark.parametrize("code", CODES)
def test_the_right_name_in_another_language_is_a_wrong_answer_in_the_wrong_language(code: str) -> None:
    for other in CODES:
        if DOG[other] == DOG[code] or other == code:
            continue
        judged = judge(name(code), DOG[other], VOCABULARY)
        assert (judged.verdict, judged.language_ok) == ("wrong_answer", False), other


def test_language_of_words_that_only_latin_languages_can_tell_apart() -> None:
    assert language_ok("This is a house", "id", VOCABULARY) is False
    assert language_ok("Ito ay bahay", "tl", VOCABULARY) is True
    assert language_ok("rumah", "id", VOCABULARY) is True  # shared by Indonesian and Malay
    assert language_ok("rumah", "ms", VOCABULARY) is True
    assert language_ok("zzz qqq", "ms", VOCABULARY) is None  # nobody's words
    assert language_ok("1234 !", "th", VOCABULARY) is None
    assert language_ok("The picture shows แมว", "th", VOCABULARY) is False


@pytest.mark.parametrize("code", CODES)
def test_an_option_by_letter_number_or_text(code: str) -> None:
    question = choose(code)
    native = LANGUAGES[code].option_letters[1]
    good = [
        "B",
        "b",
        "B.",
        "(b)",
        "B) ",
        "**B**",
        "2",
        to_native_digits("2", code),
        native,
        f"{native}.",
        f"({native})",
    ]
    good += [
        f"{native}. {DOG[code]}",
        DOG[code],
        DOG[code] + "។",
        f"Answer: {native}",
        f"{native}\n",
        f"{native}၊ {DOG[code]}",
    ]
    for reply in good:
        assert verdict(question, reply) == "correct", reply
    for reply in ("C", HOUSE[code], LANGUAGES[code].option_letters[2] + ")", to_native_digits("3", code)):
        assert verdict(question, reply) == "wrong_answer", reply


@pytest.mark.parametrize("code", CODES)
def test_two_options_at_once_or_none_is_a_wrong_format(code: str) -> None:
    native = LANGUAGES[code].option_letters
    for reply in (
        "",
        "...",
        f"{native[1]} {native[2]}",
        "B or C",
        f"{DOG[code]} / {HOUSE[code]}",
        f"{native[1]}. {HOUSE[code]}",
        "".join(native),
        "?" * 9,
        "E",
    ):
        assert verdict(choose(code), reply) == "wrong_format", reply


def test_a_name_that_was_not_offered_is_a_wrong_answer() -> None:
    judged = judge(choose("th", ("x", DOG["th"], "y", "z")), HOUSE["th"], VOCABULARY)
    assert (judged.verdict, judged.parsed) == ("wrong_answer", HOUSE["th"])
    judged = judge(choose("th"), "rumah besar", VOCABULARY)
    assert (judged.verdict, judged.language_ok) == ("wrong_format", False)


def test_traps_of_option_letters() -> None:
    options = ("red apple", "apple", "cat", "dog")
    assert verdict(choose("en", options), "A cat") == "wrong_answer"  # the article, not option A
    assert judge(choose("en", options), "A cat", VOCABULARY).parsed == "cat"
    assert judge(choose("en", options), "a red apple", VOCABULARY).parsed == "red apple"  # not "apple" too
    assert judge(choose("en", options), "The answer is A.", VOCABULARY).parsed == "red apple"
    assert judge(choose("en", ("2", "3", "4", "5")), "3", VOCABULARY).parsed == "3"  # the text, not the third
    fly = ("ஈ", "நாய்", "பூனை", "வீடு")  # the Tamil fly is written as the fourth letter
    assert judge(choose("ta", fly), "ஈ", VOCABULARY).parsed == "வீடு"
    assert judge(choose("th"), "ข้อ ข", VOCABULARY).parsed == DOG["th"]  # ข้อ begins with the letter too
    assert judge(choose("th"), "ข", VOCABULARY).language_ok is True
    assert judge(choose("th"), "B", VOCABULARY).language_ok is None
    assert judge(choose("en"), "ข", VOCABULARY).language_ok is False


SAYS_YES = {
    "my": ["ဟုတ်ကဲ့", "ဟုတ်ပါတယ်။"],
    "en": ["Yes", "yes, it is.", "Yes. It is a dog"],
    "id": ["Ya", "Ya, ini anjing.", "Betul"],
    "km": ["បាទ", "ចាស", "មែន។"],
    "lo": ["ແມ່ນ", "ແມ່ນແລ້ວ"],
    "ms": ["Ya", "Ya, betul."],
    "zh": ["是", "是的。", "对", "是的,这是狗"],
    "tl": ["Oo", "Opo.", "Oo, aso ito"],
    "ta": ["ஆம்", "ஆமாம்."],
    "th": ["ใช่", "ใช่ครับ", "ใช่ค่ะ นี่คือหมา"],
    "vi": ["Có", "Đúng", "Vâng, đúng vậy", "Phải"],
}
SAYS_NO = {
    "my": ["မဟုတ်ဘူး", "မဟုတ်ပါ။"],
    "en": ["No", "No, it is a cat."],
    "id": ["Tidak", "Bukan.", "Tidak, ini kucing"],
    "km": ["ទេ", "មិនមែនទេ", "អត់ទេ។"],
    "lo": ["ບໍ່", "ບໍ່ແມ່ນ"],
    "ms": ["Tidak", "Bukan, ini kucing"],
    "zh": ["不是", "不", "否。", "不是,这是猫"],
    "tl": ["Hindi", "Hindi po."],
    "ta": ["இல்லை", "இல்லை, இது பூனை"],
    "th": ["ไม่ใช่", "ไม่", "ไม่ใช่ นี่คือแมว"],
    "vi": ["Không", "Không phải", "Sai"],
}


@pytest.mark.parametrize("code", CODES)
def test_yes_and_no(code: str) -> None:
    for says, right, wrong in ((SAYS_YES, "yes", "no"), (SAYS_NO, "no", "yes")):
        for reply in says[code]:
            for answer in (right, says[code][0]):
                judged = judge(yesno(code, answer), reply, VOCABULARY)
                assert (judged.verdict, judged.parsed, judged.language_ok) == ("correct", right, True), reply
            assert verdict(yesno(code, wrong), reply) == "wrong_answer", reply
    both = [f"{SAYS_YES[code][0]}. {SAYS_NO[code][0]}.", "", DOG[code]]
    for reply in both:
        assert verdict(yesno(code, "yes"), reply) == "wrong_format", reply


def test_yes_or_no_in_one_breath_or_in_another_language() -> None:
    assert verdict(yesno("th", "yes"), "ใช่หรือไม่") == "wrong_format"
    assert verdict(yesno("en", "yes"), "yes or no") == "wrong_format"
    judged = judge(yesno("th", "yes"), "Yes", VOCABULARY)
    assert (judged.verdict, judged.language_ok) == ("correct", False)
    judged = judge(yesno("en", "no"), "không", VOCABULARY)
    assert (judged.verdict, judged.language_ok) == ("correct", False)


@pytest.mark.parametrize("code", CODES)
def test_numbers_in_digits_and_words(code: str) -> None:
    for value, words in enumerate(NUMBER_WORDS[code].split()):
        replies = [str(value), f"{value}.", to_native_digits(str(value), code), *words.split("/")]
        for reply in replies:
            assert judge(count(code, str(value)), reply, VOCABULARY).parsed == str(value), reply
            assert verdict(count(code, words.split("/")[0]), reply) == "correct", reply
            assert verdict(count(code, str(value + 1)), reply) == "wrong_answer", reply
    for reply in ("", "2 3", DOG[code]):
        assert verdict(count(code, "2"), reply) == "wrong_format", reply
    if LANGUAGES[code].digits[0] != "0":
        assert judge(count(code, "3"), LANGUAGES[code].digits[3], VOCABULARY).language_ok is True
        assert judge(count("en", "3"), LANGUAGES[code].digits[3], VOCABULARY).language_ok is False


def test_number_words_in_sentences_and_other_languages() -> None:
    assert judge(count("km", "6"), "ប្រាំមួយ", VOCABULARY).parsed == "6"  # "five one"
    assert judge(count("my", "7"), "ခုနှစ်ခု", VOCABULARY).parsed == "7"  # holds the word for two
    assert judge(count("th", "3"), "มีสามตัว", VOCABULARY).parsed == "3"
    assert judge(count("vi", "4"), "Có bốn con", VOCABULARY).parsed == "4"
    judged = judge(count("th", "3"), "three", VOCABULARY)
    assert (judged.verdict, judged.language_ok) == ("correct", False)


DENIES = {  # "not B", "not A but B", in the words of each language
    "my": ("{b} မဟုတ်ဘူး", "{a} မဟုတ်ဘူး၊ {b}"),
    "en": ("It is not {b}.", "Not {a}, but {b}"),
    "id": ("Bukan {b}", "Bukan {a}, tetapi {b}"),
    "km": ("មិនមែន {b}", "មិនមែន {a} ទេ គឺ {b}"),
    "lo": ("ບໍ່ແມ່ນ {b}", "ບໍ່ແມ່ນ {a} ແຕ່ແມ່ນ {b}"),
    "ms": ("Bukan {b}", "Bukan {a}, tetapi {b}"),
    "zh": ("不是{b}", "不是{a},是{b}"),
    "tl": ("Hindi {b}", "Hindi {a} kundi {b}"),
    "ta": ("{b} அல்ல", "{a} அல்ல, {b}"),
    "th": ("ไม่ใช่ {b}", "ไม่ใช่ {a} แต่เป็น {b}"),
    "vi": ("Không phải {b}", "Không phải {a} mà là {b}"),
}
REASONS = {
    "my": "{a} က အိမ်၊ {b} က ခွေး။ အဖြေမှာ {b}",
    "en": "{a} shows a cup and {b} shows an animal. So the answer is {b}.",
    "id": "{a} adalah gelas, {b} adalah hewan. Jawabannya: {b}",
    "km": "{a} ជាពែង {b} ជាសត្វ។ ចម្លើយគឺ{b}",
    "lo": "{a} ແມ່ນຈອກ, {b} ແມ່ນສັດ. ຄຳຕອບແມ່ນ {b}",
    "ms": "{a} ialah gelas, {b} ialah haiwan. Jawapan: {b}",
    "zh": "{a}是杯子,{b}是动物。所以答案是{b}。",
    "tl": "{a} ay baso at {b} ay hayop. Sagot: {b}",
    "ta": "{a} ஒரு கோப்பை, {b} ஒரு விலங்கு. விடை: {b}",
    "th": "{a} เป็นแก้ว {b} เป็นสัตว์ คำตอบคือ{b}",
    "vi": "{a} là cái cốc, {b} là con vật. Đáp án là {b}.",
}


@pytest.mark.parametrize("code", CODES)
def test_what_is_denied_is_not_the_answer_and_reasons_are_not_either(code: str) -> None:
    question = choose(code, ("x", DOG[code], HOUSE[code], "y"))
    native = LANGUAGES[code].option_letters
    for a, b in ((native[0], native[1]), ("A", "B"), (HOUSE[code], DOG[code])):
        no, but = (text.format(a=a, b=b) for text in DENIES[code])
        assert verdict(question, no) == "wrong_format", no
        assert verdict(question, but) == "correct", but
        assert verdict(choose(code, right=2), but) == "wrong_answer", but
        thought = REASONS[code].format(a=a, b=b)
        assert verdict(question, thought) == "correct", thought
        assert verdict(question, f"<think>{a}? {a}!</think>\n{b}") == "correct"
    # The one line that is an option, with reasons below it that name others.
    assert verdict(question, f"{native[1]}. {DOG[code]}\n\n({native[0]} / {native[2]})") == "correct"
    assert verdict(question, "\n".join(f"{letter}." for letter in native)) == "wrong_format"


def test_a_letter_stands_alone_beside_another_script() -> None:
    for code, replies in {
        "zh": ["答案是B", "选B", "B是正确的", "第2个", "B、"],
        "th": ["ตอบB", "ข้อข", "ข้อ2", "คำตอบคือข"],
        "km": ["ចម្លើយគឺខ", "យកB"],
        "en": ["The answer is b", "I choose B", "\\boxed{B}", "B is correct"],
    }.items():
        for reply in replies:
            judged = judge(choose(code), reply, VOCABULARY)
            assert judged.verdict == "correct" and judged.language_ok is not False, reply
    assert verdict(choose("en"), "A 3D printer") == "wrong_format"  # neither A nor the third
    assert verdict(choose("en", ("Thai dog", "apple", "cat", "dog"), 0), "A Thai dog") == "correct"
    twice = choose("en", ("cat", "dog", "cat", "fish"), 0)  # an option that is offered twice is one
    assert verdict(twice, "cat") == verdict(twice, "C. cat") == verdict(twice, "C") == "correct"
    assert verdict(choose("en", ("+", "-", "=", "%"), 0), "+") == "correct"


def test_numbers_as_they_are_written() -> None:
    short = Question("s", "short", "th", "c", "?", ("1.5",))
    assert verdict(short, "1.5") == verdict(short, "๑.๕") == verdict(short, "1,5") == "correct"
    assert verdict(short, "15") == "wrong_answer"
    assert verdict(Question("s", "short", "zh", "c", "?", ("12:30",)), "1230") == "wrong_answer"
    assert verdict(Question("s", "short", "vi", "c", "?", ("1000",)), "1.000") == "correct"
    assert verdict(Question("s", "short", "en", "c", "?", ("Paris",)), "It is not Paris") == "wrong_answer"
    assert verdict(Question("s", "short", "en", "c", "?", ("?",)), "!") == "wrong_answer"
    assert verdict(count("en", "3"), "There are 2 red ones and 1 blue one. Answer: 3") == "correct"
    assert verdict(count("en", "3"), "3.0") == verdict(count("en", "1000"), "1,000") == "correct"
    assert verdict(count("en", "3"), "1" * 5000) == "wrong_answer"  # more digits than int() takes
    assert verdict(yesno("en", "no"), "It looks like a cat, so the answer is no.") == "correct"
