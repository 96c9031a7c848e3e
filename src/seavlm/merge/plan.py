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
part of a tensor's name, or "@" and a module's word from the table `MODULES`, layers or both ("@attention",
"@layers 0-7", "@mlp layers 0-7").
`slices` stack layers of the decoder; what is not in a layer comes from the first slice, the last norm from
the last one. `modules` (text_decoder, vision_tower, multi_modal_projector) have models or slices each, so
that a text-only model can be merged into one that sees; a module of the base alone is taken as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seavlm.errors import SeavlmError, nearest
from seavlm.merge.methods import METHODS, REQUIRED, Method, Settings, check_settings, widest
from seavlm.merge.vocabulary import (
    Vocabulary,
    Wish,
    check_keys,
    map_rows,
    read_template,
    read_wish,
    same_tokenizer,
    template_of,
    tokenizer_home,
)
from seavlm.weights import names as naming
from seavlm.weights.checkpoint import FileCheckpoint

_BOTH = ("dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template", "seed")
_FORMS = ("models", "slices", "modules")
KEYS = ("merge_method", *_FORMS, "base_model", "parameters", *_BOTH)
SHORT_KEYS = ("regional", "global", "beta", *_BOTH)
IGNORED = {"int8_mask"}  # says how mergekit holds its masks; ours need no memory
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PARTS = {  # mergekit's names of a model's modules
    "text_decoder": "language_model.",
    "vision_tower": "vision_tower.",
    "multi_modal_projector": "multi_modal_projector.",
}
_RANGES = {"density": (0, 1), "gamma": (0, 1), "select_topk": (0, 1), "epsilon": (0, 1)}
_LAYER = re.compile(r"(language_model|vision_tower\.encoder)\.layers\.(\d+)\.")
_LAYERS = re.compile(r"(?:(\w+) +)?layers? *\.?(\d+) *- *(\d+)")
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
class Plan:
    """A whole merge: its steps in the order of the output, and what lies beside the weights."""

    config: Any  # a Gemma3Config
    dtype: torch.dtype
    parents: list[FileCheckpoint]
    places: list[Path]
    steps: list[Step]
    recipe: dict[str, Any]  # for the manifest
    tokenizer_home: Path
    tokenizer_checked: bool
    seed: int = 0
    vocabulary: Vocabulary | None = None
    labels: list[str] = field(default_factory=list)  # the parents' names in the manifest
    chat_template: str | None = None  # instead of the tokenizer's own
    notes: list[str] = field(default_factory=list)  # what the user may not expect
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
    parts = {word: [_Slice(sources, None)] for word in PARTS}
    parsed = _Parsed("linear", parts, None, {"normalize": False}, recipe, global_last=True)
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
    scopes: list[dict[str, Any]] = field(default_factory=list)  # parameters, the nearest first
    copied: bool = False  # as it is in its one source, whatever the method


@dataclass
class _Parsed:
    method: str
    parts: dict[str, list[_Slice]]  # by the names of `PARTS`
    base: int | None
    parameters: dict[str, Any]
    recipe: dict[str, Any]
    wish: Wish = field(default_factory=Wish)
    by_modules: bool = False
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
        if "+" in reference and not Path(reference).exists():
            raise SeavlmError(
                f"{where}: {reference} asks for an adapter to be added first",
                hint="Merge the adapter into its model, and name that folder.",
            )
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
    check_keys(raw, SHORT_KEYS, "the recipe")
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
        {word: [_Slice(sources, None)] for word in PARTS},
        None,
        {"normalize": False},
        dict(raw),
        wish=read_wish(raw, parent),
        seed=_seed(raw),
        global_last=True,
    )


def module_words(words: Iterable[Any]) -> None:
    """SeavlmError for a word that is no module: one of `MODULES`, layers A-B, or both."""
    for word in words:
        found = _LAYERS.fullmatch(str(word))
        module = str(word) if found is None else found[1]
        if module is not None and module not in MODULES:
            raise SeavlmError(
                f"beta: unknown module {word!r}.{nearest(module, [*MODULES, 'default'])}",
                hint=f"Known: {', '.join(MODULES)}, layers A-B, mlp layers A-B, default.",
            )
        if found and int(found[2]) > int(found[3]):
            raise SeavlmError(f"beta: {word!r} names no layer", hint="Write the lower number first.")


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
    """Those of the modules `words`, and of "default" for the rest, in which two models differ.

    Of a tensor's modules the first counts. SeavlmError for a word that is left without a tensor.
    """
    first, second = parents
    owner = {n: next((w for w in words if fits(f"@{w}", n)), "default") for n in first.names()}
    for word in words:
        if word not in owner.values():
            some = any(fits(f"@{word}", name) for name in owner)
            layers = first.config.text.num_hidden_layers
            raise SeavlmError(
                f"{word}: {'the modules before it leave it no tensor' if some else 'no tensor is there'}",
                hint="Put it before them." if some else f"The model has layers 0-{layers - 1}.",
            )
    found: set[str] = set()
    for name, word in owner.items():
        if word not in found and not _equal(first.get(name), second.get(name)):
            found.add(word)
    return [word for word in [*words, "default"] if word in found]


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.float(), b.float())


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
    check_keys(raw, KEYS, "the recipe")
    name = raw.get("merge_method")
    if name not in METHODS:
        raise SeavlmError(
            f"merge_method is {name!r}.{nearest(str(name), METHODS)}", hint=f"Known: {', '.join(METHODS)}."
        )
    method, base = METHODS[str(name)], None
    if raw.get("base_model") is not None:
        base = parent(raw["base_model"], "base_model")
    forms = [key for key in _FORMS if raw.get(key) is not None]
    if len(forms) != 1:
        raise SeavlmError(
            f"the recipe has {' and '.join(forms) or 'no models'}",
            hint="Write one of models, slices, modules.",
        )
    shared = _parameters(raw, method, str(name), "parameters")
    read = _Reader(str(name), method, base, parent)
    parts: dict[str, list[_Slice]]
    if "modules" in raw:
        if not isinstance(raw["modules"], dict):
            raise SeavlmError(
                f"modules are {raw['modules']!r}", hint="Write modules: {text_decoder: {models}}."
            )
        check_keys(raw["modules"], (*PARTS, "default"), "modules")
        parts = {}
        for word, entry in raw["modules"].items():
            if not isinstance(entry, dict) or ("models" in entry) == ("slices" in entry):
                raise SeavlmError(f"modules: {word} is {entry!r}", hint="It has models, or slices.")
            check_keys(entry, ("models", "slices", "parameters"), f"modules: {word}")
            own = _parameters(entry, method, str(name), f"{word}'s parameters")
            found = read.slices(entry, alone=True)
            # a text-only model has one module, "default"
            parts["text_decoder" if word == "default" else word] = [
                replace(part, scopes=[*part.scopes, own]) for part in found
            ]
    else:
        stack = read.slices(raw)
        whole = [replace(source, layers=None) for source in stack[0].sources]
        parts = {word: [replace(stack[0], sources=whole)] for word in PARTS} | {"text_decoder": stack}
    return _Parsed(
        str(name),
        parts,
        base,
        shared,
        dict(raw),
        wish=read_wish(raw, parent),
        seed=_seed(raw),
        by_modules="modules" in forms,
    )


@dataclass
class _Reader:
    """Reads the models, or the slices, of a recipe or a module."""

    name: str
    method: Method
    base: int | None
    parent: Callable[[Any, str], int]

    def slices(self, raw: Mapping[str, Any], *, alone: bool = False) -> list[_Slice]:
        """alone: of the base alone, its tensors are taken as they are."""
        result = []
        if raw.get("models") is not None:
            result.append(
                _Slice([self.source(e, ("model", "parameters")) for e in _list(raw, "models")], self.base)
            )
        for entry in _list(raw, "slices") if raw.get("slices") is not None else []:
            if not isinstance(entry, dict) or "sources" not in entry:
                raise SeavlmError(
                    "a slice has no sources", hint="slices: [{sources: [{model, layer_range}]}]."
                )
            check_keys(entry, ("sources", "base_model", "parameters"), "a slice")
            own = self.parent(entry["base_model"], "base_model") if entry.get("base_model") else self.base
            keys = ("model", "layer_range", "parameters")
            sources = [self.source(one, keys) for one in _list(entry, "sources")]
            given = _parameters(entry, self.method, self.name, "a slice's parameters")
            result.append(_Slice(sources, own, [given]))
        for part in result:
            part.copied = (
                alone and self.method.base != "none" and [s.parent for s in part.sources] == [part.base]
            )
            if part.copied:
                continue
            if (
                raw.get("models")
                and part.base is not None
                and all(s.parent != part.base for s in part.sources)
            ):
                if self.method.base == "none" and self.method.each:
                    continue  # it has no weight: it gives config and tokenizer, and no tensors
                part.sources.append(_Source(part.base, {}))
            _counted(self.name, self.method, part)
        return result

    def source(self, entry: Any, keys: tuple[str, ...]) -> _Source:
        if isinstance(entry, str):
            entry = {"model": entry}
        if not isinstance(entry, dict) or "model" not in entry:
            raise SeavlmError(f"{entry!r} names no model", hint="Write - model: REFERENCE.")
        check_keys(entry, keys, "a model")
        layers = entry.get("layer_range")
        if "layer_range" in keys and (
            not isinstance(layers, list) or len(layers) != 2 or not all(type(n) is int for n in layers)
        ):
            raise SeavlmError(f"layer_range is {layers!r}", hint="Write [first, one past the last].")
        given = _parameters(entry, self.method, self.name, "a model's parameters")
        return _Source(self.parent(entry["model"], "model"), given, tuple(layers) if layers else None)


def _counted(name: str, method: Method, part: _Slice) -> None:
    with_base = part.base is not None and any(s.parent == part.base for s in part.sources)
    if method.base == "required" and not with_base:
        missing = "a base_model" if part.base is None else "its base_model among the sources of each slice"
        raise SeavlmError(f"{name} needs {missing}", hint="It is the model the others were tuned from.")
    count = len(part.sources) - (1 if with_base and method.base != "none" else 0)
    if not method.least <= count <= method.most:
        most = "" if method.most > 99 else f", at most {method.most}"
        besides = " besides the base" if method.base != "none" else ""
        raise SeavlmError(f"{name} was given {count} models{besides}", hint=f"At least {method.least}{most}.")


def _parameters(entry: Mapping[str, Any], method: Method, name: str, where: str) -> dict[str, Any]:
    given = entry.get("parameters") or {}
    if not isinstance(given, dict):
        raise SeavlmError(f"{where} are {given!r}", hint="They are a mapping.")
    check_keys(given, [*method.shared, *method.each, *IGNORED], f"{where} of {name}")
    return given


def _list(raw: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(raw[key], list) or not raw[key]:
        raise SeavlmError(f"{key} is {raw[key]!r}", hint="It is a list, with at least one entry.")
    return raw[key]


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
            check_keys(part, ("filter", "value"), "a filtered value")
            if fits(part.get("filter"), name):
                return value_for(part["value"], name, t)
        return None
    if not setting:
        return None
    place = t * (len(setting) - 1)
    low = min(int(place), len(setting) - 1)
    high = min(low + 1, len(setting) - 1)
    if any(isinstance(part, bool) or part == "density" for part in setting):
        return setting[low]
    first, second = _number(setting[low], "a value of a list"), _number(setting[high], "a value of a list")
    return first + (place - low) * (second - first)


def fits(wanted: str | None, name: str) -> bool:
    """Whether a filter takes in the tensor of canonical `name`."""
    if wanted is None or wanted == "*":
        return True
    if not wanted.startswith("@"):
        return wanted in naming.to_disk(name, vision=True)
    word = wanted[1:]
    found = _LAYERS.fullmatch(word)
    module = found[1] if found else word
    if module is not None and module not in MODULES:
        raise SeavlmError(
            f"unknown module {wanted!r}.{nearest(module, MODULES)}",
            hint=f"Known: {', '.join('@' + m for m in MODULES)}, @layers A-B, @mlp layers A-B.",
        )
    if found:
        layer = _LAYER.match(name)
        if not layer or not int(found[2]) <= int(layer[2]) <= int(found[3]):
            return False
        if module is None:
            return layer[1] == "language_model"
    return MODULES[str(module)](name)


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
        if isinstance(default, bool):
            if not isinstance(value, bool) and (key, value) != ("rescale", "density"):
                raise SeavlmError(f"{key} is {value!r}", hint="It is true or false.")
        elif value is not None:
            value = _number(value, key)
            low, high = _RANGES.get(key, (-np.inf, np.inf))
            if not low <= value <= high:
                raise SeavlmError(f"{key} is {value:g}", hint=f"It is between {low} and {high}.")
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
    if parsed.by_modules and "vision_tower" in parsed.parts and parents[lead].config.vision is None:
        lead = parsed.parts["vision_tower"][0].sources[0].parent
    by_token = parsed.wish.source is not None
    config = parents[lead].config
    parts = {word: part for word, part in parsed.parts.items() if word == "text_decoder" or config.vision}
    if missing := [word for word in PARTS if word not in parts and (config.vision or word == "text_decoder")]:
        raise SeavlmError(
            f"modules lacks {', '.join(missing)}", hint="Each module of the model needs models."
        )
    _same_config(places, parents, parts, lead, by_token=by_token, apart=parsed.by_modules)
    vocabulary = map_rows(parsed.wish, lead, places, parents) if by_token else None
    checked = by_token or same_tokenizer(places)
    notes = [] if checked else ["tokenizers were not compared: fewer than two parents have a tokenizer.json"]
    if vocabulary is not None:
        config = parents[vocabulary.base].config
        config = replace(config, text=replace(config.text, vocab_size=len(vocabulary.rows[0])))
    elif len({parent.config.eos_token_ids for parent in parents}) > 1:
        # a base that was never tuned to end a turn does not keep the others from it
        ends = tuple(dict.fromkeys(i for p in (parents[lead], *parents) for i in p.config.eos_token_ids))
        config = replace(config, eos_token_ids=ends)
        notes.append(f"the parents end at different tokens; the merged model ends at {list(ends)}")
    layers = {word: _layers(word, part, places, parents) for word, part in parts.items() if word in _COUNTED}
    kinds = tuple(
        parents[part.sources[0].parent].config.text.layer_types[firsts[0] + inner]
        for part, inner, firsts, _ in layers["text_decoder"]
    )
    config = replace(config, text=replace(config.text, num_hidden_layers=len(kinds), layer_types=kinds))
    if config.vision is not None:
        vision = replace(config.vision, num_hidden_layers=len(layers["vision_tower"]))
        config = replace(config, vision=vision)
    _same_tensors(places, parents, parts, by_token=by_token)
    stored = target or widest([parent.dtype(name) for parent in parents for name in parent.names()])
    stored = stored if stored in DTYPES.values() else torch.float32
    config = replace(config, dtype=str(stored).removeprefix("torch."))
    steps = [_step(parsed, parts, name, shape, layers) for name, shape in naming.shapes(config).items()]
    home = tokenizer_home(places, vocabulary.base if vocabulary else lead)
    template = read_template(parsed.recipe.get("chat_template"), places)
    donors = [place for place in places if template_of(place)]
    if template is None and home is not None and donors and template_of(home) is None:
        notes.append(f"no chat template: {home} has none; {donors[0]} has one (chat_template: auto)")
    labels = [f"parent_{i}" for i in range(len(parents))]
    recipe = parsed.recipe | {"dtype": config.dtype}
    return Plan(
        config,
        stored,
        parents,
        places,
        steps,
        recipe,
        home,
        checked,
        parsed.seed,
        vocabulary,
        labels,
        template,
        notes,
    )


_AT_THE_END = tuple(
    f"{name}.{kind}" for name in ("language_model.norm", "post_layernorm") for kind in ("weight", "bias")
)
_COUNTED = {"text_decoder": "text", "vision_tower": "vision"}  # the modules with layers, and their configs
_Layers = dict[str, list[tuple[_Slice, int, list[int], int]]]


def _layers(
    word: str, parts: list[_Slice], places: list[Path], parents: list[FileCheckpoint]
) -> list[tuple[_Slice, int, list[int], int]]:
    """For each layer of the output: its slice, its place in it, each source's first layer, and the length."""
    result = []
    for part in parts:
        ranges = []
        for source in part.sources:
            count = getattr(parents[source.parent].config, _COUNTED[word]).num_hidden_layers
            first, end = source.layers or (0, count)
            if not 0 <= first < end <= count:
                raise SeavlmError(
                    f"layer_range [{first}, {end}] of {places[source.parent]}", hint=f"It has {count} layers."
                )
            ranges.append((first, end))
        lengths = {end - first for first, end in ranges}
        if len(lengths) > 1:
            raise SeavlmError(
                f"the sources of a slice have different lengths: {ranges}", hint="Make them equal."
            )
        (length,) = lengths
        result += [(part, inner, [first for first, _ in ranges], length) for inner in range(length)]
    return result


def _part_of(name: str) -> str:
    """The module, of `PARTS`, that a tensor belongs to."""
    return next((word for word, prefix in PARTS.items() if name.startswith(prefix)), "text_decoder")


def _step(
    parsed: _Parsed, parts: dict[str, list[_Slice]], name: str, shape: tuple[int, ...], layers: _Layers
) -> Step:
    """The step of the output's tensor `name`."""
    word, layer, t = _part_of(name), _LAYER.match(name), 0.0
    part = parts[word][-1 if name.endswith(_AT_THE_END) else 0]
    taken = [name] * len(part.sources)
    if layer:
        part, inner, firsts, length = layers[word][int(layer[2])]
        t = inner / (length - 1) if length > 1 else 1.0
        taken = [f"{name[: layer.start(2)]}{first + inner}{name[layer.end(2) :]}" for first in firsts]
    sources = tuple((s.parent, source) for s, source in zip(part.sources, taken, strict=True))
    if part.copied:
        return Step(name, shape, "passthrough", sources, Settings({}, ({"scale": None},)))
    method = METHODS[parsed.method]
    base = next((i for i, s in enumerate(part.sources) if s.parent == part.base), None)
    base = None if method.base == "none" else base
    common: list[Mapping[str, Any]] = [*part.scopes, parsed.parameters]
    shared = _resolve(method.shared, common, name, t, parsed.method)
    each = [
        {}
        if i == base
        else _resolve(method.each, [s.parameters, *common], source, t, f"model {s.parent + 1}")
        for i, (s, source) in enumerate(zip(part.sources, taken, strict=True))
    ]
    settings = Settings(shared, tuple(each), base, f"{parsed.seed}/{name}")
    check_settings(parsed.method, settings)
    return Step(name, shape, parsed.method, sources, settings)


# --- do the parents fit together?


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise SeavlmError(f"cannot merge to dtype {dtype!r}", hint=f"Use {' or '.join(DTYPES)}.")
    return DTYPES[dtype]


_BY_TOKEN = (
    "vocab_size",
    "pad_token_id",
    "bos_token_id",
    "image_token_index",
    "boi_token_index",
    "eoi_token_index",
)
_BY_STACK = ("num_hidden_layers", "layer_types")
_HARMLESS = ("initializer_range", "max_position_embeddings")  # they change no tensor and no number


def _said(config: Any, word: str, *, apart: bool) -> dict[str, Any]:
    """What a config says of a module; apart: whatever other modules there are."""
    if word == "text_decoder":
        ids = {key: getattr(config, key) for key in ("pad_token_id", "bos_token_id")}
        return asdict(config.text) | ids | ({} if apart else {"sees": config.vision is not None})
    tower = {f"vision.{key}": value for key, value in asdict(config.vision).items()} if config.vision else {}
    seen = {key: getattr(config, key) for key in ("mm_tokens_per_image", *_BY_TOKEN[3:])}
    return tower | (seen if config.vision else {}) | {"sees": config.vision is not None}


def _same_config(
    places: list[Path],
    parents: list[FileCheckpoint],
    parts: dict[str, list[_Slice]],
    lead: int,
    *,
    by_token: bool,
    apart: bool,
) -> None:
    """The models of a module must agree on it, but for what a slice or a vocabulary's map makes good."""
    for word, part in parts.items():
        stacked = any(source.layers for one in part for source in one.sources)
        free = _HARMLESS + (_BY_TOKEN if by_token else ()) + (_BY_STACK if stacked else ())
        first, *others = sorted({lead, *(source.parent for one in part for source in one.sources)})
        mine = _said(parents[first].config, word, apart=apart)
        for i in others:
            other = _said(parents[i].config, word, apart=apart)
            differing = [
                k for k in mine | other if mine.get(k) != other.get(k) and k.split(".")[-1] not in free
            ]
            if not differing:
                continue
            shown = ", ".join(f"{key} ({mine.get(key)} and {other.get(key)})" for key in differing[:5])
            hint = "Only models of one architecture can be merged."
            if "sees" in differing:
                shown = "only one of them sees"
                hint = (
                    "Merge a text-only model into one that sees by modules: text_decoder, vision_tower, ..."
                )
            elif set(differing) <= set(_BY_TOKEN):
                hint = "Vocabularies that differ are matched by token with tokenizer_source: base (or union)."
            raise SeavlmError(f"the configs of {places[first]} and {places[i]} differ: {shown}", hint=hint)


def _same_tensors(
    places: list[Path], parents: list[FileCheckpoint], parts: dict[str, list[_Slice]], *, by_token: bool
) -> None:
    """SeavlmError with the whole list when a name or a shape is not in every model of its module."""
    problems = []
    for word, part in parts.items():
        if any(source.layers for one in part for source in one.sources):
            continue
        mine = sorted({source.parent for one in part for source in one.sources})
        held = {i: {name for name in parents[i].names() if _part_of(name) == word} for i in mine}
        for name in sorted(set().union(*held.values())):
            absent = [str(places[i]) for i in mine if name not in held[i]]
            if absent:
                problems.append(f"{name} (not in {', '.join(absent)})")
                continue
            shapes = [tuple(parents[i].shape(name)) for i in mine]
            if by_token and name == naming.EMBEDDING:
                shapes = [shape[1:] for shape in shapes]
            if len(set(shapes)) > 1:
                problems.append(f"{name} (shapes {' and '.join(map(str, shapes))})")
    if problems:
        raise SeavlmError(
            f"{len(problems)} tensors do not match between the parents: {'; '.join(problems)}",
            hint="Every tensor must be in each parent with one shape.",
        )
