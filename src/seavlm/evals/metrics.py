"""What a reply says, whether it is right, and whether it is in the language that was asked for.

Verdicts, kept apart because they call for different cures:

- `correct`: the reply can be read, and it is the answer;
- `wrong_answer`: the reply can be read, and it is another answer;
- `wrong_format`: the reply cannot be read as one answer of the kind asked for (empty, two options at once, a
  sentence where a name was asked for);
- `graded`: a text that is not right or wrong but more or less like those that people wrote;
- `no_reply`: the endpoint gave none (too long a prompt, refused): an error of the run, told apart.

How replies are read:

- What a model thinks aloud (`<think>`) is no part of its reply. Where it says which is its answer ("so the
  answer is B"), that is what counts, else all that it says.
- `choose`, `letter`, `ranked`: an option's letter (native or A-D, bare or dressed: "ก", "B.", "(ค)",
  "选B"), its number in any script's digits, or its text. All it mentions must point at one option; one that
  it denies ("not A", "ไม่ใช่ ก") is not its answer. Failing that, the one line that is an option and no more.
- `yesno`: the words for yes and no that open the clauses of the reply. They must agree.
- `count`: one number, in any script's digits or as a word from nought to ten.
- `calls`, and wherever functions are offered: the calls, as the server reads them; a call where none is
  needed is a wrong answer, and counted apart as `false_call` (`formats.judge_calls`).
- `read`: the text in a picture, all of it; how far off it is in graphemes is measured beside (`similarity`).
- `short`: an accepted answer, alone or within a reply of few words more. Measure `contains`: it occurs in
  the reply, however long (as MTVQA and WorldCuisines count).
- `caption`, `translation`, `summary`, `answer`: graded by chrF, chrF++, ROUGE-L, F1 against what people
  wrote, from where the question's tag ("Answer:") stands on.
- `checks`, `calls`: what was asked of its form, and functions that it should call (`formats`).
- any other task asks for a name: the whole reply must be a name, equal to the accepted one after `fold`.

`language_ok` is separate from the verdict. A bare letter or digit that all share says nothing: None. A script
other than the language's own is wrong. English, Indonesian, Malay, Tagalog and Vietnamese share a script, so
there the reply is held against the words that the questions themselves use in each language (`Vocabulary`):
it passes when no other language knows more of its words, and is None when no language knows any. Names that
two languages share count for both. With questions in a single language nothing can be held against it, so
only the script is judged.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

from seavlm.errors import SeavlmError
from seavlm.evals.formats import CONTENT, failed, judge_calls, wanted_calls
from seavlm.evals.similarity import clean, graded, graphemes, likeness
from seavlm.evals.tasks import GRADED, RANKED, Question
from seavlm.text.language import LANGUAGES, plausible_languages, script_of, to_ascii_digits
from seavlm.text.normalize import normalize

VERDICTS = ("correct", "wrong_answer", "wrong_format", "graded", "no_reply")
SHORT_SLACK = 3
"""A short answer may stand in a reply of at most so many times its length."""
SPACELESS = frozenset({"my", "km", "lo", "th", "zh"})
"""Languages that put no spaces between words: a space or none is the same to them."""

YES = {  # an underscore is a space within a word
    "my": "ဟုတ်ကဲ့ ဟုတ်တယ် ဟုတ်ပါတယ် ဟုတ်ပါသည် ဟုတ်သည် ဟုတ် မှန်တယ် မှန်ပါတယ်",
    "en": "yes yeah yep correct true",
    "id": "ya iya betul benar",
    "km": "បាទ ចាស ចា៎ះ មែន មែនហើយ ត្រូវ ត្រឹមត្រូវ",
    "lo": "ແມ່ນ ແມ່ນແລ້ວ ເຈົ້າ ໂດຍ ຖືກ ຖືກຕ້ອງ",
    "ms": "ya betul benar",
    "zh": "是 是的 对 对的 没错 正确",
    "tl": "oo opo tama",
    "ta": "ஆம் ஆமாம் ஆமா சரி",
    "th": "ใช่ ใช่แล้ว ถูก ถูกต้อง จริง",
    "vi": "có đúng vâng phải dạ ừ",
}
NO = {
    "my": "မဟုတ်ဘူး မဟုတ်ပါဘူး မဟုတ်ပါ မဟုတ် မမှန်ဘူး",
    "en": "no nope not false incorrect",
    "id": "tidak bukan tak salah",
    "km": "ទេ អត់ទេ មិនមែន មិនមែនទេ មិនត្រូវ ខុស",
    "lo": "ບໍ່ ບໍ່ແມ່ນ ຜິດ",
    "ms": "tidak bukan tak salah",
    "zh": "不 不是 不是的 否 不对 没有 错 错误",
    "tl": "hindi mali",
    "ta": "இல்லை இல்ல அல்ல தவறு",
    "th": "ไม่ ไม่ใช่ เปล่า ผิด ไม่ถูก ไม่ถูกต้อง",
    "vi": "không không_phải không_có sai",
}
COMMON = {  # words that no sentence does without, and that tell the languages in Latin letters apart
    "en": "the a an is are was of and to in on with this that it there at for from not",
    "id": "ini itu adalah yang dan dengan di sebuah seorang bahwa karena dari pada untuk tidak bisa sedang",
    "ms": "ini itu ialah adalah yang dan dengan di sebuah seorang bahawa kerana dari pada untuk tidak boleh "
    "sedang",
    "tl": "ang ng mga ito iyon ay sa na isang may at nasa para hindi ni si kay",
    "vi": "là một của và có này đó trong với cho không được những các người trên",
}
ANSWER = {  # what announces an answer, and what may stand between the two
    "my": "အဖြေမှာ အဖြေ",
    "en": "answer",
    "id": "jawabannya jawaban",
    "km": "ចម្លើយគឺ ចម្លើយ",
    "lo": "ຄຳຕອບແມ່ນ ຄຳຕອບຄື ຄຳຕອບ",
    "ms": "jawapannya jawapan",
    "zh": "答案是 答案为 答案",
    "tl": "sagot",
    "ta": "விடை பதில்",
    "th": "คำตอบคือ คำตอบ",
    "vi": "đáp_án trả_lời",
}
IS = frozenset(
    ["is", "would", "be", "are", "adalah", "ialah", "ay", "là", "option", "choice", "letter", "the"]
)
LEADS = ("ข้อ", "คือ", "ตอบ", "เลือก", "ຂໍ້", "ແມ່ນ", "ຕອບ", "គឺ", "ជា", "យក")
"""Words that a bare letter of their own script may follow without a space."""
DENIED_BEFORE = {
    "en": "not isn_t cannot_be can_t_be",
    "id": "bukan bukanlah",
    "tl": "hindi",
    "vi": "không_phải không_phải_là",
    "": "不是 并非 不选 ไม่ใช่ ບໍ່ແມ່ນ មិនមែន មិនមែនជា",
}
DENIED_AFTER = {
    "en": "is_not isn_t is_wrong is_incorrect is_false",
    "id": "bukan salah",
    "tl": "mali",
    "ta": "அல்ல இல்லை",
    "vi": "sai không_phải không_đúng",
    "": "မဟုတ် 不对 不正确 是错 错误 ไม่ใช่ ไม่ถูก ผิด ບໍ່ແມ່ນ ບໍ່ຖືກ មិនត្រឹមត្រូវ មិនមែន",
}
FILLERS = (
    "the",
    "a",
    "an",
    "option",
    "answer",
    "choice",
    "letter",
    "opsi",
    "pilihan",
    "選項",
    "选项",
    "ข้อ",
    "ຂໍ້",
)
"""Words between a denial and what it denies."""
SENTENCE = 3
"""From so many words on a reply is a sentence, in which `COMMON` words are looked for."""
NUMBER_WORDS = {  # nought to ten; alternatives after a slash
    "my": "သုည တစ် နှစ် သုံး လေး ငါး ခြောက် ခုနစ်/ခုနှစ် ရှစ် ကိုး ဆယ်/တစ်ဆယ်",
    "en": "zero/none one two three four five six seven eight nine ten",
    "id": "nol/kosong satu dua tiga empat lima enam tujuh delapan sembilan sepuluh",
    "km": "សូន្យ មួយ ពីរ បី បួន ប្រាំ ប្រាំមួយ ប្រាំពីរ ប្រាំបី ប្រាំបួន ដប់",
    "lo": "ສູນ ໜຶ່ງ/ຫນຶ່ງ/ນຶ່ງ ສອງ ສາມ ສີ່ ຫ້າ ຫົກ ເຈັດ ແປດ ເກົ້າ ສິບ",
    "ms": "sifar/kosong satu dua tiga empat lima enam tujuh lapan sembilan sepuluh",
    "zh": "零/〇 一 二/两 三 四 五 六 七 八 九 十",
    "tl": "sero/wala isa/isang dalawa/dalawang tatlo/tatlong apat lima/limang anim pito/pitong walo/walong "
    "siyam sampu/sampung",
    "ta": "பூஜ்ஜியம்/பூச்சியம் ஒன்று/ஒரு இரண்டு/இரு மூன்று நான்கு/நாலு ஐந்து ஆறு ஏழு எட்டு ஒன்பது பத்து",
    "th": "ศูนย์ หนึ่ง สอง สาม สี่ ห้า หก เจ็ด แปด เก้า สิบ",
    "vi": "không một hai ba bốn/tư năm sáu bảy/bẩy tám chín mười",
}


@dataclass(frozen=True)
class Judgement:
    """What became of one reply. `parsed` is the answer read from it, None when none can be read.

    `measures` are figures beside the verdict: chrf, cer, wer, rouge_l, false_call; held, whether a reply in
    the wrong format has the right answer in it all the same. `grade` in 0..1 is the score of a reply that is
    graded.
    """

    parsed: str | None
    verdict: str
    language_ok: bool | None
    measures: dict[str, float] = field(default_factory=dict)
    grade: float | None = None

    @property
    def score(self) -> float:
        """What the reply counts, 0..1."""
        return float(self.verdict == "correct") if self.grade is None else self.grade


@dataclass(frozen=True)
class Vocabulary:
    """The names and words that a set of questions uses in each language, all folded."""

    names: dict[str, set[str]] = field(default_factory=dict)
    words: dict[str, set[str]] = field(default_factory=dict)
    longest_name: dict[str, int] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)  # of questions, by their id (`_weights`)

    @classmethod
    def of(cls, questions: Sequence[Question]) -> Vocabulary:
        """Collect from the answers, options and prompts of `questions`."""
        names: dict[str, set[str]] = defaultdict(set)
        words: dict[str, set[str]] = defaultdict(set)
        for question in questions:
            language = question.language
            for text in (*question.answers, *question.options):
                names[_spoken(question)].add(fold(text, language))
                words[_spoken(question)].update(fold(text).split())
            words[language].update(fold(question.prompt.replace("<image>", " ")).split())
        longest = {code: max(len(graphemes(name)) for name in known) for code, known in names.items()}
        return cls(dict(names), dict(words), longest, _weights(questions))


def _spoken(question: Question) -> str:
    """The language that is asked for: a translation is in another one than the question."""
    return str(json.loads(question.checks or "{}").get("language", question.language))


def _weights(questions: Sequence[Question]) -> dict[str, float]:
    """What a right choice counts in balanced accuracy: the mean over the letters of how often each is found.

    A model that always says the most frequent one is at chance there. The mean of right x weight over a
    task and language is that accuracy: n / (letters x times that this letter is right).
    """
    right: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for question in questions:
        if question.reading == "letter" and question.answers[:1] and question.answers[0] in question.options:
            place = question.options.index(question.answers[0])
            right[question.task, question.language][question.id] = place
    weights: dict[str, float] = {}
    for places in right.values():
        times = Counter(places.values())
        weights |= {one: len(places) / (len(times) * times[place]) for one, place in places.items()}
    return weights


def fold(text: str, language: str = "") -> str:
    """The form in which texts are compared: normalised, case-folded, without punctuation, single spaces.

    In a language of `SPACELESS` the spaces go too. Invisible format characters go in all of them. What stands
    between two digits stays: 1.5 is not 15, and 12:30 not 1230. A comma there is a point, as half of the
    languages write it, and before three digits neither is anything ("1,000").
    """
    folded = unicodedata.normalize("NFC", normalize(text).casefold())
    folded = _COMMA.sub(".", _THOUSANDS.sub("", folded))
    kept = []
    for at, letter in enumerate(folded):
        category = unicodedata.category(letter)
        if category[0] in "PS" and folded[at - 1 : at].isdecimal() and folded[at + 1 : at + 2].isdecimal():
            kept.append(letter)
        elif category[0] in "PSZ" or letter.isspace():
            kept.append(" ")
        elif category != "Cf":
            kept.append(letter)
    return ("" if language in SPACELESS else " ").join("".join(kept).split())


_THOUSANDS = re.compile(r"(?<=\d)[.,](?=\d{3}(?!\d))")
_COMMA = re.compile(r"(?<=\d),(?=\d)")
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)


def _key(text: str, language: str) -> str:
    """`fold`, but of what is all punctuation ("+", "?") the text itself."""
    return fold(text, language) or " ".join(text.split())


def judge(question: Question, reply: str, vocabulary: Vocabulary) -> Judgement:
    """Read `reply`, hold it against the question's answers, and see whether it is in the right language."""
    if getattr(reply, "error", ""):
        return Judgement(None, "no_reply", None)
    reply = _THOUGHT.sub("", reply)
    reading = question.reading
    if reading in ("choose", "letter", RANKED):
        return _judge_choice(question, reply, vocabulary)
    if reading == "yesno":
        return _judge_yesno(question, reply)
    if reading == "count":
        return _judge_count(question, reply)
    if reading == "calls" or question.functions:
        return _judge_calls(question, reply)
    if reading == "read" or reading in GRADED:
        return _judge_text(question, reply, vocabulary)
    if reading == "short":
        return _judge_short(question, reply, vocabulary)
    if reading == "checks":
        return _judge_checks(question, reply, vocabulary)
    return _judge_name(question, reply, vocabulary)


def check(questions: Iterable[Question]) -> None:
    """SeavlmError for a question whose own answer would not be read as right: before anything is asked."""
    for question in questions:
        if question.reading in ("choose", "letter", RANKED):
            options = [fold(option, question.language) for option in question.options]
            wrong = not any(fold(answer, question.language) in options for answer in question.answers)
            why = "is none of its options"
        elif question.reading == "yesno":
            wrong, why = _is_yes(question) is None, "is neither yes nor no"
        elif question.reading == "count":
            wrong, why = len(_numbers(question.answers[0], question.language)[0]) != 1, "is not one number"
        else:
            continue
        if wrong:
            raise SeavlmError(
                f"question {question.id}: the answer {question.answers[0]!r} {why}", hint="Correct the data."
            )


def language_ok(reply: str, language: str, vocabulary: Vocabulary) -> bool | None:
    """Whether `reply` is in `language`; None when it does not show (see the module's docstring)."""
    if script_of(reply) is None:
        return None
    if language not in plausible_languages(reply):
        return False
    if LANGUAGES[language].script != "Latn":
        return True
    folded = fold(reply)
    if folded in vocabulary.names.get(language, ()):
        return True
    words = folded.split()
    known = {code: sum(word in vocabulary.words[code] for word in words) for code in _latin(vocabulary)}
    if len(words) >= SENTENCE:
        known = {
            code: known.get(code, 0) + sum(word in common for word in words)
            for code, common in _common_words().items()
        }
    for code in known:  # a whole name known in that language outweighs single words
        if folded in vocabulary.names.get(code, ()):
            known[code] += 1
    best = max(known.values(), default=0)
    if best == 0 or len(known) < 2:
        return None
    return known.get(language, 0) == best


def _script_ok(text: str, language: str) -> bool | None:
    """Whether `text` may be in `language`, by its script alone; None when it has no letters."""
    return language in plausible_languages(text) if script_of(text) else None


def _latin(vocabulary: Vocabulary) -> list[str]:
    return [code for code in vocabulary.words if LANGUAGES[code].script == "Latn"]


@cache
def _common_words() -> dict[str, frozenset[str]]:
    return {code: frozenset(fold(words).split()) for code, words in COMMON.items()}


# --- functions


def _judge_calls(question: Question, reply: str) -> Judgement:
    checks = json.loads(question.checks or "{}")
    if "calls" not in checks:  # a conversation of data/tools.py, whose answer is a reply
        checks |= wanted_calls(question.answers[0], question.functions)
    parsed, verdict, figures = judge_calls(checks, reply, question.answers)
    return Judgement(parsed, verdict, None, figures)


# --- texts


def _judge_text(question: Question, reply: str, vocabulary: Vocabulary) -> Judgement:
    """A transcription is right when but case, spacing and punctuation differ; other texts are graded."""
    language = _spoken(question)
    parsed = _after(json.loads(question.checks or "{}").get("after", ""), reply)
    spoken = language_ok(parsed, language, vocabulary)
    if not parsed:
        return Judgement(None, "wrong_format", spoken, grade=0.0)
    spaces = language not in SPACELESS
    if question.reading in GRADED:
        measures = graded(question.reading, question.answers, parsed, language, spaces=spaces)
        return Judgement(parsed, "graded", spoken, measures, grade=next(iter(measures.values())))
    measures = likeness(question.answers, parsed, language, spaces=spaces)
    said = _key(parsed, language)
    right = [_key(answer, language) for answer in question.answers]
    if said in right:
        return Judgement(parsed, "correct", True, measures)
    slip = any(_contains(said, answer, language) for answer in right)  # it is there, with more around it
    if slip:
        measures["held"] = 1.0
    return Judgement(None if slip else parsed, "wrong_format" if slip else "wrong_answer", spoken, measures)


def _after(tag: str, reply: str) -> str:
    """What a reply says after the tag that was asked for ("Answer: ..."), or all of it."""
    return reply.split(tag, 1)[-1].strip().lstrip("`*").strip() if tag else reply.strip()


def _judge_short(question: Question, reply: str, vocabulary: Vocabulary) -> Judgement:
    language = question.language
    said = to_ascii_digits(_key(reply, language))
    right = [to_ascii_digits(_key(answer, language)) for answer in question.answers]
    spoken = language_ok(reply, language, vocabulary)
    if not said:
        return Judgement(None, "wrong_format", spoken, {"contains": 0.0})
    plain = clean(reply).replace(".", "")
    occurs = any(clean(answer).replace(".", "") in plain for answer in question.answers)
    measures = {"contains": float(occurs or said in right)}
    if said in right:
        return Judgement(reply.strip(), "correct", spoken, measures)
    for answer in right:
        if _contains(said, answer, language):
            if all(_denied(*around) for around in _around(said, answer, language)):
                return Judgement(reply.strip(), "wrong_answer", spoken, measures)
            if len(graphemes(said)) <= SHORT_SLACK * len(graphemes(answer)) + 20:
                return Judgement(answer, "correct", spoken, measures)
            return Judgement(None, "wrong_format", spoken, measures | {"held": 1.0})
    if "\n" in reply.strip() or len(graphemes(said)) > SHORT_SLACK * max(map(len, right)) + 40:
        return Judgement(None, "wrong_format", spoken, measures | {"held": 0.0})
    return Judgement(reply.strip(), "wrong_answer", spoken, measures)


def _judge_checks(question: Question, reply: str, vocabulary: Vocabulary) -> Judgement:
    checks = json.loads(question.checks)
    language = _spoken(question)
    missed = failed(checks, reply, lambda text: language_ok(text, language, vocabulary))
    spoken = None if "json" in checks else language_ok(reply, language, vocabulary)
    if not missed:
        return Judgement(reply.strip(), "correct", spoken)
    verdict = "wrong_answer" if set(missed) <= CONTENT and reply.strip() else "wrong_format"
    return Judgement(f"fails: {', '.join(missed)}", verdict, spoken)


# --- names


def _judge_name(question: Question, reply: str, vocabulary: Vocabulary) -> Judgement:
    language = question.language
    said = fold(reply, language)
    right = [_key(answer, language) for answer in question.answers]
    spoken = language_ok(reply, language, vocabulary)
    if _key(reply, language) in right:
        said = _key(reply, language)
        # The accepted name is by definition in the language asked for, even where another language shares it.
        return Judgement(question.answers[right.index(said)], "correct", True)
    if said in vocabulary.names.get(language, ()):
        return Judgement(reply.strip(), "wrong_answer", True)
    held = any(_contains(said, name, language) for name in right)
    slip = (
        not said
        or "\n" in reply.strip()
        or _bare_label(reply)
        or len(graphemes(said)) > max(vocabulary.longest_name.get(language, 0), _NAME.get(language, 20)) + 2
        or _sentence(said, language)
        or held
    )
    if slip and not any(fold(reply, code) in known for code, known in vocabulary.names.items()):
        return Judgement(None, "wrong_format", spoken, {"held": float(held)})
    return Judgement(reply.strip(), "wrong_answer", spoken)


_NAME = {"zh": 8}
"""Graphemes that a name may have in any case, however short those of the questions are; 20 elsewhere."""


def _sentence(said: str, language: str) -> bool:
    """Whether a folded reply has two words that names do without."""
    return sum(word in _common_words().get(language, ()) for word in said.split()) >= 2


def _bare_label(reply: str) -> bool:
    """Whether the reply is no more than an option letter or a number."""
    text = fold(reply)
    letters = {letter.casefold() for language in LANGUAGES.values() for letter in language.option_letters}
    return text in letters or to_ascii_digits(text).isdigit()


def _contains(text: str, part: str, language: str) -> bool:
    """Whether folded `part` occurs in folded `text`, as whole words where the language has spaces."""
    if not part:
        return False
    return part in text if language in SPACELESS else f" {part} " in f" {text} "


def _without(text: str, part: str, language: str) -> str:
    """Folded `text` with a break in place of `part`, found as in `_contains`."""
    if language in SPACELESS:
        return text.replace(part, "|")
    return f" {text} ".replace(f" {part} ", " | ").strip()


# --- which part of a reply is its answer


@cache
def _announcing() -> re.Pattern[str]:
    words = sorted({word for words in ANSWER.values() for word in words.split()}, key=len, reverse=True)
    return re.compile("|".join(re.escape(word.replace("_", " ")) for word in words), re.IGNORECASE)


def _announced(reply: str) -> str:
    """What follows the last words that announce an answer, without the "is" between; "" where none do."""
    found = list(_announcing().finditer(unicodedata.normalize("NFC", reply)))
    if not found:
        return ""
    rest = unicodedata.normalize("NFC", reply)[found[-1].end() :]
    while (word := re.match(r"[\s\W_]*([^\W_]+)", rest)) and word[1].casefold() in IS:
        rest = rest[word.end() :]
    return rest.strip(" \t\n:：=*_-–—၊។。")


# --- denials


@cache
def _denials(side: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Folded words that deny what follows (or precedes) them: of languages with spaces, and without."""
    table = DENIED_BEFORE if side == "before" else DENIED_AFTER
    spaced = {fold(word.replace("_", " ")) for code, words in table.items() if code for word in words.split()}
    return tuple(spaced), tuple(fold(word) for word in table[""].split())


def _denied(before: str, after: str) -> bool:
    """Whether what stands between two folded texts is denied by them: "not the ...", "... is wrong"."""
    spaced, spaceless = _denials("before")
    before = before.rstrip(" |")
    while filler := next((one for one in FILLERS if f" {before}".endswith(f" {one}")), ""):
        before = before[: -len(filler)].rstrip(" |")
    if before.replace(" ", "").endswith(spaceless) or any(f" {before}".endswith(f" {one}") for one in spaced):
        return True
    spaced, spaceless = _denials("after")
    after = after.strip(" |")
    return after.replace(" ", "").startswith(spaceless) or any(
        f"{after} ".startswith(f"{one} ") for one in spaced
    )


def _around(text: str, part: str, language: str) -> list[tuple[str, str]]:
    """What precedes and follows each `part` in a folded `text`, found as in `_contains`."""
    if language not in SPACELESS:
        text, part = f" {text} ", f" {part} "
    pieces = text.split(part)
    return [(part.join(pieces[:i]), part.join(pieces[i:])) for i in range(1, len(pieces))]


# --- multiple choice


def _judge_choice(question: Question, reply: str, vocabulary: Vocabulary) -> Judgement:
    weight = vocabulary.weights.get(question.id)
    measures = {} if weight is None else {"balanced": 0.0}
    spoken = _choice_language(question, reply)
    options = [_key(option, question.language) for option in question.options]
    lines = [line for line in reply.splitlines() if _is_option(question, options, line)]
    for text in (_announced(reply), reply, lines[0] if len(lines) == 1 else ""):
        chosen, whole = _chosen(question, options, text)
        if chosen is not None:
            break
    else:
        named = any(fold(reply, code) in known for code, known in vocabulary.names.items())
        if named:  # something else than what was offered: that is no matter of form
            return Judgement(reply.strip(), "wrong_answer", spoken, measures)
        return Judgement(None, "wrong_format", spoken, measures)
    if whole and not spoken:  # an option as it was offered: a name from elsewhere, perhaps
        spoken = True
    correct = options[chosen] in [_key(answer, question.language) for answer in question.answers]
    if correct and weight is not None:
        measures = {"balanced": weight}
    return Judgement(question.options[chosen], "correct" if correct else "wrong_answer", spoken, measures)


def _chosen(question: Question, options: Sequence[str], text: str) -> tuple[int | None, bool]:
    """The one option that a text points at, if there is one, and whether the text is that option's."""
    said = _key(text, question.language)
    bare = [index for index, letter in enumerate(question.letters[: len(options)]) if fold(letter) == said]
    if len(bare) == 1:
        return bare[0], False
    if said in options:
        return options.index(said), True
    labels, not_labels = _labels(question, text)
    mentions, not_mentions = _mentions(options, said, question.language)
    found = {options[index]: index for index in (labels | mentions) - not_labels - not_mentions}
    return (next(iter(found.values())), False) if len(found) == 1 else (None, False)


def _is_option(question: Question, options: Sequence[str], line: str) -> bool:
    """Whether a line is an option, by letter, text or both, and nothing else."""
    index, _ = _chosen(question, options, line)
    if index is None:
        return False
    rest = _without(_key(line, question.language), options[index], question.language).replace("|", " ")
    return len("".join(rest.split())) <= 1


def _choice_language(question: Question, reply: str) -> bool | None:
    """By script only; option letters and digits that all languages may use say nothing."""
    words = re.sub(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", " ", reply) if len(reply) < 40 else reply
    return _script_ok(words, question.language)


def _labels(question: Question, reply: str) -> tuple[set[int], set[int]]:
    """The options whose letter or number stands alone in the reply, and those of them that it denies."""
    size = len(question.options)
    labels = {letter: index for index, letter in enumerate(question.letters[:size])}
    for alphabet in {language.option_letters for language in LANGUAGES.values()}:
        labels |= {letter: index for index, letter in enumerate(alphabet[:size])}
    text = unicodedata.normalize("NFKC", to_ascii_digits(reply)).strip()
    if re.match(r"[\W_]*[a-z]\s*([).:,\]]|$)", text):  # "b", "(b)", "b. cat"
        text = re.sub(r"[a-z]", lambda found: found.group().upper(), text, count=1)
    if not any(to_ascii_digits(option).strip().isdigit() for option in question.options):
        labels |= {str(index + 1): index for index in range(size)}
    found, denied = set(), set()
    for position, letter in ((at, letter) for at, letter in enumerate(text) if letter in labels):
        before, after = text[:position], text[position + 1 :]
        if _joins(letter, after[:1]):
            continue
        if _joins(letter, before[-1:]) and not before.endswith(LEADS):
            continue
        if letter == "A" and re.match(r" (?!(?:is|was|or|and|because|since)\b)\d?[A-Za-z]", after):
            continue  # the English article
        found.add(labels[letter])
        clause = re.split(r"[.,;:!?\n。，、；：？！។၊။]", before)[-1]
        if _denied(fold(clause), fold(re.split(r"[,;!?\n。，；？！]", after)[0])):
            denied.add(labels[letter])
    return found, denied


def _joins(letter: str, neighbour: str) -> bool:
    """Whether a neighbour makes a letter or digit a part of a word or number: one of its own script does."""
    if neighbour == "" or unicodedata.category(neighbour)[0] not in "LMN":
        return False
    if unicodedata.category(neighbour)[0] == "M" or neighbour.isdecimal():
        return True
    script = script_of(neighbour)
    return script == (script_of(letter) or "Latn")  # "3D" is a word, 第3个 and ข้อ3 are the third


def _mentions(options: Sequence[str], said: str, language: str) -> tuple[set[int], set[int]]:
    """The options whose text occurs in the reply, and those of them that it denies; not a short name inside
    a longer option's name."""
    found, denied = set(), set()
    for option in sorted(set(options), key=len, reverse=True):
        if _contains(said, option, language):
            where = {index for index, other in enumerate(options) if other == option}
            found |= where
            if all(_denied(*around) for around in _around(said, option, language)):
                denied |= where
            said = _without(said, option, language)
    return found, denied


# --- yes or no


@cache
def _polar_words(language: str) -> list[tuple[str, bool]]:
    """(folded word, is it yes), the longest first."""
    words = [(fold(word, language), True) for word in YES[language].split()]
    words += [(fold(word, language), False) for word in NO[language].split()]
    return sorted(words, key=lambda pair: -len(pair[0]))


def _judge_yesno(question: Question, reply: str) -> Judgement:
    language = question.language
    if fold(reply, language) in [fold(answer, language) for answer in question.answers]:
        return Judgement("yes" if _is_yes(question) else "no", "correct", _script_ok(reply, language))
    others = [code for code in LANGUAGES if code != language]
    for text, code in [(text, code) for text in (_announced(reply), reply) for code in (language, *others)]:
        votes = _polarities(text, code)
        if votes:
            spoken = code == language
            if len(votes) > 1:
                return Judgement(None, "wrong_format", spoken)
            said = votes.pop()
            right = _is_yes(question)
            return Judgement("yes" if said else "no", "correct" if said == right else "wrong_answer", spoken)
    return Judgement(None, "wrong_format", _script_ok(reply, language))


def _is_yes(question: Question) -> bool | None:
    """The right answer, which may be given as yes/no in its language or in English, or as true/false."""
    for code in (question.language, "en"):
        votes = _polarities(question.answers[0], code)
        if len(votes) == 1:
            return votes.pop()
    return None


def _polarities(reply: str, language: str) -> set[bool]:
    """What the clauses that open with a yes or a no say. {True, False} is a reply that says both."""
    votes: set[bool] = set()
    for clause in _clauses(reply):
        for piece in clause.split() if language in SPACELESS else [clause]:
            votes |= _clause(fold(piece, language), language)
    return votes


def _clauses(text: str) -> list[str]:
    """`text` cut at line ends and at the punctuation of any script."""
    return "".join("\n" if unicodedata.category(letter)[0] == "P" else letter for letter in text).split("\n")


def _clause(clause: str, language: str) -> set[bool]:
    """The polarity of a clause that opens with a yes or a no; both, if it offers both."""
    words = _polar_words(language)
    votes: set[bool] = set()
    rest = clause
    for word, polarity in words:
        if rest.startswith(word) if language in SPACELESS else f"{rest} ".startswith(f"{word} "):
            votes.add(polarity)
            rest = rest[len(word) :]
            break
    else:
        return votes
    for word, polarity in words:  # "yes or no", "ใช่หรือไม่"
        if len(word) > 1 and _contains(rest, word, language):
            votes.add(polarity)
            rest = _without(rest, word, language)
    return votes


# --- counting


@cache
def _number_words(language: str) -> dict[str, int]:
    groups = NUMBER_WORDS[language].split()
    return {fold(word, language): value for value, group in enumerate(groups) for word in group.split("/")}


def _judge_count(question: Question, reply: str) -> Judgement:
    numbers, spoken = _numbers(reply, question.language)
    if len(numbers) != 1:
        numbers, _ = _numbers(_announced(reply), question.language)
    if len(numbers) != 1:
        return Judgement(None, "wrong_format", spoken)
    right, _ = _numbers(question.answers[0], question.language)
    verdict = "correct" if numbers == right else "wrong_answer"
    return Judgement(numbers.pop(), verdict, spoken)


def _numbers(text: str, language: str) -> tuple[set[str], bool | None]:
    """The different numbers in `text`, in ASCII digits, and whether they are in `language` (None: ASCII
    digits alone)."""
    plain = _COMMA.sub(".", _THOUSANDS.sub("", unicodedata.normalize("NFKC", text)))
    digits = re.findall(r"\d+(?:\.\d+)?", plain)
    if digits:
        native = [digit for digit in "".join(digits) if not digit.isascii()]
        if native:
            spoken: bool | None = all(digit in LANGUAGES[language].digits for digit in native)
        else:
            spoken = _script_ok(text, language)
        return {re.sub(r"\.0+$", "", to_ascii_digits(one)).lstrip("0") or "0" for one in digits}, spoken
    for code in (language, *(other for other in LANGUAGES if other != language)):
        numbers = _spelt(fold(text, code), code)
        if numbers:
            return {str(number) for number in numbers}, code == language
    return set(), _script_ok(text, language)


def _spelt(folded: str, language: str) -> set[int]:
    """The numbers written as words; the longest words are taken first (Khmer six is "five one")."""
    found = set()
    for word in sorted(_number_words(language), key=len, reverse=True):
        if _contains(folded, word, language):
            found.add(_number_words(language)[word])
            folded = _without(folded, word, language)
    return found
