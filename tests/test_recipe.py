"""Recipes are read strictly: what is not understood is refused, with the nearest thing that is."""

from __future__ import annotations

from pathlib import Path

import pytest

from seavlm.errors import SeavlmError
from seavlm.recipe import LANGUAGE_CODES, Recipe, known_keys, load_recipe
from seavlm.text.language import LANGUAGES


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text("name: small\ntrain:\n  lr: 2e-5\n", encoding="utf-8")
    return path


def test_shipped_recipes_are_valid(root: Path) -> None:
    found = sorted((root / "recipes").glob("*.yaml"))
    assert {"nano-base.yaml", "nano.yaml", "demo.yaml"} <= {path.name for path in found}
    made = {path.name: load_recipe(path) for path in found}
    assert made["nano.yaml"].base == made["demo.yaml"].base == "nano-global" == made["nano-base.yaml"].name
    for recipe in made.values():
        assert recipe.data.eval_families == ["fluent-3d"] and recipe.data.n_dev > 0


def test_defaults_hold_out_one_family_and_ask_in_all_languages(recipe: Path) -> None:
    read = load_recipe(recipe)
    assert read.train.lr == 2e-5, "YAML 1.1 takes 2e-5 for a text"
    assert read.data.eval_families == ["fluent-3d"] and read.merge.alpha == 0.43
    assert tuple(read.data.languages) == LANGUAGE_CODES == tuple(LANGUAGES)


def test_empty_sections_are_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("name: empty\ntrain:\ninit:\nmerge: {}\n", encoding="utf-8")
    read = load_recipe(path)
    assert read.init is None and read == Recipe(name="empty")
    deep = load_recipe(path, ["init.distill.lr=8e-4", "init.text={}", "init.vision={}"])
    assert deep.init and deep.init.distill and deep.init.distill.lr == 8e-4


def test_overrides_are_yaml_and_win(recipe: Path) -> None:
    read = load_recipe(
        recipe, ["train.lr=3e-4", "merge.betas=[1, 0.1, 0, 0.1]", "data.languages=[lo, km]", "seed=7"]
    )
    assert (read.train.lr, read.seed) == (3e-4, 7)
    assert read.merge.betas == [0.0, 0.1, 1.0], "sorted, each once"
    assert read.data.languages == {"lo": 1, "km": 1}
    assert load_recipe(recipe, ["data.languages={lo: 3, km: 1}"]).data.languages == {"lo": 3, "km": 1}


def test_a_resolved_recipe_reads_back(recipe: Path, tmp_path: Path) -> None:
    import yaml

    read = load_recipe(recipe, ["card.title=สวัสดี"])
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(read.model_dump(mode="json"), allow_unicode=True), encoding="utf-8")
    assert load_recipe(again) == read


@pytest.mark.parametrize(
    "override, complaint",
    [
        ("trian.lr=1", "unknown key \"trian\".* Did you mean 'train'"),
        ("train.lrr=1", "unknown key \"train.lrr\".* Did you mean 'lr'"),
        ("train.zzz=1", 'unknown key "train.zzz".* Known in train: enabled, epochs'),
        ("train.lr=fast", '"train.lr" input should be a valid number'),
        ("train.lr=-1", '"train.lr" input should be greater than 0'),
        ("data.languages=[lao]", "\"data.languages.lao\" input should be .* Did you mean 'lo'"),
        ("data.families=[fluent-3d]", "fluent-3d is in both families and eval_families"),
        ("data.task_concepts={chose: 12}", "task_concepts has chose, which `tasks` does not have"),
        ("merge.betas=[1.5]", "less than or equal to 1"),
        ("init.distill.lrr=1", "unknown key \"init.distill.lrr\".* Did you mean 'lr'"),
        ("name=a/b", "should match pattern"),
        ("train=3", '"train" input should be a valid dictionary'),
        ("train.lr", "is not an override"),
        ("name.first=x", "name is not a section"),
        ("train.lr=[", "is not YAML"),
    ],
)
def test_mistakes_are_named(recipe: Path, override: str, complaint: str) -> None:
    with pytest.raises(SeavlmError, match=complaint) as caught:
        load_recipe(recipe, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"- a\n- b\n", "is not a recipe"),
        (b"name: [\n", "not valid YAML at line 2"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"", "is not a recipe"),
        (b"seed: 1\n", 'key "name" is missing'),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(SeavlmError, match=complaint) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_one_beside_it(recipe: Path) -> None:
    with pytest.raises(SeavlmError, match=r"no recipe at .*smal\.yaml.*small\.yaml"):
        load_recipe(recipe.with_name("smal.yaml"))


def test_every_section_key_is_known() -> None:
    assert {"train.lr", "merge.betas", "data.tasks", "name"} <= set(known_keys())
    assert set(known_keys()) >= set(Recipe.model_fields)
