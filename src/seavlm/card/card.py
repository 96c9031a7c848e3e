"""The model card: a README.md for the Hugging Face hub, written from the manifests of the stages alone.

Nothing is measured or computed here but sums of what the manifests say, and nothing is claimed that they do
not: a stage without a manifest has no section. No torch, no network.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from seavlm import recipe
from seavlm.errors import SeavlmError

Manifest = Mapping[str, Any]

LANGUAGES = {
    "my": "Burmese",
    "en": "English",
    "id": "Indonesian",
    "km": "Khmer",
    "lo": "Lao",
    "ms": "Malay",
    "zh": "Mandarin",
    "tl": "Tagalog",
    "ta": "Tamil",
    "th": "Thai",
    "vi": "Vietnamese",
}
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
_WATTS = {"given": "as the recipe gives it", "assumed": "assumed, not measured"}


def write_card(
    model_dir: Path | None,
    manifests: Mapping[str, Manifest],
    results: Mapping[str, Any],
    out: Path,
    *,
    card: recipe.Card | None = None,
    name: str = "model",
    base: str = "",
    plots: Iterable[Path] = (),
) -> Path:
    """Write the card to out/README.md, and beside the model in `model_dir`; return the first.

    manifests: stage -> manifest, of "data", "train", "merge" and "eval" (any may be missing). results: what
    the evaluation wrote in results.json: of one model, or {"models": {label: results}, "final": label,
    "ahead": ...}. card: the recipe's section. base: the global parent as the recipe names it. plots: pictures
    to put beside the card, where "sweep.png" and "loss.png" are shown in their sections; missing ones are
    left out.
    """
    pictures = [plot for plot in map(Path, plots) if plot.is_file()]
    text = render(
        manifests,
        results,
        card=card or recipe.Card(),
        name=name,
        base=base,
        pictures={picture.name for picture in pictures},
    )
    for folder in (out, model_dir):
        if folder is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            shutil.copyfile(picture, folder / picture.name)
        unfinished = folder / f"README.md.tmp-{os.getpid()}"
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, folder / "README.md")
    return out / "README.md"


def render(
    manifests: Mapping[str, Manifest],
    results: Mapping[str, Any],
    *,
    card: recipe.Card,
    name: str = "model",
    base: str = "",
    pictures: Iterable[str] = (),
) -> str:
    """The card as text; see `write_card`. Raises SeavlmError when there is nothing to write about."""
    if not manifests:
        raise SeavlmError(
            "there is no manifest to write a card from", hint="Run the stages first: seavlm build."
        )
    models, final = _models(results)
    title = card.title or name
    shown = set(pictures)
    sections = [
        _front_matter(manifests, models.get(final, {}), card, name, base),
        [f"# {title}"],
        [card.description.strip() or _summary(manifests, base)],
        _start(manifests, name),
        _parents(manifests, base, shown),
        _data(manifests.get("data", {})),
        _training(manifests.get("train", {}), shown),
        _evaluation(models, final, results.get("ahead", {}), manifests.get("data", {})),
        _limits(manifests, models.get(final, {}), card),
        _carbon(manifests.get("train", {})),
        _provenance(manifests),
        ["## Authors", "", *(f"- {author}" for author in card.authors)] if card.authors else [],
    ]
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


# --- front matter


def _front_matter(
    manifests: Mapping[str, Manifest], result: Mapping[str, Any], card: recipe.Card, name: str, base: str
) -> list[str]:
    """The hub's metadata (YAML between two rules). Parents and data sets are named only if the hub has
    them.
    """
    licence = card.license.lower()
    data: dict[str, Any] = {
        "language": [code for code in LANGUAGES if code in _languages(manifests, result)],
        "license": licence if licence in LICENCES else "other",
    }
    if licence not in LICENCES:
        data["license_name"] = re.sub(r"[^a-z0-9.-]+", "-", licence).strip("-")
    data |= {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["gemma3", "vision-language", "southeast-asia", "seavlm"],
    }
    if "merge" in manifests:
        data["tags"].append("merge")
    if _on_hub(base):
        data["base_model"] = [base]
        data["base_model_relation"] = "merge" if "merge" in manifests else "finetune"
    source = str(manifests.get("data", {}).get("recipe", {}).get("source", ""))
    if _on_hub(source):
        data["datasets"] = [source]
    if result.get("cells"):
        data["model-index"] = [{"name": name, "results": _index(result, manifests.get("data", {}))}]
    return ["---", yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110).rstrip(), "---"]


def _index(result: Mapping[str, Any], data: Manifest) -> list[dict[str, Any]]:
    """The hub's model-index: a result a language, with the accuracy of each task and their mean."""
    by_language: dict[str, list[dict[str, Any]]] = {}
    for cell in result["cells"]:
        by_language.setdefault(cell["language"], []).append(cell)
    entries = []
    for code, mean in result["languages"].items():
        cells = [("mean over tasks", mean), *((cell["task"], cell) for cell in by_language[code])]
        entries.append(
            {
                "task": {
                    "type": "image-text-to-text",
                    "name": f"pictures, {LANGUAGES[code]}",
                },
                "dataset": {
                    "type": "seavlm-pictures" if _source(data) == "pictures" else "custom",
                    "name": f"seavlm {_source(data) or 'questions'}",
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


# --- sections


def _summary(manifests: Mapping[str, Manifest], base: str) -> str:
    made = "merged from a global and a regional parent" if "merge" in manifests else "fine-tuned"
    start = f" The global parent is `{base}`." if base else ""
    return (
        f"A vision-language model of Gemma 3's architecture for {_and(list(LANGUAGES.values()))}, {made} "
        f"with seavlm.{start}"
    )


def _start(manifests: Mapping[str, Manifest], name: str) -> list[str]:
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


def _from_nothing(init: Manifest) -> list[str]:
    metrics = init["metrics"]
    tower = metrics.get("tower", {})
    lines = [
        "## Made from nothing",
        "",
        f"No parent: a fresh decoder, and {metrics['vocabulary']:,} tokens of Gemma 3's vocabulary.",
    ]
    if taken := init.get("recipe", {}).get("tower"):
        lines.append(f"The vision tower is that of `{taken}`, as it was before.")
    if tower:
        lines.append(
            "The vision tower learned from the features that EfficientNet-Lite0 (ImageNet, Apache-2.0) gives "
            f"{tower['drawings']:,} drawings, none of the held-out family."
        )
    if note := tower.get("note"):
        lines.append(f"It was {note}.")
    return lines


def _parents(manifests: Mapping[str, Manifest], base: str, pictures: set[str]) -> list[str]:
    if "init" in manifests:
        return _from_nothing(manifests["init"])
    merge, train = manifests.get("merge", {}), manifests.get("train", {})
    figures = merge.get("metrics", {})
    lines = ["## Parents", "", "| parent | what | SHA-256 |", "|---|---|---|"]
    inputs = merge.get("inputs", {}) or {"global": train.get("inputs", {}).get("base", "")}
    lines.append(
        f"| global | {f'`{base}`' if base else 'the base model'} | {_hash(inputs.get('global', ''))} |"
    )
    if merge:
        lines.append(
            f"| regional | the global parent, fine-tuned as below | {_hash(inputs.get('regional', ''))} |"
        )
    if not figures.get("rows"):
        return lines
    built_in = _source(manifests.get("data", {})) == "pictures"  # its dev and eval share no concept
    alpha, merged, asked = figures["alpha"], figures.get("merge", {}), figures["questions"]
    best = figures["chosen"]["label"]
    lines += [
        "",
        "## Merge",
        "",
        f"Linear: theta = β · regional + (1 - β) · global with **β = {best}**, tensor by tensor, "
        f"summed in fp32 and rounded once{_rounding(merged)}. β maximises {alpha:g} · global score + "
        f"{1 - alpha:g} · regional score on {asked['search']:,} questions about {asked['concepts_search']:,} "
        f"concepts{', none of them in the evaluation below' if built_in else ''}. Accuracy in %, with 95 % "
        "intervals (~ of a merge that was clearly behind and was not asked everything):",
        "",
        "| β | global (en, zh) | regional (the other nine) | weighted | |",
        "|---:|---:|---:|---:|---|",
    ]
    for row in figures["rows"]:
        note = {"0": "global parent", "1": "regional parent"}.get(row["label"], "")
        guess = "~" if row["stopped"] else ""
        cells = [row["label"], *(guess + _score(row[key]) for key in ("global", "regional", "score"))]
        if row["chosen"]:
            cells = [f"**{cell}**" for cell in cells]
            note = f"{note}, chosen".lstrip(", ")
        lines.append(f"| {' | '.join(cells)} | {note} |")
    lines += [
        "",
        f"On {asked['verdict']:,} other questions about {asked['concepts_verdict']:,} other concepts: "
        f"{figures['verdict']}",
    ]
    if "sweep.png" in pictures:
        lines += [
            "",
            "![Accuracy over β for the global and regional suites and the weighted score](sweep.png)",
        ]
    return lines


def _data(data: Manifest) -> list[str]:
    if not data:
        return []
    settings, metrics = data.get("recipe", {}), data.get("metrics", {})
    built_in = settings.get("source") == "pictures"
    what = "the picture set that ships with seavlm" if built_in else f"`{settings.get('source', '?')}`"
    lines = [
        "## Data",
        "",
        f"Samples are made from {what}.",
        "",
        "| split | rows | pictures | tasks | languages |",
    ]
    lines.append("|---|---:|---:|---|---|")
    for split in ("train", "dev", "eval"):
        if split in metrics:
            part = metrics[split]
            tasks = ", ".join(f"{task} {count:,}" for task, count in part.get("tasks", {}).items())
            languages = " ".join(code for code in LANGUAGES if code in part.get("languages", {}))
            lines.append(
                f"| {split} | {part['rows']:,} | {part.get('pictures', 0):,} | {tasks} | {languages} |"
            )
    held_out = settings.get("eval_families")
    if built_in and held_out:
        lines += [
            "",
            f"Drawings of the art family {_and(held_out)} are in dev and eval only, never trained on.",
        ]
    if data.get("sources"):
        lines += ["", "| source | author | package | licence |", "|---|---|---|---|"]
        for source in data["sources"]:
            url = f"[{source['what']}]({source['url']})" if source.get("url") else source["what"]
            package = f"`{source['package']}`" if source.get("package") else ""
            lines.append(f"| {url} | {source.get('author', '')} | {package} | {source['licence']} |")
    return lines


def _training(train: Manifest, pictures: set[str]) -> list[str]:
    if not train:
        return []
    settings, metrics = train.get("recipe", {}), train.get("metrics", {})
    lines = ["## Fine-tuning", "", "AdamW, loss on the replies only.", "", "| setting | value |", "|---|---|"]
    length = (
        f"{settings['steps']} steps" if settings.get("steps") else f"{settings.get('epochs', '?')} epochs"
    )
    lines.append(f"| length | {length} |")
    lines += [
        f"| {label} | {_value(settings[key])} |" for key, label in _TRAIN_SETTINGS.items() if key in settings
    ]
    lines += [
        f"| {label} | {_value(metrics[key])} |" for key, label in _TRAIN_FIGURES.items() if key in metrics
    ]
    if "loss.png" in pictures:
        lines += ["", "![Loss over the steps](loss.png)"]
    return lines


def _evaluation(models: Mapping[str, Any], final: str, ahead: Mapping[str, Any], data: Manifest) -> list[str]:
    if final not in models:
        return []
    result = models[final]
    tasks = list(result["tasks"])
    cells = {(cell["task"], cell["language"]): cell for cell in result["cells"]}
    asked = (
        "drawings of an art family never trained on" if _source(data) == "pictures" else "held-out samples"
    )
    lines = [
        "## Evaluation",
        "",
        f"Accuracy in % on {result['suites']['all']['n']:,} questions about {asked}, with 95 % intervals "
        "that resample the questions by concept. *Wrong format*: replies that cannot be read as an answer; "
        "they count as wrong. *Right language*: of the replies that show a language. `!`: below chance.",
        "",
        f"| language | {' | '.join(tasks)} | mean | wrong format | right language |",
        "|---|" + "---:|" * (len(tasks) + 3),
    ]
    for code, mean in result["languages"].items():
        row = [_score(cells[task, code]) if (task, code) in cells else "" for task in tasks]
        lines.append(f"| {LANGUAGES[code]} | {' | '.join(row)} | {_score(mean)} | {_tail(mean)} |")
    for suite, mean in result["suites"].items():
        row = [_score(result["tasks"][task]) if suite == "all" else "" for task in tasks]
        lines.append(f"| **{suite}** | {' | '.join(row)} | **{_score(mean)}** | {_tail(mean)} |")
    chance = ", ".join(f"{task} {cell['chance'] * 100:.1f}" for task, cell in result["tasks"].items())
    lines += ["", f"Guessing without the picture would score: {chance}."]
    if "ranked" in tasks:
        lines += [
            "",
            "*ranked*: the picture of each *choose* question, asked about without its options in sight; the "
            "most likely of them is taken, as a classifier would pick one. It is in no mean.",
        ]
    if len(models) > 1:
        lines += ["", *_comparison(models, final, ahead)]
    return lines


def _comparison(models: Mapping[str, Any], final: str, ahead: Mapping[str, Any]) -> list[str]:
    """All models side by side, and the final one's lead on each parent with its paired interval."""
    others = [label for label in models if label != final and label in ahead]
    heads = [*models, *(f"lead on {label}" for label in others)]
    lines = ["The models side by side, means over the tasks; leads are paired by question:", ""]
    lines += [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    groups = [(code, "languages", LANGUAGES[code]) for code in models[final]["languages"]]
    groups += [(suite, "suites", f"**{suite}**") for suite in models[final]["suites"]]
    for key, kind, label in groups:
        row = [f"{model[kind][key]['accuracy'] * 100:.1f}" for model in models.values()]
        row += [
            f"{lead['mean'] * 100:+.1f} [{lead['low'] * 100:+.1f}, {lead['high'] * 100:+.1f}]"
            for lead in (ahead[other][key] for other in others)
        ]
        lines.append(f"| {label} | {' | '.join(row)} |")
    return lines


def _limits(manifests: Mapping[str, Manifest], result: Mapping[str, Any], card: recipe.Card) -> list[str]:
    limits = [
        "Not aligned for safety: nothing was done to keep it from harmful, biased or false replies. Put your "
        "own safeguards around it.",
    ]
    parameters = _parameters(manifests)
    if 0 < parameters < SMALL:
        limits.append(
            f"A small model ({parameters:,} parameters): it answers questions of the kinds it was trained "
            "on, and is no general assistant."
        )
    if _source(manifests.get("data", {})) == "pictures":
        limits.append(
            "Trained and measured on drawings and flags; photographs and documents were not tested."
        )
    languages = result.get("languages", {})
    if len(languages) > 1:
        ranked = sorted(languages, key=lambda code: languages[code]["accuracy"])
        worst, best = ranked[0], ranked[-1]
        limits.append(
            f"Uneven over the languages: {LANGUAGES[worst]} {languages[worst]['accuracy'] * 100:.1f} %, "
            f"{LANGUAGES[best]} {languages[best]['accuracy'] * 100:.1f} % (means over the tasks)."
        )
    weak = [
        f"{cell['task']} ({cell['language']})" for cell in result.get("cells", []) if cell["below_chance"]
    ]
    if weak:
        limits.append(f"Below chance, so not to be used: {', '.join(weak)}.")
    return ["## Limits", "", *(f"- {limit}" for limit in [*limits, *card.limitations])]


def _carbon(train: Manifest) -> list[str]:
    carbon = train.get("metrics", {}).get("carbon")
    if not carbon:
        return []
    source = str(carbon.get("watts_source", "assumed"))
    power = _WATTS.get(source, f"measured ({source})")
    hardware = carbon.get("hardware") or train.get("hardware")
    return [
        "## Carbon",
        "",
        "| hardware | hours | watts | kWh | kg CO2e per kWh | kg CO2e |",
        "|---|---:|---:|---:|---:|---:|",
        f"| {hardware or train.get('platform', 'not recorded')} | {_sig(carbon['hours'])} "
        f"| {carbon['watts']:,.0f} | {_sig(carbon['kwh'])} | {carbon['kg_per_kwh']:g} "
        f"| **{_sig(carbon['kg_co2e'])}** |",
        "",
        f"Hours × watts / 1000 × intensity (Lacoste et al. 2019, arXiv 1910.09700). Power: {power}. "
        f"Electricity: {carbon.get('region', 'not recorded')}. This is the fine-tuning alone, without the "
        "parents, the merge, the evaluation, or the data centre's overhead.",
    ]


def _provenance(manifests: Mapping[str, Manifest]) -> list[str]:
    lines = [
        "## Provenance",
        "",
        "| stage | made | seed | seconds | seavlm | inputs (SHA-256) |",
        "|---|---|---:|---:|---|---|",
    ]
    for stage, manifest in manifests.items():
        inputs = ", ".join(f"{label} {_hash(value)}" for label, value in manifest.get("inputs", {}).items())
        seconds = manifest.get("duration_s")
        cells = [
            stage,
            manifest.get("created", ""),
            manifest.get("seed", ""),
            "" if seconds is None else f"{seconds:,.0f}",
            manifest.get("versions", {}).get("seavlm") or "",
            inputs,
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


# --- words and numbers


def _models(results: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The results by model, and the name of the one that the card is about."""
    if "models" in results:
        models = dict(results["models"])
        return models, results.get("final", list(models)[-1] if models else "")
    return ({results["name"]: results}, results["name"]) if results.get("cells") else ({}, "")


def _languages(manifests: Mapping[str, Manifest], result: Mapping[str, Any]) -> set[str]:
    """Those evaluated, else those trained on, else all."""
    trained = manifests.get("data", {}).get("recipe", {}).get("languages", [])
    return set(result.get("languages") or trained or LANGUAGES)


def _parameters(manifests: Mapping[str, Manifest]) -> int:
    merged = manifests.get("merge", {}).get("metrics", {}).get("merge", {}).get("parameters")
    return int(merged or manifests.get("train", {}).get("metrics", {}).get("parameters") or 0)


def _source(data: Manifest) -> str:
    return str(data.get("recipe", {}).get("source", ""))


def _on_hub(reference: str) -> bool:
    """Whether this looks like a hub id (owner/name), not a path or a built-in name."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", reference)) and not Path(reference).exists()


def _rounding(merged: Mapping[str, Any]) -> str:
    if "rounding_mean" not in merged:
        return ""
    return f" to {merged['dtype']} (mean absolute rounding {merged['rounding_mean']:.1e})"


def _score(cell: Mapping[str, Any]) -> str:
    mean = cell["accuracy"] if "accuracy" in cell else cell["mean"]
    mark = " !" if cell.get("below_chance") else ""
    return f"{mean * 100:.1f} [{cell['low'] * 100:.0f}-{cell['high'] * 100:.0f}]{mark}"


def _tail(cell: Mapping[str, Any]) -> str:
    language = cell["language_ok"]
    return f"{cell['wrong_format']:.1%} | {'-' if language is None else f'{language:.1%}'}"


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "nothing"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _sig(value: float) -> str:
    """Three significant digits, or all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _hash(value: str) -> str:
    return f"`{value[:12]}`" if value else ""


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
