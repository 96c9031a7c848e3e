"""Merge recipes: ours and mergekit's keys; values by filter, layer and module; stacks; vocabularies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from seavlm.errors import SeavlmError
from seavlm.merge import stream, vocabulary
from seavlm.merge.methods import METHODS
from seavlm.merge.stream import at_path, merge_recipe
from seavlm.model.config import Gemma3Config, TextConfig, VisionConfig
from seavlm.weights import names as naming
from seavlm.weights.checkpoint import open_checkpoint, save_checkpoint

TEXT = TextConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    query_pre_attn_scalar=8,
    max_position_embeddings=64,
    layer_types=("sliding_attention", "sliding_attention", "full_attention"),
)
VISION = VisionConfig(
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
CONFIG = Gemma3Config(
    text=TEXT, vision=VISION, mm_tokens_per_image=1, image_token_index=9, boi_token_index=7, eoi_token_index=8
)


def write(place: Path, seed: int, tokens: list[str], *, rows: int = 40) -> Path:
    config = replace(CONFIG, text=replace(TEXT, vocab_size=rows))
    draw = torch.Generator().manual_seed(seed)
    save_checkpoint(
        place, config, [(n, torch.randn(s, generator=draw)) for n, s in naming.shapes(config).items()]
    )
    added = [{"id": 0, "content": tokens[0], "special": True}]
    content = {"added_tokens": added, "model": {"vocab": {token: i for i, token in enumerate(tokens)}}}
    (place / "tokenizer.json").write_text(json.dumps(content))
    return place


TOKENS = [f"t{i}" for i in range(40)]


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parents")
    return {name: write(root / name, seed, TOKENS) for seed, name in enumerate(("base", "a", "b"))}


@pytest.fixture
def made(parents: dict[str, Path], tmp_path: Path) -> Callable[..., Any]:
    """Carries out a recipe whose models are called base, a and b; the merged checkpoint."""

    def make(raw: dict[str, Any], **options: Any) -> Any:
        merge_recipe(raw, tmp_path / "out", open_parent=lambda name: at_path(parents[name]), **options)
        return open_checkpoint(tmp_path / "out")

    return make


def share(out: Any, parents: dict[str, Path], name: str) -> float:
    """beta of a tensor that is beta * a + (1 - beta) * base."""
    a, base = (open_checkpoint(parents[p]).get(name).double() for p in ("a", "base"))
    beta = ((out.get(name).double() - base) / (a - base)).flatten()
    assert float(beta.max() - beta.min()) < 1e-2
    return round(float(beta.median()), 4)


LAYER = "language_model.layers.{}.{}.weight"


def test_a_beta_for_each_module(made, parents) -> None:
    beta = {
        "default": 0.1,
        "vision_tower": 0,
        "projector": 0.25,
        "embeddings": 0.05,
        "layers 2-2": 1,
        "mlp layers 0-0": 0.75,
        "attention": [0.2, 0.6],
        "mlp": 0.5,
    }
    out = made({"regional": "a", "global": "base", "beta": beta})
    wanted = {
        "vision_tower.encoder.layers.1.mlp.fc1.weight": 0,
        "multi_modal_projector.mm_input_projection_weight": 0.25,
        naming.EMBEDDING: 0.05,
        LAYER.format(2, "mlp.up_proj"): 1,  # the first that fits
        LAYER.format(0, "self_attn.q_proj"): 0.2,
        LAYER.format(1, "self_attn.q_norm"): 0.4,
        LAYER.format(0, "mlp.down_proj"): 0.75,
        LAYER.format(1, "mlp.down_proj"): 0.5,
        LAYER.format(0, "input_layernorm"): 0.1,
        "language_model.norm.weight": 0.1,
    }
    assert {name: share(out, parents, name) for name in wanted} == wanted


def test_the_example_of_a_recipe(made, parents, root: Path) -> None:
    """docs/merge.yaml, with other parents."""
    raw = yaml.safe_load((root / "docs" / "merge.yaml").read_text(encoding="utf-8"))
    out = made(raw | {"regional": "a", "global": "base"})
    wanted = {
        "vision_tower.encoder.layers.1.mlp.fc1.weight": 0,
        "multi_modal_projector.mm_input_projection_weight": 0.1,
        naming.EMBEDDING: 0.05,
        LAYER.format(0, "self_attn.q_proj"): 0.1,  # layers 0-1 come before attention
        LAYER.format(2, "self_attn.q_proj"): 0.6,
        LAYER.format(2, "mlp.up_proj"): 0.3,
    }
    assert {name: share(out, parents, name) for name in wanted} == wanted


def test_filters_and_gradients(made, parents) -> None:
    """mergekit's: a part of the name, the first that fits; a list is laid over the layers."""
    a = {
        "weight": [
            {"filter": "self_attn", "value": [0, 0.5, 1]},
            {"filter": "mlp", "value": 0.25},
            {"value": 0.75},
        ]
    }
    rest = {
        "weight": [
            {"filter": "self_attn", "value": [1, "5e-1", 0]},  # as YAML 1.1 reads 5e-1
            {"filter": "mlp", "value": 0.75},
            {"value": 0.25},
        ]
    }
    out = made(
        {
            "merge_method": "linear",
            "models": [{"model": "a", "parameters": a}, {"model": "base", "parameters": rest}],
            "base_model": "base",
            "dtype": "float32",
        }
    )
    wanted = {LAYER.format(i, "self_attn.k_proj"): i / 2 for i in range(3)}
    wanted |= {"vision_tower.encoder.layers.0.mlp.fc2.weight": 0.25, "language_model.norm.weight": 0.75}
    wanted |= {f"vision_tower.encoder.layers.{i}.self_attn.q_proj.weight": float(i) for i in range(2)}
    assert {name: share(out, parents, name) for name in wanted} == wanted


@pytest.mark.parametrize("method", [m for m in METHODS if m != "passthrough"])
def test_pieces_do_not_matter(made, parents, method: str, monkeypatch) -> None:
    """Every method in small pieces gives what it gives at once, and again the same bits."""
    needs = METHODS[method]
    values = {"weight": 0.6, "density": 0.5, "gamma": 0.1, "epsilon": 0.1}
    given = {"parameters": {key: values[key] for key in needs.each if key in values}}
    models = [{"model": name, **given} for name in ("a", "b")[: needs.most]]
    raw: dict[str, Any] = {"merge_method": method, "models": models}
    if needs.base == "required":
        raw["base_model"] = "base"
    if "t" in needs.shared:
        raw["parameters"] = {"t": 0.3}
    if method == "sce":
        raw["parameters"] = {"select_topk": 0.4}
    once = made(raw)
    whole = {name: once.get(name).clone() for name in once.names()}
    monkeypatch.setattr(stream, "PIECE", 256)
    monkeypatch.setattr(stream, "BLOCK", 100)
    again = made(raw, shard_bytes=3000)
    assert len(list(again.path.glob("*.safetensors"))) > 3
    for name, tensor in whole.items():
        torch.testing.assert_close(again.get(name), tensor, atol=2e-6, rtol=1e-5)
        if method not in ("slerp", "nuslerp", "karcher", "model_stock", "sce") and "d" not in method:
            assert torch.equal(again.get(name), tensor)


def test_layers_stacked(made, parents) -> None:
    out = made(
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": "a", "layer_range": [0, 2]}]},
                {
                    "sources": [
                        {
                            "model": "b",
                            "layer_range": [1, 3],
                            "parameters": {"scale": [{"filter": "o_proj", "value": 0}, {"value": 1}]},
                        }
                    ]
                },
            ],
        }
    )
    a, b = (open_checkpoint(parents[name]) for name in "ab")
    kinds = ("sliding_attention",) * 3 + ("full_attention",)
    assert out.config.text.num_hidden_layers == 4 and out.config.text.layer_types == kinds
    for i, (source, layer) in enumerate([(a, 0), (a, 1), (b, 1), (b, 2)]):
        name = "self_attn.q_proj"
        assert torch.equal(out.get(LAYER.format(i, name)), source.get(LAYER.format(layer, name)))
    assert not out.get(LAYER.format(3, "self_attn.o_proj")).any()
    assert torch.equal(out.get("language_model.norm.weight"), b.get("language_model.norm.weight"))
    for name in (naming.EMBEDDING, "vision_tower.post_layernorm.weight"):
        assert torch.equal(out.get(name), a.get(name))


def test_vocabularies_by_token(parents, tmp_path: Path) -> None:
    """Other order, other length, tokens that only one knows; spare rows stay where they are."""
    old = write(tmp_path / "old", 1, [*TOKENS[:30], "left", "x"], rows=34)  # rows 32 and 33 spare
    new = write(tmp_path / "new", 2, [*reversed(TOKENS[:30]), "x", "p", "q", "r"], rows=36)
    weights = [
        {"model": str(old), "parameters": {"weight": 1}},
        {"model": str(new), "parameters": {"weight": 3}},
    ]
    raw = {"merge_method": "linear", "models": weights, "base_model": str(old)}
    with pytest.raises(SeavlmError, match="tokenizer_source"):
        merge_recipe(raw, tmp_path / "out")
    o, n = (open_checkpoint(p).get(naming.EMBEDDING) for p in (old, new))
    both = {f"t{i}": (o[i] + 3 * n[29 - i]) / 4 for i in range(30)} | {
        "left": o[30],
        "x": (o[31] + 3 * n[30]) / 4,
    }
    for source, rows in (("base", 34), ("union", 35)):
        report = merge_recipe(raw | {"tokenizer_source": source}, tmp_path / source)
        out = open_checkpoint(tmp_path / source)
        content = json.loads((tmp_path / source / "tokenizer.json").read_text())
        tokens = vocabulary.tokens(content)
        merged = out.get(naming.EMBEDDING)
        assert len(merged) == rows and all(tokens[token] == i for i, token in enumerate(both))
        for token, row in both.items():
            torch.testing.assert_close(merged[tokens[token]], row)
        if source == "base":
            assert torch.equal(merged[32:34], o[32:34]) or report["rows_filled"]
            assert len(tokens) == 32
        else:
            assert [tokens[t] for t in "pqr"] == [32, 33, 34] and report["tokens_added"] == 3
            torch.testing.assert_close(merged[32:35], n[31:34])


def test_the_first_row_behind_a_missing_one(parents, tmp_path: Path) -> None:
    """Row 0 is read wherever its token stands; -1 and 0 are no neighbours."""
    old = write(tmp_path / "old", 1, ["x", "q", *TOKENS[1:39]])
    new = write(tmp_path / "new", 2, ["q", *TOKENS])
    raw: dict[str, Any] = {"merge_method": "linear", "parameters": {"weight": 1}, "tokenizer_source": "base"}
    merge_recipe(raw | {"models": [str(old), str(new)]}, tmp_path / "out")
    o, n, merged = (open_checkpoint(p).get(naming.EMBEDDING) for p in (old, new, tmp_path / "out"))
    torch.testing.assert_close(merged[1], (o[1] + n[0]) / 2)
    torch.testing.assert_close(merged[0], o[0])


def test_names_of_transformers_5_and_a_tied_head(made, parents, tmp_path: Path) -> None:
    """vision_tower.encoder..., model.language_model..., and a head stored twice."""
    wanted = made({"regional": "a", "global": "base", "beta": 0.3})
    wanted = {n: wanted.get(n).clone() for n in wanted.names()}
    for prefix in ("", "model."):
        place = tmp_path / f"named-{prefix}"
        place.mkdir()
        for file in ("config.json", "tokenizer.json"):
            (place / file).write_bytes((parents["a"] / file).read_bytes())
        stored = {}
        for name, tensor in load_file(parents["a"] / "model.safetensors").items():
            name = name.replace("vision_tower.vision_model.", "vision_tower.")
            stored[
                f"model.{name}".replace("language_model.model.", "language_model.") if prefix else name
            ] = tensor
        stored["lm_head.weight"] = next(t for n, t in stored.items() if "embed_tokens" in n).clone()
        save_file(stored, place / "model.safetensors")
        merge_recipe(
            {"regional": str(place), "global": str(parents["base"]), "beta": 0.3}, tmp_path / f"o{prefix}"
        )
        out = open_checkpoint(tmp_path / f"o{prefix}")
        assert all(torch.equal(out.get(n), wanted[n]) for n in wanted)
        stored["lm_head.weight"] += 1
        save_file(stored, place / "model.safetensors")
        with pytest.raises(SeavlmError, match="head"):
            merge_recipe(
                {"regional": str(place), "global": str(parents["base"]), "beta": 0.3}, tmp_path / "no"
            )
        assert not list(tmp_path.glob("no*"))


def test_a_text_only_model_merged_into_one_that_sees(made, parents, tmp_path: Path) -> None:
    """By modules; and of the tower, which only the base has, not a bit changes, whatever the method."""
    text = tmp_path / "text"
    a = open_checkpoint(parents["a"])
    config = replace(CONFIG, vision=None)
    save_checkpoint(text, config, [(n, a.get(n)) for n in naming.shapes(config)], copy_from=parents["a"])
    raw = {
        "merge_method": "ties",
        "base_model": str(parents["base"]),
        "parameters": {"weight": 1, "density": 0.5},
    }
    merge_recipe(raw | {"models": [str(parents["a"])]}, tmp_path / "wanted")
    for models in ("models", "slices"):
        with pytest.raises(SeavlmError, match=r"only one of them sees.*modules"):
            merge_recipe(raw | {"models": [str(text)]}, tmp_path / "no")
        decoder: Any = [str(text)]
        if models == "slices":
            both = [{"model": str(m), "layer_range": [0, 3]} for m in (text, parents["base"])]
            decoder = [{"sources": both}]
        alone = {"models": [str(parents["base"])]}
        modules = {"text_decoder": {models: decoder}, "vision_tower": alone, "multi_modal_projector": alone}
        merge_recipe(raw | {"modules": modules}, tmp_path / models)
        out, wanted = open_checkpoint(tmp_path / models), open_checkpoint(tmp_path / "wanted")
        base = open_checkpoint(parents["base"])
        for name in out.names():
            same = wanted if name.startswith("language_model") else base
            assert torch.equal(out.get(name), same.get(name)), name


def test_single_tokens(parents, tmp_path: Path) -> None:
    """A token's row from one parent, from another token or nothing; a new one; padding."""
    base, a = parents["base"], parents["a"]
    wish = {
        "t3": {"source": str(a), "force": True},
        "t4": {"source": str(a)},  # all have it
        "new": {"source": {"kind": "model_token", "model": str(a), "token": "t5"}},
        "t6": {"source": {"kind": "zero"}, "force": True},
        "t7": {"source": {"kind": "model_token", "model": str(base), "token_id": 8}, "force": True},
    }
    raw = {
        "merge_method": "linear",
        "models": [{"model": str(m), "parameters": {"weight": 1}} for m in (base, a)],
        "tokenizer": {"source": "base", "tokens": wish, "pad_to_multiple_of": 16},
        "chat_template": "{{ messages }}",
    }
    report = merge_recipe(raw, tmp_path / "out")
    out = open_checkpoint(tmp_path / "out")
    b, x, merged = (c.get(naming.EMBEDDING) for c in (open_checkpoint(base), open_checkpoint(a), out))
    tokens = vocabulary.tokens(json.loads((tmp_path / "out" / "tokenizer.json").read_text()))
    assert tokens["new"] == 40 and report["tokens_added"] == 1 and len(merged) == 48
    torch.testing.assert_close(merged[3], x[3])
    torch.testing.assert_close(merged[4], (b[4] + x[4]) / 2)
    torch.testing.assert_close(merged[40], x[5])
    assert not merged[6].any()
    torch.testing.assert_close(merged[7], b[8])
    torch.testing.assert_close(merged[41:], ((b[0] + x[0]) / 2).expand(7, -1))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_base_that_was_never_tuned_to_talk(parents, tmp_path: Path) -> None:
    """It ends at other tokens and has no template: what is merged into it ends as they do, and it is said."""
    talks, quiet = tmp_path / "talks", tmp_path / "quiet"
    for place, ends in ((talks, [1, 6]), (quiet, 1)):
        shutil.copytree(parents["a"], place)
        (place / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (talks / "chat_template.jinja").write_text("{{ talk }}")
    raw = TIES | {"base_model": str(quiet), "models": [{"model": str(talks), "parameters": {"weight": 1}}]}
    report = merge_recipe(raw, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").config.eos_token_ids == (1, 6)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [1, 6]
    assert any("end" in note for note in report["notes"]) and any("auto" in note for note in report["notes"])
    assert not merge_recipe(raw | {"chat_template": "auto"}, tmp_path / "out")["notes"][1:]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ talk }}"


@pytest.mark.parametrize("kind", [torch.float16, torch.float64])
def test_what_is_never_written(parents, tmp_path: Path, kind: torch.dtype) -> None:
    """float16, which overflows in Gemma 3, and float64 become float32."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "tokenizer.json"):
            (tmp_path / name / file).write_bytes((parents[name] / file).read_bytes())
        stored = load_file(parents[name] / "model.safetensors")
        save_file({n: t.to(kind) for n, t in stored.items()}, tmp_path / name / "model.safetensors")
    merge_recipe(
        {"regional": str(tmp_path / "a"), "global": str(tmp_path / "b"), "beta": 0.3}, tmp_path / "out"
    )
    assert open_checkpoint(tmp_path / "out").config.dtype == "float32"


TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "a", "parameters": {"weight": 1}}],
}


@pytest.mark.parametrize(
    "raw, match",
    [
        (TIES | {"merge_method": "tise"}, "Did you mean 'ties'"),
        (TIES | {"base": "b"}, "unknown key 'base'.*base_model"),
        (TIES | {"parameters": {"lamda": 1}}, "unknown key 'lamda'.*lambda"),
        (TIES | {"models": [{"model": "a", "parameters": {"wieght": 1}}]}, "weight"),
        (TIES | {"models": [{"model": "a"}]}, "no 'weight'"),
        (
            TIES | {"models": [{"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": 1}]}}]},
            "no 'weight'",
        ),
        (TIES | {"base_model": None}, "needs a base_model"),
        (TIES | {"models": []}, "models"),
        (TIES | {"slices": []}, "models and slices"),
        (TIES | {"modules": {}}, "models and modules"),
        (TIES | {"models": [{"model": "a", "parameters": {"weight": "density"}}]}, "weight is 'density'"),
        (TIES | {"models": [{"model": "a", "parameters": {"weight": True}}]}, "weight is True"),
        (TIES | {"models": [{"model": "a", "parameters": {"weight": 1, "density": 40}}]}, "density is 40"),
        (TIES | {"models": [{"model": "a+lora", "parameters": {"weight": 1}}]}, "adapter"),
        (TIES | {"tokenizer": "base"}, "tokenizer is 'base'"),
        (TIES | {"tokenizer": {"sorce": "base"}}, "source"),
        (TIES | {"tokenizer": {}, "tokenizer_source": "base"}, "tokenizer_source and tokenizer"),
        (TIES | {"tokenizer": {"tokens": {"t1": {"source": {"kind": "zro"}}}}}, "no source"),
        (
            TIES
            | {
                "tokenizer": {
                    "tokens": {"t1": {"source": {"kind": "model_token", "model": "a", "token": "z"}}}
                }
            },
            "no row for 'z'",
        ),
        (TIES | {"chat_template": "chatml"}, "chat_template"),
        (TIES | {"merge_method": "della", "parameters": {"density": 0.9}}, "epsilon"),
        (
            {
                "merge_method": "linear",
                "models": [{"model": m, "parameters": {"weight": w}} for m, w in (("a", 1), ("b", -1))],
            },
            "sum to 0",
        ),
        ({"merge_method": "linear", "modules": {"text_decodr": {"models": ["a"]}}}, "text_decoder"),
        (
            {
                "merge_method": "linear",
                "parameters": {"weight": 1},
                "modules": {"text_decoder": {"models": ["a"]}},
            },
            "lacks vision_tower",
        ),
        (
            {
                "merge_method": "slerp",
                "base_model": "b",
                "parameters": {"t": 0.1},
                "slices": [{"sources": [{"model": "a", "layer_range": [0, 3]}]}],
            },
            "sources of each slice",
        ),
        ({"regional": "a", "global": "base", "beta": {"layers 3-0": 1, "default": 0}}, "no layer"),
        (TIES | {"dtype": "float16"}, "float16"),
        (TIES | {"seed": "x"}, "seed"),
        (TIES | {"parameters": {"normalize": 3}}, "normalize"),
        (TIES | {"merge_method": "model_stock", "models": [{"model": "a"}]}, "1 models"),
        ({"regional": "a", "global": "a", "beta": 0.1}, "same model"),
        ({"regional": "a", "global": "base", "beta": 1.1}, "beta"),
        ({"regional": "a", "global": "base", "beta": {"atention": 0.1}}, "attention"),
        ({"regional": "a", "global": "base", "beta": {"mlp": 0.1}}, "no 'weight'"),
        ({"regional": "a", "beta": 0.1}, "global"),
        (
            {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [0, 9]}]}]},
            "has 3 layers",
        ),
    ],
)
def test_what_is_wrong_is_named(made, tmp_path: Path, raw: dict[str, Any], match: str) -> None:
    with pytest.raises(SeavlmError, match=match):
        made(raw)
    assert not list(tmp_path.iterdir())


def test_the_command(cli, parents, tmp_path: Path) -> None:
    recipe = tmp_path / "merge.yaml"
    text = f"regional: {parents['a']}\nglobal: {parents['base']}\n"
    text += "beta: {mlp: 0.5, default: 0.1}\ndtype: bfloat16\n"
    recipe.write_text(text, encoding="utf-8")
    ahead = cli("merge", recipe, "--out", tmp_path / "new" / "out", "--dry-run")
    assert ahead.code == 0 and "in 1 files" in ahead.out and "linear" in ahead.out
    assert sorted(tmp_path.iterdir()) == [recipe]
    done = cli("merge", recipe, "--out", tmp_path / "out", "--set", "beta.attention=0.3")
    assert done.code == 0 and "bfloat16" in done.out and "rounding" in done.out
    assert open_checkpoint(tmp_path / "out").config.dtype == "bfloat16"
    assert "--out" in cli("merge", recipe).err
    recipe.write_text("merge_methd: ties\nmodels: [nano]\n", encoding="utf-8")
    assert "Did you mean 'merge_method'" in cli("merge", recipe, "--out", tmp_path / "out").err
