"""The model card: a README.md for the Hugging Face hub, written from what manifests and runs have recorded.

Nothing is measured or computed here but sums of what they say, and nothing is claimed that they do not: a
stage without a manifest has no section. No torch, no network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from seavlm import recipe
from seavlm.card.facts import Facts, Manifest, Stage, on_hub, short
from seavlm.card.scores import LANGUAGES, METHODS, evaluations, rounding, search
from seavlm.errors import SeavlmError
from seavlm.manifest import sha256_bytes

LICENCES = {  # of the hub's identifiers, those that a vision-language model is likely to have
    *("apache-2.0", "mit", "gemma", "bsd-3-clause", "openrail", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"),
    *(
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
        "cc-by-nd-4.0",
        "llama3.1",
        "llama3.2",
        "llama4",
        "other",
        "unknown",
    ),
}
SMALL = 1_000_000_000
"""Parameters below which the card warns of what so small a model cannot do."""
TAG = "seavlm"

_DATASET = re.compile(r"https://huggingface\.co/datasets/([\w.-]+/[\w.-]+)")
_TRAIN_SETTINGS = {
    "lr": "peak learning rate",
    "schedule": "schedule",
    "warmup_ratio": "warm-up, share of the steps",
    "batch_size": "samples a step",
    "max_seq_len": "tokens in a packed row",
    "weight_decay": "weight decay",
    "betas": "AdamW betas",
    "eps": "AdamW eps",
    "max_grad_norm": "largest gradient norm",
    "freeze": "frozen",
    "lora_rank": "LoRA rank",
    "image_views": "views of each picture",
    "dtype": "compute dtype",
}
_TRAIN_FIGURES = {
    "steps": "steps",
    "samples_seen": "samples seen",
    "tokens_seen": "tokens seen",
    "parameters_trained": "parameters trained",
    "loss_first": "first loss",
    "loss_last": "last loss",
    "samples_per_s": "samples/s",
}


def write(facts: Facts, out: Path, settings: recipe.Card | None = None) -> Path:
    """Write the card to the file `out`, its pictures beside it; return `out`.

    settings: what the card says beyond what is recorded. Raises SeavlmError for manifests that lack what this
    version writes into them.
    """
    text = render(facts, settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    made = {out: text.encode()}
    for picture in facts.pictures:
        place = out.parent / picture.name
        if not (place.exists() and place.samefile(picture)):
            made[place] = picture.read_bytes()
    unfinished = {place: place.with_name(f"{place.name}.tmp-{os.getpid()}") for place in made}
    try:  # all of it or, on a full disk, nothing
        for place, content in made.items():
            unfinished[place].write_bytes(content)
        for place, partial in unfinished.items():
            os.replace(partial, place)
    finally:
        for partial in unfinished.values():
            partial.unlink(missing_ok=True)
    return out


def may_replace(out: Path, force: bool) -> None:
    """SeavlmError when `out` is a card that somebody else has written, unless `force`."""
    if out.is_file() and not force:
        front = out.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
        if not re.search(rf"^- {TAG}$", front, re.MULTILINE):
            raise SeavlmError(
                f"{out} is there, and seavlm has not written it", hint="Give another --out, or --force."
            )


def render(facts: Facts, settings: recipe.Card | None = None) -> str:
    """The card as text; see `write`. Raises SeavlmError when there is nothing to write about."""
    card = settings or recipe.Card()
    if not facts.stages and not facts.evaluations:
        raise SeavlmError(
            "there is no manifest to write a card from", hint="Run the stages first: seavlm build."
        )
    try:
        sections = [
            _front_matter(facts, card),
            [f"# {card.title or facts.name}"],
            [card.description.strip() or _summary(facts)],
            _start(facts.name),
            _parents(facts),
            _from_nothing(facts),
            _merges(facts),
            _data(facts),
            *(_training(facts, stage) for stage in facts.of("train")),
            evaluations(facts),
            _limits(facts, card),
            _carbon(facts),
            _provenance(facts),
            ["## Authors", "", *(f"- {author}" for author in card.authors)] if card.authors else [],
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        versions = {str((stage.made.get("versions") or {}).get("seavlm")) for stage in facts.stages}
        raise SeavlmError(
            f"the manifests (of seavlm {', '.join(sorted(versions)) or 'unknown'}) lack what a card needs "
            f"({type(error).__name__}: {error})",
            hint="Run their stages again with this version.",
        ) from error
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


# --- front matter


def _front_matter(facts: Facts, card: recipe.Card) -> list[str]:
    """The hub's metadata (YAML between two rules). Parents and data sets are named only if the hub has
    them.
    """
    licence = card.license.lower()
    data: dict[str, Any] = {
        "language": [code for code in LANGUAGES if code in _spoken(facts)],
        "license": licence if licence in LICENCES else "other",
    }
    if licence not in LICENCES:
        data["license_name"] = re.sub(r"[^a-z0-9.-]+", "-", licence).strip("-")
    data |= {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["gemma3", "vision-language", "southeast-asia", TAG],
    }
    merged = any(not stage.whose for stage in facts.of("merge"))
    if merged:
        data["tags"].append("merge")
    if bases := [name for name in dict.fromkeys(map(short, [facts.base, *facts.parents])) if on_hub(name)]:
        data["base_model"] = [name.partition("@")[0] for name in bases]
        quantised = any(not stage.whose for stage in facts.of("quantize"))
        data["base_model_relation"] = "merge" if merged else "quantized" if quantised else "finetune"
    if sets := _datasets(facts):
        data["datasets"] = sets
    if index := [one for evaluation in facts.evaluations for one in _index(evaluation, facts)]:
        data["model-index"] = [{"name": facts.name, "results": index}]
    rows = [carbon for _, carbon in _energy(facts) if "kg_co2e" in carbon]
    if rows:
        data["co2_eq_emissions"] = {
            "emissions": round(sum(row["kg_co2e"] for row in rows) * 1000, 3),
            "source": "seavlm: hours x watts x PUE x intensity (Lacoste et al. 2019, arXiv 1910.09700)",
            "training_type": "fine-tuning" if facts.of("train") else "merging and evaluation",
            "geographical_location": ", ".join(dict.fromkeys(str(row.get("region", "")) for row in rows)),
            "hardware_used": "; ".join(dict.fromkeys(row["hardware"] for row in rows if row.get("hardware"))),
        }
    return ["---", yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110).rstrip(), "---"]


def _slug(name: str) -> str:
    """A name as the hub's ids have them; of one in another script, a hash."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-") or sha256_bytes(name.encode())[:8]


def _index(evaluation: Any, facts: Facts) -> list[dict[str, Any]]:
    """The hub's model-index: a result a language, with the score of each task and their mean."""
    result = evaluation.models[evaluation.final]
    about = result.get("about", {})
    source = str(facts.first("data").get("recipe", {}).get("source", ""))
    suite = short(str(about.get("suite") or source or "questions"))
    known = _DATASET.match(str(about.get("source", "")))
    by_language: dict[str, list[dict[str, Any]]] = {}
    for cell in result["cells"]:
        by_language.setdefault(cell["language"], []).append(cell)
    entries = []
    for code, mean in result["languages"].items():
        cells = [("mean over tasks", mean), *((cell["task"], cell) for cell in by_language[code])]
        entries.append(
            {
                "task": {"type": "image-text-to-text", "name": f"{suite}, {LANGUAGES[code]}"},
                "dataset": {
                    "type": known[1] if known else f"seavlm-{_slug(suite)}",
                    "name": f"seavlm {suite} {about.get('version', '')}".strip(),
                    "config": code,
                    "split": "eval",
                },
                "metrics": [
                    {
                        "type": "accuracy",
                        "name": f"accuracy %, {task}",
                        "value": round(cell["accuracy"] * 100, 2),
                    }
                    for task, cell in cells
                ],
            }
        )
    return entries


def _datasets(facts: Facts) -> list[str]:
    """Ids of the hub's data sets that the model or its parents were trained on."""
    named = []
    for stage in facts.of("data"):
        named.append(str(stage.made.get("recipe", {}).get("source", "")))
        for source in stage.made.get("sources", []):
            known = _DATASET.match(str(source.get("url", "")))
            named.append(known[1] if known else "")
    return [name for name in dict.fromkeys(named) if on_hub(name)]


# --- sections


def _summary(facts: Facts) -> str:
    if facts.of("merge"):
        made = f"merged from {_and(list(map(_called, facts.parents)))}" if facts.parents else "merged"
    elif facts.of("train"):
        made = "fine-tuned"
    else:
        made = "measured"
    start = f" The global parent is {_called(facts.base)}." if facts.base else ""
    spoken = [LANGUAGES[code] for code in LANGUAGES if code in _spoken(facts)]
    return f"A vision-language model of Gemma 3's architecture for {_and(spoken)}, {made} with seavlm.{start}"


def _start(name: str) -> list[str]:
    return f"""## Start

```sh
seavlm ask picture.png "ນີ້ແມ່ນຫຍັງ?" --model ./{name}
```

```python
import seavlm

model = seavlm.load("./{name}")
picture = {{"type": "image", "path": "picture.png"}}
question = {{"type": "text", "text": "Apa ini?"}}
reply = model.generate([{{"role": "user", "content": [picture, question]}}], max_new_tokens=24)
print(reply.text)
```

The folder is a Hugging Face checkpoint: `transformers` loads it with
`AutoModelForImageTextToText`.""".split("\n")


def _from_nothing(facts: Facts) -> list[str]:
    lines: list[str] = []
    for stage in facts.of("init"):
        metrics = stage.metrics
        tower = metrics.get("tower", {})
        what = f"{_called(stage.whose)} has no parent" if stage.whose else "No parent"
        lines += [
            "" if lines else "## Made from nothing",
            "",
            f"{what}: a fresh decoder, and {metrics['vocabulary']:,} tokens of Gemma 3's vocabulary.",
        ]
        if taken := stage.made.get("recipe", {}).get("tower"):
            lines.append(f"The vision tower is that of `{taken}`, as it was before.")
        if "drawings" in tower:
            lines.append(
                "The vision tower learned from the features that EfficientNet-Lite0 (ImageNet, Apache-2.0) "
                f"gives {tower['drawings']:,} drawings, none of the held-out family."
            )
        if note := tower.get("note"):
            lines.append(f"It was {note}.")
    return [*lines, ""] if lines else []


def _parents(facts: Facts) -> list[str]:
    if any(not stage.whose for stage in facts.of("init")):
        return []
    rows = []
    for name, digest in facts.parents.items():
        called = _called(name)
        if name == "the global parent" and facts.base:
            called = _called(facts.base)
        elif name == "the regional parent":
            called = "the global parent, fine-tuned as below"
        other = "regional" if len(facts.parents) == 2 else "parent"
        role = "global" if name in (facts.base, "the global parent") else other
        if not facts.of("merge"):
            role = "base"
        rows.append(f"| {role} | {called} | {_hash(digest) or 'not recorded'} |")
    return ["## Parents", "", "| parent | what | SHA-256 |", "|---|---|---|", *rows] if rows else []


def _merges(facts: Facts) -> list[str]:
    lines: list[str] = []
    shown = {picture.name for picture in facts.pictures}
    for stage in [*facts.of("sweep"), *facts.of("merge"), *facts.of("delta")]:
        if stage.kind == "sweep":
            body = ["### Search", "", *search(stage, "pareto.png" if "pareto.png" in shown else "")]
            made = [one.made.get("recipe", {}) for one in facts.of("merge") if not one.whose]
            if made and all(one.get("beta") != stage.metrics["chosen"]["beta"] for one in made):
                body += ["", "This model is not the one that the search chose: its own recipe is below."]
        elif stage.kind == "delta":
            body = _delta(stage)
        elif "rows" in stage.metrics:
            what = f"theta = β · regional + (1 - β) · global. {rounding(stage.metrics['merge'])}"
            picture = "sweep.png" if "sweep.png" in shown and not stage.whose else ""
            body = [f"### Merge of {stage.whose}", ""] if stage.whose else []
            body += [what, "", *search(stage, picture)]
        else:
            body = _recipe(stage)
        lines += ["", *body]
    return ["## Merge", *lines] if lines else []


def _recipe(stage: Stage) -> list[str]:
    """A merge by `seavlm merge`: its method and its recipe."""
    made = _without_folders(stage.made.get("recipe", {}))
    method = str(made.get("merge_method") or made.get("method") or "linear")
    what = METHODS.get(method, "")
    if "beta" in made:
        each = ", β by module, the first that fits" if isinstance(made["beta"], dict) else ""
        what = f"theta = β · regional + (1 - β) · global{each}. {what}"
    metrics = stage.metrics
    lines = [f"### Recipe{f' of {stage.whose}' if stage.whose else ''}", "", f"`{method}`. {what}".strip()]
    lines[-1] += f" {metrics['tensors']:,} tensors, {metrics['parameters']:,} parameters. {rounding(metrics)}"
    if metrics.get("tokens_added"):
        lines[-1] += f" {metrics['tokens_added']:,} tokens were added to the vocabulary."
    shown = yaml.safe_dump(made, sort_keys=False, allow_unicode=True, width=100).rstrip()
    return [*lines, "", "```yaml", *shown.split("\n"), "```"]


def _without_folders(value: Any) -> Any:
    """A recipe without the folders of the machine where it ran."""
    if isinstance(value, dict):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    return short(value) if isinstance(value, str) else value


def _delta(stage: Stage) -> list[str]:
    made, metrics = stage.made.get("recipe", {}), stage.metrics
    form = made.get("lossy")
    error = f", relative error {metrics['relative_error']:.2g}" if form else ", bit for bit"
    return [
        "### Delta",
        "",
        f"Kept as its difference from `{short(str(made.get('base', 'its base')))}`: {metrics['bytes']:,} "
        f"bytes, {metrics['share']:.1%} of the model ({form or 'exact'}{error}).",
    ]


def _data(facts: Facts) -> list[str]:
    stages = facts.of("data")
    if not stages:
        return []
    lines = ["## Data"]
    for stage in stages:
        settings, metrics = stage.made.get("recipe", {}), stage.metrics
        built_in = settings.get("source") == "pictures"
        source = short(str(settings.get("source", "?")))
        what = "the picture set that ships with seavlm" if built_in else f"`{source}`"
        lines += [
            "",
            f"Samples {f'of `{stage.whose}` ' if stage.whose else ''}are made from {what}.",
            "",
            "| split | rows | pictures | tasks | languages |",
            "|---|---:|---:|---|---|",
        ]
        for split in ("train", "dev", "eval"):
            if split in metrics:
                part = metrics[split]
                tasks = ", ".join(f"{task} {count:,}" for task, count in part.get("tasks", {}).items())
                languages = " ".join(code for code in LANGUAGES if code in part.get("languages", {}))
                counts = f"{part['rows']:,} | {part.get('pictures', 0):,}"
                lines.append(f"| {split} | {counts} | {tasks} | {languages} |")
        held_out = settings.get("eval_families")
        if built_in and held_out:
            family = f"Drawings of the art family {_and(held_out)}"
            lines += ["", f"{family} are in dev and eval only, never trained on."]
    sources = {source["what"]: source for stage in stages for source in stage.made.get("sources", [])}
    if sources:
        lines += ["", "| source | author | package | licence |", "|---|---|---|---|"]
        for source in sources.values():
            url = f"[{source['what']}]({source['url']})" if source.get("url") else source["what"]
            package = f"`{source['package']}`" if source.get("package") else ""
            lines.append(f"| {url} | {source.get('author', '')} | {package} | {source['licence']} |")
    elif not any(stage.made.get("recipe", {}).get("source") == "pictures" for stage in stages):
        lines += ["", "The manifest names no licences of these samples."]
    return lines


def _training(facts: Facts, stage: Stage) -> list[str]:
    settings, metrics = stage.made.get("recipe", {}), stage.metrics
    title = f"## Fine-tuning{f' of {stage.whose}' if stage.whose else ''}"
    optimiser = "Muon for matrices, AdamW for the rest" if settings.get("optimizer") == "muon" else "AdamW"
    lines = [title, "", f"{optimiser}, loss on the replies only.", "", "| setting | value |", "|---|---|"]
    length = (
        f"{settings['steps']} steps" if settings.get("steps") else f"{settings.get('epochs', '?')} epochs"
    )
    lines.append(f"| length | {length} |")
    lines += [
        f"| {label} | {_value(settings[key])} |"
        for key, label in _TRAIN_SETTINGS.items()
        if settings.get(key) is not None
    ]
    lines += [
        f"| {label} | {_value(metrics[key])} |" for key, label in _TRAIN_FIGURES.items() if key in metrics
    ]
    if not stage.whose and any(picture.name == "loss.png" for picture in facts.pictures):
        lines += ["", "![Loss over the steps](loss.png)"]
    return lines


def _limits(facts: Facts, card: recipe.Card) -> list[str]:
    limits = [
        "Not aligned for safety: nothing was done to keep it from harmful, biased or false replies. Put your "
        "own safeguards around it.",
    ]
    parameters = _parameters(facts)
    if 0 < parameters < SMALL:
        limits.append(
            f"A small model ({parameters:,} parameters): it answers questions of the kinds it was trained "
            "on, and is no general assistant."
        )
    if facts.first("data").get("recipe", {}).get("source") == "pictures":
        limits.append(
            "Trained and measured on drawings and flags; photographs and documents were not tested."
        )
    if not facts.evaluations:
        limits.append("Not evaluated: there are no scores.")
    for evaluation in facts.evaluations:
        result = evaluation.models[evaluation.final]
        languages = result.get("languages", {})
        suite = short(str(result.get("about", {}).get("suite") or ""))
        where = f" in {suite}" if suite and len(facts.evaluations) > 1 else ""
        if len(languages) > 1:
            ranked = sorted(languages, key=lambda code: languages[code]["accuracy"])
            worst, best = (
                f"{LANGUAGES[code]} {languages[code]['accuracy'] * 100:.1f} %"
                for code in (ranked[0], ranked[-1])
            )
            limits.append(f"Uneven over the languages{where}: {worst}, {best} (means over the tasks).")
        weak: dict[str, list[str]] = {}
        for cell in result["cells"]:
            if cell["below_chance"] and not cell["task"].endswith("/blind"):
                weak.setdefault(cell["task"], []).append(cell["language"])
        if weak:
            cells = ", ".join(f"{task} ({' '.join(codes)})" for task, codes in weak.items())
            limits.append(f"Below chance{where}, so not to be used: {cells}.")
    return ["## Limits", "", *(f"- {limit}" for limit in [*limits, *card.limitations])]


def _energy(facts: Facts) -> list[tuple[str, Mapping[str, Any]]]:
    """(stage, what its manifest says of energy and carbon), of all stages that say something."""
    rows = []
    for stage in facts.stages:
        if carbon := stage.metrics.get("carbon"):
            rows.append((stage.label, carbon))
        if earlier := stage.metrics.get("tower", {}).get("carbon"):
            rows.append((f"vision tower, before {stage.label}", earlier))
    return rows


def _carbon(facts: Facts) -> list[str]:
    rows = _energy(facts)
    known = [(label, carbon) for label, carbon in rows if "kg_co2e" in carbon]
    lines = ["## Energy and carbon", ""]
    if known:
        lines += [
            "| stage | hardware | hours | GPU-hours | watts | kWh | kg CO2e | power |",
            "|---|---|---:|---:|---:|---:|---:|---|",
        ]
        for label, one in known:
            devices = one.get("gpus")
            gpu_hours = _sig(one["hours"] * devices) if devices else "" if devices is None else "0"
            lines.append(
                f"| {label} | {_hardware(one)} | {_sig(one['hours'])} | {gpu_hours} | {one['watts']:,.0f} "
                f"| {_sig(one['kwh'])} | {_sig(one['kg_co2e'])} | {_power(one)}{_where(one, known)} |"
            )
        total = {key: sum(one[key] for _, one in known) for key in ("hours", "kwh", "kg_co2e")}
        total_gpu = sum(one["hours"] * (one.get("gpus") or 0) for _, one in known)
        lines += [
            f"| **all** | | **{_sig(total['hours'])}** | **{_sig(total_gpu)}** | | **{_sig(total['kwh'])}** "
            f"| **{_sig(total['kg_co2e'])}** | |",
            "",
            "Hours × watts × PUE / 1000 × intensity (Lacoste et al. 2019, arXiv 1910.09700). "
            f"{_pue([one for _, one in known])} {_electricity([one for _, one in known])}",
        ]
    unknown = [label for label, one in rows if "unknown" in one]
    if unknown:
        lines += ["", f"Not known, and in no sum: {', '.join(unknown)} (asked through an endpoint)."]
    silent = [
        stage.label
        for stage in facts.stages
        if stage.kind not in ("data", "quantize") and "carbon" not in stage.metrics
    ]
    if silent and rows:
        lines += ["", f"Not recorded, and in no sum: {', '.join(silent)}."]
    return lines if rows else []


def _hardware(carbon: Mapping[str, Any]) -> str:
    return str(carbon.get("hardware") or "not recorded")


def _power(carbon: Mapping[str, Any]) -> str:
    source, assumed = str(carbon.get("watts_source", "assumed")), str(carbon.get("watts_assumed") or "")
    if source == "given":
        return "given"
    if source == "assumed":
        return f"assumed: {assumed}" if assumed else "assumed"
    if source.startswith("codecarbon"):
        return f"by {source}, which estimates what it cannot measure"
    return f"measured ({source}){f'; assumed: {assumed}' if assumed else ''}"


def _where(carbon: Mapping[str, Any], known: list[tuple[str, Mapping[str, Any]]]) -> str:
    """The region, where the stages ran in several."""
    return f"; {carbon.get('region')}" if len({one.get("region") for _, one in known}) > 1 else ""


def _pue(rows: list[Mapping[str, Any]]) -> str:
    factors = sorted({float(one.get("pue", 1.0)) for one in rows})
    if factors == [1.0]:
        return "PUE is 1: nothing is added for the data centre's overhead."
    return f"PUE: {_and([f'{factor:g}' for factor in factors])}."


def _electricity(rows: list[Mapping[str, Any]]) -> str:
    sources: dict[str, str] = {}
    for one in rows:
        where = f"{one.get('region', 'not recorded')} {one['kg_per_kwh']:g}"
        sources[where] = sources.get(where) or str(one.get("intensity_source") or "")
    told = [f"{where} ({source or 'source not recorded'})" for where, source in sources.items()]
    return f"Electricity, kg CO2e per kWh: {'; '.join(told)}. The manufacture of the hardware is not counted."


def _provenance(facts: Facts) -> list[str]:
    if not facts.stages:
        return []
    lines = [
        "## Provenance",
        "",
        "| stage | made | seed | seconds | seavlm | inputs (SHA-256) |",
        "|---|---|---:|---:|---|---|",
    ]
    for stage in facts.stages:
        made = stage.made
        inputs = ", ".join(
            f"{label} {_hash(value, 8)}" for label, value in made.get("inputs", {}).items() if value
        )
        seconds = made.get("duration_s")
        cells = [
            stage.label,
            str(made.get("created", ""))[:10].replace("-", "\u2011"),  # on one line
            made.get("seed", ""),
            "" if seconds is None else f"{seconds:,.0f}",
            (made.get("versions") or {}).get("seavlm") or "",
            inputs,
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


# --- words and numbers


def _spoken(facts: Facts) -> set[str]:
    """The languages evaluated, else those trained on, else all."""
    asked = {code for one in facts.evaluations for code in one.models[one.final].get("languages", {})}
    trained = facts.first("data").get("recipe", {}).get("languages", [])
    return asked or set(trained) or set(LANGUAGES)


def _parameters(facts: Facts) -> int:
    merged: Manifest = facts.first("merge").get("metrics", {})
    trained: Manifest = facts.first("train").get("metrics", {})
    own = merged.get("parameters") or merged.get("merge", {}).get("parameters")
    return int(own or trained.get("parameters") or 0)


def _called(parent: str) -> str:
    """A parent's name: code, unless it is only described."""
    return parent if parent.startswith("the ") else f"`{short(parent)}`"


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "nothing"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _sig(value: float) -> str:
    """Three significant digits, or all digits before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 or not value else f"{value:.1e}"


def _hash(value: str, digits: int = 12) -> str:
    return f"`{value[:digits]}`" if value else ""


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
