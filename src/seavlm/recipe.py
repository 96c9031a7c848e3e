"""The recipe: one YAML file that says how a model is made, read into plain typed objects. No torch here.

    recipe = load_recipe("recipes/demo.yaml", overrides=["train.lr=2e-5"])
    recipe.train.lr

Every section belongs to one stage: data -> train -> merge -> eval -> card. A key nobody knows is refused
with the nearest known one, because a misspelt key that is silently ignored costs a training run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from seavlm.errors import SeavlmError, nearest

Language = Literal["my", "en", "id", "km", "lo", "ms", "zh", "tl", "ta", "th", "vi"]
LANGUAGE_CODES: tuple[Language, ...] = get_args(Language)
Fraction = Annotated[float, Field(ge=0, le=1)]
Watts = Annotated[float, Field(gt=0)] | str | None


class Section(BaseModel):
    """A part of a recipe: immutable, and no key beyond the ones written here."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    """Which questions about which pictures. Default: the picture set that ships with the package."""

    source: str = Field(
        "pictures",
        description='"pictures" (built in), or a folder with train.parquet, eval.parquet (or .jsonl)',
    )
    languages: dict[Language, PositiveInt] = Field(
        default=dict.fromkeys(LANGUAGE_CODES, 1),
        min_length=1,
        description="a list, or {my: 10, en: 1}: ten times as many samples in Burmese as in English",
    )
    eval_languages: list[Language] | None = Field(
        None, description="languages asked in evaluation; default: all 11"
    )
    tasks: dict[str, float] = Field(
        default={"name": 4.0, "choose": 3.0, "yesno": 1.5, "flag": 1.0, "corner": 0.5, "count": 0.5},
        description="task -> share of the training samples (shares need not sum to 1)",
    )
    eval_tasks: dict[str, float] | None = Field(
        None, description="the same for evaluation; default: as `tasks`"
    )
    families: list[str] | None = Field(
        None, description="art families to train on; default: all but eval_families"
    )
    eval_families: list[str] = Field(default=["fluent-3d"], description="art families never trained on")
    concepts: int | list[str] | None = Field(None, description="how many concepts, or which; default: all")
    task_concepts: dict[str, int | list[str] | None] = Field(
        default={},
        description="task -> concepts, where a task's training samples take others than `concepts`; ~: all",
    )
    n: int = Field(20_000, gt=0, description="training samples")
    n_eval: int = Field(2_200, gt=0, description="questions of the final evaluation")
    n_dev: int = Field(
        1_100, ge=0, description="questions of the merge sweep, none of them in the final evaluation"
    )

    @field_validator("languages", mode="before")
    @classmethod
    def _all_alike(cls, given: Any) -> Any:
        return dict.fromkeys(given, 1) if isinstance(given, list) else given

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        shared = sorted(set(self.families or []) & set(self.eval_families))
        if shared:
            raise ValueError(
                f"family {', '.join(shared)} is in both families and eval_families; held-out art stays out"
            )
        if strange := sorted(set(self.task_concepts) - set(self.tasks)):
            raise ValueError(f"task_concepts has {', '.join(strange)}, which `tasks` does not have")
        return self


class Distill(Section):
    """How a vision tower learns from a classifier's features of drawings (seavlm.train.distill)."""

    steps: int = Field(6000, gt=0)
    batch_size: int = Field(96, gt=0)
    patches_kept: int = Field(
        24, gt=0, description="of each picture, for the first three quarters of the steps"
    )
    target_size: int = Field(256, gt=0, description="dimensions kept of the teacher's features")
    focus: list[str] | None = Field(
        None, description="concepts or groups drawn more often; default: all alike"
    )
    focus_weight: float = Field(12.0, gt=0)
    lr: float = Field(8e-4, gt=0, description="of AdamW: patches, positions, norms, head")
    muon_lr: float = Field(0.02, gt=0, description="of Muon: the encoder's matrices")
    save_every: int = Field(200, gt=0)


class Init(Section):
    """A base model from nothing, instead of `base`: fresh decoder, distilled tower, trimmed vocabulary."""

    tokenizer: str = Field("gemma3-270m", description="whose tokenizer is trimmed: a reference, as in `base`")
    concepts: int | list[str] | None = Field(
        None, description="whose names the vocabulary covers; default: all"
    )
    text: dict[str, Any] = Field(description="the decoder's shape: fields of model.config.TextConfig")
    vision: dict[str, Any] | None = Field(
        None, description="the tower's shape: fields of model.config.VisionConfig"
    )
    tower: str | None = Field(
        None, description="a model (a reference) whose tower is taken, instead of `vision` and `distill`"
    )
    mm_tokens_per_image: int = Field(16, gt=0)
    distill: Distill | None = None
    watts: Watts = None
    region: str | None = None

    @model_validator(mode="after")
    def _one_tower(self) -> Init:
        if (self.vision is None) == (self.tower is None) or (self.tower and self.distill):
            raise ValueError("either `vision` (with or without `distill`) describes the tower, or `tower`")
        return self


class Train(Section):
    """Supervised fine-tuning: a step sees batch_size samples, packed into rows of max_seq_len tokens."""

    enabled: bool = True
    epochs: float = Field(1.0, gt=0)
    steps: int | None = Field(None, gt=0, description="this many optimiser steps, whatever epochs says")
    batch_size: int = Field(64, gt=0, description="samples in one optimiser step")
    max_seq_len: int = Field(512, gt=0, description="tokens in a packed row; longer samples are left out")
    micro_rows: int = Field(
        8, gt=0, description="packed rows in one forward pass; the gradients of a step's passes are summed"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon: Muon for the layers' matrices, AdamW for the rest; for a base from nothing",
    )
    lr: float = Field(2e-5, gt=0, description="peak, of AdamW")
    muon_lr: float = Field(0.02, gt=0, description="peak, of Muon; it follows the same schedule")
    min_lr_ratio: Fraction = Field(0.0, description="share of lr at the end")
    warmup_ratio: Fraction = 0.03
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = Field(0.01, ge=0, description="decoupled; matrices only, never norms or biases")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0, description="largest gradient norm; 0 = no clipping")
    freeze: list[str] = Field(
        default=["vision_tower"],
        description="prefixes of parameter names: vision_tower, multi_modal_projector, language_model, ...",
    )
    lora_rank: int | None = Field(
        None,
        gt=0,
        description="LoRA: train adapters of this rank on the linear layers that freeze leaves, nothing else",
    )
    lora_alpha: float = Field(32, gt=0, description="the adapters' weight is lora_alpha / lora_rank")
    image_views: int = Field(
        1, gt=0, description="1 = the pictures as they are; K = those and K-1 augmented ones, drawn per epoch"
    )
    blend: dict[str, Fraction] = Field(
        default={},
        description="task -> most of another picture blended into its pictures, drawn evenly from 0 to it. "
        "{choose: 1}: pictures that leave it open what they show, so that the options are read",
    )
    recompute: bool = Field(
        False,
        description="keep each decoder layer's input only and compute the layer again in the backward pass: "
        "a third more work, a fraction of the memory, the same losses",
    )
    cache_images: bool = Field(True, description="with a frozen tower: compute each picture's features once")
    image_cache_dir: str | None = Field(None, description="shared by several runs; default: out/cache/images")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="compute; the trained weights themselves stay fp32. fp16 overflows in Gemma 3"
    )
    save_dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the finished model")
    device: str = "auto"
    threads: int | None = Field(None, gt=0, description="CPU threads; default: torch's own choice")
    save_every: int = Field(200, gt=0, description="optimiser steps between checkpoints")
    keep_last: int = Field(2, gt=0, description="checkpoints that are kept")
    watts: Watts = Field(
        None,
        description="power of the whole machine, for all stages: a number, GPUs such as '8 x H200' (their "
        "TDP), codecarbon; default: SEAVLM_WATTS, else measured where possible, else assumed",
    )
    carbon_intensity: float | None = Field(
        None, ge=0, description="kg CO2e per kWh; default: the region's published figure"
    )
    region: str | None = Field(
        None, description="a country, or a cloud's region; default: SEAVLM_REGION, else singapore"
    )
    pue: float | None = Field(
        None,
        ge=1,
        description="watts a data centre draws for each of its machines; default: SEAVLM_PUE, else 1",
    )

    @model_validator(mode="after")
    def _adapters(self) -> Train:
        if self.lora_rank and self.optimizer == "muon":
            raise ValueError("lora_rank goes with adamw: Muon is for whole matrices")
        return self


class Merge(Section):
    """theta = beta * regional + (1 - beta) * global; the best weighted score wins (seavlm.merge.search)."""

    enabled: bool = True
    method: Literal["linear"] = "linear"
    betas: list[Fraction] = Field(default=[0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0], min_length=1)
    modules: list[str] = Field(
        default=[], description="with a beta of their own: attention, mlp, embeddings, mlp layers 0-5, ..."
    )
    trials: int = Field(0, ge=0, description="betas that optuna proposes; 0: one module after the other")
    alpha: Fraction = Field(0.43, description="weight of the global suite; the regional suite has 1 - alpha")
    floors: dict[str, Fraction] = Field(
        default={}, description="language -> share of the global parent's accuracy that a merge must keep"
    )
    confirm: float = Field(
        0.5, ge=0.1, le=0.9, description="share of the concepts kept from the search, for the verdict"
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="of the merged file; default: as the parents"
    )

    @field_validator("betas")
    @classmethod
    def _sorted(cls, betas: list[float]) -> list[float]:
        return sorted(set(betas))


class Eval(Section):
    """How replies are made and judged. The questions are the data stage's held-out ones."""

    batch_size: int = Field(32, gt=0)
    max_new_tokens: int = Field(24, gt=0)
    bootstrap: int = Field(1000, gt=0, description="resamples of the questions for the 95 % intervals")
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


class Card(Section):
    """What the model card says beyond what the manifests know."""

    title: str | None = None
    description: str = ""
    license: str = "gemma"
    authors: list[str] = []
    limitations: list[str] = []


class Recipe(Section):
    """One model, from base to card."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    base: str = Field(
        "nano-global", description="the global parent: a directory, a .gguf, a hub id or a built-in name"
    )
    out: str | None = Field(None, description="where the stages go; default: out/<name>")
    init: Init | None = Field(None, description="make the base from nothing; `base` is then not used")
    data: Data = Data()
    train: Train = Train()
    merge: Merge = Merge()
    eval: Eval = Eval()
    card: Card = Card()

    @property
    def out_dir(self) -> Path:
        return Path(self.out) if self.out else Path("out") / self.name


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides such as "train.lr=2e-5" (values are YAML)."""
    return parse_recipe(read_mapping(path, overrides), source=str(path))


def read_mapping(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping of a YAML file, with overrides, unchecked."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = path.parent if path.parent.is_dir() else Path(".")
        known = [str(p) for p in sorted(beside.glob("*.yaml"))]
        raise SeavlmError(
            f"There is no recipe at {path}", hint=f"Give the path of a YAML file.{nearest(str(path), known)}"
        ) from None
    except (OSError, UnicodeDecodeError) as e:
        raise SeavlmError(
            f"Recipe {path} cannot be read ({e})", hint="A recipe is a UTF-8 YAML file."
        ) from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(e, "problem", None) or "not YAML"
        raise SeavlmError(f"{path} is not valid YAML{where}: {problem}", hint="Mend that line.") from None
    if not isinstance(raw, dict):
        raise SeavlmError(
            f"{path} is not a recipe", hint='A recipe is a mapping; its first line is often "name: ...".'
        )
    for override in overrides:
        _apply(raw, override)
    return raw


def is_merge(raw: Mapping[str, Any]) -> bool:
    """Whether a mapping is a merge recipe (`merge.plan`), not one of a build."""
    return bool({"merge_method", "models", "slices", "modules", "regional", "global", "beta"} & set(raw))


def parse_recipe(raw: dict[str, Any], *, source: str = "the recipe") -> Recipe:
    """Check a mapping against the schema; the first problem becomes one line with its dotted key."""
    if "version" in raw and ("tasks" in raw or "include" in raw):
        raise SeavlmError(f"{source} is a suite of questions", hint=f"seavlm eval MODEL --suite {source}")
    raw = _floats(raw, Recipe)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as e:
        raise _explain(e, source) from None


def known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, such as "train.lr"."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if section := _section(field.annotation):
            keys += known_keys(section, f"{prefix}{name}.")
    return keys


def _apply(raw: dict[str, Any], override: str) -> None:
    key, eq, value = override.partition("=")
    if not eq or not key.strip():
        raise SeavlmError(
            f"{override!r} is not an override", hint="Write KEY=VALUE, for example train.lr=2e-5."
        )
    *parents, last = key.strip().split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise SeavlmError(f"{key} cannot be set: {parent} is not a section", hint=_known_hint(key))
        node = child
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise SeavlmError(
            f"The value of {override!r} is not YAML", hint='Quote it, or write a list as "[a, b]".'
        ) from None


def _floats(raw: Any, model: type[BaseModel]) -> Any:
    """YAML 1.1 reads 2e-5 as a string (it wants 2.0e-5): where the schema has a number, read it as one.

    A section written without content ("train:") is an empty one.
    """
    if not isinstance(raw, dict):
        return raw
    fixed: dict[str, Any] = {}
    for key, value in raw.items():
        field = model.model_fields.get(key)
        section = _section(field.annotation) if field else None
        if section:
            empty = value is None and field is not None and field.default is not None
            value = _floats({} if empty else value, section)
        elif field is not None and isinstance(value, str) and float in _types(field.annotation):
            with contextlib.suppress(ValueError):
                value = float(value)
        fixed[key] = value
    return fixed


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one."""
    found = [t for t in _types(annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
    return found[0] if found else None


def _types(annotation: Any) -> Iterable[Any]:
    if get_origin(annotation) is None:
        return (annotation,)
    return [t for arg in get_args(annotation) for t in _types(arg)]


def _known_hint(key: str) -> str:
    section, _, last = key.rpartition(".")
    same = [k.rpartition(".")[2] for k in known_keys() if k.rpartition(".")[0] == section]
    if not same:
        return nearest(key, known_keys()).strip() or f"Sections: {', '.join(Recipe.model_fields)}."
    return f"{nearest(last, same)} Known {f'in {section}' if section else 'here'}: {', '.join(same)}.".strip()


def _explain(error: ValidationError, source: str) -> SeavlmError:
    problems = error.errors()
    unknown = [p for p in problems if p["type"] == "extra_forbidden"]
    first = (unknown or problems)[0]
    key = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] == "extra_forbidden":
        return SeavlmError(f'{source}: unknown key "{key}"', hint=_known_hint(key))
    if first["type"] == "missing":
        return SeavlmError(f'{source}: key "{key}" is missing', hint=f"Add it: {key}: ...")
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = first.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) or given is None else ""
    expected = first.get("ctx", {}).get("expected", "")
    hint = (
        nearest(str(given), [w.strip("' ") for w in expected.replace(" or ", ",").split(",")]).strip()
        if expected
        else ""
    )
    more = f" and {len(problems) - 1} more problem{'s' * (len(problems) > 2)}" if len(problems) > 1 else ""
    return SeavlmError(
        f'{source}: "{key}" {message}{shown}{more}', hint=hint or "Mend that value in the recipe."
    )
