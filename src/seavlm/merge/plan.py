"""What a merge is made of, before a byte of it is: recipe, parents' checks, and a step for every tensor.

Our own form, for two models:

    regional: out/demo/train/model
    global: nano-global
    beta: 0.1                     # or by module, the first that fits:
    beta: {vision_tower: 0, embeddings: 0.05, layers 0-3: 0.3, attention: [0.1, 0.3], default: 0.1}

mergekit's, with the same keys and the same meaning:

    merge_method: ties
    base_model: nano-global
    models:
      - model: out/demo/train/model
        parameters: {weight: 1, density: [{filter: mlp, value: 0.3}, {value: 0.5}]}
    parameters: {lambda: 1.0}
    dtype: bfloat16

A value is a number, a list that is interpolated over the layers, or a list of {filter, value}. A filter is a
part of a tensor's name, or "@" and a module's word from the table `MODULES` ("@attention", "@layers 0-7").
`slices` stack layers of the decoder; what is not in a layer comes from the first slice, the last norm from
the last one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seavlm.errors import SeavlmError, nearest
from seavlm.merge.methods import METHODS, REQUIRED, Method, Settings, widest
from seavlm.weights import names as naming
from seavlm.weights.checkpoint import FileCheckpoint

_BOTH = ("dtype", "out_dtype", "tokenizer_source", "tokenizer", "seed")
KEYS = ("merge_method", "models", "slices", "base_model", "parameters", *_BOTH)
SHORT_KEYS = ("regional", "global", "beta", *_BOTH)
IGNORED = {"int8_mask"}  # says how mergekit holds its masks; ours need no memory
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_LAYER = re.compile(r"(language_model|vision_tower\.encoder)\.layers\.(\d+)\.")
_LAYERS = re.compile(r"layers? *\.?(\d+) *- *(\d+)")
MODULES: dict[str, Callable[[str], bool]] = {
    "vision": lambda name: name.startswith(("vision_tower.", "multi_modal_projector.")),
    "vision_tower": lambda name: name.startswith("vision_tower."),
    "projector": lambda name: name.startswith("multi_modal_projector."),
    "embeddings": lambda name: name == naming.EMBEDDING,
    "attention": lambda name: name.startswith("language_model.") and ".self_attn." in name,
    "mlp": lambda name: name.startswith("language_model.") and ".mlp." in name,
    "norms": naming.is_text_norm,
}


@dataclass(frozen=True)
class Step:
    """One tensor of the output: of which tensors of which parents it is made, and how."""

    name: str
    shape: tuple[int, ...]
    method: str
    sources: tuple[tuple[int, str], ...]  # (parent's index, its tensor's name)
    settings: Settings


@dataclass(frozen=True)
class Vocabulary:
    """Embedding rows by token. rows: for each parent, the row that holds output row i's token, -1 for none;
    base: the parent whose row stands in where another has none; content: of tokenizer.json, None to copy the
    base's; added, filled: figures for the report.
    """

    rows: list[np.ndarray]
    base: int
    content: dict[str, Any] | None
    added: int
    filled: list[int]


@dataclass(frozen=True)
class Plan:
    """A whole merge: its steps in the order of the output, and what lies beside the weights."""

    config: Any  # a Gemma3Config
    dtype: torch.dtype
    parents: list[FileCheckpoint]
    places: list[Path]
    steps: list[Step]
    recipe: dict[str, Any]  # for the manifest
    tokenizer_home: Path | None
    tokenizer_checked: bool
    seed: int = 0
    vocabulary: Vocabulary | None = None
    labels: list[str] = field(default_factory=list)  # the parents' names in the manifest
    references: list[str] = field(default_factory=list)  # the parents as the recipe names them


# --- from two models and a weight


def weighted_mean(
    places: Sequence[Path],
    parents: list[FileCheckpoint],
    weights: Sequence[float],
    dtype: str | torch.dtype | None,
) -> Plan:
    """The plan of sum_i weights[i] * parents[i]."""
    recipe = {"method": "linear", "parents": [str(p) for p in places], "weights": [float(w) for w in weights]}
    sources = [_Source(i, {"weight": float(w)}) for i, w in enumerate(weights)]
    parsed = _Parsed("linear", [_Slice(sources, None)], None, {"normalize": False}, recipe, global_last=True)
    return replace(_plan(parsed, list(places), parents, dtype), references=[str(p) for p in places])


# --- from a recipe


@dataclass
class _Source:
    parent: int
    parameters: dict[str, Any]
    layers: tuple[int, int] | None = None


@dataclass
class _Slice:
    sources: list[_Source]
    base: int | None
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Parsed:
    method: str
    slices: list[_Slice]
    base: int | None
    parameters: dict[str, Any]
    recipe: dict[str, Any]
    stacked: bool = False
    tokenizer_source: str | int | None = None
    seed: int = 0
    global_last: bool = False  # config and tokenizer come from the last parent


def from_recipe(
    raw: Mapping[str, Any],
    open_parent: Callable[[str], tuple[Path, FileCheckpoint]],
    dtype: str | None = None,
) -> Plan:
    """The plan of a recipe. open_parent: a model reference -> its place and its opened checkpoint.

    SeavlmError, naming the key, for keys and parameters nobody knows, for values that are missing, and for
    parents that do not fit together.
    """
    references: list[str] = []

    def parent(reference: Any, where: str) -> int:
        if not isinstance(reference, str):
            raise SeavlmError(f"{where} is {reference!r}", hint="It must be a model reference.")
        if reference not in references:
            references.append(reference)
        return references.index(reference)

    short = "merge_method" not in raw and {"regional", "global", "beta"} & set(raw)
    parsed = _short(raw, parent) if short else _long(raw, parent)
    opened = [open_parent(reference) for reference in references]
    wanted = dtype or raw.get("out_dtype") or raw.get("dtype")
    plan = _plan(parsed, [p for p, _ in opened], [c for _, c in opened], wanted)
    return replace(plan, references=references)


def _short(raw: Mapping[str, Any], parent: Callable[[Any, str], int]) -> _Parsed:
    _known(raw, SHORT_KEYS, "the recipe")
    for key in ("regional", "global", "beta"):
        if key not in raw:
            raise SeavlmError(f"the recipe has no {key!r}", hint="regional, global and beta go together.")
    beta = raw["beta"]
    if isinstance(beta, dict):
        module_words(word for word in beta if word != "default")
        beta = [
            {"value": value} | ({} if word == "default" else {"filter": f"@{word}"})
            for word, value in sorted(beta.items(), key=lambda item: item[0] == "default")
        ]
    sources = [
        _Source(parent(raw["regional"], "regional"), {"weight": beta}),
        _Source(parent(raw["global"], "global"), {"weight": _complement(beta)}),
    ]
    if sources[0].parent == sources[1].parent:
        raise SeavlmError("regional and global are the same model", hint="Give two.")
    return _Parsed(
        "linear",
        [_Slice(sources, None)],
        None,
        {"normalize": False},
        dict(raw),
        tokenizer_source=_tokenizer_source(raw, parent),
        seed=_seed(raw),
        global_last=True,
    )


def module_words(words: Iterable[Any]) -> None:
    """SeavlmError for a word that is no module: one of `MODULES`, or layers A-B."""
    for word in words:
        if word not in MODULES and not _LAYERS.fullmatch(str(word)):
            raise SeavlmError(
                f"beta: unknown module {word!r}.{nearest(str(word), [*MODULES, 'default'])}",
                hint=f"Known: {', '.join(MODULES)}, layers A-B, default.",
            )


def by_module(
    places: Sequence[Path],
    parents: list[FileCheckpoint],
    betas: Mapping[str, float],
    dtype: str | torch.dtype | None = None,
) -> Plan:
    """The plan of [regional, global] with a beta for each module, the first that fits, or "default" alone."""
    opened = dict(zip(map(str, places), zip(places, parents, strict=True), strict=True))
    regional, world = opened
    beta = dict(betas) if len(betas) > 1 else betas["default"]
    raw = {"regional": regional, "global": world, "beta": beta}
    return from_recipe(raw, lambda reference: opened[reference], None if dtype is None else str(dtype))


def differing(parents: Sequence[FileCheckpoint], words: Sequence[str]) -> list[str]:
    """Those of the modules `words` in which two models differ; of a tensor's modules the first counts."""
    first, second = parents
    found = set()
    for name in first.names():
        word = next((w for w in words if fits(f"@{w}", name)), None)
        if word and word not in found and not torch.equal(first.get(name).float(), second.get(name).float()):
            found.add(word)
    return [word for word in words if word in found]


def _complement(beta: Any) -> Any:
    if isinstance(beta, list):
        return [_complement(part) for part in beta]
    if isinstance(beta, dict):
        return beta | {"value": _complement(beta["value"])}
    number = _number(beta, "beta")
    if not 0 <= number <= 1:
        raise SeavlmError(f"beta is {number:g}", hint="A share is between 0 and 1.")
    return 1 - number


def _long(raw: Mapping[str, Any], parent: Callable[[Any, str], int]) -> _Parsed:
    _known(raw, KEYS, "the recipe")
    name = raw.get("merge_method")
    if name not in METHODS:
        raise SeavlmError(
            f"merge_method is {name!r}.{nearest(str(name), METHODS)}", hint=f"Known: {', '.join(METHODS)}."
        )
    method, base = METHODS[str(name)], None
    if raw.get("base_model") is not None:
        base = parent(raw["base_model"], "base_model")
    if ("models" in raw) == ("slices" in raw):
        raise SeavlmError("the recipe needs models or slices, one of the two", hint="Write models: [...].")
    shared = _parameters(raw, method, str(name), "parameters")
    slices = []
    if "models" in raw:
        sources = [
            _source(entry, parent, method, str(name), ("model", "parameters"))
            for entry in _list(raw, "models")
        ]
        slices.append(_Slice(sources, base))
    for entry in _list(raw, "slices") if "slices" in raw else []:
        if not isinstance(entry, dict) or "sources" not in entry:
            raise SeavlmError("a slice has no sources", hint="slices: [{sources: [{model, layer_range}]}].")
        _known(entry, ("sources", "base_model", "parameters"), "a slice")
        own = parent(entry["base_model"], "base_model") if entry.get("base_model") else base
        keys = ("model", "layer_range", "parameters")
        sources = [_source(one, parent, method, str(name), keys) for one in _list(entry, "sources")]
        slices.append(_Slice(sources, own, _parameters(entry, method, str(name), "a slice's parameters")))
    for part in slices:
        if "models" in raw and part.base is not None and all(s.parent != part.base for s in part.sources):
            if method.base == "none" and method.each:
                continue  # it has no weight: it gives config and tokenizer, and no tensors
            part.sources.append(_Source(part.base, {}))
        _counted(str(name), method, part)
    return _Parsed(
        str(name),
        slices,
        base,
        shared,
        dict(raw),
        stacked="slices" in raw,
        tokenizer_source=_tokenizer_source(raw, parent),
        seed=_seed(raw),
    )


def _counted(name: str, method: Method, part: _Slice) -> None:
    with_base = part.base is not None and any(s.parent == part.base for s in part.sources)
    if method.base == "required" and not with_base:
        raise SeavlmError(f"{name} needs a base_model", hint="Name the model the others were tuned from.")
    count = len(part.sources) - (1 if with_base and method.base != "none" else 0)
    if not method.least <= count <= method.most:
        most = "" if method.most > 99 else f", at most {method.most}"
        besides = " besides the base" if method.base != "none" else ""
        raise SeavlmError(f"{name} was given {count} models{besides}", hint=f"At least {method.least}{most}.")


def _source(
    entry: Any, parent: Callable[[Any, str], int], method: Method, name: str, keys: tuple[str, ...]
) -> _Source:
    if isinstance(entry, str):
        entry = {"model": entry}
    if not isinstance(entry, dict) or "model" not in entry:
        raise SeavlmError(f"{entry!r} names no model", hint="Write - model: REFERENCE.")
    _known(entry, keys, "a model")
    layers = entry.get("layer_range")
    if "layer_range" in keys and (
        not isinstance(layers, list) or len(layers) != 2 or not all(type(n) is int for n in layers)
    ):
        raise SeavlmError(f"layer_range is {layers!r}", hint="Write [first, one past the last].")
    given = _parameters(entry, method, name, "a model's parameters")
    return _Source(parent(entry["model"], "model"), given, tuple(layers) if layers else None)


def _parameters(entry: Mapping[str, Any], method: Method, name: str, where: str) -> dict[str, Any]:
    given = entry.get("parameters") or {}
    if not isinstance(given, dict):
        raise SeavlmError(f"{where} are {given!r}", hint="They are a mapping.")
    _known(given, [*method.shared, *method.each, *IGNORED], f"{where} of {name}")
    return given


def _known(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            raise SeavlmError(
                f"{where}: unknown key {key!r}.{nearest(str(key), known)}", hint=f"Known: {', '.join(known)}."
            )


def _list(raw: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(raw[key], list) or not raw[key]:
        raise SeavlmError(f"{key} is {raw[key]!r}", hint="It is a list, with at least one entry.")
    return raw[key]


def _tokenizer_source(raw: Mapping[str, Any], parent: Callable[[Any, str], int]) -> str | int | None:
    given = raw.get("tokenizer_source")
    if raw.get("tokenizer") is not None:
        _known(raw["tokenizer"], ("source",), "tokenizer")
        given = raw["tokenizer"].get("source", "union")
    if given is None or given in ("base", "union"):
        return given
    return parent(given, "tokenizer_source")


def _seed(raw: Mapping[str, Any]) -> int:
    seed = raw.get("seed", 0)
    if type(seed) is not int:
        raise SeavlmError(f"seed is {seed!r}", hint="It is a whole number.")
    return seed


# --- the value of a parameter for a tensor


def value_for(setting: Any, name: str, t: float) -> Any:
    """A parameter's value for the tensor of canonical `name`; t: its layer's place, 0 (first) to 1 (last).

    None when no filter fits. A filter is looked for in Google's name of the tensor.
    """
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if any(isinstance(part, dict) for part in setting):
        for part in setting:
            if not isinstance(part, dict) or "value" not in part:
                raise SeavlmError(f"{part!r} has no value", hint="Write {filter: mlp, value: 0.3}.")
            _known(part, ("filter", "value"), "a filtered value")
            if fits(part.get("filter"), name):
                return value_for(part["value"], name, t)
        return None
    if not setting:
        return None
    if any(isinstance(part, bool | str) for part in setting):
        return setting[int(t * (len(setting) - 1))]
    place = t * (len(setting) - 1)
    low = min(int(place), len(setting) - 1)
    high = min(low + 1, len(setting) - 1)
    return setting[low] + (place - low) * (setting[high] - setting[low])


def fits(wanted: str | None, name: str) -> bool:
    """Whether a filter takes in the tensor of canonical `name`."""
    if wanted is None or wanted == "*":
        return True
    if not wanted.startswith("@"):
        return wanted in naming.to_disk(name, vision=True)
    word = wanted[1:]
    if found := _LAYERS.fullmatch(word):
        layer = _LAYER.match(name)
        return bool(
            layer and layer[1] == "language_model" and int(found[1]) <= int(layer[2]) <= int(found[2])
        )
    if word not in MODULES:
        raise SeavlmError(
            f"unknown module {wanted!r}.{nearest(word, MODULES)}",
            hint=f"Known: {', '.join('@' + m for m in MODULES)}, @layers A-B.",
        )
    return MODULES[word](name)


def _resolve(
    defaults: Mapping[str, Any], scopes: list[Mapping[str, Any]], name: str, t: float, what: str
) -> dict[str, Any]:
    found = {}
    for key, default in defaults.items():
        given = (value_for(scope[key], name, t) for scope in scopes if key in scope)
        value = next((v for v in given if v is not None), default)
        if value is REQUIRED:
            raise SeavlmError(
                f"{what} has no {key!r} for {name}", hint="Give it, or a value without a filter."
            )
        if isinstance(default, bool) and key != "rescale":
            if not isinstance(value, bool):
                raise SeavlmError(f"{key} is {value!r}", hint="It is true or false.")
        elif not (isinstance(value, bool) or value is None or value == "density"):
            value = _number(value, key)
        found[key] = value
    return found


def _number(value: Any, key: str) -> float:
    try:
        number = float(value)  # YAML 1.1 reads 1e-3 as text
        if isinstance(value, bool) or not np.isfinite(number):
            raise ValueError
    except (TypeError, ValueError):
        raise SeavlmError(f"{key} is {value!r}", hint="It is a number.") from None
    return number


# --- the steps


def _plan(
    parsed: _Parsed, places: list[Path], parents: list[FileCheckpoint], dtype: str | torch.dtype | None
) -> Plan:
    target = _dtype(dtype)
    lead = parsed.base if parsed.base is not None else len(parents) - 1 if parsed.global_last else 0
    by_token = parsed.tokenizer_source is not None
    _same_config(places, parents, stacked=parsed.stacked, by_token=by_token)
    vocabulary = _vocabulary_plan(parsed.tokenizer_source, lead, places, parents) if by_token else None
    checked = by_token or _same_tokenizer(places)
    config = parents[lead].config
    if vocabulary is not None:
        config = parents[vocabulary.base].config
        config = replace(config, text=replace(config.text, vocab_size=len(vocabulary.rows[0])))
    layers = [_slice_layers(parents, places, part) for part in parsed.slices]
    if parsed.stacked:
        kinds = [
            parents[part.sources[0].parent].config.text.layer_types[i]
            for part, mine in zip(parsed.slices, layers, strict=True)
            for i in range(*mine[0])
        ]
        text = replace(config.text, num_hidden_layers=len(kinds), layer_types=tuple(kinds))
        config = replace(config, text=text)
    else:
        _same_tensors(places, parents, by_token=by_token)
    stored = target or widest([parent.dtype(name) for parent in parents for name in parent.names()])
    config = replace(config, dtype=str(stored).removeprefix("torch."))
    where = [
        (part, i) for part, mine in zip(parsed.slices, layers, strict=True) for i in range(_length(mine))
    ]
    steps = [
        _step(parsed, name, shape, where, layers, config) for name, shape in naming.shapes(config).items()
    ]
    home = _tokenizer_home(places, vocabulary.base if vocabulary else lead)
    labels = [f"parent_{i}" for i in range(len(parents))]
    recipe = parsed.recipe | {"dtype": config.dtype}
    return Plan(
        config, stored, parents, places, steps, recipe, home, checked, parsed.seed, vocabulary, labels
    )


def _length(ranges: list[tuple[int, int]]) -> int:
    return ranges[0][1] - ranges[0][0]


def _slice_layers(parents: list[FileCheckpoint], places: list[Path], part: _Slice) -> list[tuple[int, int]]:
    """Each source's layers, as (first, one past the last)."""
    result = []
    for source in part.sources:
        count = parents[source.parent].config.text.num_hidden_layers
        first, end = source.layers or (0, count)
        if not 0 <= first < end <= count:
            raise SeavlmError(
                f"layer_range [{first}, {end}] of {places[source.parent]}", hint=f"It has {count} layers."
            )
        result.append((first, end))
    if len({end - first for first, end in result}) > 1:
        raise SeavlmError(f"the sources of a slice have different lengths: {result}", hint="Make them equal.")
    return result


def _step(
    parsed: _Parsed,
    name: str,
    shape: tuple[int, ...],
    where: list[tuple[_Slice, int]],
    ranges: list[list[tuple[int, int]]],
    config: Any,
) -> Step:
    """The step of the output's tensor `name`."""
    method, part = METHODS[parsed.method], parsed.slices[0]
    layer, t = _LAYER.match(name), 0.0
    taken = [name] * len(part.sources)
    if layer and layer[1] == "language_model":
        part, inner = where[int(layer[2])]
        mine = next(r for s, r in zip(parsed.slices, ranges, strict=True) if s is part)
        t = inner / (_length(mine) - 1) if _length(mine) > 1 else 1.0
        rest = name[layer.end() :]
        taken = [f"language_model.layers.{first + inner}.{rest}" for first, _ in mine]
    elif layer:
        count = config.vision.num_hidden_layers
        t = int(layer[2]) / (count - 1) if count > 1 else 1.0
    elif name == "language_model.norm.weight":
        part = parsed.slices[-1]
        taken = [name] * len(part.sources)
    base = next((i for i, s in enumerate(part.sources) if s.parent == part.base), None)
    base = None if method.base == "none" else base
    common: list[Mapping[str, Any]] = [part.parameters, parsed.parameters]
    shared = _resolve(method.shared, common, name, t, parsed.method)
    each = [
        {}
        if i == base
        else _resolve(method.each, [s.parameters, *common], source, t, f"model {s.parent + 1}")
        for i, (s, source) in enumerate(zip(part.sources, taken, strict=True))
    ]
    sources = tuple((s.parent, source) for s, source in zip(part.sources, taken, strict=True))
    settings = Settings(shared, tuple(each), base, f"{parsed.seed}/{name}")
    return Step(name, shape, parsed.method, sources, settings)


# --- do the parents fit together?


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise SeavlmError(f"cannot merge to dtype {dtype!r}", hint=f"Use {' or '.join(DTYPES)}.")
    return DTYPES[dtype]


_BY_TOKEN = ("vocab_size", "token_id", "token_index", "token_ids")
_BY_STACK = ("num_hidden_layers", "layer_types", "sliding_window_pattern")


def _same_config(places: list[Path], parents: list[FileCheckpoint], *, stacked: bool, by_token: bool) -> None:
    """Equal shapes and ids; the dtype may differ, and what a slice or a vocabulary's map makes good."""
    free = (_BY_TOKEN if by_token else ()) + (_BY_STACK if stacked else ())

    def flat(parent: FileCheckpoint) -> dict[str, Any]:
        found = _flat(parent.config.to_dict())
        return {k: v for k, v in found.items() if k.startswith("vision_config.") or not k.endswith(free)}

    first = flat(parents[0])
    for place, parent in zip(places[1:], parents[1:], strict=True):
        other = flat(parent)
        differing = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
        if differing:
            shown = ", ".join(f"{key} ({first.get(key)} and {other.get(key)})" for key in differing[:5])
            hint = "Only models of one architecture can be merged."
            if all(key.endswith(_BY_TOKEN) for key in differing):
                hint = "Vocabularies that differ are matched by token with tokenizer_source: base (or union)."
            raise SeavlmError(f"the configs of {places[0]} and {place} differ: {shown}", hint=hint)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {} if prefix.endswith(("dtype.", "transformers_version.")) else {prefix[:-1]: value}
    return {k: v for key, part in value.items() for k, v in _flat(part, f"{prefix}{key}.").items()}


def _same_tensors(places: list[Path], parents: list[FileCheckpoint], *, by_token: bool) -> None:
    """SeavlmError with the whole list when a name or a shape is not in every parent."""
    problems = []
    held = [set(parent.names()) for parent in parents]
    for name in sorted(set().union(*held)):
        absent = [str(place) for place, names in zip(places, held, strict=True) if name not in names]
        if absent:
            problems.append(f"{name} (not in {', '.join(absent)})")
            continue
        shapes = [tuple(parent.shape(name)) for parent in parents]
        if by_token and name == naming.EMBEDDING:
            shapes = [shape[1:] for shape in shapes]
        if len(set(shapes)) > 1:
            problems.append(f"{name} (shapes {' and '.join(map(str, shapes))})")
    if problems:
        raise SeavlmError(
            f"{len(problems)} tensors do not match between the parents: {'; '.join(problems)}",
            hint="Every tensor must be in each parent with one shape.",
        )


def _same_tokenizer(places: list[Path]) -> bool:
    """Equal vocabularies and special ids, read from tokenizer.json. False when fewer than two parents have
    one.
    """
    homes = [place for place in places if (place / "tokenizer.json").is_file()]
    if len(homes) < 2:
        return False
    first = _tokens(_tokenizer(homes[0]))
    for place in homes[1:]:
        other = _tokens(_tokenizer(place))
        hint = (
            "Row i of the embedding must mean the same token in each parent; or set tokenizer_source: base."
        )
        if len(first) != len(other):
            raise SeavlmError(
                f"the tokenizers of {homes[0]} and {place} have {len(first)} and {len(other)} tokens",
                hint=hint,
            )
        differing = sorted(t for t in first.keys() | other.keys() if first.get(t) != other.get(t))
        if differing:
            shown = ", ".join(f"{t!r} ({first.get(t)} and {other.get(t)})" for t in differing[:3])
            raise SeavlmError(
                f"the tokenizers of {homes[0]} and {place} disagree on {len(differing)} tokens: {shown}",
                hint=hint,
            )
    return True


def _tokenizer(place: Path) -> dict[str, Any]:
    try:
        content = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))
        _tokens(content)
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SeavlmError(
            f"{place}/tokenizer.json cannot be read: {error!r}", hint="Copy it again."
        ) from error


def _tokens(content: dict[str, Any]) -> dict[str, int]:
    return {
        **content["model"]["vocab"],
        **{token["content"]: token["id"] for token in content["added_tokens"]},
    }


def _tokenizer_home(places: list[Path], lead: int) -> Path | None:
    """Where the tokenizer is copied from: the leading parent, else the last that has one."""
    order = [*(p for i, p in enumerate(places) if i != lead), places[lead]]
    homes = [place for place in order if (place / "tokenizer.json").is_file()]
    found = homes or [place for place in order if place.is_dir()]
    return found[-1] if found else None


def _vocabulary_plan(
    source: str | int | None, lead: int, places: list[Path], parents: list[FileCheckpoint]
) -> Vocabulary:
    """Which row of which parent holds each token of the output.

    base: the base's rows stay where they are, spare ones too (row i with row i). union: tokens that only
    others know take the base's spare rows and then rows behind; in tokenizer.json they are added tokens.
    Where a parent lacks a token, the base's row stands in for it; where the base lacks it too, the mean of
    those that have it.
    """
    base = source if isinstance(source, int) else lead
    contents = [_tokenizer(place) for place in places]
    sizes = [parent.shape(naming.EMBEDDING)[0] for parent in parents]
    maps = [
        {token: i for token, i in _tokens(content).items() if i < size}
        for content, size in zip(contents, sizes, strict=True)
    ]
    out, added = dict(maps[base]), []
    if source == "union":
        taken = set(out.values())
        free = (i for i in range(10**9) if i not in taken)
        for content, tokens in zip(contents, maps, strict=True):
            special = {token["content"]: token for token in content["added_tokens"]}
            for token in sorted(tokens, key=tokens.__getitem__):
                if token not in out:
                    out[token] = next(free)
                    plain = {"single_word": False, "lstrip": False, "rstrip": False}
                    plain |= {"normalized": True, "special": False}
                    added.append({**plain, **special.get(token, {}), "id": out[token], "content": token})
    total = max(sizes[base], max(out.values()) + 1)
    named = np.zeros(total, dtype=bool)
    named[list(out.values())] = True
    rows = []
    for tokens, size in zip(maps, sizes, strict=True):
        row = np.full(total, -1, dtype=np.int64)
        row[list(out.values())] = [tokens.get(token, -1) for token in out]
        spare = np.zeros(total, dtype=bool)
        spare[:size] = True
        spare[[i for i in tokens.values() if i < total]] = False
        row = np.where(~named & spare, np.arange(total), row)
        rows.append(row)
    merged = contents[base] if added else None
    if merged is not None:
        merged["added_tokens"] = sorted([*merged["added_tokens"], *added], key=lambda token: token["id"])
    return Vocabulary(rows, base, merged, len(added), [int((row < 0).sum()) for row in rows])
