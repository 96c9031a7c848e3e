"""A whole evaluation, with planted answerers whose faults are known."""

import hashlib
import io
import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from seavlm.errors import SeavlmError
from seavlm.evals.metrics import Vocabulary, judge
from seavlm.evals.run import evaluate, rescore
from seavlm.evals.scores import compare, comparison, score
from seavlm.evals.show import markdown, table
from seavlm.evals.tasks import Pictures, Question, fingerprint, load_questions, question_of, with_chance
from seavlm.text.language import LANGUAGES, to_native_digits

CODES = list(LANGUAGES)
NAMES = {  # CLDR's names of 🏠 ☀ 🐟 🌳, in the order of LANGUAGES
    "house": [
        "အိမ်",
        "house",
        "rumah",
        "ផ្ទះ",
        "ອາຄານເຮືອນ",
        "rumah",
        "房子",
        "bahay",
        "வீடு",
        "บ้านเดี่ยว",
        "ngôi nhà",
    ],
    "sun": [
        "နေ",
        "sun",
        "matahari",
        "ព្រះអាទិត្យ",
        "ຕາເວັນ",
        "matahari",
        "太阳",
        "araw",
        "சூரியன்",
        "พระอาทิตย์",
        "mặt trời",
    ],
    "fish": ["ငါး", "fish", "ikan", "ត្រី", "ປາ", "ikan", "鱼", "isda", "மீன்", "ปลา", "cá"],
    "tree": ["သစ်ပင်", "tree", "pohon", "ដើមឈើ", "ຕົ້ນໄມ້", "pokok", "树", "puno", "மரம்", "ต้นไม้", "cái cây"],
}
WHAT = [
    "ဒါဘာလဲ",
    "What is this?",
    "Apa ini?",
    "នេះជាអ្វី?",
    "ນີ້ແມ່ນຫຍັງ?",
    "Apakah ini?",
    "这是什么?",
    "Ano ito?",
    "இது என்ன?",
    "นี่คืออะไร",
    "Đây là gì?",
]


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 40, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def rows() -> list[dict]:
    """Rows as the data stage writes them: the model's reply is the last message, letters for options."""
    made = []
    for position, code in enumerate(CODES):
        for shade, (concept, names) in enumerate(NAMES.items()):
            letters = LANGUAGES[code].option_letters
            options = [name[position] for name in NAMES.values()]
            listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
            asked = {
                "name": (WHAT[position], names[position], {}),
                "choose": (
                    f"{WHAT[position]}\n{listed}",
                    letters[shade],
                    {"options": options, "letters": list(letters), "bare": WHAT[position]},
                ),
            }
            for task, (prompt, answer, more) in asked.items():
                made.append(
                    {
                        "id": f"{task}-{code}-{concept}",
                        "task": task,
                        "language": code,
                        "messages": [
                            {
                                "role": "user",
                                "content": [{"type": "image", "text": ""}, {"type": "text", "text": prompt}],
                            },
                            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                        ],
                        "images": [{"bytes": png(shade), "path": f"{concept}.png"}],
                        "meta": json.dumps({"concept": concept, "family": "plain", "answer": answer, **more}),
                    }
                )
    return made


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    import pyarrow as pa

    path = tmp_path / "eval.parquet"
    pq.write_table(pa.Table.from_pylist(rows()), path)
    return load_questions(path)


class Planted:
    """Knows every picture and, of each question, which fault to make."""

    def __init__(self, questions: list[Question], reply) -> None:
        self.by_content = {self.key(question.conversation()): question for question in questions}
        self.reply = reply
        self.batches: list[int] = []

    @staticmethod
    def key(messages: list[dict]) -> tuple:
        image, text = messages[-1]["content"]
        assert image["type"] == "image" and isinstance(image["image"], bytes)
        return image["image"], text["text"]

    def __call__(self, batch: list[list[dict]]) -> list[str]:
        self.batches.append(len(batch))
        return [self.reply(self.by_content[self.key(messages)]) for messages in batch]


def right(question: Question) -> str:
    return question.answers[0]


def test_the_questions_are_what_the_rows_say(questions: list[Question]) -> None:
    assert len(questions) == 88
    first = questions[1]
    assert first.task == "choose" and first.answers == ("အိမ်",) and first.chance == 0.25
    assert [message["role"] for message in first.messages] == ["user"]  # the reply is not given away
    assert questions[0].chance == 0.25  # one of four concepts
    assert first.image_sha256 == questions[0].image_sha256 and first.image_sha256 != questions[2].image_sha256


def test_a_perfect_model(questions: list[Question], tmp_path: Path) -> None:
    results = evaluate(Planted(questions, right), questions, tmp_path / "out", name="perfect", progress=False)
    assert {cell.accuracy for cell in results.cells} == {1.0} and len(results.cells) == 22
    assert {cell.language_ok for cell in results.cells} == {1.0}
    assert results.suites["all"].normalised == 1.0 and results.suites["global"].n == 16
    assert all(cell.low < 0.75 for cell in results.cells)  # four questions prove little
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".lock",
        "pictures.parquet",
        "questions.parquet",
        "results.json",
        "table.md",
    ]
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved == json.loads(json.dumps(results.to_dict())) and saved["languages"]["lo"]["accuracy"] == 1.0


def test_options_are_ranked_beside_the_free_reply_and_counted_once(
    questions: list[Question], tmp_path: Path
) -> None:
    """A model that names the thing in the wrong words, but finds it among the options."""
    vague = Planted(questions, lambda q: "something" if q.task == "choose" else q.answers[0])
    by_prompt = {Planted.key(q.conversation()): q for q in questions}
    asked: list[tuple[str, ...]] = []

    def rank(batch: list, options: list[tuple[str, ...]]) -> list[str]:
        asked.extend(options)
        assert all(messages[-1]["content"][1]["text"] in WHAT for messages in batch)  # no option in sight
        return [by_prompt[Planted.key(messages)].answers[0] for messages in batch]

    results = evaluate(vague, questions, tmp_path, ranker=rank, batch_size=7, progress=False)
    assert len(asked) == 44 and sum(vague.batches) == 88
    tasks = {task: cell.accuracy for task, cell in results.tasks.items()}
    assert tasks == {"name": 1.0, "choose": 0.0, "ranked": 1.0}
    assert results.tasks["ranked"].chance == 0.25 and results.tasks["ranked"].n == 44
    assert {cell.accuracy for cell in results.languages.values()} == {0.5}  # name and choose alone
    assert {cell.n for cell in results.languages.values()} == {8} and results.suites["all"].accuracy == 0.5
    assert "| language | name | choose | ranked | mean |" in markdown(results)
    again = rescore(tmp_path)
    assert again.cells == results.cells and again.suites == results.suites
    assert compare(results, again)["all"].mean == 0.0


def test_a_model_that_slips_in_format_is_told_from_one_that_does_not_know(questions: list[Question]) -> None:
    chatty = Planted(
        questions, lambda q: f"Well, {q.answers[0]} - {q.answers[0]}? It is {q.options or q.answers}"
    )
    slips = evaluate(chatty, questions, progress=False)
    assert slips.suites["all"].accuracy == 0 and slips.suites["all"].wrong_format == 1.0
    assert slips.suites["all"].wrong_answer == 0
    shifted = dict(zip(NAMES, [*list(NAMES)[1:], "house"], strict=True))
    other = Planted(questions, lambda q: NAMES[shifted[q.concept]][CODES.index(q.language)])
    ignorant = evaluate(other, questions, progress=False)
    assert ignorant.suites["all"].wrong_answer == 1.0 and ignorant.suites["all"].wrong_format == 0
    assert markdown(slips).count("] f |") == 22 + 11 + 2 + 3 and "] f |" not in markdown(ignorant)


def test_a_model_that_answers_in_english_is_diagnosed(questions: list[Question]) -> None:
    english = Planted(questions, lambda q: NAMES[q.concept][CODES.index("en")])
    results = evaluate(english, questions, progress=False)
    names = {cell.language: cell for cell in results.cells if cell.task == "name"}
    assert names["en"].accuracy == 1 and names["en"].language_ok == 1
    for code in set(CODES) - {"en"}:
        assert names[code].language_ok == 0 and names[code].wrong_answer == 1, code


def test_replies_can_be_judged_again_without_the_model(questions: list[Question], tmp_path: Path) -> None:
    first = evaluate(Planted(questions, right), questions, tmp_path, name="mine", progress=False)
    again = rescore(tmp_path)
    assert again.cells == first.cells and again.languages == first.languages and again.suites == first.suites
    assert again.name == "mine" and again.suite == first.suite and again.records == first.records


class Dies(Planted):
    """Stopped after three batches."""

    def __call__(self, batch: list[list[dict]]) -> list[str]:
        if len(self.batches) == 3:
            raise KeyboardInterrupt
        return super().__call__(batch)


def test_a_killed_run_goes_on_where_it_stopped(questions: list[Question], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(Dies(questions, right), questions, tmp_path, key="m1", batch_size=10, progress=False)
    with (tmp_path / "replies.jsonl").open("a") as file:
        file.write('[77, "cut o')  # the machine stopped while it wrote
    rest = Planted(questions, right)
    results = evaluate(rest, questions, tmp_path, key="m1", batch_size=10, progress=False)
    assert sum(rest.batches) == 58 and results.suites["all"].accuracy == 1
    assert not (tmp_path / "replies.jsonl").exists()
    rested = Planted(questions, right)
    assert evaluate(rested, questions, tmp_path, key="m1", progress=False).cells == results.cells
    assert rested.batches == []  # finished: nothing is asked twice


def test_a_folder_holds_one_run(questions: list[Question], tmp_path: Path) -> None:
    """Another model, another limit, other questions: what was paid for is not thrown away."""

    class Dies(Planted):
        def __call__(self, batch: list[list[dict]]) -> list[str]:
            if self.batches:
                raise KeyboardInterrupt
            return super().__call__(batch)

    def run(asked: list[Question], key: str, **options) -> int:
        model = Planted(questions, right)
        evaluate(model, asked, tmp_path, key=key, batch_size=10, progress=False, **options)
        return sum(model.batches)

    with pytest.raises(KeyboardInterrupt):
        evaluate(Dies(questions, right), questions, tmp_path, key="m1", batch_size=10, progress=False)
    for key, asked, what in (("m2", questions, "another model"), ("m1", questions[:-1], "other questions")):
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(SeavlmError, match=what):
            run(asked, key)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert run(questions, "m1") == 78
    for key, asked, what in (("m2", questions, "another model"), ("m1", questions[:-1], "other questions")):
        with pytest.raises(SeavlmError, match=what):
            run(asked, key)
    assert run(questions, "m1") == 0
    assert run(questions, "m2", replace=True) == 88  # and does not inherit the replies
    assert run(questions, "m2", replace=True) == 0
    (tmp_path / "questions.parquet").write_bytes(b"PAR1, and then the disk was full")
    with pytest.raises(SeavlmError, match="cannot read"):
        run(questions, "m2")
    assert run(questions, "m2", replace=True) == 88


def test_two_processes_do_not_share_a_folder(questions: list[Question], tmp_path: Path) -> None:
    def inside(batch: list[list[dict]]) -> list[str]:
        with pytest.raises(SeavlmError, match="another run is working"):
            evaluate(Planted(questions, right), questions, tmp_path, key="k", progress=False)
        return ["x"] * len(batch)

    evaluate(inside, questions, tmp_path, key="k", progress=False)


@pytest.mark.parametrize("damage", ['[77, "cut', "\0" * 300 + "\n", "[3]\n"])
def test_a_journal_is_read_as_far_as_it_is_whole(
    questions: list[Question], tmp_path: Path, damage: str
) -> None:
    """Killed within a line, or the machine lost its power: what came before is kept, and asked no more."""

    with pytest.raises(KeyboardInterrupt):
        evaluate(Dies(questions, right), questions, tmp_path, key="m1", batch_size=10, progress=False)
    with (tmp_path / "replies.jsonl").open("a") as file:
        file.write(damage)
    rest = Planted(questions, right)
    results = evaluate(rest, questions, tmp_path, key="m1", batch_size=10, progress=False)
    assert sum(rest.batches) == 58 and results.suites["all"].accuracy == 1


def test_the_seconds_of_all_sittings_count(questions: list[Question], tmp_path: Path) -> None:
    """A run that was finished is not one of no time, which would be a model of endless speed."""

    class Slow(Planted):
        def __call__(self, batch: list[list[dict]]) -> list[str]:
            if len(self.batches) == 2:
                raise KeyboardInterrupt
            time.sleep(0.1)
            return super().__call__(batch)

    with pytest.raises(KeyboardInterrupt):
        evaluate(Slow(questions, right), questions, tmp_path, key="k", batch_size=10, progress=False)
    ended = evaluate(Planted(questions, right), questions, tmp_path, key="k", progress=False)
    assert 0.2 <= ended.seconds < 5
    again = evaluate(Planted(questions, right), questions, tmp_path, key="k", progress=False)
    assert again.seconds == ended.seconds == rescore(tmp_path).seconds


def test_what_stands_before_the_question_is_part_of_it(tmp_path: Path) -> None:
    """Another system text is another question: its replies are not reused, nor paired."""

    def asked(system: str) -> list[Question]:
        row = rows()[0]
        row["messages"] = [{"role": "system", "content": system}, *row["messages"]]
        return [question_of(row)]

    one, other = asked("Be short."), asked("Answer in verse.")
    assert fingerprint(one) != fingerprint(other)
    results = evaluate(lambda batch: ["x"] * len(batch), one, tmp_path, progress=False)
    assert json.loads(results.records[0]["context"]) == [["system", "Be short."]]
    assert rescore(tmp_path).suite == results.suite
    with pytest.raises(SeavlmError, match="no question in common"):
        comparison(results, score(other, ["x"]))


def test_a_question_that_no_reply_is_right_about_is_refused_at_once() -> None:
    base = {"language": "th", "concept": "c", "prompt": "?"}
    for question, why in (
        (Question("a", "choose", answers=("หมู",), options=("แมว", "หมา"), **base), "none of its options"),
        (Question("b", "yesno", answers=("อาจจะ",), **base), "neither yes nor no"),
        (Question("c", "count", answers=("หลาย",), **base), "not one number"),
    ):
        with pytest.raises(SeavlmError, match=why):
            evaluate(lambda batch: pytest.fail("asked"), [question], progress=False)


def test_pictures_are_read_when_they_are_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set's pictures are not all in memory: 400 of 100 kB, of which a batch is at a time."""
    import pyarrow as pa

    rng = np.random.default_rng(0)
    row = rows()[0]
    path = tmp_path / "eval.parquet"
    with pq.ParquetWriter(path, pa.Table.from_pylist([row]).schema) as writer:
        for start in range(0, 400, 50):
            many = [
                {**row, "id": f"{i}", "images": [{"bytes": rng.bytes(100_000), "path": ""}]}
                for i in range(start, start + 50)
            ]
            writer.write_table(pa.Table.from_pylist(many))
    seen: list[str] = []

    def look(batch: list[list[dict]]) -> list[str]:
        seen.extend(hashlib.sha256(messages[-1]["content"][0]["image"]).hexdigest() for messages in batch)
        return [""] * len(batch)

    monkeypatch.setattr(Pictures, "memory", 1 << 20)
    tracemalloc.start()
    asked = load_questions(path)
    evaluate(look, asked, batch_size=8, progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [question.image_sha256[0] for question in asked] == seen and len(set(seen)) == 400
    assert peak < 25e6  # of 40 MB


def test_two_models_compared_in_pairs(questions: list[Question]) -> None:
    good = score(questions, [right(q) for q in questions], name="good")
    bad = score(questions, [right(q) if q.concept == "sun" or q.language == "en" else "" for q in questions])
    differences = compare(good, bad)
    assert differences["en"].mean == 0 and differences["th"].mean == 0.75
    assert differences["all"].mean == pytest.approx(0.75 * 10 / 11)
    with pytest.raises(SeavlmError, match="same questions"):
        compare(good, score(questions[:-1], [""] * 87))


def test_the_table_has_a_row_a_language_and_marks_what_is_below_chance(questions: list[Question]) -> None:
    results = score(questions * 4, ["?"] * len(questions) * 4)
    text = io.StringIO()
    Console(file=text, width=100).print(table(results))
    assert all(language.english_name in text.getvalue() for language in LANGUAGES.values())
    assert (
        "0.0 [0-53] f" in markdown(results) and "0 ±53f" in text.getvalue() and "regional" in text.getvalue()
    )
    many = [
        Question(f"{i}", "choose", "th", f"c{i}", "", ("ก",), ("ก", "x", "y", "z"), tuple("กขคง"))
        for i in range(60)
    ]
    assert score(many, ["no idea"] * 60).cells[0].below_chance


def test_bad_rows_and_bad_answerers(tmp_path: Path, questions: list[Question]) -> None:
    import pyarrow as pa

    def load(**changes) -> list[Question]:
        path = tmp_path / "bad.parquet"
        pq.write_table(pa.Table.from_pylist([{**rows()[0], **changes}]), path)
        return load_questions(path)

    with pytest.raises(SeavlmError, match="unknown language 'jp'"):
        load(language="jp")
    with pytest.raises(SeavlmError, match="1 image parts for 0 images"):
        load(images=[])
    with pytest.raises(SeavlmError, match="no answer"):
        load(meta="{}")
    with pytest.raises(SeavlmError, match="not JSON"):
        load(meta="{")
    with pytest.raises(SeavlmError, match="cannot read"):
        load_questions(tmp_path / "none.parquet")
    with pytest.raises(SeavlmError, match="gave 1 replies to 64"):
        evaluate(lambda batch: ["x"], questions, progress=False)


def test_a_limit_keeps_the_same_concepts_in_every_language(tmp_path: Path, questions: list[Question]) -> None:
    kept = load_questions(tmp_path / "eval.parquet", limit=2, seed=1, languages=["th", "vi"], tasks=["name"])
    assert len(kept) == 4 and {q.chance for q in kept} == {0.25}  # a guesser does not know the limit
    assert {q.concept for q in kept if q.language == "th"} == {q.concept for q in kept if q.language == "vi"}


def test_every_accepted_answer_to_the_shipped_questions_is_read_as_right() -> None:
    """Real names in eleven languages are full of traps: shared words, one-letter names, native digits."""
    from seavlm.data.pictures import load_pictures
    from seavlm.data.tasks import TASKS, make_samples

    drawn = make_samples(
        load_pictures(),
        split="eval",
        tasks=dict.fromkeys(TASKS, 1.0),
        languages=CODES,
        families=["fluent-3d"],
        concepts=None,
        n=660,
        seed=0,
    )
    pairs = [(question_of(row), json.loads(row["meta"])) for row in drawn]
    vocabulary = Vocabulary.of(question for question, _ in pairs)
    for question, meta in pairs:
        for answer in [meta["answer"], *meta["aliases"]]:
            judged = judge(question, answer, vocabulary)
            assert judged.verdict == "correct" and judged.language_ok is not False, (question.id, answer)
        assert judge(question, "", vocabulary).verdict == "wrong_format"
    assert len({question.task for question, _ in pairs}) == 7 and len(pairs) == 660


def test_a_number_is_the_same_in_all_digits() -> None:
    """Guessing from 1 to 3 is right once in three, whatever digits the languages have."""
    asked = [
        Question(f"{code}{n}", "count", code, f"{n}", "", (to_native_digits(str(n), code),))
        for code in ("en", "my", "km")
        for n in (1, 2, 3)
    ]
    assert {question.chance for question in with_chance(asked)} == {1 / 3}


def test_replies_of_earlier_versions_are_judged_too(questions: list[Question], tmp_path: Path) -> None:
    """Their files have neither kinds nor costs."""
    results = evaluate(Planted(questions, right), questions, tmp_path, key="k", progress=False)
    table = pq.read_table(tmp_path / "questions.parquet")
    later = ["kind", "checks", "score", "measures", "prompt_tokens", "new_tokens", "error"]
    pq.write_table(table.drop_columns(later), tmp_path / "questions.parquet")
    assert rescore(tmp_path).cells == results.cells
    nobody = Planted(questions, lambda question: pytest.fail("asked again"))
    assert evaluate(nobody, questions, tmp_path, key="k", progress=False).cells == results.cells
