"""A whole recipe on a model of nothing: every stage runs once, and again only when it has to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from seavlm import build as building
from seavlm.errors import SeavlmError
from seavlm.manifest import read_manifest
from seavlm.recipe import Recipe, parse_recipe

STAGES = tuple(stage for stage in building.STAGES if stage != "init")  # the base is given here


@pytest.fixture
def small(model_dir: Path, tmp_path: Path) -> dict:
    """Two languages, two steps, three betas."""
    return {
        "name": "small",
        "base": str(model_dir),
        "out": str(tmp_path / "out"),
        "data": {
            "languages": ["lo"],
            "eval_languages": ["en", "lo"],
            "tasks": {"name": 1},
            "concepts": 12,
            "n": 24,
            "n_dev": 8,
            "n_eval": 8,
        },
        "train": {
            "steps": 2,
            "batch_size": 8,
            "max_seq_len": 256,
            "micro_rows": 2,
            "lr": 1e-3,
            "save_every": 1,
        },
        "merge": {"betas": [0, 0.5, 1]},
        "eval": {"max_new_tokens": 3, "bootstrap": 50},
    }


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that were really run, in order."""
    names: list[str] = []
    for name, stage in building._RUN.items():
        monkeypatch.setitem(
            building._RUN, name, lambda *args, name=name, stage=stage: (names.append(name), stage(*args))[1]
        )
    return names


def run(settings: dict, **changes: dict) -> Path:
    merged = {**settings, **{key: {**settings.get(key, {}), **value} for key, value in changes.items()}}
    return building.build(parse_recipe(merged), progress=False)


def test_every_stage_once_then_only_what_changed(small: dict, ran: list[str], capsys) -> None:
    out = Path(small["out"])
    model = run(small)
    shown = capsys.readouterr().out
    assert ran == list(STAGES)
    assert model == out / "merge" / "model"
    card = (out / "card" / "README.md").read_text(encoding="utf-8")
    for part in (
        "| regional | the global parent, fine-tuned as below |",
        "| train | ",
        "| merge | ",
        "| eval | ",
    ):
        assert part in card, part
    assert "(sweep.png)" in card and "(loss.png)" in card and "lead on global parent" in card
    assert (out / "merge" / "model" / "README.md").read_text(encoding="utf-8") == card
    for stage in STAGES:
        manifest = read_manifest(out / stage)
        assert manifest["stage"] == stage and manifest["seed"] == 0 and manifest["inputs"]
    for file in (
        "data/train.parquet",
        "data/dev.parquet",
        "data/eval.parquet",
        "train/metrics.jsonl",
        "train/loss.png",
        "merge/sweep.json",
        "merge/sweep.csv",
        "merge/sweep.png",
        "eval/results.json",
        "eval/table.md",
        "card/README.md",
        "merge/model/README.md",
        "merge/model/manifest.json",
        "asked.webp",
        "recipe.yaml",
    ):
        assert (out / file).stat().st_size > 0, file
    report = json.loads((out / "eval" / "results.json").read_text())
    assert list(report["models"]) == ["global parent", "regional parent", "merged"]
    assert (
        "merge sweep" in shown
        and "means over the tasks" in shown
        and "English" in shown
        and "sweep.png" in shown
    )
    assert not list(out.rglob("*.tmp-*"))

    ran.clear()
    run(small)
    assert ran == [], "nothing has changed"
    assert "means over the tasks" in capsys.readouterr().out, "but everything is shown again"
    run(small, card={"title": "Another"})
    assert ran == ["card"]
    ran.clear()
    run(small, train={"threads": 1, "save_every": 7})
    assert "train" not in ran, "these change how it runs, not what comes out"
    ran.clear()
    run(small, train={"lr": 2e-3})
    assert ran == ["train", "merge", "eval", "card"]


def test_the_resolved_recipe_repeats_the_run(small: dict, ran: list[str], cli: Callable) -> None:
    out = Path(small["out"])
    first = Path(small["out"]).with_name("small.yaml")
    first.write_text(yaml.safe_dump(small), encoding="utf-8")
    for verb in (("data", "samples"), ("train",)):
        done = cli(*verb, first, "--set", "train.lr=2e-3", "--quiet")
        assert done.code == 0, done.err
    assert ran == ["data", "train"]
    done = cli("train", out / "recipe.yaml", "--quiet")
    assert done.code == 0 and ran == ["data", "train"], "the same settings: nothing to do"


def test_a_stage_that_failed_is_not_done(
    small: dict, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(small)
    building.run_stage("data", recipe, progress=False)
    real = building._RUN["train"]

    def stopped(recipe: Recipe, root: Path, *args: object) -> None:
        (root / "train").mkdir()
        (root / "train" / "half").write_text("written")
        raise KeyboardInterrupt

    monkeypatch.setitem(building._RUN, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        building.run_stage("train", recipe, progress=False)
    with pytest.raises(SeavlmError, match="First run: seavlm train"):
        building.run_stage("merge", recipe, progress=False)
    monkeypatch.setitem(building._RUN, "train", real)
    assert building.run_stage("train", recipe, progress=False)
    assert not building.run_stage("train", recipe, progress=False)


def test_edited_outputs_make_the_next_stages_run_again(small: dict, ran: list[str]) -> None:
    recipe = parse_recipe(small)
    for stage in ("data", "train"):
        building.run_stage(stage, recipe, progress=False)
    from seavlm.data.samples import read_samples, write_samples

    train = Path(small["out"]) / "data" / "train.parquet"
    rows = list(read_samples(train))
    write_samples(train, rows[: len(rows) // 2])
    ran.clear()
    building.run_stage("train", recipe, progress=False)
    assert ran == ["train"]


def test_two_runs_in_one_folder_are_refused(small: dict) -> None:
    recipe = parse_recipe(small)
    with building._alone(Path(small["out"])), pytest.raises(SeavlmError, match="another run is working in"):
        building.run_stage("data", recipe, progress=False)


def test_stages_can_be_switched_off(small: dict, ran: list[str]) -> None:
    model = run(small, merge={"enabled": False})
    assert model == Path(small["out"]) / "train" / "model"
    assert ran == ["data", "train", "eval", "card"]
    report = json.loads((Path(small["out"]) / "eval" / "results.json").read_text())
    assert (
        list(report["models"]) == ["global parent", "regional parent"]
        and report["final"] == "regional parent"
    )
    ran.clear()
    run(small, merge={"enabled": False})
    assert ran == [], "the card beside the model does not make it another model"
    ran.clear()
    run(small, train={"enabled": False})
    assert ran == ["eval", "card"], "the base alone is asked, with the same questions"
    card = (Path(small["out"]) / "card" / "README.md").read_text(encoding="utf-8")
    assert "## Evaluation" in card and "## Fine-tuning" not in card and "## Data" in card
