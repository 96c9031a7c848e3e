"""A sweep whose answer is known: the answerer reads beta back out of the merged weights."""

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from seavlm import recipe
from seavlm.errors import SeavlmError
from seavlm.evals.tasks import Answerer, load_questions
from seavlm.merge.sweep import run, summarise
from seavlm.model.config import Gemma3Config, TextConfig
from seavlm.model.gemma3 import Gemma3
from seavlm.text.language import LANGUAGES
from seavlm.weights.checkpoint import open_checkpoint, save_checkpoint

CONCEPTS = 40
CONFIG = Gemma3Config(
    text=TextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
    )
)
NORM = "language_model.norm.weight"


def parent(path: Path, value: float) -> Path:
    """A random small model whose last norm holds `value`: 0 in the global parent, 1 in the regional one."""
    torch.manual_seed(int(value))
    tensors = {name: tensor.detach() for name, tensor in Gemma3(CONFIG).state_dict().items()}
    tensors[NORM] = torch.full_like(tensors[NORM], value)
    save_checkpoint(path, CONFIG, tensors.items())
    return path


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("parents")
    return parent(root / "global", 0.0), parent(root / "regional", 1.0)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One yes/no question about each concept in each language; the prompt numbers the concepts."""
    rows = [
        {
            "id": f"{code}-{concept}",
            "task": "yesno",
            "language": code,
            "messages": [{"role": "user", "content": [{"type": "text", "text": f"{code} {concept}"}]}],
            "images": [],
            "meta": json.dumps({"concept": f"c{concept}", "answer": "yes"}),
        }
        for code in LANGUAGES
        for concept in range(CONCEPTS)
    ]
    path = tmp_path_factory.mktemp("data") / "dev.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def knows(beta: float, code: str) -> float:
    """The share of concepts that the merge at beta knows: the usual curves, the best weighted at 0.3."""
    if code in ("en", "zh"):
        return 0.9 - 0.8 * beta**2
    return 0.2 + 2.5 * beta if beta <= 0.3 else 0.95 - 0.5 * (beta - 0.3)


class Factory:
    """Makes answerers that read beta from the merged file; counts what is merged and asked."""

    def __init__(self, dies_at: float | None = None) -> None:
        self.betas: list[float] = []
        self.asked = 0
        self.dies_at = dies_at

    def __call__(self, path: Path) -> Answerer:
        norm = open_checkpoint(path).get(NORM)
        beta = round(float(norm[0]), 6)
        assert torch.equal(norm, torch.full_like(norm, norm[0]))
        self.betas.append(beta)

        def answer(batch: list[list[dict]]) -> list[str]:
            if beta == self.dies_at:
                raise KeyboardInterrupt
            self.asked += len(batch)
            asked = [messages[-1]["content"][-1]["text"].split() for messages in batch]
            return ["yes" if int(concept) < CONCEPTS * knows(beta, code) else "no" for code, concept in asked]

        return answer


def sweep(factory: Factory, parents: tuple[Path, Path], questions: Path, out: Path, **changes) -> dict:
    cfg = recipe.Merge(**{"betas": [0.1, 0.3, 0.6], **changes})
    return run(
        cfg,
        global_parent=parents[0],
        regional_parent=parents[1],
        questions_parquet=questions,
        out=out,
        answerer_factory=factory,
        progress=False,
    )


def test_the_best_beta_is_found_and_its_model_kept(
    parents: tuple[Path, Path], questions: Path, tmp_path: Path
) -> None:
    factory = Factory()
    report = sweep(factory, parents, questions, tmp_path)
    assert factory.betas == [0.0, 0.1, 0.3, 0.6, 1.0]  # the parents are in the grid unasked
    assert report["best_beta"] == 0.3 and report["better_parent"] == 0.0 and not report["inside_noise"]
    assert "higher than the better parent (global)" in report["verdict"]

    best = next(row for row in report["rows"] if row["beta"] == 0.3)
    known = {
        code: sum(i < CONCEPTS * knows(0.3, code) for i in range(CONCEPTS)) / CONCEPTS for code in LANGUAGES
    }
    assert best["languages"] == pytest.approx(known)
    score = 0.43 * known["en"] + 0.57 * known["th"]
    assert best["score"]["mean"] == pytest.approx(score)
    assert all(row["score"]["low"] < row["score"]["mean"] < row["score"]["high"] for row in report["rows"])
    assert sum(row["wins"] for row in report["rows"]) == pytest.approx(1)

    kept = open_checkpoint(tmp_path / "model")
    g, r = (open_checkpoint(path) for path in parents)
    for name in kept.names():
        expected = 0.3 * r.get(name).double() + 0.7 * g.get(name).double()
        torch.testing.assert_close(kept.get(name).double(), expected, rtol=1e-6, atol=1e-7)

    assert json.loads((tmp_path / "sweep.json").read_text())["rows"] == report["rows"]
    lines = list(csv.DictReader(io.StringIO((tmp_path / "sweep.csv").read_text())))
    assert [float(line["beta"]) for line in lines] == [0.0, 0.1, 0.3, 0.6, 1.0]
    assert float(lines[2]["score_mean"]) == pytest.approx(score, abs=1e-6)
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.format == "PNG" and picture.width >= 1000
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["stage"] == "merge" and set(manifest["inputs"]) == {"global", "regional", "questions"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "betas", "manifest.json", "model", "sweep.csv", "sweep.json", "sweep.png",
    ]  # fmt: skip


def test_alpha_decides_what_is_best(parents: tuple[Path, Path], questions: Path, tmp_path: Path) -> None:
    assert sweep(Factory(), parents, questions, tmp_path / "a", betas=[0.3], alpha=1.0)["best_beta"] == 0.0
    regional = sweep(Factory(), parents, questions, tmp_path / "b", betas=[0.3], alpha=0.0)
    assert regional["best_beta"] == 0.3 and regional["better_parent"] == 1.0


def test_a_killed_sweep_asks_only_what_is_missing(
    parents: tuple[Path, Path], questions: Path, tmp_path: Path
) -> None:
    whole = sweep(Factory(), parents, questions, tmp_path / "whole")["rows"]
    with pytest.raises(KeyboardInterrupt):
        sweep(Factory(dies_at=0.6), parents, questions, tmp_path / "killed")
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["betas"]  # no half model, no tmp
    rest = Factory()
    resumed = sweep(rest, parents, questions, tmp_path / "killed")
    assert rest.betas == [0.6, 1.0] and rest.asked == 2 * CONCEPTS * len(LANGUAGES)
    assert resumed["rows"] == whole
    more = Factory()
    sweep(more, parents, questions, tmp_path / "killed", betas=[0.1, 0.2, 0.3, 0.6])
    assert more.betas == [0.2]  # a finer grid costs only the new betas


def test_a_lead_inside_the_noise_is_called_that(questions: Path) -> None:
    from seavlm.evals.scores import score

    asked = load_questions(questions)
    base = ["yes" if index % 3 else "no" for index in range(len(asked))]
    luck = list(base)
    luck[0] = luck[3] = "yes"
    parent, merged = score(asked, base), score(asked, luck)
    report = summarise([0.0, 0.5, 1.0], [parent, merged, parent], alpha=0.43)
    assert report["best_beta"] == 0.5 and report["gain"]["mean"] > 0
    assert report["inside_noise"] and "inside the noise" in report["verdict"]
    tie = summarise([0.0, 0.5, 1.0], [parent, parent, parent], alpha=0.43)
    assert tie["best_beta"] == 0.0 and "No merge scores higher" in tie["verdict"]


def test_questions_must_cover_both_suites(
    parents: tuple[Path, Path], questions: Path, tmp_path: Path
) -> None:
    rows = [row for row in pq.read_table(questions).to_pylist() if row["language"] not in ("en", "zh")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "regional.parquet")
    factory = Factory()
    with pytest.raises(SeavlmError, match="no question for the global suite"):
        sweep(factory, parents, tmp_path / "regional.parquet", tmp_path / "out")
    assert factory.betas == [] and not (tmp_path / "out").exists()
