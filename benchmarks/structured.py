"""Replies held to JSON schemas: which schemas are taken, whether every reply is valid, and what it costs.

    python benchmarks/structured.py --tokenizer gemma-3 --suite JSON-Schema-Test-Suite --real maskbench/data
    python benchmarks/structured.py --tokenizer gemma-3 --cost
    python benchmarks/structured.py --unique 10000

--suite: a folder of json-schema-org/JSON-Schema-Test-Suite (its `tests/draft2020-12` is also in the sdist
of jsonschema, as `json/tests`). --real: a folder of JSON files {"schema", "tests"}, as
guidance-ai/jsonschemabench has in `maskbench/data`: schemas from GitHub, JSON Schema Store, Kubernetes and
function calls. Replies come from a model that knows nothing: random logits over the real vocabulary, leaning
to tokens that end something. They are judged by jsonschema against the schema that was given, with exact
numbers. Each run writes its part of the JSON.
"""

from __future__ import annotations

import argparse
import decimal
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import regex

from seavlm.engine.bench import machine
from seavlm.engine.engine import Engine
from seavlm.engine.grammar import Constraint, Grammars
from seavlm.engine.sampler import Sampling, adjust, choose
from seavlm.engine.sequence import Prompt, Sequence
from seavlm.engine.vlm import load
from seavlm.errors import SeavlmError
from seavlm.fit import resident
from seavlm.text.tokenizer import Tokenizer

ENDING = [
    '"',
    "}",
    "]",
    '"}',
    '",',
    '"]',
    "}}",
    ",",
    '":',
    "0",
    "1",
    "a",
    "1}",
]  # what a reply ends by, mostly
LEAN = 6.0  # as many standard deviations
SAMPLES, TOKENS = 3, 160

Schemas = Iterator[tuple[str, Any, list[dict]]]
Validate = Callable[[Any], list[str]]


def search(pattern: str, text: str) -> bool:
    """As Python has it, and what of ECMA-262 it has not."""
    return bool((regex if re.search(r"\\[pP]", pattern) else re).search(pattern, text))


def validator(schema: Any, formats: bool = False) -> Validate:
    """What is wrong with an instance (numbers as Decimal), in words."""
    import jsonschema
    from jsonschema.validators import extend, validator_for

    kind = validator_for(schema, default=jsonschema.Draft202012Validator)

    def pattern(_: Any, wanted: str, instance: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
        if isinstance(instance, str) and not search(wanted, instance):
            yield jsonschema.ValidationError(f"{instance!r} does not match {wanted!r}")

    def names(held: Any, wanted: Any, instance: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
        for name, part in wanted.items():
            for key in instance if isinstance(instance, dict) else ():
                if search(name, key):
                    yield from held.descend(instance[key], part, path=key, schema_path=name)

    checker = kind.TYPE_CHECKER.redefine(
        "integer",
        lambda _, x: (
            not isinstance(x, bool) and (isinstance(x, int) or (isinstance(x, Decimal) and x == int(x)))
        ),
    ).redefine("number", lambda _, x: isinstance(x, int | Decimal) and not isinstance(x, bool))
    decimal.getcontext().prec = 2000
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    own = extend(kind, {"pattern": pattern, "patternProperties": names}, type_checker=checker)
    held = own(exact, format_checker=kind.FORMAT_CHECKER if formats else None)
    return lambda instance: [error.message[:200] for error in held.iter_errors(instance)]


class Model:
    """One that knows nothing: its logits are windows of a long row of normal numbers."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: list[int], seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.rows = tokenizer.vocab_size
        self.noise = self.random.standard_normal(self.rows * 9, dtype=np.float32)
        self.stop_ids = set(stop_ids)
        ending = {i for text in ENDING if len(ids := tokenizer.encode(text)) == 1 for i in ids}
        self.sampling = Sampling(
            temperature=1.5, top_k=64, top_p=1.0, logit_bias=dict.fromkeys(ending | self.stop_ids, LEAN)
        )
        self.seconds: list[float] = []  # of each mask

    def reply(self, constraint: Constraint) -> list[int] | None:
        """Ids, without the stop token; None for one that did not come to its end."""
        ids: list[int] = []
        while len(ids) < TOKENS:
            began = time.perf_counter()
            allowed = constraint(ids)
            self.seconds.append(time.perf_counter() - began)
            start = int(self.random.integers(len(self.noise) - self.rows))
            logits = self.noise[start : start + self.rows].copy()
            adjust(logits, self.sampling, (), ids, allowed)
            token = choose(logits, self.sampling, self.random)
            if token in self.stop_ids:
                return ids
            ids.append(token)
        return None


def takes(tokenizer: Tokenizer, constraint: Constraint, instance: Any) -> bool:
    """The grammar lets a reply be this instance, in one of the orders of its first four properties."""
    orders = [instance]
    if isinstance(instance, dict) and len(instance) <= 4:
        orders = [dict(order) for order in itertools.permutations(instance.items())]
    for order in orders:
        text = json.dumps(order, ensure_ascii=False, separators=(",", ":"), default=_number)
        try:
            ids = tokenizer.encode(text)
        except (UnicodeError, SeavlmError):  # half a surrogate pair: no reply is that
            return False
        matcher = constraint.copy()._matcher
        if matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting():
            return True
    return False


def _number(x: Decimal) -> float:
    return float(x)


def of_suite(folder: Path) -> Schemas:
    tests = folder / "tests" / "draft2020-12"
    for path in sorted(tests.rglob("*.json")):
        for group in json.loads(path.read_text()):
            name = f"{path.relative_to(tests).with_suffix('')}: {group['description']}"
            yield name, group["schema"], group["tests"]


def of_folder(folder: Path, most: int) -> Schemas:
    """Every so many-th file by name, so that all sources are there."""
    paths = sorted(folder.glob("*.json"))
    for path in paths[:: max(1, len(paths) // most)]:
        found = json.loads(path.read_text())
        yield path.stem, found["schema"], found.get("tests", [])


def measure(tokenizer: Tokenizer, grammars: Grammars, model: Model, schemas: Schemas) -> dict[str, Any]:
    compiled: list[float] = []
    refused: dict[str, list[str]] = {}
    count: Counter[str] = Counter()
    wrong: list[dict[str, Any]] = []
    for name, schema, tests in schemas:
        count["schemas"] += 1
        assertion = name.startswith("optional/format")  # the suite wants formats asserted there
        began = time.perf_counter()
        try:
            constraint = grammars.json_schema(schema)
        except SeavlmError as error:
            refused.setdefault(_reason(error.message), []).append(name)
            continue
        compiled.append(time.perf_counter() - began)
        count["accepted"] += 1
        try:
            faults = validator(schema, assertion)
        except Exception as error:  # jsonschema cannot judge by it
            count["schemas that jsonschema refuses"] += 1
            print(f"{name}: {error}")
            continue
        for _ in range(SAMPLES):
            try:
                ids = model.reply(constraint.copy())
            except SeavlmError as error:
                count["replies given up"] += 1
                print(f"{name}: {error}")
                continue
            if ids is None:
                count["replies at the limit"] += 1
                continue
            count["replies"] += 1
            text = tokenizer.decode(ids)
            try:
                told = faults(json.loads(text, parse_float=Decimal))
            except ValueError as error:
                told = [f"not JSON: {error}"[:200]]
            except Exception as error:  # a pattern that Python does not know
                count["replies that jsonschema cannot judge"] += 1
                print(f"{name}: {error}")
                continue
            if told:
                count["invalid replies"] += 1
                wrong.append({"schema": name, "reply": text[:300], "faults": told[:2]})
        for test in tests:
            kind = "valid" if test["valid"] else "invalid"
            count[f"{kind} instances"] += 1
            if takes(tokenizer, constraint, test["data"]):
                count[f"{kind} instances accepted"] += 1
                if not test["valid"]:
                    wrong.append({"schema": name, "instance": test["description"][:200]})
    return {
        **{key: count[key] for key in COUNTED},
        "compile ms": _percentiles(compiled, 1e3),
        "mask us": _percentiles(model.seconds, 1e6),
        "refused": {
            reason: {"schemas": len(names), "of them": names[:3]}
            for reason, names in sorted(refused.items(), key=lambda item: -len(item[1]))
        },
        "wrong": wrong,
    }


COUNTED = [
    "schemas",
    "accepted",
    "replies",
    "invalid replies",
    "replies at the limit",
    "replies given up",
    "schemas that jsonschema refuses",
    "replies that jsonschema cannot judge",
    "valid instances",
    "valid instances accepted",
    "invalid instances",
    "invalid instances accepted",
]


def _percentiles(seconds: list[float], scale: float) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(seconds, p)) * scale, 2) for p in (50, 99)} if seconds else {}


def _reason(message: str) -> str:
    """Without what is the schema's own: the pointer down to its last name, and numbers."""
    message = re.sub(r"#(/\S*)?/([^/\s:]+)", r"#…/\2", message)
    return re.sub(r"\d+", "N", re.sub(r'"[^"]*"|/[^/ ]*/|\[.*?\]', "…", message))[:100]


def a_schema(number: int) -> dict[str, Any]:
    """One that no other number has."""
    random = np.random.default_rng(number)
    kinds: list[dict[str, Any]] = [
        {"type": "string", "maxLength": int(random.integers(1, 60))},
        {"type": "integer", "minimum": int(random.integers(1000)), "maximum": 1000 + number},
        {
            "type": "array",
            "items": {"enum": [f"v{number}", "x", None]},
            "maxItems": int(random.integers(1, 9)),
        },
        {"type": "string", "pattern": f"^[a-z]{{1,{int(random.integers(2, 20))}}}-{number}$"},
        {"type": "string", "format": "date-time"},
        {
            "anyOf": [
                {"type": "boolean"},
                {"type": "object", "properties": {f"q{number}": {"type": "number"}}},
            ]
        },
    ]
    chosen = [kinds[int(i)] for i in random.integers(len(kinds), size=int(random.integers(2, 8)))]
    properties = {f"p{number}_{place}": kind for place, kind in enumerate(chosen)}
    return {"type": "object", "properties": properties, "required": list(properties)[:2]}


def unique(grammars: Grammars, count: int) -> dict[str, Any]:
    """So many schemas, each with a mask: what memory is taken."""
    samples: list[dict[str, float]] = []
    began = time.perf_counter()
    for number in range(count + 1):
        if number % 250 == 0:
            seconds = time.perf_counter() - began
            samples.append({"schemas": number, "seconds": seconds, "resident MiB": resident() / 2**20})
        assert grammars.json_schema(a_schema(number))([]).any()
    half = [sample["resident MiB"] for sample in samples[len(samples) // 2 :]]
    return {"schemas": count, "second half MiB": [min(half), max(half)], "samples": samples}


def plot(told: dict[str, Any], path: Path) -> None:
    """Memory over schemas."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    samples = told["samples"]
    axes.plot([s["schemas"] for s in samples], [s["resident MiB"] for s in samples], color="#264653")
    axes.set_ylim(0, 1.2 * max(s["resident MiB"] for s in samples))
    axes.set_ylabel("resident MiB")
    axes.set_xlabel("different schemas compiled")
    axes.set_title(f"{told['schemas']:,} JSON schemas, one after another", loc="left")
    figure.savefig(path, dpi=110)


ANIMAL = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["cat", "dog", "bird"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["name", "kind", "legs"],
}


def forms(grammars: Grammars) -> dict[str, Constraint | None]:
    return {
        "free": None,
        "strings": grammars.json_schema({"type": "array", "items": {"type": "string"}, "minItems": 200}),
        "objects": grammars.json_schema({"type": "array", "items": ANIMAL, "minItems": 200}),
        "words": grammars.regex("([a-z]{3,9} ){200,}"),
    }


def choice_cost(grammars: Grammars, model: Model) -> dict[str, Any]:
    """Microseconds of what comes after the model's step: the mask, and with it the choice."""
    told: dict[str, Any] = {}
    for name, form in forms(grammars).items():
        engine = Engine.__new__(Engine)  # the choice alone
        engine.limit, engine._banned = model.rows, []
        masks: list[float] = []

        def timed(ids: Any, form: Constraint | None = form, masks: list[float] = masks) -> np.ndarray:
            assert form is not None
            began = time.process_time()
            allowed = form(ids)
            masks.append(time.process_time() - began)
            return allowed

        sequence = Sequence(
            Prompt([2]), Sampling(seed=1), 400, [], [2], frozenset(), mask=None if form is None else timed
        )
        choices: list[float] = []
        for _ in range(400):
            start = int(model.random.integers(len(model.noise) - model.rows))
            row = model.noise[start : start + model.rows].copy()
            for token in model.sampling.logit_bias:
                row[token] += LEAN
            began = time.process_time()
            token = engine._choose(sequence, row)
            choices.append(time.process_time() - began)
            sequence.put(token)
        told[name] = {
            "mean": round(float(np.mean(choices)) * 1e6, 1),
            **_percentiles(choices, 1e6),
            "of it masks": {"mean": round(float(np.mean(masks)) * 1e6, 1), **_percentiles(masks, 1e6)}
            if masks
            else None,
        }
    return told


def engine_cost(model: str, rounds: int = 6, tokens: int = 160) -> dict[str, Any]:
    """Microseconds a token of one sequence at a time, the best of rounds in turn."""
    vlm = load(model, device="cpu", quantize="int8")
    kinds = forms(Grammars(vlm.tokenizer, vlm.config.eos_token_ids))
    best = dict.fromkeys(kinds, float("inf"))
    for _ in range(rounds):
        for name, form in kinds.items():
            sequence = vlm.engine.add(
                Prompt([vlm.tokenizer.bos_id, *vlm.tokenizer.encode("Animals:")]),
                Sampling(seed=1),
                max_new_tokens=tokens,
                stop_ids=[0],
                mask=None if form is None else form.copy(),
            )
            while not sequence.ids:
                vlm.engine.step()
            began = time.perf_counter()
            while not sequence.finished:
                vlm.engine.step()
            best[name] = min(best[name], (time.perf_counter() - began) / (tokens - 1))
    return {
        "model": f"{model} int8",
        **{
            name: {
                "us a token": round(seconds * 1e6, 1),
                "more than free": round((seconds - best["free"]) * 1e6, 1),
                "of free's tokens/s": round(best["free"] / seconds, 3),
            }
            for name, seconds in best.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokenizer", type=Path, help="a folder of Gemma 3's; without it nano's, of fewer words"
    )
    parser.add_argument("--suite", type=Path)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--most", type=int, default=600, help="about so many schemas of --real")
    parser.add_argument("--unique", type=int, help="so many different schemas, and memory")
    parser.add_argument("--cost", action="store_true", help="what a token costs more than without a schema")
    parser.add_argument("--out", type=Path, default=Path("structured.json"))
    args = parser.parse_args()
    if args.tokenizer is not None:
        tokenizer, stop_ids = Tokenizer.from_dir(args.tokenizer), [1, 106]
    else:
        vlm = load("nano", device="cpu")
        tokenizer, stop_ids = vlm.tokenizer, list(vlm.config.eos_token_ids)
    grammars = Grammars(tokenizer, stop_ids)
    told = json.loads(args.out.read_text()) if args.out.exists() else {}
    told["machine"] = machine() | {"llguidance": version("llguidance")}
    for name, wanted in (("suite", args.suite), ("real", args.real)):
        if wanted is not None:
            schemas = of_suite(wanted) if name == "suite" else of_folder(wanted, args.most)
            found = measure(tokenizer, grammars, Model(tokenizer, stop_ids), schemas)
            told[name] = {"vocabulary": tokenizer.vocab_size, **found}
            print(name, {key: found[key] for key in (*COUNTED, "compile ms", "mask us")})
    if args.cost:
        told["cost"] = {
            "choice us": choice_cost(grammars, Model(tokenizer, stop_ids)),
            "vocabulary": tokenizer.vocab_size,
            "engine": engine_cost("nano"),
        }
        print(json.dumps(told["cost"], indent=1))
    if args.unique:
        told["memory"] = unique(grammars, args.unique)
        print(told["memory"]["second half MiB"])
        plot(told["memory"], args.out.with_name(args.out.stem + "-memory.png"))
    args.out.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
