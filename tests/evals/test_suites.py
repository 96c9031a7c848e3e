"""Suites as data: each adapter on a small file of its data set's schema, made here; the offline suites; and
planted models whose faults are known.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from seavlm import manifest
from seavlm.build import Asked, evaluate_model
from seavlm.data.pictures import FAMILIES, HELD_OUT, load_pictures
from seavlm.errors import SeavlmError
from seavlm.evals import offline, suites
from seavlm.evals.adapters import language_code
from seavlm.evals.export import to_lmms_eval
from seavlm.evals.metrics import Vocabulary, judge
from seavlm.evals.page import page
from seavlm.evals.report import gather
from seavlm.evals.run import evaluate, rescore
from seavlm.evals.scores import comparison, retention_change
from seavlm.evals.show import diagnosis, table
from seavlm.evals.similarity import graphemes
from seavlm.evals.tasks import BLIND, GRADED, Question, Reply, pictures_of, question_of, with_blind
from seavlm.recipe import Eval
from seavlm.text.language import LANGUAGES, to_native_digits
from seavlm.text.tools import Call, render_calls


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 40, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def image(shade: int) -> dict[str, Any]:
    """As `datasets` stores an Image column."""
    return {"bytes": png(shade), "path": f"{shade}.png"}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSONL, or Parquet with the columns' features in its metadata, as `datasets` and the hub write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return
    table = pa.Table.from_pylist(rows)
    features = {
        name: {"_type": "Image" if isinstance(rows[0][name], dict) and "bytes" in rows[0][name] else "Value"}
        for name in table.column_names
    }
    info = json.dumps({"info": {"features": features}})
    pq.write_table(table.replace_schema_metadata({"huggingface": info}), path)


# File name -> rows. Columns as the data sets' cards and the code that reads them have them.
FILES: dict[str, dict[str, list[dict[str, Any]]]] = {
    "cvqa": {
        "test-00000-of-00001.parquet": [
            {
                "image": image(i),
                "ID": f"5{i // 2}_{i % 2}",
                "Subset": subset,
                "Question": "Apa ini?",
                "Translated Question": "What is this?",
                "Options": ["nasi", "sate", "bakso", "soto"],
                "Translated Options": ["rice", "satay", "meatball", "soup"],
                "Label": label,
                "Category": "Food",
                "Image Type": "Self",
                "Image Source": "Self-open",
                "License": "CC BY-SA",
            }
            for i, (subset, label) in enumerate(
                [
                    ("('Indonesian', 'Indonesia')", 1),
                    ("('Malay', 'Malaysia')", 3),
                    ("('Filipino', 'Philippines')", -1),
                    ("('Amharic', 'Ethiopia')", 0),
                ]
            )
        ]
    },
    "marvl": {
        "id-00000-of-00001.parquet": [
            {
                "id": f"id-{i}",
                "language": "id",
                "left_img_id": "1",
                "right_img_id": "2",
                "annotator_info": {"age": 30},
                "chapter": "Animal",
                "concept": "39-Bebek",
                "hypothesis": "Ada bebek di kedua foto.",
                "hypo_en": "There are ducks in both.",
                "label": label,
                "left_img": image(1),
                "right_img": image(2),
                "resized_left_img": image(1),
                "resized_right_img": image(2),
                "vertically_stacked_img": image(3),
                "horizontally_stacked_img": image(3),
            }
            for i, label in enumerate([True, False])
        ]
    },
    "xm3600": {
        f"{code}-00000-of-00001.parquet": [
            {
                "image_id": "000411001ff7dd4f",
                "image_locale": code,
                "captions": ["isang pusa sa mesa", "pusa na natutulog"],
                "captions_tokenized": ["isang pusa sa mesa"],
                "captions_tokenized_lowercase": ["isang pusa sa mesa"],
                "image": image(5),
            }
        ]
        for code in ("fil", "ar")
    },
    "worldcuisines": {
        name: [
            {
                "qa_id": f"{task}_{number}",
                "lang": lang,
                "food_id": 7,
                "prompt_id": 3,
                "prompt_type": kind,
                "image_url": "https://upload.wikimedia.org/7.jpg",
                "task": task,
                "lang_status": "ok",
                "image_path": "images/7.png",
                "question": "Makanan apa ini?",
                "options": ["Rendang", "Pho", "Sushi", "Laksa", "Tom yam"],
                "mcq_answer_index": 4,
                "answer": {"th": "ต้มยำ", "cs": "Polévka"}.get(lang, "Tom yam"),
            }
            for lang in ("id_formal", "th", "cs")
            for number, kind in enumerate((1, 4) if task == "task1" else (2,))
        ]
        for name, task in (
            ("task1/test_small/0000.parquet", "task1"),
            ("hf_prompt/small_eval_task2/small_eval_task2.jsonl", "task2"),
            ("task1/train/0000.parquet", "task1"),  # not asked
        )
    },
    "mtvqa": {
        "test-00000-of-00001.parquet": [
            {
                "id": number,
                "image": image(7),
                "qa_pairs": str(
                    [{"question": "ราคาเท่าไร", "answer": "๑๒๐ บาท"}, {"question": "ร้านอะไร", "answer": "ก."}]
                ),
                "lang": lang,
            }
            for number, lang in enumerate(("TH", "DE"))
        ],
        "train-00000-of-00001.parquet": [{"id": 9, "image": image(7), "qa_pairs": "[]", "lang": "TH"}],
    },
    "seavl": {
        "train-00000-of-00001.parquet": [
            {
                "id": "0",
                "image": image(8),
                "caption": "A market in Laos",
                "caption_native_lang": "ຕະຫຼາດໃນລາວ",
                "culture_relevant_loc": "Laos",
                "native_lang": "Lao (lao)",
                "avg_cultural_relevance": 4.5,
                "avg_caption_fit": 5.0,
                "avg_img_quality": 4.0,
                "n_annotator": 2,
            }
        ]
    },
}
LEFT_OUT = {
    "cvqa": {"the answer is hidden (Label -1)": 1, "another language": 1},
    "marvl": {},
    "xm3600": {"another language": 1},
    "worldcuisines": {"another language": 3},
    "mtvqa": {"another language": 1},
    "seavl": {},
}


def put(name: str, folder: Path) -> Path:
    """A data set's files, in a folder whose own name must not matter."""
    folder = folder / "test-train"
    for file, rows in FILES[name].items():
        write(folder / file, rows)
    if name == "worldcuisines":  # images.tar.gz, unpacked
        (folder / "images").mkdir()
        (folder / "images" / "7.png").write_bytes(png(6))
    return folder


@pytest.fixture(params=FILES)
def downloaded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A data set's name, and its folder."""
    return request.param, put(request.param, tmp_path)


def test_every_adapter_reads_its_schema(downloaded: tuple[str, Path]) -> None:
    """What is asked can be answered rightly and wrongly, and its pictures are whole."""
    name, folder = downloaded
    asked = suites.ask(name, data=folder)
    assert dict(asked.skipped) == LEFT_OUT[name]
    vocabulary = Vocabulary.of(asked.questions)
    for question in asked.questions:
        assert question.prompt and question.messages and question.language in LANGUAGES
        right = judge(question, question.answers[0], vocabulary)
        assert right.score == 1.0, (question, right)
        assert right.language_ok is not False
        if question.options:
            letter = question.letters[question.options.index(question.answers[0])]
            assert judge(question, f"{letter}.", vocabulary).verdict == "correct"
            other = next(option for option in question.options if option != question.answers[0])
            assert judge(question, other, vocabulary).verdict == "wrong_answer"
        assert judge(question, "", vocabulary).verdict == "wrong_format"
        parts = [part for part in question.messages[-1]["content"] if part["type"] == "image"]
        assert len(parts) == len(question.image_sha256) == (2 if name == "marvl" else 1)


def test_what_the_adapters_make_of_it(tmp_path: Path) -> None:
    def ask(name: str) -> list[Question]:
        return suites.ask(name, data=put(name, tmp_path / name)).questions

    cvqa = ask("cvqa")
    assert [q.language for q in cvqa] == ["id", "ms"] and cvqa[0].concept == cvqa[1].concept == "50"
    assert (
        cvqa[0].prompt == "<image>\nApa ini?\nA. nasi\nB. sate\nC. bakso\nD. soto" and cvqa[0].chance == 0.25
    )
    marvl = ask("marvl")
    assert [q.answers[0] for q in marvl] == ["Ya", "Tidak"] and marvl[0].chance == 0.5
    xm3600 = ask("xm3600")
    assert xm3600[0].language == "tl" and len(xm3600[0].answers) == 2
    dishes = ask("worldcuisines")
    assert [(q.task, q.language, q.family) for q in dishes] == [
        *(("dish", c, kind) for c in ("id", "th") for kind in ("no-context", "adversarial")),
        *(("origin", c, "location") for c in ("id", "th")),
    ]
    assert dishes[0].chance == 0.2 and dishes[0].letters == tuple("ABCDE")
    mtvqa = ask("mtvqa")
    vocabulary = Vocabulary.of(mtvqa)
    assert judge(mtvqa[0], "120 บาท", vocabulary).verdict == "correct", "digits of any script"
    assert judge(mtvqa[0], "ราคา ๑๒๐ บาท ครับ", vocabulary).verdict == "correct"
    assert judge(mtvqa[0], "๙๐ บาท", vocabulary).verdict == "wrong_answer"
    long = judge(mtvqa[0], "๑๒๐ บาท " + "และอื่นๆ" * 20, vocabulary)
    assert long.verdict == "wrong_format" and long.measures["contains"] == 1, "what MTVQA's script counts"
    assert judge(mtvqa[0], "๙๐ บาท", vocabulary).measures["contains"] == 0


def test_data_sets_can_be_asked_in_other_ways(tmp_path: Path) -> None:
    """The options that the adapters' docstring names."""

    def ask(rows: list[dict[str, Any]], **task: Any) -> Question:
        write(tmp_path / "rows.parquet", rows)
        suite = {"name": "x", "version": 1, "changes": {1: "first"}, "tasks": [{"name": "t", **task}]}
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
        return suites.ask(tmp_path / "x.yaml", data=tmp_path / "rows.parquet").questions[0]

    rows = {name: next(iter(files.values())) for name, files in FILES.items()}
    cvqa = ask(rows["cvqa"], adapter="cvqa", english=True)
    assert cvqa.language == "en" and cvqa.answers == ("satay",) and "What is this?" in cvqa.prompt
    assert ask(rows["seavl"], adapter="seavl", english=True).answers == ("A market in Laos",)
    marvl = ask(rows["marvl"], adapter="marvl", english=True)
    assert marvl.language == "en" and "There are ducks" in marvl.prompt and marvl.answers == ("Yes",)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "7.png").write_bytes(png(6))
    dish = ask(rows["worldcuisines"], adapter="worldcuisines", open=True)
    assert dish.reading == "short" and dish.chance == 0
    assert dish.answers == ("Tom yam", "ต้มยำ", "Polévka"), "the dish's name in any of its languages"
    texts = {key: str(rows["cvqa"][0][key]) for key in ("Options", "Translated Options")}
    assert ask([{**rows["cvqa"][0], **texts}], adapter="cvqa").options == ("nasi", "sate", "bakso", "soto")


def test_languages_are_known_by_all_their_names() -> None:
    given = [
        "TH",
        "id_formal",
        "Filipino",
        "Burmese",
        "fil",
        "zh_cn",
        "zh-s",
        "de",
        "Myanmar (mm)",
        "Lao (lao)",
    ]
    codes = ["th", "id", "tl", "my", "tl", "zh", "zh", None, "my", "lo"]
    assert [language_code(name) for name in given] == codes


def test_what_is_no_suite_is_said(tmp_path: Path) -> None:
    with pytest.raises(SeavlmError, match="there is no suite pictres") as error:
        suites.load_suite("pictres")
    assert "pictures" in str(error.value)
    with pytest.raises(SeavlmError, match="--data"):
        suites.ask("cvqa")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SeavlmError, match="no Parquet or JSONL"):
        suites.ask("cvqa", data=tmp_path / "empty")
    write(tmp_path / "other" / "a.jsonl", [{"ID": 1, "image": "", "question": "?"}])
    with pytest.raises(
        SeavlmError, match=r"no file of cvqa: it has no column Subset, Question, Options, Label"
    ):
        suites.ask("cvqa", data=tmp_path / "other")
    with pytest.raises(SeavlmError, match="it has no column id, qa_pairs, lang") as error:
        suites.ask("mtvqa", data=tmp_path / "other" / "a.jsonl")
    assert "It has ID, image, question" in str(error.value)
    with pytest.raises(SeavlmError, match="task dish has no file"):
        suites.ask("worldcuisines", data=tmp_path / "other")
    hidden = [{**FILES["cvqa"]["test-00000-of-00001.parquet"][0], "Label": -1}]
    pq.write_table(pa.Table.from_pylist(hidden), tmp_path / "test.parquet")
    with pytest.raises(SeavlmError, match=r"no question left \(1 rows: the answer is hidden"):
        suites.ask("cvqa", data=tmp_path / "test.parquet")
    good = {
        "name": "mine",
        "version": "1",
        "changes": {"1": "first"},
        "tasks": [{"name": "t", "adapter": "samples"}],
    }
    for change, message in (
        ({"version": "2"}, "changes do not say"),
        ({"changes": {"1": "first", "2": "more"}}, "version 1 is not the last of its changes, 2"),
        ({"languages": ["xx"]}, "unknown language 'xx'"),
        ({"taskes": []}, "unknown key 'taskes'"),
        ({"tasks": [{"name": "t", "adapter": "cqva"}]}, "no adapter 'cqva'"),
        ({"tasks": [{"name": "t"}]}, "either an adapter or a generator"),
    ):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({**good, **change}), encoding="utf-8")
        with pytest.raises(SeavlmError, match=message):
            suites.load_suite(path)


def test_a_suite_of_ones_own(tmp_path: Path, cli: Callable) -> None:
    rows = [
        {
            "id": f"q{i}",
            "task": "colour",
            "language": "ms",
            "messages": [{"role": "user", "content": [{"type": "text", "text": f"Warna {i}?"}]}],
            "meta": json.dumps({"kind": "short", "answer": "merah"}),
        }
        for i in range(3)
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    suite = {
        "name": "mine",
        "version": "1.0.0",
        "changes": {"1.0.0": "first"},
        "tasks": [{"name": "colour", "adapter": "samples", "data": "mine.jsonl"}],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    asked = suites.ask(tmp_path / "mine.yaml", limit=2)
    assert len(asked.questions) == 2 and asked.suite.label == "mine 1.0.0"
    out = tmp_path / "out"
    done = cli("eval", "nano", "--suite", tmp_path / "mine.yaml", "--out", out, "--price", "1,2", "--quiet")
    assert done.code == 0, done.err
    assert "costs 0.0" in done.err
    first = json.loads((out / "results.json").read_text())
    assert first["about"]["suite"] == "mine" and first["usage"]["prompt_tokens"] > 0
    used = first["usage"]
    assert first["cost"] == (used["prompt_tokens"] + 2 * used["new_tokens"]) / 1e6 > 0
    told = gather([out]).facts["runs"][0]["speed"]
    assert told["cost"] == first["cost"] and f"{told['cost']:,.4f}</td>" in page(gather([out]))
    done = cli("eval", "--rescore", out, "--lmms-eval", tmp_path / "lmms", "--against", out)
    assert done.code == 0 and "inside the noise" in done.out, done.err
    again = json.loads((out / "results.json").read_text())
    assert again == first, "the same, without asking"
    assert cli("eval", "--rescore", out, "--price", "2,4", "--quiet").code == 0
    again = json.loads((out / "results.json").read_text())
    assert again["cost"] == 2 * first["cost"]
    (out / "comparison.json").unlink()
    (out / "comparison.json").symlink_to("/dev/full")
    full = cli("eval", "--rescore", out, "--against", out)
    assert full.code == 2 and "No space left" in full.err and "Make room" in full.err
    (samples,) = (tmp_path / "lmms").rglob("*_samples_colour.jsonl")
    line = json.loads(samples.read_text().splitlines()[0])
    assert {"doc_id", "target", "filtered_resps", "input", "doc_hash", "prompt_hash", "target_hash"} <= set(
        line
    )
    assert line["target"] == "merah" and line["acc"] in (0.0, 1.0)


def test_the_example_of_a_suite(root: Path, tmp_path: Path) -> None:
    """docs/suite.yaml has every key, every way to read a reply that its comments name, and asks in Khmer."""
    example = root / "docs" / "suite.yaml"
    text = example.read_text(encoding="utf-8")
    assert set(yaml.safe_load(text)) == suites.KEYS
    asked = suites.ask(example)
    assert {question.language for question in asked.questions} == {"km"}
    assert set(asked.skipped) == {"another language"}, "the flags in ten languages; each row is asked"
    vocabulary = Vocabulary(asked.questions)
    for question in asked.questions:
        right = '{"name": "ដំរី"}' if question.reading == "checks" else question.answers[0]
        verdict = judge(question, right, vocabulary).verdict
        assert verdict == ("graded" if question.reading in GRADED else "correct"), question.id
    first = asked.questions[0]
    assert pictures_of(first) == [(root / "docs" / "elephant.png").read_bytes()]
    for kind in ("short", "choose", "letter", "yesno", "count", "read", "checks", *GRADED):
        assert re.search(rf"\b{kind}\b", text.split("kind     ")[1]), kind

    for name in ("suite.yaml", "suite.jsonl"):  # elsewhere, without the pictures
        (tmp_path / name).write_bytes((root / "docs" / name).read_bytes())
    away = suites.ask(tmp_path / "suite.yaml")
    assert away.skipped["no picture"] == 6 and len(away.questions) == len(asked.questions) - 6


def test_pictures_of_ones_own_are_named_from_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "រូបភាព ខ្មែរ"
    folder.mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "ក ខ.png")
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "នេះជាអ្វី?"}]}
    row = {"id": "q", "language": "km", "messages": [turn], "images": ["ក ខ.png"], "meta": {"answer": "ឆ្មា"}}
    suite = {
        "name": "mine",
        "version": "1",
        "changes": {"1": "first"},
        "tasks": [{"name": "own", "adapter": "samples", "data": "mine.jsonl"}],
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    lines = folder / "mine.jsonl"

    def ask(change: dict[str, Any], **choice: Any) -> list[Question]:
        lines.write_text(json.dumps(row | change, ensure_ascii=False), encoding="utf-8")
        return suites.ask(folder / "mine.yaml", **choice).questions

    (question,) = ask({})
    assert question.conversation()[0]["content"][0]["image"] == (folder / "ក ខ.png").read_bytes()
    for place in ("គ.png", "../ក ខ.png"):
        with pytest.raises(SeavlmError, match="no picture"):
            ask({"images": [place]})
    for change, message in (
        ({"meta": "{"}, "question q: its meta is not JSON"),
        ({"messages": [{"role": "user", "content": [{"text": "?"}]}]}, "cannot be read: it has no 'type'"),
        ({"messages": [{"role": "user"}]}, "question q cannot be read: it has no 'content'"),
    ):
        with pytest.raises(SeavlmError, match=message):
            ask(change)
    with pytest.raises(SeavlmError, match="unknown language 'kh'"):
        ask({}, languages=["kh"])
    with pytest.raises(SeavlmError, match="mine 1 has no task 'owm'") as error:
        ask({}, tasks=["owm"])
    assert "Did you mean 'own'" in str(error.value)


def test_wrong_places_are_told_before_the_run(tmp_path: Path, cli: Callable) -> None:
    asked = ("eval", "nano", "--suite", "flags", "--limit", "1", "--language", "km", "--quiet")
    done = cli(*asked, "--against", tmp_path / "none")
    assert done.code == 2 and "there is no run" in done.err and "Khmer" not in done.out
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for option in ("--out", "--lmms-eval"):
        done = cli(*asked, option, tmp_path / "file")
        assert done.code == 2 and "file is a file" in done.err and "Khmer" not in done.out
    done = cli("eval", "--rescore", tmp_path, "--limit", "1")
    assert done.code == 2 and "Leave out" in done.err
    model = tmp_path / "model"
    manifest.write_manifest(model, stage="merge", recipe={}, seed=0, inputs={}, metrics={})
    before = (model / "manifest.json").read_bytes()
    done = cli(*asked, "--out", model, "--force")
    assert done.code == 2 and "manifest.json would be lost" in done.err
    assert (model / "manifest.json").read_bytes() == before
    with pytest.raises(SeavlmError, match="is a folder"):
        manifest.write_text(tmp_path, "a report")
    (tmp_path / "suite.yaml").write_text("name: a\nversion: 1\ntasks: []\n", encoding="utf-8")
    assert "is a suite of questions" in cli("eval", tmp_path / "suite.yaml").err


# --- the offline suites, and planted models


@pytest.fixture(scope="module")
def everything() -> list[Question]:
    """Some of all offline questions, in all languages."""
    return suites.ask("offline", limit=4).questions


def test_a_part_of_a_suite_is_limited_to_the_same_questions() -> None:
    """So that a run of a suite and one of its part can be compared, whatever else was asked."""
    whole, part = (suites.ask(name, limit=3, languages=["lo"]) for name in ("offline", "pictures"))
    alone = suites.ask("offline", limit=3, languages=["lo"], tasks=["name"])
    of_whole = {question.id for question in whole.questions}
    assert len(part.questions) == 6 and {question.id for question in part.questions} < of_whole
    assert {question.id for question in alone.questions} < of_whole


def test_the_offline_suites_ask_in_eleven_languages(everything: list[Question]) -> None:
    cells = {(question.task, question.language) for question in everything}
    tasks = {
        "name",
        "choose",
        "flag",
        "count",
        "reading",
        "json",
        "language",
        "lines",
        "length",
        "calls",
        "continue",
    }
    assert cells == {(task, code) for task in tasks for code in LANGUAGES}
    again = suites.ask("offline", limit=4).questions
    assert [q.prompt for q in again] == [q.prompt for q in everything], "the same each time"
    assert not [q for q in everything if "{" in q.prompt and q.reading not in ("calls", "checks")]


@pytest.mark.parametrize("name", sorted({*suites.names()} - {"seahelm", "sea-ifeval"}))
def test_what_is_asked_changes_with_the_version_only(
    name: str, tmp_path: Path, same_as_before: Callable[[str, Path | None], None]
) -> None:
    same_as_before(name, put(name, tmp_path) if name in FILES else None)


def test_who_always_says_the_same_is_at_chance() -> None:
    """Chance is what it says: no letter, number or phrase gets further."""
    for name, task in (("pictures", "choose"), ("counting", "count")):
        asked = suites.ask(name, tasks=[task]).questions
        for code in LANGUAGES:
            cell = [question for question in asked if question.language == code]
            places = [q.options.index(q.answers[0]) if q.options else q.answers[0] for q in cell]
            most = max(Counter(places).values()) / len(cell)
            assert most == pytest.approx(cell[0].chance), (task, code)
    with pytest.raises(SeavlmError, match="cannot be balanced"):
        next(offline.pictures({"task": "count", "each": 40}))
    forms = suites.ask("formats").questions
    vocabulary = Vocabulary.of(forms)
    for said in ("?", "1", "...\n...\n...", '{"name": "x", "number": 1}', "xyz abc def"):
        # JSON's keys are words of the prompts in all languages, so its language does not show.
        asked = [q for q in forms if not said.startswith("{") or q.task in ("json", "lines")]
        right = [q.id for q in asked if judge(q, said, vocabulary).verdict == "correct"]
        assert not right, (said, right[:3])


def test_held_out_art_is_in_no_other_family() -> None:
    pictures = load_pictures()
    keys = [concept.key for concept in pictures.select(offline.CONCEPTS)]
    trained = {
        hashlib.sha256(pictures.image_bytes(key, family)).digest()
        for key in keys
        for family in FAMILIES
        if family != HELD_OUT
    }
    held_out = {hashlib.sha256(pictures.image_bytes(key, HELD_OUT)).digest() for key in keys}
    assert len(held_out) > 200 and not held_out & trained


def test_the_suites_are_listed(cli: Callable) -> None:
    done = cli("eval", "--list")
    assert done.code == 0, done.err
    for name in suites.names():
        suite = suites.load_suite(name)
        assert suite.label in done.out and suite.about in done.out
        assert suite.size and suite.licence, "how much, and under which licence"
        assert not suite.source or suite.source in done.out
    assert "th vi; 2,116 pictures" in done.out and "CC-BY-NC-4.0" in done.out
    done = cli("eval", "--list", "--suite", "mtvqa")
    assert done.out.startswith("mtvqa 1.") and "xm3600" not in done.out
    done = cli("eval", "nano", "--suite", "help")
    assert done.code == 2 and "seavlm eval --list" in done.err


def test_reading_is_drawn_in_every_script() -> None:
    rows = pq.read_table(offline.READING).to_pylist()
    assert len(rows) == 24 * len(LANGUAGES)
    for code in LANGUAGES:  # letters that a font lacks would be boxes, and words of one length the same
        own = [row for row in rows if row["language"] == code]
        assert len({row["image"] for row in own}) == len({row["text"] for row in own})
    for row in rows:
        with Image.open(io.BytesIO(row["image"])) as picture:
            assert picture.format == "WEBP" and picture.size == (256, 256)
            grey = picture.convert("L")
        assert grey.getextrema() == (0, 255), row["id"]  # black on white
        ink = sum(grey.histogram()[:128]) / 256**2
        assert 0.003 < ink < 0.4, (row["id"], ink)
        assert all(grey.getpixel((x, y)) == 255 for x in (0, 255) for y in range(256)), "nothing is cut off"


def right_answer(question: Question) -> str:
    """What a model says that makes no mistake."""
    if question.reading == "calls":
        calls = json.loads(question.checks)["calls"]
        made = [Call(c["name"], json.dumps({k: v[0] for k, v in c["arguments"].items()})) for c in calls]
        return render_calls(made) if made else "👋"
    if question.reading == "checks":
        checks = json.loads(question.checks)
        if "json" in checks:
            return json.dumps(checks["values"], ensure_ascii=False)
        if "lines" in checks:
            return "\n".join([checks["each_line"]] * 3)
        return LANGUAGES[checks["language"]].native_name
    return question.answers[0]


def play(questions: list[Question], answer: Callable[[Question], str]) -> Any:
    """The results of a model that answers like that."""
    by_messages = {str(question.conversation()): question for question in questions}

    def answerer(batch: list[Any]) -> list[str]:
        return [answer(by_messages[str(messages)]) for messages in batch]

    def ranker(batch: list[Any], options: Any) -> list[str]:
        return answerer(batch)

    return evaluate(answerer, questions, name=answer.__name__, ranker=ranker, progress=False, resamples=200)


def plain(questions: list[Question]) -> list[Question]:
    """Without what a `Ranker` would be asked beside."""
    return [replace(question, bare="") for question in questions]


def test_a_model_without_fault_gets_everything_right(everything: list[Question]) -> None:
    results = play(plain(everything), right_answer)
    wrong = [(r["id"], r["reply"], r["parsed"]) for r in results.records if r["verdict"] != "correct"]
    assert not wrong, wrong[:5]
    assert results.suites["all"].accuracy == 1.0 and results.tasks["reading"].measures["cer"] == 0


def test_a_planted_format_slip_is_told_from_not_knowing(everything: list[Question]) -> None:
    """It knows every answer and never gives it in the form asked for; the other one gives wrong ones."""
    asked = [
        q for q in plain(everything) if q.reading in ("choose", "count", "flag", "read", "checks", "calls")
    ]

    def slips(question: Question) -> str:
        said = right_answer(question)
        if question.reading == "calls":
            return "[{" + said[1:-1] if said != "👋" else "["
        if question.reading == "count":
            return f"{said} {int(to_int(said)) + 1}"
        if question.reading == "checks":
            return "" if "json" not in question.checks else f"Sure! {said}"
        return " / ".join(question.options) if question.options else f"<b>{said}</b>\nI am sure of {said}."

    def errs(question: Question) -> str:
        if question.reading == "calls":
            return render_calls([Call("multiply", '{"a": 0, "b": 0}')])
        if question.reading == "count":
            return to_native_digits("9", question.language)
        if question.reading == "checks":
            return right_answer(question)
        others = [
            other for other in asked if other.task == question.task and other.language == question.language
        ]
        wrong = {option for other in others for option in (other.options or other.answers)} - set(
            question.answers
        )
        return sorted(wrong & set(question.options) or wrong)[0]

    one, other = play(asked, slips), play(asked, errs)
    checks = ("json", "language", "lines", "length")
    for task, cell in one.tasks.items():
        assert cell.accuracy == 0 and cell.wrong_format == 1, (task, cell)
        if task not in checks:
            assert other.tasks[task].wrong_answer == 1, (task, other.tasks[task])
    told = [
        line
        for line in diagnosis(one)
        if "100% of the replies are in the wrong format (all languages)" in line
    ]
    assert len(told) == len(one.tasks)
    assert not [line for line in diagnosis(other) if line.startswith(("choose", "flag")) and "format" in line]
    assert one.suites["all"].wrong_format == 1 > 0.5 > other.suites["all"].wrong_format
    compared = comparison(other, one)
    assert compared["groups"]["all"]["mean"] > 0 and set(compared["groups"]) >= set(LANGUAGES)


def to_int(text: str) -> str:
    from seavlm.text.language import to_ascii_digits

    return to_ascii_digits(text)


def test_a_planted_wrong_language_is_told(everything: list[Question]) -> None:
    """It answers in English where there is a picture, and in the language asked for where there is none."""
    concepts = {(q.concept, q.task, q.language): q for q in plain(everything)}
    asked = with_blind([q for q in concepts.values() if q.task in ("name", "flag")])

    def turns_english(question: Question) -> str:
        english = concepts[question.concept, question.task.removesuffix(BLIND), "en"].answers[0]
        return question.answers[0] if question.task.endswith(BLIND) else english

    results = play(asked, turns_english)
    for code, cell in results.languages.items():
        script = LANGUAGES[code].script
        if code != "en" and script != "Latn":
            assert cell.language_ok == 0 and cell.accuracy == 0, (code, cell)
            found = results.fidelity[code]
            assert found["with_picture"] == 0 and found["without_picture"] == 1
            assert found["change"]["high"] < 0, "the picture makes it leave the language"
    told = diagnosis(results)
    assert "Thai: 100% of the replies are in another language" in told
    assert any(line.startswith("Lao: replies leave the language, 100% more") for line in told)
    assert not [line for line in told if line.startswith("English")]
    assert results.languages["en"].language_ok == 1
    kept = [r for r in results.records if r["task"].endswith(BLIND)]
    assert all(r["image_sha256"] == [] and "<image>" not in r["prompt"] for r in kept)
    assert "name/blind" in results.tasks and results.suites["all"].n == len(asked) // 2


def test_real_models_with_planted_faults_are_told_from_the_one_without(tmp_path: Path) -> None:
    """nano as it is; nano that chats about what it sees; and nano that is asked everything in English.

    The same weights and pictures: what it knows is the same, and the product says what is wrong, in its
    results and in its report.
    """
    asked = suites.ask("pictures", tasks=["name"], limit=6).questions
    english = {q.concept: q.conversation() for q in asked if q.language == "en"}
    concepts = {str(q.conversation()): q.concept for q in asked}
    nano = Asked("nano", Eval(max_new_tokens=12))

    def chats(batch: list[Any]) -> list[str]:
        return [f"Sure!\nThis is {reply}, I think." for reply in nano.answer(batch)]

    def in_english(batch: list[Any]) -> list[str]:
        return nano.answer([english[concepts[str(messages)]] for messages in batch])

    models = {"plain": nano.answer, "chats": chats, "in English": in_english}
    for name, answerer in models.items():
        evaluate(answerer, asked, tmp_path / name, name=name, progress=False, resamples=200)
    report = gather([tmp_path / name for name in models])
    plain, slips, leaves = (run["results"] for run in report.facts["runs"])
    score, held = plain["suites"]["all"]["accuracy"], slips["tasks"]["name"]["measures"]["held"]
    assert score > 0.3 and not any("name: " in line for line in plain["diagnosis"])
    assert slips["suites"]["all"]["accuracy"] == 0 and slips["suites"]["all"]["wrong_format"] == 1
    assert held == pytest.approx(score, abs=0.1), "it knows as much as before"
    told = [line for line in slips["diagnosis"] if line.startswith("name: 100% of the replies")]
    assert told and "of form, not of knowledge" in told[0] and "hold the right answer" in told[0]
    assert leaves["suites"]["all"]["wrong_format"] < 0.1 < leaves["suites"]["all"]["wrong_answer"]
    for code, language in LANGUAGES.items():
        said = [line for line in leaves["diagnosis"] if line.startswith(f"{language.english_name}: ")]
        assert bool(said) == (code != "en"), (code, said)
        if language.script != "Latn":
            assert said == [f"{language.english_name}: 100% of the replies are in another language"]
    shown = page(report)
    assert html.escape(told[0]) in shown and "Thai: 100% of the replies are in another language" in shown


def test_captions_are_graded_and_their_language_is_seen() -> None:
    question = Question(
        "c", "xm3600", "id", "c", "", ("seekor kucing tidur di atas meja", "kucing di meja"), kind="caption"
    )
    vocabulary = Vocabulary.of([question])
    good = judge(question, "Ini adalah seekor kucing yang tidur di meja.", vocabulary)
    assert good.verdict == "graded" and 0.5 < good.score < 1 and good.language_ok is True
    other = judge(question, "This is a cat that is asleep on the table.", vocabulary)
    assert other.language_ok is False and other.score < good.score
    assert judge(question, " ", vocabulary).verdict == "wrong_format"
    assert judge(question, Reply("", error="400"), vocabulary).verdict == "no_reply"


def test_what_a_reply_cost_and_how_it_was_read_is_kept(tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = suites.ask("formats", limit=1).questions
    results = evaluate(
        lambda batch: [Reply("{}", rng.randint(3, 9), 2) for _ in batch],
        rows,
        tmp_path,
        key="k",
        progress=False,
    )
    assert results.usage["new_tokens"] == 2 * len(rows)
    assert rescore(tmp_path).records == results.records
    assert len(to_lmms_eval(results, tmp_path / "lmms")) == 5
    many = suites.ask("offline", limit=1).questions
    wide = play(plain(many), lambda question: "?")
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=100).print(table(wide))
    assert max(map(len, text.getvalue().splitlines())) <= 100 and "continue" in text.getvalue()


def test_a_row_without_answer_or_checks_cannot_be_asked() -> None:
    row = {
        "id": "x",
        "task": "t",
        "language": "lo",
        "messages": [{"role": "user", "content": "?"}],
        "meta": "{}",
    }
    with pytest.raises(SeavlmError, match="no answer"):
        question_of(row)


def test_a_run_that_replaces_another_keeps_none_of_its_texts(tmp_path: Path) -> None:
    options = {"limit": 1, "languages": ["lo"], "progress": False}
    evaluate_model("nano", None, tmp_path, suite="retention", **options)
    assert (tmp_path / "retention.json").is_file()
    evaluate_model("nano-global", None, tmp_path, suite="flags", replace=True, **options)
    assert not (tmp_path / "retention.json").exists()


def test_retention_is_measured_in_bits_per_character(model_dir: Path, tmp_path: Path) -> None:
    """What `log_likelihoods` says is what the model's forward pass says."""
    import torch

    from seavlm.engine.vlm import load

    options = {"suite": "retention", "limit": 1, "languages": ["lo"], "progress": False}
    evaluate_model("nano", None, tmp_path, dtype="float32", **options)
    found = json.loads((tmp_path / "retention.json").read_text())
    assert set(found) == set(LANGUAGES) and found["lo"]["bits_per_character"] > 1
    lines = [line for line in offline.declaration()["lo"].splitlines() if len(line) > 1]
    bits = sum(bits for _, bits in found["lo"]["lines"])
    for unit, size in (
        ("byte", sum(len(line.encode()) for line in lines)),
        ("character", sum(map(len, lines))),
        ("grapheme", sum(len(graphemes(line)) for line in lines)),
    ):
        assert found["lo"][f"bits_per_{unit}"] == pytest.approx(bits / size, rel=1e-4)
    worse = json.loads(json.dumps(found))
    worse["lo"]["lines"] = [
        [size, bits + size + number] for number, (size, bits) in enumerate(found["lo"]["lines"])
    ]
    change = retention_change(worse, found)
    assert 1 < change["lo"]["low"] < change["lo"]["change"] < change["lo"]["high"] < 1.2
    assert change["th"]["change"] == 0
    vlm = load(model_dir, device="cpu", dtype="float32")
    texts = ["ນີ້ແມ່ນຫຍັງ? ແມວ", "a cat, a dog"]
    for text, chance in zip(texts, vlm.log_likelihoods(texts), strict=True):
        ids = [vlm.tokenizer.bos_id, *vlm.tokenizer.encode(text)]
        with torch.no_grad():
            logits = vlm.model(torch.tensor([ids])).float()[0]
        chances = torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(ids[1:])[:, None])
        assert chance == pytest.approx(float(chances.sum()), abs=1e-3)


def test_a_text_only_parent_foretells_the_same_text(model_dir: Path, tmp_path: Path) -> None:
    """The language model of a picture model, saved alone: bit by bit what the whole model says of a text."""
    tensors = {
        name: tensor for file in model_dir.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    language = {
        f"model.{name.split('language_model.')[-1].removeprefix('model.')}": tensor
        for name, tensor in tensors.items()
        if "language_model." in name
    }
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))["text_config"]
    save_file(language, tmp_path / "model.safetensors", {"format": "pt"})
    config |= {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    lines = [line for line in offline.declaration()["lo"].splitlines() if len(line) < 110]
    cfg = Eval(dtype="float32")
    parent, child = (Asked(path, cfg) for path in (tmp_path, model_dir))
    assert parent.bits(lines) == pytest.approx(child.bits(lines), rel=1e-5)


def test_pictures_of_what_went_wrong_are_kept(everything: list[Question], tmp_path: Path) -> None:
    asked = [question for question in plain(everything) if question.task == "flag"]
    evaluate(lambda batch: ["?"] * len(batch), asked, tmp_path, progress=False)
    kept = pq.read_table(tmp_path / "pictures.parquet").to_pylist()
    wanted = {digest for question in asked for digest in question.image_sha256}
    assert {row["sha256"] for row in kept} == wanted
    with Image.open(io.BytesIO(kept[0]["image"])) as picture:
        assert max(picture.size) <= 256


def test_a_question_that_is_too_long_gets_no_reply_and_the_rest_do(model_dir: Path) -> None:
    asked = suites.ask("flags", limit=1, languages=["lo", "en"]).questions
    long = {"role": "user", "content": [{"type": "text", "text": "a cat " * 400}]}
    given = [asked[0].conversation(), [long], asked[1].conversation()]
    model = Asked(model_dir, Eval(max_new_tokens=2))
    first, second, third = model.answer(given)
    assert not first.error and not third.error and "reads at most" in second.error
    with pytest.raises(SeavlmError, match="reads at most"):
        model.answer([[long]])


def test_runs_are_compared_on_what_both_were_asked(everything: list[Question]) -> None:
    asked = [question for question in plain(everything) if question.task in ("flag", "name")]
    one, other = play(asked, right_answer), play([q for q in asked if q.task == "flag"], lambda question: "?")
    compared = comparison(one, other)
    assert compared["questions"] == len(other.records) < len(one.records)
    assert compared["groups"]["all"]["mean"] == 1 and compared["groups"]["lo"]["p_holm"] >= 0.1
    with pytest.raises(SeavlmError, match="no question in common"):
        comparison(one, play([q for q in plain(everything) if q.task == "count"], right_answer))
