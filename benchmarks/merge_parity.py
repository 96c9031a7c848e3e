"""Our merges beside mergekit's, method by method, on small Gemma-3-VL-shaped models in fp32.

    python benchmarks/merge_parity.py --mergekit-python VENV/bin/python --out benchmarks/merge_parity.json

mergekit 0.1.5 lives in an environment of its own (`pip install --no-deps mergekit==0.1.5` and what it needs).
It draws masks from torch's generator in whatever order its graph runs; here both sides draw from one fixed
table of numbers, so that DARE and DELLA can be compared at all. Everything else is as installed. (With
transformers 5.23 it cannot change Gemma 3's number of layers: it leaves `layer_types` as it was. So the
stacks below have as many layers as their parents.)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

TWO = [("tuned_a", {"weight": 0.6}), ("tuned_b", {"weight": 0.3})]
SPARSE = [("tuned_a", {"weight": 0.6, "density": 0.4}), ("tuned_b", {"weight": 0.3, "density": 0.7})]
FILTERED = [
    ("tuned_a", {"weight": [{"filter": "self_attn", "value": [0.1, 0.5, 0.2]}, {"value": 0.3}]}),
    ("tuned_b", {"weight": [0.9, 0.2]}),
]
# name -> (method, models, parameters, with a base)
CASES: dict[str, tuple[str, list, dict, bool]] = {
    "linear": ("linear", TWO, {}, False),
    "linear, not normalised": ("linear", TWO, {"normalize": False}, False),
    "linear, filters and gradients": ("linear", FILTERED, {}, False),
    "slerp": (
        "slerp",
        [("tuned_a", {})],
        {"t": [{"filter": "mlp", "value": [0, 0.5, 1]}, {"value": 0.3}]},
        True,
    ),
    "nuslerp": ("nuslerp", TWO, {}, False),
    "nuslerp, with a base": ("nuslerp", TWO, {}, True),
    "nuslerp, by rows": ("nuslerp", TWO, {"nuslerp_flatten": False}, True),
    "nuslerp, by columns": ("nuslerp", TWO, {"nuslerp_flatten": False, "nuslerp_row_wise": True}, True),
    "task_arithmetic": ("task_arithmetic", TWO, {"lambda": 0.8}, True),
    "task_arithmetic, normalised": ("task_arithmetic", TWO, {"normalize": True}, True),
    "ties": ("ties", SPARSE, {}, True),
    "ties, lambda 1.3, int8_mask": ("ties", SPARSE, {"lambda": 1.3, "int8_mask": True}, True),
    "dare_linear": ("dare_linear", SPARSE, {}, True),
    "dare_ties": ("dare_ties", SPARSE, {}, True),
    "dare_ties, not rescaled": ("dare_ties", SPARSE, {"rescale": False, "normalize": True}, True),
    "della": ("della", SPARSE, {"epsilon": 0.1}, True),
    "della_linear": ("della_linear", SPARSE, {"epsilon": 0.1}, True),
    "breadcrumbs": ("breadcrumbs", SPARSE, {"gamma": 0.05}, True),
    "breadcrumbs_ties": ("breadcrumbs_ties", SPARSE, {"gamma": 0.05}, True),
    "model_stock": ("model_stock", TWO, {}, True),
    "model_stock, filter_wise": ("model_stock", TWO, {"filter_wise": True}, True),
    "sce": ("sce", TWO, {}, True),
    "sce, the tenth that varies most": ("sce", TWO, {"select_topk": 0.1}, True),
    "karcher": ("karcher", TWO, {}, False),
    "karcher, three models": ("karcher", TWO, {}, True),
}
STACKS: dict[str, list[list[tuple[str, int, int]]]] = {  # slices of text-only models
    "passthrough, layers stacked": [[("text_a", 1, 3)], [("text_b", 1, 2)]],
    "slerp, in slices": [[("text_a", 1, 3), ("text_b", 0, 2)], [("text_a", 0, 1), ("text_b", 2, 3)]],
}
PICTURES = ("multi_modal_projector", "vision_tower")
DECODER = [("tuned_a", {"weight": [0.2, 0.9], "density": 0.5}), ("tuned_b", {"weight": 0.4, "density": 0.3})]
NEW = {"kind": "model_token", "model": "words_b", "token": "p"}
WORDS: dict[str, dict] = {  # vocabularies that differ, compared token by token
    "tokenizer_source: base": {"tokenizer_source": "base"},
    "tokenizer_source: union": {"tokenizer_source": "union"},
    "tokenizer: single tokens": {
        "tokenizer": {
            "source": "union",
            "tokens": {
                "t3": {"source": "words_b", "force": True},
                "t4": {"source": {"kind": "zero"}, "force": True},
                "q": {"source": NEW},
                "new": {"source": NEW},
            },
        }
    },
}
MODULES = "modules: ties, and towers as they are"
DIFFERENCES = [
    "dtype: we sum in fp32 and round once to it; mergekit casts to it first, and computes in it",
    "float16 is never written (Gemma 3's activations overflow in it); parents of float16 give float32",
    "ties, breadcrumbs, sce: equal magnitudes share one fate, mergekit's sort picks between them: of nano's "
    "bf16 differences ties so keeps up to 0.2 points more than the density, of a small tensor 6.5",
    "dare, della: what is dropped depends on seed, tensor and place alone; in mergekit on its graph's order",
    "della of the patch embedding, of four dimensions: mergekit ranks a pixel's colours among themselves",
    "density, gamma and select_topk beyond 0 to 1 are refused; in mergekit a density of 40 keeps all",
    "slerp with a tensor of zeros is the straight line; mergekit takes it to stand at a right angle",
    "tiny differences count: below 1e-6 mergekit's sce weighs all alike and its model_stock takes another "
    "angle, below 1e-7 its dare and della do not rescale",
    "tokenizer: rows without a token stay, in mergekit they go; rows of pad_to_multiple_of are the padding "
    "token's, in mergekit the mean",
    "where parents end at different tokens the merged model ends at all of them, in mergekit at the base's",
    "modules: of the base alone, a module is taken as it is whatever the method",
]
EXPLAINED = {
    "vision_tower.embeddings.patch_embedding.weight": "the one tensor of four dimensions: mergekit ranks the "
    "colours of a pixel among themselves, we rank all weights of an output unit, as in every matrix"
}
ALL = (*CASES, *STACKS, MODULES, *WORDS)
WEIGHTLESS = ("slerp", "model_stock", "sce", "karcher")


def placed(root: Path, given: object) -> object:
    """The names of models in a part of a recipe, as paths."""
    if isinstance(given, dict):
        return {key: placed(root, part) for key, part in given.items()}
    return str(root / given) if isinstance(given, str) and given.startswith("words_") else given


def recipe(root: Path, case: str) -> dict:
    if case in WORDS:
        models = [
            {"model": str(root / m), "parameters": {"weight": w}} for m, w in (("words_a", 1), ("words_b", 3))
        ]
        raw = {
            "merge_method": "linear",
            "models": models,
            "base_model": models[0]["model"],
            "dtype": "float32",
        }
        return raw | placed(root, WORDS[case])  # type: ignore[operator]
    if case == MODULES:
        tuned = [{"model": str(root / name), "parameters": given} for name, given in DECODER]
        base = str(root / "base")
        modules = {"text_decoder": {"models": tuned, "parameters": {"lambda": 0.7}}}
        modules |= {name: {"models": [{"model": base}]} for name in PICTURES}
        return {"merge_method": "ties", "base_model": base, "modules": modules, "dtype": "float32"}
    if case in STACKS:
        slices = [
            {"sources": [{"model": str(root / m), "layer_range": [first, end]} for m, first, end in sources]}
            for sources in STACKS[case]
        ]
        slerp = (
            {"base_model": str(root / "text_a"), "parameters": {"t": [0.2, 0.7]}} if "slerp" in case else {}
        )
        return {"merge_method": case.split(",")[0], "slices": slices, "dtype": "float32", **slerp}
    method, models, parameters, base = CASES[case]
    listed = [
        {"model": str(root / name)} | ({} if method in WEIGHTLESS else {"parameters": given})
        for name, given in models
    ]
    result = {"merge_method": method, "models": listed, "parameters": parameters, "dtype": "float32"}
    return result | ({"base_model": str(root / "base")} if base else {})


def make_parents(root: Path) -> None:
    import torch

    from seavlm.model.config import Gemma3Config, TextConfig, VisionConfig
    from seavlm.weights import names as naming
    from seavlm.weights.checkpoint import save_checkpoint

    text = TextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=128,
    )
    vision = VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
    )
    ids = {"image_token_index": 9, "boi_token_index": 7, "eoi_token_index": 8}
    config = Gemma3Config(text=text, vision=vision, mm_tokens_per_image=4, eos_token_ids=(1, 5), **ids)
    draw = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=draw) for n, s in naming.shapes(config).items()}
    save_checkpoint(root / "base", config, base.items())
    for name in ("tuned_a", "tuned_b"):
        tuned = {n: t + 0.2 * torch.randn(t.shape, generator=draw) for n, t in base.items()}
        save_checkpoint(root / name, config, tuned.items())
    alone = Gemma3Config(text=text, eos_token_ids=(1, 5))
    for name in ("text_a", "text_b"):
        tensors = {n: torch.randn(s, generator=draw) for n, s in naming.shapes(alone).items()}
        save_checkpoint(root / name, alone, tensors.items())

    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    numbered = [f"t{i}" for i in range(40)]
    for name, tokens in (
        ("words_a", [*numbered, "x", "q"]),
        ("words_b", [*reversed(numbered), "p", "x", "r"]),
    ):
        config = Gemma3Config(text=replace(text, vocab_size=len(tokens)), eos_token_ids=(1, 5))
        save_checkpoint(
            root / name,
            config,
            [(n, torch.randn(s, generator=draw)) for n, s in naming.shapes(config).items()],
        )
        bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
        PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(root / name)


def table(shape: object) -> object:
    """The numbers that both sides draw for a tensor of this shape, whatever its name."""
    import torch

    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(1))  # type: ignore[arg-type]


def mergekit_side(root: Path) -> None:
    """Runs in mergekit's own interpreter."""
    import torch
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    torch.bernoulli = lambda chances: (table(chances.shape) < chances).to(chances.dtype)
    for case in ALL:
        options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False, lazy_unpickle=True)
        run_merge(
            MergeConfiguration.model_validate(recipe(root, case)),
            str(root / "theirs" / case),
            options=options,
        )


def our_side(root: Path) -> None:
    from seavlm.merge import methods
    from seavlm.merge.stream import merge_recipe

    # A piece is the whole of each small tensor here, so a piece's shape is the tensor's.
    methods.uniform = lambda key, start, count: table((count,))
    for case in ALL:
        merge_recipe(recipe(root, case), root / "ours" / case)


def compare(root: Path) -> dict:
    from seavlm.merge.vocabulary import tokens
    from seavlm.weights import names as naming
    from seavlm.weights.checkpoint import open_checkpoint

    rows = {}
    for case in ALL:
        ours, theirs = (open_checkpoint(root / side / case) for side in ("ours", "theirs"))
        sides = [{n: c.get(n) for n in c.names()} for c in (ours, theirs)]
        if case in WORDS:
            for side, held in zip(("ours", "theirs"), sides, strict=True):
                content = json.loads((root / side / case / "tokenizer.json").read_text(encoding="utf-8"))
                held[naming.EMBEDDING] = held[naming.EMBEDDING][
                    [i for _, i in sorted(tokens(content).items())]
                ]
        errors = {n: float((sides[0][n] - sides[1][n]).abs().max()) for n in sides[0]}
        told = EXPLAINED if case.startswith("della") else {}
        worst = max((n for n in errors if n not in told), key=errors.__getitem__)
        rows[case] = {"largest_difference": errors[worst], "tensor": worst, "equal": errors[worst] <= 1e-5}
        rows[case] |= {"but": told} if told else {}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit-python", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        return mergekit_side(given.side)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_parents(root)
        subprocess.run([given.mergekit_python, __file__, "--side", root], check=True)
        our_side(root)
        rows = compare(root)
    for case, row in rows.items():
        print(f"{case:36} {row['largest_difference']:.1e}  {row['tensor']}")
    result = {"mergekit": "0.1.5", "python": sys.version.split()[0], "dtype": "float32", "cases": rows}
    result["differences"] = DIFFERENCES
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(not all(row["equal"] for row in rows.values()))


if __name__ == "__main__":
    main()
