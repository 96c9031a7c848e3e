"""A card from folders alone: what real commands on nano have written, found, tied together, or refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from seavlm import build, manifest
from seavlm.card.card import _slug, render
from seavlm.card.facts import gather, parents_of
from seavlm.data import run as data
from seavlm.errors import SeavlmError
from seavlm.merge.delta import apply_delta, make_delta
from seavlm.merge.stream import merge_recipe
from seavlm.merge.unwritten import open_parent
from seavlm.recipe import Data, read_mapping
from seavlm.weights.refs import resolve

RECIPE = {
    "merge_method": "task_arithmetic",
    "base_model": "nano-global",
    "models": [{"model": "nano", "parameters": {"weight": 0.5}}],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge by a recipe, another, a sweep, and runs of the merge and of a parent."""
    out = tmp_path_factory.mktemp("card")
    merge_recipe(RECIPE, out / "merged", open_parent=open_parent)
    other = {"regional": "nano", "global": "nano-global", "beta": 0.7}
    merge_recipe(other, out / "other", open_parent=open_parent)
    asked: dict[str, Any] = {"suite": "flags", "languages": ["en", "lo"], "limit": 3, "progress": False}
    for model in ("merged", "nano"):
        build.evaluate_model(
            model if model == "nano" else out / model, out=out / f"{model}-flags", max_new_tokens=8, **asked
        )
    few = Data(eval_languages=["en", "lo"], tasks={"name": 1}, concepts=12, n=2, n_dev=16, n_eval=2)
    data.run(few, out=out / "data", seed=0, progress=False)
    build.sweep_models(
        "nano", "nano-global", out / "sweep", data=out / "data", betas=[0.0, 1.0], max_new_tokens=4
    )
    return out


@pytest.fixture
def card(cli: Callable, place: Path, tmp_path: Path) -> Callable[..., Any]:
    """Runs `seavlm card` on folders of `place`; what it said, and the card's text where there is one."""

    def run(*what: str | Path, **options: str) -> SimpleNamespace:
        out = tmp_path / "card.md"
        out.unlink(missing_ok=True)
        flags = [part for name, value in options.items() for part in (f"--{name}", value)]
        done = cli(
            "card", *(place / one if not Path(one).is_absolute() else one for one in what), "-o", out, *flags
        )
        text = out.read_text(encoding="utf-8") if out.exists() else ""
        return SimpleNamespace(code=done.code, err=done.err, text=text)

    return run


def changed(place: Path, name: str, to: Path, **parts: Any) -> Path:
    """A copy of a folder with another manifest."""
    copy = to / name
    shutil.copytree(place / name, copy)
    made = manifest.read_manifest(copy)
    manifest.write_json(copy / manifest.MANIFEST, {**made, **parts})
    return copy


def test_a_suite_in_another_script_has_an_id_of_its_own() -> None:
    slugs = [_slug(name) for name in ("flags", "my own", "ខ្មែរ", "ภาพ")]
    assert slugs[:2] == ["flags", "my-own"] and len(set(slugs)) == 4
    assert all(re.fullmatch("[a-z0-9-]+", slug) for slug in slugs)


def test_all_of_it_is_in_the_card(card: Callable, tmp_path: Path) -> None:
    done = card("merged", "sweep", "merged-flags", "nano-flags", set="title=A merge")
    assert done.code == 0, done.err
    text = done.text
    assert "# A merge" in text and (tmp_path / "pareto.png").is_file()
    assert not (tmp_path / "loss.png").exists(), "that of a parent, which the card does not show"
    assert "`task_arithmetic`. Sum of differences" in text and "weight: 0.5" in text
    assert re.search(r"\| global \| `nano-global` \| `[0-9a-f]{12}` \|", text)
    assert re.search(r"\| regional \| `nano` \| `[0-9a-f]{12}` \|", text)
    assert "Samples of `nano` are made from the picture set" in text and "CC-BY-SA-4.0" in text
    assert "## Fine-tuning of nano" in text and "`nano-global` has no parent" in text
    assert "### Search" in text and "chosen" in text and "![Global score against" in text
    assert "This model is not the one that the search chose" in text
    assert "### flags 1.0.0" in text and "CC-BY-4.0 (flags)" in text
    assert re.search(r"\| \| merged \| nano \| lead on nano \|", text)
    assert re.search(r"\| \*\*all\*\* \| \d+\.\d \| \d+\.\d \| [+-]\d+\.\d \[", text)
    for stage in ("sweep", "merge", "eval (flags)", "eval (flags) of nano", "train of nano"):
        assert re.search(rf"^\| {re.escape(stage)} \| .* \| .*(assumed|measured|given)", text, re.M), stage
    assert str(place_of(text)) == "", "no path of this machine"
    front = ModelCard(text).data
    assert front.model_name == "merged" and front.to_dict()["model-index"][0]["results"]
    assert {one.dataset_type for one in front.eval_results} == {"seavlm-flags"}
    assert front.to_dict()["co2_eq_emissions"]["emissions"] > 0


def place_of(text: str) -> str:
    found = re.search(r"(?<![\w./:])/(?:home|root|tmp|var|private)/\S+", text)
    return found[0] if found else ""


def test_energy_is_noted_by_what_ran_here(place: Path) -> None:
    for folder in ("merged", "merged-flags", "sweep"):
        carbon = manifest.read_manifest(place / folder)["metrics"]["carbon"]
        assert carbon["kwh"] > 0 and carbon["hardware"] and carbon["intensity_source"], folder
    before = manifest.read_manifest(place / "nano-flags")["metrics"]["carbon"]["hours"]
    build.evaluate_model(
        "nano",
        out=place / "nano-flags",
        suite="flags",
        languages=["en", "lo"],
        limit=3,
        max_new_tokens=8,
        progress=False,
    )
    after = manifest.read_manifest(place / "nano-flags")["metrics"]["carbon"]["hours"]
    assert before < after < 2 * before + 0.01, "asked nothing again, and lost nothing of what it took"


def test_the_model_alone_and_a_builtin(card: Callable, cli: Callable, place: Path, tmp_path: Path) -> None:
    done = card("merged")
    assert done.code == 0 and "Not evaluated" in done.text and "## Merge" in done.text
    done = cli("card", "nano", place / "nano-flags", "--out", tmp_path / "nano")
    text = (tmp_path / "nano" / "README.md").read_text(encoding="utf-8")
    assert done.code == 0 and "# nano\n" in text and "## Fine-tuning\n" in text
    assert {path.name for path in (tmp_path / "nano").iterdir()} >= {"README.md", "sweep.png", "loss.png"}
    done = cli("card", "nano")
    assert done.code == 2 and "--out" in done.err


def test_the_card_leaves_the_model_the_same(cli: Callable, place: Path) -> None:
    """A card is put beside the model, and its runs and merges still belong to it."""
    for _ in range(2):
        done = cli("card", place / "merged", place / "merged-flags", place / "sweep")
        assert done.code == 0, done.err
    assert (place / "merged" / "README.md").is_file() and (place / "merged" / "pareto.png").is_file()


def test_what_belongs_to_another_model_is_refused(card: Callable, place: Path, tmp_path: Path) -> None:
    asked = {"model": manifest.sha256_tree(place / "other"), "questions": "ab" * 32}
    for folder in (place / "other", changed(place, "merged-flags", tmp_path, inputs=asked)):
        done = card("merged", "merged-flags", folder)
        assert done.code == 2 and not done.text
        assert str(folder) in done.err and "another model" in done.err and done.err.count("\n") == 1


def test_a_sweep_of_others_is_refused(card: Callable, place: Path, tmp_path: Path) -> None:
    strange = changed(place, "sweep", tmp_path, inputs={"regional": "ab" * 32, "global": "cd" * 32})
    assert "another model" in card("merged", strange).err


def test_a_parents_runs_are_no_scores_of_the_model(card: Callable) -> None:
    done = card("merged", "nano-flags")
    assert done.code == 2 and "none of the runs is of" in done.err


def test_an_endpoints_run_says_so(card: Callable, place: Path, tmp_path: Path) -> None:
    made = manifest.read_manifest(place / "merged-flags")
    unknown = made["metrics"] | {"carbon": {"unknown": "the model ran behind an endpoint"}}
    served = changed(
        place, "merged-flags", tmp_path, metrics=unknown, inputs={"questions": made["inputs"]["questions"]}
    )
    text = card("merged", served).text
    assert "through an endpoint: that it had these weights was not checked" in text
    assert "Not known, and in no sum: eval (flags)" in text


def test_no_manifest_a_broken_one_and_one_of_another_version(
    card: Callable, place: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(place / "merged", bare)
    os.unlink(bare / manifest.MANIFEST)
    done = card(bare)
    assert done.code == 2 and "no manifest" in done.err and "seavlm eval" in done.err
    (bare / manifest.MANIFEST).write_text('{"stage": "mer')
    assert "cannot be read" in card(bare).err
    (bare / manifest.MANIFEST).write_text('{"made_by": 7}')
    assert "has no stage" in card(bare).err
    old = changed(place, "merged-flags", tmp_path, metrics=["of", "old"], versions={"seavlm": "0.0.1"})
    done = card("merged", old)
    assert done.code == 2 and "another version of seavlm (0.0.1)" in done.err
    lacking = changed(place, "sweep", tmp_path, metrics={"chosen": 1}, versions={"seavlm": "0.0.2"})
    done = card("merged", lacking)
    assert done.code == 2 and "0.0.2" in done.err and "again" in done.err
    done = card("merged", "nowhere")
    assert done.code == 2 and "there is no folder" in done.err
    done = card("merged", set="colour=red")
    assert done.code == 2 and "colour" in done.err


def test_a_parent_that_has_changed_is_not_followed(card: Callable, place: Path, tmp_path: Path) -> None:
    parent = tmp_path / "tuned"
    shutil.copytree(place / "other", parent)
    raw = {"regional": str(parent), "global": "nano-global", "beta": 0.5}
    merge_recipe(raw, tmp_path / "again", open_parent=open_parent)
    assert list(parents_of(manifest.read_manifest(tmp_path / "again")).values()) == [
        str(parent),
        "nano-global",
    ]
    done = card(tmp_path / "again")
    assert "### Recipe of tuned" in done.text and str(tmp_path) not in done.text and not done.err
    (parent / "config.json").write_text(json.dumps({"changed": True}))
    done = card(tmp_path / "again")
    assert done.code == 0 and "has changed since" in done.err and "### Recipe of tuned" not in done.text


def test_a_card_by_hand_is_not_written_over(cli: Callable, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "README.md"
    out.write_text("# Mine\n")
    done = cli("card", place / "merged", "-o", out)
    assert done.code == 2 and "--force" in done.err and out.read_text() == "# Mine\n"
    assert cli("card", place / "merged", "-o", out, "--force").code == 0


def test_help_teaches(cli: Callable) -> None:
    shown = cli("card", "--help").out
    for word in ("SEAVLM_REGION", "SEAVLM_WATTS", "SEAVLM_PUE", "hashes", "--set license=gemma"):
        assert word in shown, word


def test_a_build_is_tied_by_its_hashes(place: Path, tmp_path: Path) -> None:
    """init -> data -> train -> merge, each known by what it was made from; the base is the model's own."""
    for name, model in {
        "init": resolve("nano-global"),
        "train": resolve("nano"),
        "merge": place / "other",
    }.items():
        shutil.copytree(model, tmp_path / name / "model")
        (tmp_path / name / "model" / manifest.MANIFEST).unlink()
    shutil.copytree(place / "data", tmp_path / "data")
    base, regional = (manifest.sha256_tree(tmp_path / name / "model") for name in ("init", "train"))
    samples = manifest.sha256_file(tmp_path / "data" / "train.parquet")
    made: dict[str, tuple[dict, dict]] = {
        "init": ({}, {"vocabulary": 13_743}),
        "train": ({"base": base, "data": samples}, {"steps": 7}),
        "merge": ({"global": base, "regional": regional}, {"parameters": 9}),
    }
    for stage, (inputs, metrics) in made.items():
        more = {"tensors": 3, "dtype": "bfloat16"} if stage == "merge" else {}
        manifest.write_manifest(
            tmp_path / stage, stage=stage, recipe={}, seed=0, inputs=inputs, metrics=metrics | more
        )
    found = gather(tmp_path / "merge" / "model", [tmp_path])
    assert [stage.label for stage in found.stages] == ["init", "data", "train", "merge"]
    assert found.name == tmp_path.name
    assert found.parents == {"the global parent": base, "the regional parent": regional}
    text = render(found)
    assert "No parent: a fresh decoder" in text and "## Fine-tuning\n" in text and "| steps | 7 |" in text
    alone = gather(tmp_path / "merge" / "model", [])  # the train stage and its data are found beside it
    assert [stage.label for stage in alone.stages] == ["data", "train", "merge"]
    with pytest.raises(SeavlmError, match="another model"):
        gather(tmp_path / "init" / "model", [tmp_path / "train"])


def test_a_delta_is_its_models_or_a_parent(card: Callable, place: Path, tmp_path: Path) -> None:
    make_delta(resolve("nano-global"), place / "other", tmp_path / "delta")
    told = "Kept as its difference from `nano-global"
    assert told in card("other", tmp_path / "delta").text
    apply_delta(resolve("nano-global"), tmp_path / "delta", tmp_path / "half", beta=0.5)
    assert card(tmp_path / "half", tmp_path / "delta").text.count(told) == 1
    assert "another model" in card("merged", tmp_path / "delta").err


def test_what_the_search_chose_is_not_said_to_be_another(card: Callable, place: Path, tmp_path: Path) -> None:
    best = read_mapping(place / "sweep" / "best.yaml")
    merge_recipe(best, tmp_path / "best", open_parent=open_parent)
    text = card(tmp_path / "best", "sweep").text
    assert "### Search" in text and "not the one that the search chose" not in text
