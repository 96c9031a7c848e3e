"""A search whose answer is known: the answerer knows so many concepts as the betas say."""

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from seavlm.build import Asked, sweep_models
from seavlm.errors import SeavlmError
from seavlm.evals import suites
from seavlm.evals.tasks import Answerer, Question
from seavlm.merge.plan import by_module, differing
from seavlm.merge.search import Betas, search, table
from seavlm.merge.stream import Merged, merge_recipe
from seavlm.merge.unwritten import open_parent
from seavlm.recipe import Eval
from seavlm.text.language import LANGUAGES
from seavlm.weights.checkpoint import open_checkpoint
from seavlm.weights.refs import resolve

CONCEPTS = 80


def questions(concepts: int = CONCEPTS, codes: tuple[str, ...] = tuple(LANGUAGES)) -> list[Question]:
    """One yes/no question about each concept in each language; the prompt numbers the concepts."""
    return [
        Question(
            id=f"{code}-{concept}",
            task="yesno",
            language=code,
            concept=f"c{concept}",
            prompt=f"{code} {concept}",
            answers=("yes",),
            messages=[{"role": "user", "content": [{"type": "text", "text": f"{code} {concept}"}]}],
        )
        for code in codes
        for concept in range(concepts)
    ]


def knows(betas: Betas, code: str) -> float:
    """The share of concepts a merge knows: attention unlearns English, the rest learns the region."""
    attention, rest = betas.get("attention", betas["default"]), betas["default"]
    if code in ("en", "zh"):
        return 0.9 - 0.7 * attention - 0.1 * rest
    return 0.1 + 0.7 * rest + 0.05 * attention


def hashed(concept: str) -> float:
    """0 to 1, a concept's own: spread alike over every part of them."""
    return int(concept) * 0.618034 % 1


class Factory:
    """Makes answerers; counts merges and what they are asked."""

    def __init__(self, known: Callable[[Betas, str], float] = knows, dies_at: Betas | None = None) -> None:
        self.known, self.dies_at = known, dies_at
        self.made: list[Betas] = []
        self.asked = 0

    def __call__(self, betas: Betas) -> Answerer:
        self.made.append(betas)
        if betas == self.dies_at:
            raise KeyboardInterrupt

        def answer(batch: list[list[dict]]) -> list[str]:
            self.asked += len(batch)
            asked = [messages[-1]["content"][-1]["text"].split() for messages in batch]
            return ["yes" if hashed(concept) < self.known(betas, code) else "no" for code, concept in asked]

        return answer


def swept(out: Path, factory: Callable[[Betas], Answerer], **changes) -> dict:
    settings = {"key": "k", "betas": [0.0, 0.3, 0.6, 1.0], "resamples": 300}
    return search(changes.pop("asked", questions()), factory, out, **settings | changes)


def test_coordinates_find_what_one_beta_cannot(tmp_path: Path) -> None:
    factory = Factory()
    report = swept(tmp_path, factory, modules=["attention"], parents={"regional": "r", "global": "g"})
    assert report["chosen"]["betas"] == {"attention": 0.0, "default": 1.0}
    assert report["win"] and report["verdict"].startswith("A win")
    assert report["against"]["best_linear"]["settled"] and report["against"]["best_linear"]["low"] > 0
    assert report["questions"]["saved"] > 0
    assert any(row["stopped"].startswith("behind") for row in report["rows"])
    chosen = [row["label"] for row in report["rows"] if row["chosen"]]
    assert chosen == ["attention 0, rest 1"] and set(chosen) <= {
        r["label"] for r in report["rows"] if r["front"]
    }

    assert json.loads((tmp_path / "sweep.json").read_text())["verdict"] == report["verdict"]
    lines = list(csv.DictReader(io.StringIO((tmp_path / "sweep.csv").read_text())))
    assert len(lines) == report["candidates"] and lines[0]["attention"] == "0.0"
    raw = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert raw == {"regional": "r", "global": "g", "beta": {"attention": 0.0, "default": 1.0}}
    with Image.open(tmp_path / "pareto.png") as picture:
        assert picture.format == "PNG" and picture.width >= 1000
    assert table(report).row_count == len(report["rows"])

    # the verdict's concepts are not the search's, and every question was asked of a candidate once
    parts = report["questions"]
    assert parts["concepts_search"] + parts["concepts_verdict"] == CONCEPTS
    lines_of = [path.read_text().splitlines() for path in (tmp_path / "replies").iterdir()]
    assert sum(map(len, lines_of)) == factory.asked
    assert all(len({json.loads(line)[0] for line in lines}) == len(lines) for lines in lines_of)


def test_stopped_ones_are_estimated_near_the_truth(tmp_path: Path) -> None:
    report = swept(tmp_path, Factory(), modules=["attention"])
    for row in report["rows"]:
        truth = 0.43 * knows(row["betas"], "en") + 0.57 * knows(row["betas"], "th")
        assert row["score"]["mean"] == pytest.approx(truth, abs=0.08)


def test_a_killed_search_asks_only_what_is_missing(tmp_path: Path) -> None:
    whole_factory = Factory()
    whole = swept(tmp_path / "whole", whole_factory, modules=["attention"])
    first = Factory(dies_at={"attention": 0.0, "default": 1.0})
    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path / "killed", first, modules=["attention"])
    (cut,) = list((tmp_path / "killed" / "replies").iterdir())[:1]
    cut.write_text(cut.read_text() + '["half a li')
    rest = Factory()
    again = swept(tmp_path / "killed", rest, modules=["attention"])
    assert first.asked + rest.asked == whole_factory.asked
    assert {**again, "merges": 0} == {**whole, "merges": 0}
    more = Factory()
    swept(tmp_path / "killed", more, modules=["attention"])
    assert more.made == []


def test_nothing_inside_the_noise_is_a_win(tmp_path: Path) -> None:
    """beta 0.3 is better by a concept or two: chosen, and not called a win; more questions are asked for."""

    def alike(betas: Betas, code: str) -> float:
        return 0.5 + (0.03 if betas["default"] == 0.3 else 0)

    report = swept(tmp_path / "a", Factory(alike))
    assert report["chosen"]["label"] == "0.3" and not report["win"]
    gain = report["against"]["better_parent"]
    assert "inside the noise" in report["verdict"] and gain["more_questions"] > 0
    assert f"{gain['more_questions']:,} more questions" in report["verdict"]
    same = swept(tmp_path / "b", Factory(lambda betas, code: 0.5))
    assert same["chosen"]["label"] == "0" and "No merge scores higher" in same["verdict"]
    assert same["questions"]["saved"] == 0  # equals are not told apart


def test_floors_come_before_the_score(tmp_path: Path) -> None:
    report = swept(tmp_path, Factory(), floors={"en": 0.75, "zh": 0.75})
    chosen = next(row for row in report["rows"] if row["chosen"])
    assert chosen["floors_kept"] and chosen["label"] == "0"
    free = swept(tmp_path / "free", Factory(), alpha=0.2)
    assert free["chosen"]["label"] == "1"
    bound = swept(tmp_path / "bound", Factory(), alpha=0.2, floors={"en": 0.7})
    assert bound["chosen"]["label"] == "0.3"
    assert bound["floors"]["en"]["kept"] and bound["better_parent"] == "0"
    assert any("below the floor of en" in row["stopped"] for row in bound["rows"])


def test_trials_propose_the_same_betas_again(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    first = swept(tmp_path, Factory(), modules=["attention"], trials=12)
    assert len(first["chosen"]["betas"]) == 2 and first["search"] == "trials"
    assert first["chosen"]["betas"]["attention"] < first["chosen"]["betas"]["default"]
    again = Factory()
    assert swept(tmp_path, again, modules=["attention"], trials=12)["rows"] == first["rows"]
    assert again.made == []
    more = Factory()
    longer = swept(tmp_path, more, modules=["attention"], trials=14)
    assert longer["candidates"] - first["candidates"] <= 2


def test_what_cannot_be_searched_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factory = Factory()
    cases: list[tuple[str, dict]] = [
        ("unknown module 'atention'", {"modules": ["atention"]}),
        ("no question for the global suite", {"asked": questions(9, ("th", "my"))}),
        ("no question in it", {"asked": questions(9, ("en", "my")), "floors": {"th": 0.9}}),
        ("the floor of en is 1.5", {"floors": {"en": 1.5}}),
        ("too few concepts", {"asked": questions(1)}),
    ]
    for message, changes in cases:
        with pytest.raises(SeavlmError, match=message):
            swept(tmp_path, factory, **changes)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SeavlmError, match="trials need optuna") as caught:
        swept(tmp_path, factory, trials=3)
    assert "seavlm[sweep]" in str(caught.value) and factory.made == []


def test_a_merge_in_memory_is_the_written_one(tmp_path: Path) -> None:
    places = [Path(resolve(name)) for name in ("nano", "nano-global")]
    betas = {"attention": 0.2, "layers 0-2": 0.7, "default": 0.9}
    parents = [open_checkpoint(place) for place in places]
    merged = Merged(by_module(places, parents, betas))
    raw = {"regional": "nano", "global": "nano-global", "beta": betas}
    merge_recipe(raw, tmp_path / "written", open_parent=open_parent, hash_inputs=False)
    written = open_checkpoint(tmp_path / "written")
    assert merged.names() == written.names()
    for name in written.names():
        assert merged.dtype(name) == written.dtype(name) and torch.equal(merged.get(name), written.get(name))
    assert differing(parents, ["vision_tower", "attention", "vision"]) == ["attention", "vision"]

    asked = [
        question.messages for question in suites.ask("pictures", languages=["en", "th"], limit=2).questions
    ]
    cfg = Eval(max_new_tokens=8)
    replies = Asked(merged, cfg).answer(asked)
    assert replies == Asked(tmp_path / "written", cfg).answer(asked)


def test_the_models_are_swept(tmp_path: Path) -> None:
    said: list[str] = []
    report = sweep_models(
        "nano", "nano-global", tmp_path, suite="pictures", tasks=["name"], limit=4, betas=[0.5],
        modules=["vision_tower"], max_new_tokens=6, tell=said.append,
    )  # fmt: skip
    assert report["modules"] == [] and "vision_tower: the parents are equal there, so it has no beta" in said
    assert {row["label"] for row in report["rows"]} == {"0", "0.5", "1"}
    assert not list(tmp_path.rglob("*.safetensors"))
    assert json.loads((tmp_path / "manifest.json").read_text())["stage"] == "sweep"
    assert yaml.safe_load((tmp_path / "best.yaml").read_text())["regional"] == "nano"
