"""Replies held to JSON schemas: which schemas are taken, whether every reply is valid, and what it costs.

    python benchmarks/structured.py --suite JSON-Schema-Test-Suite --real maskbench/data
    python benchmarks/structured.py --unique 10000
    python benchmarks/structured.py --cost

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
from pathlib import Path
from typing import Any

import numpy as np
import regex

from seavlm.engine.bench import machine
from seavlm.engine.grammar import Constraint, Grammars
from seavlm.engine.sampler import Sampling, adjust, choose
from seavlm.engine.vlm import VLM, load
from seavlm.errors import SeavlmError

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

    def __init__(self, vlm: VLM, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.rows = vlm.tokenizer.vocab_size
        self.noise = self.random.standard_normal(self.rows * 9, dtype=np.float32)
        self.stop_ids = set(vlm.config.eos_token_ids)
        ending = {i for text in ENDING if len(ids := vlm.tokenizer.encode(text)) == 1 for i in ids}
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


def takes(vlm: VLM, constraint: Constraint, instance: Any) -> bool:
    """The grammar lets a reply be this instance, in one of the orders of its first four properties."""
    orders = [instance]
    if isinstance(instance, dict) and len(instance) <= 4:
        orders = [dict(order) for order in itertools.permutations(instance.items())]
    for order in orders:
        text = json.dumps(order, ensure_ascii=False, separators=(",", ":"), default=_number)
        try:
            ids = vlm.tokenizer.encode(text)
        except (UnicodeError, SeavlmError):  # half a surrogate pair: no reply is that
            return False
        matcher = constraint.copy()._matcher
        if matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting():
            return True
    return False


def _number(x: Decimal) -> float:
    return float(x)


def of_suite(folder: Path) -> Iterator[tuple[str, Any, list[dict]]]:
    tests = folder / "tests" / "draft2020-12"
    for path in sorted(tests.rglob("*.json")):
        for group in json.loads(path.read_text()):
            name = f"{path.relative_to(tests).with_suffix('')}: {group['description']}"
            yield name, group["schema"], group["tests"]


def of_folder(folder: Path, most: int) -> Iterator[tuple[str, Any, list[dict]]]:
    """Every so many-th file by name, so that all sources are there."""
    paths = sorted(folder.glob("*.json"))
    for path in paths[:: max(1, len(paths) // most)]:
        found = json.loads(path.read_text())
        yield path.stem, found["schema"], found.get("tests", [])


def measure(vlm: VLM, grammars: Grammars, schemas: Iterator[tuple[str, Any, list[dict]]]) -> dict[str, Any]:
    model = Model(vlm)
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
            text = vlm.tokenizer.decode(ids)
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
            if takes(vlm, constraint, test["data"]):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--suite", type=Path)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--most", type=int, default=600, help="about so many schemas of --real")
    parser.add_argument("--out", type=Path, default=Path("structured.json"))
    args = parser.parse_args()
    vlm = load(args.model, device="cpu")
    grammars = Grammars(vlm.tokenizer, vlm.config.eos_token_ids)
    told = json.loads(args.out.read_text()) if args.out.exists() else {}
    told.update(machine=machine(), model=args.model, vocabulary=vlm.tokenizer.vocab_size)
    for name, wanted in (("suite", args.suite), ("real", args.real)):
        if wanted is not None:
            schemas = of_suite(wanted) if name == "suite" else of_folder(wanted, args.most)
            told[name] = measure(vlm, grammars, schemas)
            print(name, {key: told[name][key] for key in (*COUNTED, "compile ms", "mask us")})
    args.out.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
