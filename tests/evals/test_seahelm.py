"""SEA-HELM's text tasks, in files of its layout: rows as the hub's data sets and its repository have them,
and config.yaml files of the same keys with prompts of our own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from seavlm.errors import SeavlmError
from seavlm.evals import suites
from seavlm.evals.formats import _rule
from seavlm.evals.metrics import Vocabulary, judge
from seavlm.evals.run import score
from seavlm.evals.tasks import Question, Reply


def words(
    code: str, tag: str, task: str, preamble: str = 'Jawab begini: "{answer_tag} ..."'
) -> dict[str, Any]:
    template = {"preamble": preamble, "task_template": task, "answer_template": "x", "answer_tag": tag}
    return {code: {"filepath": "", "max_tokens": 32, "prompt_template": template}}


def row(label: Any, *, code: str = "id", number: int | None = None, **fields: Any) -> dict[str, Any]:
    found = {"label": label, "prompts": [fields], "metadata": {"language": code}}
    return found if number is None else {"id": number, **found}


# Task of SEA-HELM -> what its config.yaml says of the languages.
PROMPTS: dict[str, dict[str, Any]] = {
    "sentiment": words("id", "Jawaban:", "Kalimat:\n{text}") | words("th", "คำตอบ:", "ประโยค:\n{text}"),
    "nli": words("id", "Jawaban:", "1: {sentence1}\n2: {sentence2}"),
    "causal": words("id", "Jawaban:", "{premise} {question_translated}?\nA: {choice1}\nB: {choice2}"),
    "paraphrase": words("my", "အဖြေ-", "{sentence1}\n{sentence2}"),
    "global_mmlu_lite": words("my", "အဖြေ-", "{question}\nက- {option_a}\nခ- {option_b}"),
    "pragmatic-single": words("id", "Jawaban:", "{text}: {question_translated}? {choices_translated}"),
    "idiom_understanding": words("zh", "答案：", "{text}"),
    "mp-r": words("id", "Jawaban:", "{sentence_pair}"),
    "qa": words("id", "Jawaban:", "{text}\n{question}"),
    "abssum": words("id", "Rangkuman:", "{text}"),
    "translation-en-xx": words("id", "Terjemahan:", "{text}"),
    "translation-xx-en": words("id", "Terjemahan:", "{text}"),
    "if-eval": words("id", "", "{text}", "") | words("th", "", "{text}", ""),
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "NLU-Sentiment-Analysis/id/eval-00000-of-00001.parquet": [
        row("Positif", number=0, text="Bagus!"),
        row("Positif", number=1, text="Enak!"),
        row("Positif", number=2, text="Hebat!"),
        row("Negatif", number=3, text="Jelek {x}."),
    ],
    "NLU-Sentiment-Analysis/id/examples-00000-of-00001.parquet": [row("Netral", number=0, text="Contoh")],
    "NLU-Sentiment-Analysis/th/eval-00000-of-00001.parquet": [
        {"label": label, "prompts": [{"text": "อร่อย"}], "metadata": {"language": None}}
        for label in ("แง่บวก", "แง่ลบ")  # no id, and no language but the folder's
    ],
    "NLR-NLI/id/eval-0.parquet": [row(label, sentence1="Satu.", sentence2="Dua.") for label in "ABC"],
    "NLR-Causal-Reasoning/id/eval-0.parquet": [
        row("B", premise="Basah.", choice1="Hujan.", choice2="Panas.", question_translated="sebab")
    ],
    "NLU-Belebele-MCQA/km/eval-0.parquet": [
        row(
            3,
            code="km",
            number=0,
            text="អត្ថបទ",
            question="អ្វី?",
            choice1="ក១",
            choice2="ខ២",
            choice3="គ៣",
            choice4="ឃ៤",
        ),
    ],
    "seahelm_tasks/nlu/paraphrase_identification/data/my_myparaphrase.jsonl": [
        {"id": f"p{label}", **row(label, code="my", sentence1="တစ်", sentence2="နှစ်")} for label in "ကခ"
    ],
    "seahelm_tasks/nlu/paraphrase_identification/data/my_myparaphrase_examples.jsonl": [
        {"id": "p9", **row("က", code="my", sentence1="တစ်", sentence2="နှစ်")}
    ],
    "seahelm_tasks/knowledge/global_mmlu_lite/global_mmlu_lite_my_test.jsonl": [
        row("ခ", code="my", number=0, question="ဘာလဲ", option_a="တစ်", option_b="နှစ်", subject="astronomy")
    ],
    "seahelm_tasks/nlu/idiom/data/ChID_test_data_SEAHELM.jsonl": [
        row("G", code="zh", number=0, text="#idiom#", **{f"choice_{one}": f"成语{one}" for one in "abcdefg"})
    ],
    "Linguistic-Diagnostics-Pragmatics/id_single/eval-0.parquet": [
        row(label, number=i, text="X pintar", question_translated="apa", choices_translated=offered)
        for i, (label, offered) in enumerate([("Benar", "Benar atau Salah"), ("Ya", "Ya atau Tidak")] * 2)
    ]
    + [
        row(label, number=9, text="X", question_translated="apa", choices_translated=offered)
        for label, offered in (("Salah", "Benar atau Salah"), ("Tidak", "Ya atau Tidak"))
    ],
    "Linguistic-Diagnostics-Syntax/id/eval-0.parquet": [
        row(label, number=0, sentence_pair="A: Tono tahu\nB: Tono tidak tahu")
        for label in "AB"  # one id
    ],
    "NLU-Question-Answering/id/eval-0.parquet": [
        row(["masa Neolitikum", "zaman batu"], number=0, text="Kapal ...", question="Kapan?")
    ],
    "NLG-Abstractive-Summarization/id/eval-0.parquet": [
        row("Pemerintah menahan kepala kelompok itu.", number=0, text="Panjang ...")
    ],
    "NLG-Machine-Translation/en_to_id/eval-0.parquet": [row("Ada kucing di atas meja.", text="A cat ...")],
    "NLG-Machine-Translation/id_to_en/eval-0.parquet": [
        row("There is a cat on the table.", text="Ada kucing di atas meja.")
    ],
}
RULES: list[tuple[str, dict[str, Any], str, str]] = [  # rule, figures, what keeps to it, what does not
    ("length_constraints:number_words", {"relation": "at least", "num_words": 3},
     "ini adalah satu", "ini satu"),
    ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 3},
     "Satu.***Dua.***", "Satu.***Dua.***Tiga."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "Satu\n***\nDua", "Satu\n\nDua"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S."},
     "Itu.\np.p. s. juga", "Itu.\nP.S. juga"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[nama] di [kota]", "[nama] di []"),
    ("detectable_format:title", {}, "<<Judul>>\nisi", "<< >>\nisi"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* satu\n- **dua**", "* satu\n*dua"),
    ("detectable_format:multiple_sections", {"section_title": "Bagian", "num_sections": 2},
     "Bagian 1\nx\nBagian B\ny", "Bagian 1\nx"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2},
     "*satu* dan **dua**", "**satu**"),
    ("detectable_format:json_format", {}, '```JSON\n{"a": 1}\n```', 'Ini: {"a": 1}'),
    ("detectable_format:constrained_response", {"phrases": ["Ya.", "Tidak."]}, "Kata saya: Ya.", "ya"),
    ("startend:first_word", {"first_word": "Ringkasan"}, "ringkasan: itu", "Ini ringkasan"),
    ("startend:end_checker", {"end_phrase": "Terima kasih."}, "Itu. terima kasih.", "Terima kasih. Itu"),
    ("startend:quotation", {}, '"Itu."', '"Itu.'),
    ("keywords:existence", {"keywords": ["gajah", "sungai"]}, "Gajah di sungai", "gajah di sungainya"),
    ("keywords:forbidden_words", {"forbidden_words": ["gas"]}, "tegas", "Gas itu"),
    ("keywords:frequency", {"relation": "exactly", "keyword": "pagi", "frequency": 2}, "Pagi-pagi", "pagi"),
    ("keywords:number_frequency", {"relation": "at least", "number": "3", "frequency": 2}, "33", "3 tiga"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Apa itu?"}, "apa itu? Kucing.", "Apa itu?"),
    ("combination:two_responses", {}, "satu ****** dua", "satu ****** ..."),
]  # fmt: skip
KWARGS = ("relation", "num_words", "response_language", "num_bullets")


def put(folder: Path) -> Path:
    """Data sets and a checkout side by side, as the suite's file asks for them."""
    folder = folder / "sea"
    rows = {
        "metadata": {"language": "id", "category": "x", "subcategory": "x"},
        "prompts": [{"text": 'Jawab: "Ya.", "Tidak."'}],
    }
    asked = [
        {"id": i, **rows, "metadata": {**rows["metadata"], "subcategory": rule}, "kwargs": [
            {**dict.fromkeys(KWARGS), **{key: one for key, one in given.items() if key != "phrases"}}]}
        for i, (rule, given, _, _) in enumerate(RULES)
    ]  # fmt: skip
    asked.append(
        {**asked[0], "id": 90, "metadata": {"language": "th", "category": "x", "subcategory": RULES[0][0]}}
    )
    language = {"category": "language", "language": "id", "subcategory": "language:response_language"}
    asked.append({**asked[0], "id": 91, "metadata": language, "kwargs": [{"response_language": "th"}]})
    write = {**ROWS, "Instruction-Following-IFEval/id_sea_ifeval.jsonl": asked}
    for name, each in write.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(one) + "\n" for one in each), encoding="utf-8")
        else:
            pq.write_table(pa.Table.from_pylist(each), path)
    for task, languages in PROMPTS.items():
        path = folder / "seahelm_tasks" / task / "config.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        other = {f"{task}-logprobs": {"languages": f"${{{task}.languages}}"}}
        path.write_text(yaml.safe_dump({task: {"languages": languages}, **other}, allow_unicode=True))
    return folder


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Question]]:
    folder = put(tmp_path_factory.mktemp("seahelm"))
    found: dict[tuple[str, str], list[Question]] = {}
    for question in suites.ask("seahelm", data=folder).questions:
        found.setdefault((question.task, question.language), []).append(question)
    return found


def test_every_task_is_read_and_no_example(asked: dict[tuple[str, str], list[Question]]) -> None:
    counts = {key: len(questions) for key, questions in asked.items()}
    assert counts == {
        ("sentiment", "id"): 4,
        ("sentiment", "th"): 2,
        ("nli", "id"): 3,
        ("causal", "id"): 1,
        ("belebele", "km"): 1,
        ("paraphrase", "my"): 2,
        ("mmlu-lite", "my"): 1,
        ("idiom", "zh"): 1,
        ("pragmatics", "id"): 6,
        ("syntax", "id"): 2,
        ("qa", "id"): 1,
        ("abssum", "id"): 1,
        ("from-english", "id"): 1,
        ("to-english", "id"): 1,
    }
    questions = [question for each in asked.values() for question in each]
    vocabulary = Vocabulary.of(questions)
    for question in questions:
        right = judge(question, question.answers[0], vocabulary)
        assert right.score == 1 and right.language_ok is not False, question
        assert judge(question, "", vocabulary).verdict == "wrong_format"


def test_what_is_asked_is_what_seahelm_asks(asked: dict[tuple[str, str], list[Question]]) -> None:
    one = asked["sentiment", "id"][3]
    assert one.prompt == 'Jawab begini: "Jawaban: ..."\n\nKalimat:\nJelek {x}.'
    assert one.options == ("Negatif", "Positif") and one.chance == 0.5, "the labels that occur"
    assert [q.answers[0] for q in asked["nli", "id"]] == ["A", "B", "C"]
    assert asked["nli", "id"][0].chance == pytest.approx(1 / 3)
    causal, belebele = asked["causal", "id"][0], asked["belebele", "km"][0]
    assert causal.answers == ("Panas.",) and causal.letters == ("A", "B")
    assert "A: Hujan.\nB: Panas." in causal.prompt
    assert belebele.prompt == "អត្ថបទ\n\nអ្វី?\nក. ក១\nខ. ខ២\nគ. គ៣\nឃ. ឃ៤", "no prompt for it: its own fields"
    assert asked["mmlu-lite", "my"][0].letters == ("က", "ခ") and asked["mmlu-lite", "my"][0].answers == (
        "နှစ်",
    )
    idiom = asked["idiom", "zh"][0]
    assert idiom.letters == tuple("ABCDEFG") and idiom.answers == ("成语g",) and idiom.chance == 1 / 7
    pragmatics = asked["pragmatics", "id"]
    assert pragmatics[0].options == ("Benar", "Salah") and pragmatics[1].options == ("Tidak", "Ya")
    assert {q.chance for q in pragmatics} == {0.5}
    vocabulary = Vocabulary.of([q for each in asked.values() for q in each])
    assert judge(causal, "Jawaban: B", vocabulary).verdict == "correct"
    assert judge(causal, "**Jawaban:** A", vocabulary).verdict == "wrong_answer"
    assert judge(one, "Jawaban: negatif", vocabulary).verdict == "correct"
    assert judge(asked["mmlu-lite", "my"][0], "အဖြေ- ခ", vocabulary).verdict == "correct"


def test_texts_are_graded_by_the_measure_of_their_task(asked: dict[tuple[str, str], list[Question]]) -> None:
    vocabulary = Vocabulary.of([q for each in asked.values() for q in each])
    qa = judge(asked["qa", "id"][0], "Jawaban: pada zaman batu", vocabulary)
    assert qa.verdict == "graded" and qa.score == pytest.approx(2 * 2 / (2 + 3)) and qa.measures["exact"] == 0
    assert judge(asked["qa", "id"][0], "Jawaban: Zaman batu.", vocabulary).score == 1
    summary = judge(asked["abssum", "id"][0], "Rangkuman: Pemerintah menahan dia.", vocabulary)
    assert summary.score == summary.measures["rouge_l"] == pytest.approx(2 * 2 / (5 + 3))
    there, back = asked["from-english", "id"][0], asked["to-english", "id"][0]
    said = judge(there, "Terjemahan: Ada kucing di meja.", vocabulary)
    assert said.score == said.measures["chrf++"] == pytest.approx(0.6693, abs=1e-4), "sacreBLEU's"
    assert judge(back, "Terjemahan: There is a cat on a table.", vocabulary).language_ok is True
    assert judge(back, "Ada kucing di atas meja dan itu adalah kucing.", vocabulary).language_ok is False


def test_balanced_accuracy_is_beside_the_score(asked: dict[tuple[str, str], list[Question]]) -> None:
    """Three of four are positive: who always says so is right in 75 %, and at chance when balanced."""
    questions = asked["sentiment", "id"]
    cell = score(questions, ["Positif"] * 4).cells[0]
    assert cell.accuracy == 0.75 and cell.measures["balanced"] == pytest.approx(0.5)
    cell = score(questions, ["Positif", "Positif", "Negatif", "Negatif"]).cells[0]
    assert cell.measures["balanced"] == pytest.approx((2 / 3 + 1) / 2)
    assert score(questions, ["?"] * 4).cells[0].measures["balanced"] == 0


def test_without_a_checkout_only_rows_with_options_are_asked(tmp_path: Path) -> None:
    folder = put(tmp_path)
    for path in folder.rglob("config.yaml"):
        path.unlink()
    found = suites.ask("seahelm", data=folder)
    assert {question.task for question in found.questions} == {"causal", "belebele", "mmlu-lite", "idiom"}
    assert any("checkout of SEA-HELM" in reason for reason in found.skipped)
    (folder / "NLR-NLI" / "id" / "eval-0.parquet").unlink()
    (folder / "NLR-NLI" / "id" / "eval-0.jsonl").write_text('{"sentence": "x"}\n')
    with pytest.raises(SeavlmError, match="it has no column prompts"):
        suites.ask("seahelm", data=folder)


@pytest.mark.parametrize("name", ["seahelm", "sea-ifeval"])
def test_what_is_asked_changes_with_the_version_only(
    name: str, tmp_path: Path, same_as_before: Callable[[str, Path | None], None]
) -> None:
    same_as_before(name, put(tmp_path))


@pytest.mark.parametrize(("rule", "given", "good", "bad"), RULES, ids=[rule for rule, *_ in RULES])
def test_rules(rule: str, given: dict[str, Any], good: str, bad: str) -> None:
    assert _rule(good, rule, "id", **given) and not _rule(bad, rule, "id", **given)


def test_instructions_are_followed_in_the_right_language(tmp_path: Path) -> None:
    found = suites.ask("sea-ifeval", data=put(tmp_path))
    assert found.suite.max_new_tokens == 4096
    assert found.skipped == {"it counts words where none are spaced": 1}
    assert len(found.questions) == len(RULES) + 1
    vocabulary = Vocabulary.of(found.questions)
    by_rule = {json.loads(q.checks).get("rule", {"name": "language"})["name"]: q for q in found.questions}
    phrase = by_rule["detectable_format:constrained_response"]
    assert json.loads(phrase.checks)["rule"]["phrases"] == ["Ya.", "Tidak."], "as the prompt quotes them"
    words = by_rule["length_constraints:number_words"]
    assert judge(words, "ini adalah satu", vocabulary).verdict == "correct"
    assert judge(words, "ini satu", vocabulary).verdict == "wrong_format"
    assert judge(words, "หนึ่ง สอง สาม", vocabulary).verdict == "wrong_format", "in another language"
    assert judge(by_rule["language"], "สวัสดีครับ", vocabulary).verdict == "correct"
    assert judge(by_rule["language"], "Selamat pagi", vocabulary).verdict == "wrong_format"
    assert judge(words, Reply("", error="x"), vocabulary).verdict == "no_reply"
    with pytest.raises(ValueError, match="unknown rule"):
        _rule("x", "keywords:colour", "id")
