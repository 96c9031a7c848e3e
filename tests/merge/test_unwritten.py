"""Merges that no file holds: wherever a model is named they answer as the written merge, token for token."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch

from seavlm.build import evaluate_model, model_hash
from seavlm.engine.vlm import load, opened
from seavlm.errors import SeavlmError
from seavlm.merge.delta import make_delta
from seavlm.merge.stream import merge_recipe
from seavlm.merge.unwritten import open_parent
from seavlm.recipe import read_mapping
from seavlm.serve.server import Settings
from seavlm.text.trim import trim_tokenizer
from seavlm.weights.refs import Unwritten, resolve, unwritten
from tests.conftest import TEXTS, write_model
from tests.serve.conftest import serving

SHARE = 0.3
GREEDY = {"temperature": 0, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano as its difference from nano-global."""
    place = tmp_path_factory.mktemp("unwritten") / "delta"
    make_delta("nano-global", "nano", place)
    return place


@pytest.fixture(scope="module")
def recipe(delta: Path) -> Path:
    place = delta.parent / "merge.yaml"
    place.write_text(f"regional: nano\nglobal: nano-global\nbeta: {SHARE}\n")
    return place


@pytest.fixture(scope="module")
def written(recipe: Path) -> Path:
    """The same merge as files."""
    place = recipe.parent / "written"
    merge_recipe(read_mapping(recipe), place, open_parent=open_parent, hash_inputs=False)
    return place


@pytest.fixture(scope="module")
def questions(root: Path) -> list[list[dict]]:
    def ask(question: str, picture: str = "elephant") -> list[dict]:
        picture_part = {"type": "image", "path": str(root / "docs" / f"{picture}.png")}
        return [{"role": "user", "content": [picture_part, {"type": "text", "text": question}]}]

    return [ask("ນີ້ແມ່ນຫຍັງ?"), ask("What is this?", "pineapple")]


def test_in_python(delta: Path, recipe: Path, written: Path, questions: list[list[dict]]) -> None:
    expected, threads = load(written, device="cpu"), torch.get_num_threads()
    wanted = [reply.token_ids for reply in expected.generate_batch(questions, **GREEDY)]
    logits = expected.logits(questions[0])
    for ref in (f"{delta}@{SHARE}", str(recipe)):
        vlm = load(ref, device="cpu")
        assert vlm.name == ref and vlm.generation == expected.generation
        assert torch.get_num_threads() == threads
        assert [reply.token_ids for reply in vlm.generate_batch(questions, **GREEDY)] == wanted
        assert torch.equal(vlm.logits(questions[0]), logits)
    # whole, it is the tuned model; and another share does answer otherwise
    tuned, whole = (load(ref, device="cpu").logits(questions[0]) for ref in ("nano", delta))
    assert torch.equal(tuned, whole) and not torch.equal(whole, logits)


def test_through_the_command(cli: Callable, root: Path, delta: Path, recipe: Path, written: Path) -> None:
    asked = root / "docs" / "elephant.png", "Đây là gì?"
    said = [cli("ask", *asked, "--model", ref) for ref in (written, f"{delta}@{SHARE}", recipe)]
    assert [done.code for done in said] == [0, 0, 0] and len({done.out for done in said}) == 1
    for wrong, told in ((f"{delta}@1.5", "no share"), (f"{delta}@nan", "no share")):
        done = cli("ask", *asked, "--model", wrong)
        assert done.code == 2 and told in done.err and len(done.err.strip().splitlines()) == 1
    assert "merge recipe" in cli("ask", *asked, "--model", root / "recipes" / "demo.yaml").err
    assert "seavlm delta apply" in cli("quantize", delta, delta.parent / "small").err
    assert "seavlm merge" in cli("fit", recipe).err
    assert "plain weights" in cli("ask", *asked, "--model", delta, "--quantize", "stored").err


def test_side_by_side_over_http(delta: Path, written: Path, root: Path) -> None:
    """In int8, where there are kernels: the merges are rounded as the files are."""
    names = [f"{delta}@0.1", f"{delta}@{SHARE}", str(written)]
    data = base64.b64encode((root / "docs" / "elephant.png").read_bytes()).decode()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    parts = [picture, {"type": "text", "text": "Ano ito?"}]
    body = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "logprobs": True}

    def ask(name: str) -> dict:
        answer = httpx.post(f"{live.url}/v1/chat/completions", json=body | {"model": name}, timeout=60)
        assert answer.json()["model"] == name
        return answer.json()["choices"][0]

    with serving(Settings(), models=names) as live:
        assert [one["id"] for one in httpx.get(f"{live.url}/v1/models").json()["data"]] == names
        some, more, files = map(ask, names)
    assert more == files and some["logprobs"] != more["logprobs"]


def test_evaluated(cli: Callable, tmp_path: Path, delta: Path, recipe: Path, written: Path) -> None:
    given = {"suite": "pictures", "tasks": ["name"], "languages": ["th"], "limit": 3, "max_new_tokens": 6}
    found = [
        evaluate_model(ref, out=tmp_path / out, progress=False, **given)
        for ref, out in ((written, "a"), (f"{delta}@{SHARE}", "b"))
    ]
    assert found[0].records == found[1].records and len(found[0].records) == 3
    asked = ("--suite", "pictures", "--task", "name", "--language", "th", "--limit", 1, "--quiet")
    assert cli("eval", recipe, *asked, "--max-new-tokens", 4).code == 0


def test_a_model_is_known_wherever_it_is_named_from(delta: Path, monkeypatch) -> None:
    """Else a run that was stopped goes on only from the folder in which it began."""
    known = {beta: model_hash(opened(f"{delta}@{beta}")) for beta in (0.3, 0.5)}
    monkeypatch.chdir(delta.parent)
    assert model_hash(opened(f"{delta.name}@0.3")) == known[0.3] != known[0.5]


def test_a_delta_is_a_parent(tmp_path: Path, delta: Path, written: Path) -> None:
    raw = {"regional": str(delta), "global": "nano-global", "beta": SHARE}
    merge_recipe(raw, tmp_path / "out", open_parent=open_parent, hash_inputs=False)
    for file in written.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    with pytest.raises(SeavlmError, match="a merge itself"):
        merge_recipe(raw | {"regional": f"{delta}@0.5"}, tmp_path / "no", open_parent=open_parent)


def test_a_vocabulary_of_its_own(tmp_path: Path, words: Path) -> None:
    """More tokens than the base has: tokenizer and rows are those of the written merge."""
    trim_tokenizer(words, tmp_path / "few", TEXTS[:3])
    one = write_model(tmp_path / "one", words, seed=1, spare_rows=0)
    two = write_model(tmp_path / "two", tmp_path / "few", seed=2, spare_rows=0)
    raw = {"regional": str(one), "global": str(two), "beta": 0.5, "tokenizer_source": "union"}
    (tmp_path / "merge.yml").write_text(json.dumps(raw))
    assert merge_recipe(raw, tmp_path / "out")["tokens_added"] > 20
    asked = [{"role": "user", "content": " ".join(TEXTS)}]
    made, files = (load(ref, device="cpu") for ref in (tmp_path / "merge.yml", tmp_path / "out"))
    assert made.prompt(asked).ids == files.prompt(asked).ids
    assert max(made.prompt(asked).ids) >= load(two, device="cpu").tokenizer.vocab_size
    assert torch.equal(made.logits(asked), files.logits(asked))


# --- where a base is


def test_the_base_is_found_again(tmp_path: Path, delta: Path, cli: Callable, monkeypatch) -> None:
    assert json.loads((delta / "delta.json").read_text())["base"] == {"name": "nano-global"}
    shutil.copytree(resolve("nano-global"), tmp_path / "here" / "base")
    shutil.copytree(resolve("nano"), tmp_path / "nano")
    monkeypatch.chdir(tmp_path)
    done = cli("delta", "make", "here/base", "./nano", "--out", "here/delta")
    assert done.code == 0, done.err
    (tmp_path / "here").rename(tmp_path / "there")  # both together
    shutil.copytree("there/delta", "alone")
    tuned = open_parent("nano")[1].get("language_model.norm.weight")

    def norm(ref: str) -> torch.Tensor:
        return open_parent(ref)[1].get("language_model.norm.weight")

    assert torch.equal(norm("there/delta"), tuned)
    with pytest.raises(
        SeavlmError, match=r"the base of alone .*no such model.* seavlm delta base alone MODEL"
    ):
        norm("alone")
    before = Path("alone/delta.json").read_bytes()
    assert "is not what alone was made from" in cli("delta", "base", "alone", "nano").err
    assert Path("alone/delta.json").read_bytes() == before
    assert cli("delta", "base", "alone", "there/base").code == 0
    assert torch.equal(norm("alone"), tuned)
    for over in ("there/base", "nano"):  # neither parent is written over
        assert "would be replaced" in cli("delta", "make", "there/base", "./nano", "--out", over).err
    assert "would be replaced" in cli("delta", "apply", "there/base", "alone", "--out", "there/base").err


def test_references(tmp_path: Path, delta: Path, recipe: Path) -> None:
    assert unwritten(recipe) == Unwritten(recipe) and unwritten(delta) == Unwritten(delta, 1.0)
    assert unwritten(f"{delta}@0.25") == unwritten(f"{delta}/@.25") == Unwritten(delta, 0.25)
    for ref in ("nano", "org/name@0.3", tmp_path, f"{tmp_path}@0.3", tmp_path / "none.yaml"):
        assert unwritten(ref) is None
    for share in ("", "x", "-0.1", "1.01", "inf", "nan"):
        with pytest.raises(SeavlmError, match="no share"):
            unwritten(f"{delta}@{share}")
    shutil.copytree(resolve("nano"), place := tmp_path / "delta@0.5")  # a folder's own name comes first
    shutil.copytree(delta, tmp_path / "delta")
    assert unwritten(place) is None and resolve(place) == place
    for ref in (delta, f"{delta}@0.3", recipe):
        with pytest.raises(SeavlmError, match="is not written"):
            resolve(ref)
    with pytest.raises(SeavlmError, match="no such model"):
        resolve("nowhere/merge.yaml")  # not asked of the hub
