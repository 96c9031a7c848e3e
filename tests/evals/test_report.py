"""A report of real runs: all is in it, nothing is fetched, and what a model says stays text."""

import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from seavlm import manifest
from seavlm.errors import SeavlmError
from seavlm.evals.page import page
from seavlm.evals.report import chance_of, gather, markdown, settled
from seavlm.evals.run import evaluate
from seavlm.evals.stats import front
from seavlm.evals.tasks import Answerer, Question, Reply, question_of
from seavlm.merge.search import search
from seavlm.text.language import LANGUAGES

HOSTILE = (
    '</dd><script>alert(1)</script><img src=x onerror="alert(2)">\u202e' + "`[a](https://evil.example)|\x07"
)
NAMES = {
    "my": ["ငါး", "သစ်ပင်"],
    "km": ["ត្រី", "ដើមឈើ"],
    "en": ["fish", "tree"],
    "zh": ["鱼", "树"],
    "lo": ["ປາ", "ຕົ້ນໄມ້"],
}


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 40, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def questions() -> list[Question]:
    return [
        question_of(
            {
                "id": f"{task}-{place}-{code}",
                "task": task,
                "language": code,
                "images": [png(place)] if task == "name" else [],
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image"}] * (task == "name")
                        + [{"type": "text", "text": "?" * 9}],
                    }
                ],
                "meta": json.dumps({"concept": f"c{place}", "answer": name}),
            }
        )
        for task in ("name", "short")
        for code, names in sorted(NAMES.items())  # in the order in which they are asked
        for place, name in enumerate(names)
    ]


def run(folder: Path, name: str, reply: Callable[[int], str], which: slice = slice(None)) -> Path:
    asked = questions()[which]
    replies = iter([Reply(reply(place), 20 + place, 3) for place in range(len(asked))])
    about = {"suite": "mine", "version": "1.0.0", "left_out": {}}
    evaluate(
        lambda batch: [next(replies) for _ in batch],
        asked,
        folder,
        name=name,
        progress=False,
        resamples=100,
        about=about,
    )
    return folder


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("runs")
    asked = [
        Question(
            f"{code}{i}",
            "yesno",
            code,
            f"c{i}",
            "?",
            ("yes",),
            messages=[{"role": "user", "content": str(i)}],
        )
        for code in ("en", "th")
        for i in range(40)
    ]

    def made(betas: dict[str, float]) -> Answerer:
        known = 20 + 20 * (betas["default"] == 0.5)
        return lambda batch: ["yes" if int(one[0]["content"]) < known else "no" for one in batch]

    (out / "sweep").mkdir()
    manifest.write_json(
        out / "sweep" / "sweep.json", search(asked, made, betas=[0.5]) | {"verdict": "<b>inside</b>"}
    )
    carbon = {"hours": 2.0, "watts": 300.0, "kwh": 0.6, "kg_per_kwh": 0.4, "kg_co2e": 0.24, "region": "laos"}
    manifest.write_manifest(
        out / "train", stage="train", recipe={}, seed=0, inputs={}, metrics={"carbon": carbon}
    )
    names = [name for _ in range(2) for _, pair in sorted(NAMES.items()) for name in pair]
    return [
        run(out / "a", "good <b>", lambda place: names[place]),
        run(out / "b", "bad", lambda place: HOSTILE),
        out / "sweep",
        out / "train",
    ]


def test_every_cell_is_there_and_nothing_comes_from_outside(folders: list[Path]) -> None:
    report = gather(folders)
    text = page(report)
    found = Page(text)
    shown = [attrs["title"] for tag, attrs in found.tags if tag == "td" and "title" in attrs]
    # two runs, of two tasks in five languages, with the means of both ways
    assert len(shown) == 2 * (2 + 1) * (5 + 1)
    for part in (
        "good <b>",
        "bad minus good <b>",
        "β 0.5 (chosen)",
        "<b>inside</b>",
        "laos",
        "inside the noise",
    ):
        assert part in found.text
    for code in NAMES:
        assert ("span", code) in {(tag, attrs.get("lang")) for tag, attrs in found.tags}
        assert LANGUAGES[code].english_name in found.text
    pictures = [attrs["src"] for tag, attrs in found.tags if tag == "img"]
    assert pictures and all(str(source).startswith("data:image/webp;base64,") for source in pictures)
    links = [value for _, attrs in found.tags for key, value in attrs.items() if key in ("src", "href")]
    assert all(re.match("#|data:", str(link)) for link in links)
    assert not re.search(r"url\(|@import|https?:", text.replace("https://evil.example", ""))
    policy = next(attrs["content"] for tag, attrs in found.tags if attrs.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_names_of_merges_stay_in_their_picture(folders: list[Path]) -> None:
    """Also of those that everything was right for, whose points lie in the corner."""
    text = page(gather(folders))
    charts = re.findall(r'<svg viewBox="0 0 (\d+) (\d+)".*?</svg>', text, re.S)
    labels = re.findall(r'<text x="([\d.-]+)" y="([\d.-]+)" text-anchor="\w+">β', text)
    assert charts and labels
    assert all(12 <= float(y) <= 400 and 0 <= float(x) <= 520 for x, y in labels)


def test_what_a_model_says_stays_text(folders: list[Path]) -> None:
    report = gather(folders)
    found = Page(page(report))
    assert not {tag for tag, _ in found.tags} & {"script", "iframe", "object", "link", "b "}
    assert not [name for _, attrs in found.tags for name in attrs if name.startswith("on")]
    assert "<script>alert(1)</script>" in found.text and "\x07" not in found.text
    assert "\u202e" not in found.text
    written = markdown(report.facts)
    assert "<script" not in written and not re.search(r"(?<!\\)\]\(", written) and "\u202e" not in written


def test_a_reply_without_end_is_cut(tmp_path: Path) -> None:
    text = page(gather([run(tmp_path / "long", "long", lambda place: "ក" * 20_000, slice(0, 2))]))
    assert len(text) < 100_000 and "… (+19,600)" in text


def test_the_json_is_what_the_runs_wrote(folders: list[Path], tmp_path: Path, cli: Callable) -> None:
    out = [tmp_path / name for name in ("deep/r.html", "r.md", "r.json")]
    done = cli("report", *folders, "--out", out[0], "--markdown", out[1], "--json", out[2], "--examples", 1)
    assert done.code == 0 and "2 runs" in done.out
    facts = json.loads(out[2].read_text(encoding="utf-8"))
    for one, folder in zip(facts["runs"], folders, strict=False):
        assert one["results"] == json.loads((folder / "results.json").read_text(encoding="utf-8"))
        assert one["speed"]["prompt_tokens"] == one["results"]["usage"]["prompt_tokens"]
    assert set(facts["comparisons"][0]["groups"]) == {*NAMES, "global", "regional", "all"}
    assert facts["comparisons"][0]["groups"]["all"]["mean"] == -1
    assert [one["language"] for one in facts["examples"]] == [code for code in LANGUAGES if code in NAMES]
    assert facts["runs"][0]["tokens"]["en"]["against_english"] == 1
    assert "| name |" in out[1].read_text(encoding="utf-8")


def test_runs_of_other_questions_are_not_compared(folders: list[Path], tmp_path: Path) -> None:
    half = run(tmp_path / "half", "good <b>", lambda place: "fish", slice(0, 4))
    other = run(tmp_path / "other", "other", lambda place: "fish", slice(4, 6))
    facts = gather([half, other, folders[1]]).facts
    assert [one["name"] for one in facts["runs"]] == ["good <b>", "other", "bad"]
    assert "not_compared" in facts["comparisons"][0] and facts["comparisons"][1]["questions"] == 4
    assert [one["name"] for one in gather([half, half]).facts["runs"]] == ["good <b>", "good <b> (2)"]
    assert "Not compared" in page(gather([half, other]))


def test_a_whole_build_is_found_by_its_folder(folders: list[Path]) -> None:
    facts = gather([folders[0].parent]).facts
    assert len(facts["runs"]) == 2 and len(facts["carbon"]) == 1


def test_what_cannot_be_read_is_named(folders: list[Path], tmp_path: Path, cli: Callable) -> None:
    with pytest.raises(SeavlmError, match="no run to report on"):
        gather(folders[2:])
    with pytest.raises(SeavlmError, match="no folder"):
        gather([tmp_path / "nowhere"])
    broken = run(tmp_path / "broken", "broken", lambda place: "")
    (broken / "results.json").write_text("[", encoding="utf-8")
    done = cli("report", broken, "--out", tmp_path / "r.html")
    assert done.code == 2 and "cannot be read" in done.err and not (tmp_path / "r.html").exists()


def test_the_front_is_what_nothing_beats() -> None:
    assert front([(1, 1), (2, 0), (0, 2), (0, 1), (1, 1), (2, 0)]) == [(0, 2), (1, 1), (2, 0)]
    assert front([(3, 3), (1, 3), (3, 1)]) == [(3, 3)]


def test_a_difference_is_one_where_it_is_one_among_all() -> None:
    gap = {"significant": False, "mean": -0.1, "p": 0.03, "concepts": 10, "concepts_needed": 40}
    assert settled(gap | {"significant": True}) == "lower"
    assert settled(gap | {"significant": True, "mean": 0.1}) == "higher"
    assert chance_of(0.0) == "< 0.001" and chance_of(0.0213) == "0.021"
    assert settled(gap) == "by itself, not among all languages"
    assert settled(gap | {"p": 0.3}) == "inside the noise, 40 concepts would settle it"
    assert settled(gap | {"p": 0.3, "concepts_needed": 0}) == "inside the noise"
