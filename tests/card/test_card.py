"""The card says what the manifests say, in a form that the hub reads."""

import json
import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from seavlm import recipe
from seavlm.carbon import footprint, gpus, grid
from seavlm.card.card import may_replace, render, write
from seavlm.card.facts import Evaluation, Facts, Stage
from seavlm.errors import SeavlmError
from seavlm.evals.scores import compare, score
from seavlm.evals.tasks import Answerer, Question
from seavlm.merge.search import search
from seavlm.merge.show import curve
from seavlm.text.language import LANGUAGES


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return [
        Question(
            f"{task}-{code}-{i}",
            task,
            code,
            f"c{i}",
            "?",
            ("yes",),
            chance=0.5,
            messages=[{"role": "user", "content": str(i)}],
        )
        for task in ("yesno", "check")
        for code in LANGUAGES
        for i in range(40)
    ]


@pytest.fixture(scope="module")
def evaluation(questions: list[Question]) -> Evaluation:
    """Two models as the evaluation writes them: the second knows more, but no Lao."""
    base = score(
        questions, ["yes" if int(q.concept[1:]) % 2 else "no" for q in questions], name="global parent"
    )
    merged = score(
        questions,
        ["no" if q.language == "lo" else "yes" if int(q.concept[1:]) % 4 else "??" for q in questions],
        name="merged",
    )
    ahead = {
        group: {"mean": d.mean, "low": d.low, "high": d.high} for group, d in compare(merged, base).items()
    }
    models = {"global parent": base.to_dict(), "merged": merged.to_dict()}
    return Evaluation(json.loads(json.dumps(models)), "merged", {"global parent": ahead})


def carbon(hours: float, watts: float, kg_per_kwh: float, **said: object) -> dict:
    kwh, kg = footprint(hours, watts, kg_per_kwh)
    power = {"watts_source": "assumed", "watts_assumed": "8 x H200 at 620 W", "pue": 1.0}
    where = {"region": "singapore", "kg_per_kwh": kg_per_kwh, "intensity_source": "ML CO2 Impact, 2017"}
    figures = {"hours": hours, "watts": watts, "kwh": kwh, "kg_co2e": kg}
    return {"gpus": 8, "hardware": "8 x H200", **power, **where, **figures, **said}


@pytest.fixture(scope="module")
def facts(questions: list[Question], evaluation: Evaluation) -> Facts:
    def stage(name: str, settings: object, metrics: dict, **extra: object) -> Stage:
        inputs = {"global": "ab" * 32, "regional": "cd" * 32} if name == "merge" else {"base": "ab" * 32}
        made = {
            "stage": name,
            "created": "2026-11-23T13:00:00+00:00",
            "duration_s": 12.5,
            "seed": 7,
            "inputs": inputs,
            "recipe": settings,
            "metrics": metrics,
            "versions": {"seavlm": "0.1.0"},
            **extra,
        }
        return Stage(name, made)

    def made(betas: dict[str, float]) -> Answerer:
        known = {0.0: 20, 0.1: 30, 1.0: 25}[betas["default"]]
        return lambda asked: ["yes" if int(one[0]["content"]) < known else "no" for one in asked]

    sweep = search(questions, made, betas=[0.1])
    sweep["merge"] = {"parameters": 10_500_000, "dtype": "bfloat16", "rounding_mean": 1.5e-5}
    counts = {
        "rows": 5000,
        "pictures": 900,
        "tasks": {"name": 5000},
        "languages": dict.fromkeys(LANGUAGES, 454),
    }
    source = {"what": "drawings", "author": "A. Painter", "package": "@x/y 1.0", "licence": "MIT"}
    train = {"steps": 800, "samples_seen": 51_200, "loss_first": 4.2, "loss_last": 0.31}
    train["carbon"] = carbon(13.0, 8 * 620.0, 0.419)
    return Facts(
        "nano",
        "google/gemma-3-27b-it",
        stages=[
            stage(
                "data",
                recipe.Data().model_dump(mode="json"),
                {"train": counts, "eval": counts},
                sources=[source | {"url": "https://x.org"}],
            ),
            stage("train", recipe.Train().model_dump(mode="json"), train),
            stage("merge", recipe.Merge().model_dump(mode="json"), sweep),
        ],
        parents={"the global parent": "ab" * 32, "the regional parent": "cd" * 32},
        evaluations=[evaluation],
        pictures=[Path("merge/sweep.png")],
    )


@pytest.fixture(scope="module")
def text(facts: Facts) -> str:
    return render(facts, recipe.Card(authors=["A Lab"], limitations=["Knows no dishes."], license="gemma"))


def test_the_hub_reads_its_metadata(text: str) -> None:
    card = ModelCard(text)
    data = card.data
    assert data.language == list(LANGUAGES)
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "gemma",
        "transformers",
        "image-text-to-text",
    )
    assert data.base_model == ["google/gemma-3-27b-it"] and data.to_dict()["base_model_relation"] == "merge"
    assert {"merge", "gemma3", "southeast-asia"} <= set(data.tags)
    assert data.model_name == "nano" and len(data.eval_results) == 11 * 3
    lao = [r for r in data.eval_results if r.dataset_config == "lo"]
    assert [r.metric_value for r in lao] == [0.0, 0.0, 0.0]
    thai = [r for r in data.eval_results if r.dataset_config == "th"]
    assert thai[0].metric_value == 75.0 and thai[0].metric_type == "accuracy"
    again = ModelCard(str(card))  # what the hub's own library writes of it is the same
    assert again.data.to_dict() == data.to_dict()
    index = eval_results_to_model_index(data.model_name, data.eval_results)
    assert model_index_to_eval_results(index) == ("nano", data.eval_results)
    assert index == data.to_dict()["model-index"]
    known = {name for name in vars(ModelCardData()) if not name.startswith("_")} | {"model-index"}
    assert set(data.to_dict()) - known == {"base_model_relation", "co2_eq_emissions"}
    emitted = data.to_dict()["co2_eq_emissions"]
    assert emitted["emissions"] == pytest.approx(27_017, abs=1), "in grams"
    assert emitted["geographical_location"] == "singapore" and emitted["hardware_used"] == "8 x H200"


def test_what_the_hub_knows_is_named(facts: Facts) -> None:
    """Licences of the hub's list as they are, others by name; data sets by their id; parents without @rev."""
    source = {"what": "captions", "url": "https://huggingface.co/datasets/SEACrowd/sea-vl_crowdsourcing"}
    data = {"recipe": {"source": "my/set"}, "sources": [source | {"licence": "CC-BY-SA-4.0"}]}
    stages = [Stage("data", data), Stage("merge", {"recipe": {"method": "linear"}, "metrics": MERGED})]
    cached = "cache/hub/models--aisingapore--x/snapshots/0123abc"
    parents = {"google/gemma-3-4b-it@main": "", cached: "ab" * 32, "nano": ""}
    told = Facts("m", "google/gemma-3-4b-it@main", stages, parents)
    card = ModelCard(render(told, recipe.Card(license="CC-BY-SA-4.0"))).data
    assert card.license == "cc-by-sa-4.0" and card.license_name is None
    assert card.base_model == ["google/gemma-3-4b-it", "aisingapore/x"]
    assert card.datasets == ["my/set", "SEACrowd/sea-vl_crowdsourcing"]
    card = ModelCard(render(replace(told, stages=[stages[0]]), recipe.Card(license="My Own v2"))).data
    assert (card.license, card.license_name) == ("other", "my-own-v2")
    assert card.to_dict()["base_model_relation"] == "finetune"


MERGED = {"tensors": 3, "parameters": 10, "dtype": "bfloat16", "rounding_mean": 1e-6}


def test_the_published_cards_carbon(text: str, facts: Facts) -> None:
    """13 hours of a node of eight H200, 27 kg: see tests/test_carbon.py for what has to be assumed."""
    row = "| train | 8 x H200 | 13 | 104 | 4,960 | 64.5 | 27 | assumed: 8 x H200 at 620 W |"
    assert row in text and "| **all** | | **13** | **104** | | **64.5** | **27** | |" in text
    assert "singapore 0.419 (ML CO2 Impact, 2017)" in text and "PUE is 1" in text
    assert "Not recorded, and in no sum: merge." in text
    region = "asia-southeast1"
    said = carbon(13, gpus("8 x H200")[2], grid(region).kg_per_kwh, region=region)
    shown = render(replace(facts, stages=[Stage("train", {"metrics": {"carbon": said}})]))
    assert "| train | 8 x H200 | 13 | 104 | 5,600 | 72.8 | 26.7 |" in shown


def test_power_is_called_what_it_is(facts: Facts) -> None:
    def shown(**said: object) -> str:
        made = {"metrics": {"carbon": carbon(1, 100, 0.5) | said}}
        return render(replace(facts, stages=[Stage("train", made)]))

    assert "| measured (RAPL+NVML) |" in shown(watts_source="RAPL+NVML", watts_assumed="")
    half = shown(watts_source="NVML", watts_assumed="16 cores at 10 W")
    assert "| measured (NVML); assumed: 16 cores at 10 W |" in half
    assert "| given |" in shown(watts_source="given", watts_assumed="")
    assert "estimates what it cannot measure" in shown(watts_source="codecarbon 3.3.2", watts_assumed="")
    assert "PUE: 1.3." in shown(pue=1.3)
    old = {
        "hours": 1.0,
        "watts": 50.0,
        "watts_source": "RAPL",
        "kwh": 0.05,
        "kg_per_kwh": 0.4,
        "kg_co2e": 0.02,
    }
    earlier = render(replace(facts, stages=[Stage("train", {"metrics": {"carbon": old}})]))
    assert "| train | not recorded | 1 |  | 50 | 0.05 | 0.02 | measured (RAPL) |" in earlier


def test_an_endpoints_energy_is_not_known(facts: Facts, evaluation: Evaluation) -> None:
    made = {"metrics": {"carbon": {"unknown": "the model ran behind an endpoint"}}}
    stages = [*facts.stages, Stage("eval", made, note="flags")]
    shown = render(replace(facts, stages=stages, evaluations=[replace(evaluation, remote=True)]))
    assert "Not known, and in no sum: eval (flags) (asked through an endpoint)." in shown
    assert "that it had these weights was not checked" in shown
    assert "| **all** | | **13** |" in shown


def test_scores_merge_data_and_settings_are_in_it(text: str, facts: Facts) -> None:
    assert re.search(r"\| Lao \| 0\.0 \[0-\d+\]\xa0`!` \| 0\.0 \[0-\d+\]\xa0`!` \| .* \| -100\.0 \|", text)
    assert re.search(r"\| Thai \| 75\.0 \[\d+-\d+\]\xa0`f` \|.* \| 50\.0 \| 25\.0% \|", text)
    assert re.search(r"\| \*\*regional\*\* \| \d+\.\d \| \d+\.\d \| [+-]\d+\.\d \[", text)
    assert re.search(r"\| \*\*0\.1\*\* \| \*\*\d+\.\d \[.*\| chosen \|", text)
    assert "**0.1** for all" in text and facts.first("merge")["metrics"]["verdict"] in text
    assert "| [drawings](https://x.org) | A. Painter | `@x/y 1.0` | MIT |" in text
    assert "| peak learning rate | 2e-05 |" in text and "| samples seen | 51,200 |" in text
    assert "fluent-3d are in dev and eval only" in text
    assert "![" in text and "(sweep.png)" in text and "loss.png" not in text
    assert "| global | `google/gemma-3-27b-it` | `abababababab` |" in text
    for limit in (
        "Not aligned for safety",
        "10,500,000 parameters",
        "Knows no dishes.",
        "Lao 0.0 %",
        "check (lo)",
    ):
        assert limit in text, limit
    assert "- A Lab" in text


def test_many_tasks_get_tables_of_their_own(questions: list[Question], facts: Facts) -> None:
    asked = [replace(q, id=f"{q.id}-{n}", task=f"{q.task}{n}") for n in range(3) for q in questions]
    result = score(asked, ["yes" if q.language != "lo" else "no" for q in asked], name="m").to_dict()
    about = {
        "suite": "mine",
        "version": "1.2.0",
        "about": "yes or no",
        "licence": "MIT",
        "left_out": {"x": 3},
    }
    text = render(replace(facts, evaluations=[Evaluation({"m": result | {"about": about}}, "m")]))
    assert "### mine 1.2.0" in text and "2,640 questions: yes or no. Questions: MIT." in text
    assert "| task | my | en | id | km | lo | ms | zh | tl | ta | th | vi |" in text
    assert re.search(r"\| check2 \| 100±\d+ \| .* \| 0±\d+\xa0! \|", text)
    assert re.search(r"\| yesno0 \| 440 \| 50\.0 \| 90\.9 \[\d+-\d+\] \| 81\.8 \| 0\.0% \|", text)
    assert "Left out: 3 (x)." in text and "- yesno0: worse than guessing (lo)" in text


def test_what_the_card_tells_to_run_is_python(text: str) -> None:
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        compile(code, "card", "exec")
    assert "seavlm ask picture.png" in text


def test_no_claim_without_a_manifest(facts: Facts) -> None:
    text = render(Facts("x", "nano-global", stages=facts.of("train")), recipe.Card())
    assert "## Merge" not in text and "## Data" not in text and "## Evaluation" not in text
    assert "Not evaluated" in text
    data = ModelCard(text).data
    assert data.base_model is None and data.eval_results is None  # a built-in name is no hub id
    with pytest.raises(SeavlmError, match="no manifest"):
        render(Facts("x"))


def test_what_another_version_lacks_is_told(facts: Facts) -> None:
    strange = Stage("merge", {"recipe": {}, "metrics": {"of": "old"}, "versions": {"seavlm": "0.0.1"}})
    with pytest.raises(SeavlmError, match=r"0\.0\.1.*tensors") as told:
        render(replace(facts, stages=[strange]))
    assert "again" in told.value.hint


def test_it_is_written_with_its_pictures(facts: Facts, tmp_path: Path) -> None:
    picture = tmp_path / "merge" / "sweep.png"
    picture.parent.mkdir()
    picture.write_bytes(curve(facts.first("merge")["metrics"]))
    told = replace(facts, pictures=[picture])
    for folder in ("model", "card"):
        out = tmp_path / folder / "README.md"
        assert write(told, out) == out
        assert sorted(p.name for p in out.parent.iterdir()) == ["README.md", "sweep.png"]
        assert ModelCard.load(out).data.model_name == "nano"
    may_replace(out, force=False)
    assert write(told, picture.with_name("README.md")).exists(), "a picture that is there stays"


def test_a_full_disk_leaves_no_half_of_a_card(facts: Facts, tmp_path: Path) -> None:
    """Also the card and the picture that were there stay as they were."""
    told = replace(facts, pictures=[tmp_path / "sweep.png"])
    told.pictures[0].write_bytes(curve(facts.first("merge")["metrics"]))
    out = tmp_path / "card" / "README.md"
    write(told, out)
    told.pictures[0].write_bytes(bytes(50_000))
    before = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))  # what a disk has left
    try:
        with pytest.raises(OSError):
            write(told, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == before


def test_what_others_have_written_stays(tmp_path: Path) -> None:
    out = tmp_path / "README.md"
    out.write_text("---\nlicense: mit\ntags:\n- seavlm-like\n---\n# By hand\n- seavlm\n")
    with pytest.raises(SeavlmError, match="not written it"):
        may_replace(out, force=False)
    may_replace(out, force=True)


def test_a_base_made_from_nothing_says_so(facts: Facts) -> None:
    tower = {"drawings": 11_701, "note": "trained in one part", "carbon": carbon(2, 100, 0.5)}
    init = Stage("init", {"metrics": {"vocabulary": 13_743, "tower": tower}})
    text = render(replace(facts, stages=[init, *facts.stages]))
    assert "13,743 tokens" in text and "11,701 drawings" in text and "trained in one part" in text
    assert "## Parents" not in text
    assert "| vision tower, before init |" in text and "| **all** | | **15** |" in text
