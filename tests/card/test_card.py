"""The card says what the manifests say, in a form that the hub reads."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from seavlm import recipe
from seavlm.card.card import render, write_card
from seavlm.errors import SeavlmError
from seavlm.evals.scores import compare, score
from seavlm.evals.tasks import Answerer, Question
from seavlm.merge.search import search
from seavlm.merge.show import curve
from seavlm.text.language import LANGUAGES
from seavlm.train.carbon import footprint


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
def results(questions: list[Question]) -> dict:
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
    return json.loads(json.dumps({"models": models, "final": "merged", "ahead": {"global parent": ahead}}))


@pytest.fixture(scope="module")
def manifests(questions: list[Question]) -> dict[str, dict]:
    def stage(name: str, settings: object, metrics: dict, **extra: object) -> dict:
        return {
            "stage": name,
            "created": "2026-11-23T13:00:00+00:00",
            "duration_s": 12.5,
            "seed": 7,
            "inputs": {"global": "ab" * 32, "regional": "cd" * 32}
            if name == "merge"
            else {"base": "ab" * 32},
            "recipe": settings,
            "metrics": metrics,
            "versions": {"seavlm": "0.1.0"},
            "platform": "Linux",
            **extra,
        }

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
    sources = [
        {
            "what": "drawings",
            "author": "A. Painter",
            "package": "@x/y 1.0",
            "licence": "MIT",
            "url": "https://x.org",
        }
    ]
    carbon = {
        "hours": 13.0,
        "watts": 8 * 620.0,
        "watts_source": "assumed",
        "region": "singapore",
        "kg_per_kwh": 0.419,
        "hardware": "8 x H200",
    }
    carbon["kwh"], carbon["kg_co2e"] = footprint(13.0, 8 * 620.0, 0.419)
    train = {"steps": 800, "samples_seen": 51_200, "loss_first": 4.2, "loss_last": 0.31, "carbon": carbon}
    return {
        "data": stage(
            "data", recipe.Data().model_dump(mode="json"), {"train": counts, "eval": counts}, sources=sources
        ),
        "train": stage("train", recipe.Train().model_dump(mode="json"), train),
        "merge": stage("merge", recipe.Merge().model_dump(mode="json"), sweep),
        "eval": stage("eval", recipe.Eval().model_dump(mode="json"), {}),
    }


@pytest.fixture(scope="module")
def text(manifests: dict, results: dict) -> str:
    card = recipe.Card(authors=["A Lab"], limitations=["Knows no dishes."], license="gemma")
    return render(
        manifests, results, card=card, name="nano", base="google/gemma-3-27b-it", pictures=["sweep.png"]
    )


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


def test_the_published_cards_carbon(text: str) -> None:
    """13 hours on eight H200 at 620 W each, 0.419 kg/kWh: about 27 kg."""
    assert "| 8 x H200 | 13 | 4,960 | 64.5 | 0.419 | **27** |" in text
    assert "assumed, not measured" in text and "Electricity: singapore" in text


def test_measured_power_is_called_measured(manifests: dict, results: dict) -> None:
    carbon = manifests["train"]["metrics"]["carbon"] | {"watts_source": "RAPL+NVML"}
    train = manifests["train"] | {"metrics": manifests["train"]["metrics"] | {"carbon": carbon}}
    shown = render(manifests | {"train": train}, results, card=recipe.Card())
    assert "measured (RAPL+NVML)" in shown and "assumed" not in shown


def test_scores_merge_data_and_settings_are_in_it(text: str, manifests: dict) -> None:
    assert re.search(r"\| Lao \| 0\.0 \[0-\d+\] ! \| 0\.0 \[0-\d+\] ! \|", text)
    assert re.search(r"\| Thai \| 75\.0 \[\d+-\d+\] \|", text)
    assert re.search(r"\| \*\*regional\*\* \| \d+\.\d \| \d+\.\d \| [+-]\d+\.\d \[", text)
    assert re.search(r"\| \*\*0\.1\*\* \| \*\*\d+\.\d \[.*\| chosen \|", text)
    assert "**β = 0.1**" in text and manifests["merge"]["metrics"]["verdict"] in text
    assert "| [drawings](https://x.org) | A. Painter | `@x/y 1.0` | MIT |" in text
    assert "| peak learning rate | 2e-05 |" in text and "| samples seen | 51,200 |" in text
    assert "fluent-3d are in dev and eval only" in text
    assert "![" in text and "(sweep.png)" in text and "loss.png" not in text
    for limit in (
        "Not aligned for safety",
        "10,500,000 parameters",
        "Knows no dishes.",
        "Lao 0.0 %",
        "check (lo)",
    ):
        assert limit in text, limit
    assert "- A Lab" in text and "`abababababab`" in text


def test_what_the_card_tells_to_run_is_python(text: str) -> None:
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        compile(code, "card", "exec")
    assert "seavlm ask picture.png" in text


def test_no_claim_without_a_manifest(manifests: dict) -> None:
    text = render(
        {"train": manifests["train"]}, {}, card=recipe.Card(license="My Own v2"), base="nano-global"
    )
    assert "## Merge" not in text and "## Data" not in text and "## Evaluation" not in text
    data = ModelCard(text).data
    assert data.license == "other" and data.license_name == "my-own-v2"
    assert data.base_model is None and data.eval_results is None  # a built-in name is no hub id
    with pytest.raises(SeavlmError, match="no manifest"):
        render({}, {}, card=recipe.Card())


def test_it_is_written_beside_the_model_with_its_pictures(
    manifests: dict, results: dict, tmp_path: Path
) -> None:
    (tmp_path / "merge").mkdir()
    (tmp_path / "merge" / "sweep.png").write_bytes(curve(manifests["merge"]["metrics"]))
    plots = [tmp_path / "merge" / "sweep.png", tmp_path / "train" / "loss.png"]
    written = write_card(tmp_path / "model", manifests, results, tmp_path / "card", name="nano", plots=plots)
    assert written == tmp_path / "card" / "README.md"
    for folder in ("model", "card"):
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == ["README.md", "sweep.png"]
        assert ModelCard.load(tmp_path / folder / "README.md").data.model_name == "nano"


def test_one_models_results_do_too(manifests: dict, results: dict) -> None:
    text = render(manifests, results["models"]["merged"], card=recipe.Card())
    assert "## Evaluation" in text and "side by side" not in text


def test_a_base_made_from_nothing_says_so(manifests: dict[str, dict], results: dict) -> None:
    tower = {"drawings": 11_701, "note": "trained in one part"}
    init = {**manifests["train"], "stage": "init", "metrics": {"vocabulary": 13_743, "tower": tower}}
    text = render({"init": init, **manifests}, results, card=recipe.Card(), name="nothing")
    assert "13,743 tokens" in text and "11,701 drawings" in text and "trained in one part" in text
    assert "## Parents" not in text
