"""The data stage: what it writes, what its manifest says, and what stays when it fails."""

from pathlib import Path

import pytest

from seavlm import recipe
from seavlm.data import run as stage
from seavlm.data.pictures import load_pictures
from seavlm.data.samples import read_samples
from seavlm.errors import SeavlmError
from seavlm.manifest import read_manifest, sha256_file

SMALL = {"n": 66, "n_eval": 66, "n_dev": 33, "concepts": ["animal-mammal"]}


def test_files_and_manifest(tmp_path: Path) -> None:
    cfg = recipe.Data(**SMALL, languages=["lo", "th"], tasks={"name": 1, "choose": 1})
    metrics = stage.run(cfg, out=tmp_path / "data", seed=7, progress=False)
    manifest = read_manifest(tmp_path / "data")
    assert manifest["stage"] == "data" and manifest["seed"] == 7 and manifest["metrics"] == metrics
    assert manifest["inputs"] == stage.inputs(cfg) and "templates.yaml" in manifest["inputs"]
    assert recipe.Data(**manifest["recipe"]) == cfg
    assert sorted(p.name for p in tmp_path.rglob("*.parquet")) == [
        "dev.parquet",
        "eval.parquet",
        "train.parquet",
    ]
    for name, digest in manifest["files"].items():
        assert sha256_file(tmp_path / "data" / name) == digest
    trained = list(read_samples(tmp_path / "data" / "train.parquet"))
    assert len(trained) == 66 == metrics["train"]["rows"]
    assert metrics["train"]["tasks"] == {"choose": 33, "name": 33}
    assert {row["language"] for row in trained} == {"lo", "th"}
    assert set(metrics["eval"]["languages"].values()) == {6}  # all 11 languages by default
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_language_is_drawn_as_often_as_its_weight_says(tmp_path: Path) -> None:
    concepts = len(load_pictures().select(["animal-mammal"]))
    small = {**SMALL, "n": 11 * concepts}  # once through all of them
    cfg = recipe.Data(**small, languages={"lo": 10, "th": 1}, tasks={"name": 1})
    metrics = stage.run(cfg, out=tmp_path, seed=0, progress=False)
    assert metrics["train"]["languages"] == {"lo": 10 * concepts, "th": concepts}


def test_the_same_recipe_gives_the_same_bytes_and_replaces_the_old(tmp_path: Path) -> None:
    cfg = recipe.Data(**SMALL)
    stage.run(cfg, out=tmp_path, seed=0, progress=False)
    before = {path.name: sha256_file(path) for path in tmp_path.glob("*.parquet")}
    (tmp_path / "old").touch()
    stage.run(cfg, out=tmp_path, seed=0, progress=False)
    assert {path.name: sha256_file(path) for path in tmp_path.glob("*.parquet")} == before
    assert not (tmp_path / "old").exists()


def test_a_folder_of_ones_own_samples(tmp_path: Path) -> None:
    stage.run(recipe.Data(**SMALL), out=tmp_path / "mine", seed=0, progress=False)
    (tmp_path / "mine" / "dev.parquet").unlink()
    own = recipe.Data(source=str(tmp_path / "mine"))
    metrics = stage.run(own, out=tmp_path / "data", seed=0, progress=False)
    assert set(metrics) == {"train", "eval"}
    for name in ("train.parquet", "eval.parquet"):
        assert list(read_samples(tmp_path / "data" / name)) == list(read_samples(tmp_path / "mine" / name))
    (tmp_path / "mine" / "eval.parquet").unlink()
    with pytest.raises(SeavlmError, match=r"train\.parquet and eval\.parquet are not both there"):
        stage.run(own, out=tmp_path / "data", seed=0, progress=False)


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    stage.run(recipe.Data(**SMALL), out=tmp_path / "data", seed=0, progress=False)
    before = sha256_file(tmp_path / "data" / "train.parquet")
    broken = recipe.Data(**SMALL | {"n_eval": 11}, eval_families=["no-such-family"])
    with pytest.raises(SeavlmError, match="unknown art family 'no-such-family'"):
        stage.run(broken, out=tmp_path / "data", seed=0, progress=False)
    assert sha256_file(tmp_path / "data" / "train.parquet") == before
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
