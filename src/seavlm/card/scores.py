"""The scores of a model card: evaluations, and the searches for a merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seavlm.card.facts import Evaluation, Facts, Manifest, Stage, short

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
WIDEST = 4  # tasks that a table by language has columns for
FORMAT_ALARM = 0.10  # a score with more replies in the wrong format measures form, and is marked
ROWS = 12  # merges of a search that are shown
METHODS = {
    "linear": "Weighted mean (model soups: Wortsman et al. 2022, arXiv 2203.05482).",
    "slerp": "Spherical interpolation (Shoemake 1985).",
    "nuslerp": "Spherical interpolation, by rows or of differences.",
    "task_arithmetic": "Sum of differences (Ilharco et al. 2023, arXiv 2212.04089).",
    "ties": "Trimmed differences whose signs agree (TIES: Yadav et al. 2023, arXiv 2306.01708).",
    "dare_linear": "Differences dropped at random (DARE: Yu et al. 2023, arXiv 2311.03099).",
    "dare_ties": "Differences dropped at random (DARE, arXiv 2311.03099), signs as in TIES (2306.01708).",
    "della": "Differences dropped by rank (DELLA: Deep et al. 2024, arXiv 2406.11617), signs as in TIES.",
    "della_linear": "Differences dropped by rank (DELLA: Deep et al. 2024, arXiv 2406.11617).",
    "breadcrumbs": "Differences without outliers (Davari and Belilovsky 2023, arXiv 2312.06795).",
    "breadcrumbs_ties": "Differences without outliers (arXiv 2312.06795), signs as in TIES.",
    "model_stock": "Model stock (Jang et al. 2024, arXiv 2403.19522).",
    "sce": "Select, calculate, erase (FuseChat-3: Wan et al. 2024, arXiv 2408.07990).",
    "karcher": "Karcher mean on the sphere.",
    "passthrough": "Layers taken over as they are.",
}


# --- evaluations


def evaluations(facts: Facts) -> list[str]:
    """The section "Evaluation"."""
    if not facts.evaluations:
        return []
    lines = [
        "## Evaluation",
        "",
        "Scores in %, with 95 % intervals that resample the questions by concept. *Wrong format*: replies "
        "that cannot be read as an answer; they count as wrong. *Above chance*: (score - chance) / "
        "(1 - chance): 0 is guessing, 100 is perfect. *Right language*: of the replies that show a language. "
        f"`!`: below chance. `f`: more than {FORMAT_ALARM:.0%} of the replies in the wrong format.",
    ]
    several = len(facts.evaluations) > 1
    for evaluation in facts.evaluations:
        lines += ["", *_evaluation(evaluation, facts.first("data"), several)]
    return lines


def _evaluation(evaluation: Evaluation, data: Manifest, several: bool) -> list[str]:
    result = evaluation.models[evaluation.final]
    about, tasks = result.get("about", {}), list(result["tasks"])
    cells = {(cell["task"], cell["language"]): cell for cell in result["cells"]}
    suite = about.get("suite", "")
    title = f"{short(str(suite))} {about.get('version', '')}".strip()
    lines = [f"### {title}", ""] if several or title else []
    lines += [f"{_asked(result, about, data)}{_remote(evaluation)}", ""]
    if len(tasks) <= WIDEST:
        lines += _by_language(result, tasks, cells)
    else:
        lines += [*_languages(result), "", "By task:", "", *_tasks(result), "", *_matrix(result, cells)]
    chance = ", ".join(f"{task} {cell['chance'] * 100:.1f}" for task, cell in result["tasks"].items())
    if len(tasks) <= WIDEST:
        lines += ["", f"Guessing without the picture would score: {chance}."]
    if "ranked" in tasks:
        lines += [
            "",
            "*ranked*: the picture of each *choose* question, asked about without its options in sight; the "
            "most likely of them is taken, as a classifier would pick one. It is in no mean.",
        ]
    if any(task.endswith("/blind") for task in tasks):
        lines += [
            "",
            "*/blind*: asked once more without the picture, which shows what can be guessed. In no mean.",
        ]
    told = [remark for remark in result.get("diagnosis", []) if not remark.endswith("in another language")]
    lines += ["", *(f"- {remark}" for remark in told)] if told else []  # the rest is in the tables
    if left := {reason: count for reason, count in about.get("left_out", {}).items() if count}:
        lines += ["", f"Left out: {', '.join(f'{count:,} ({reason})' for reason, count in left.items())}."]
    if len(evaluation.models) > 1:
        lines += ["", *_comparison(evaluation)]
    return lines


def _asked(result: Manifest, about: Manifest, data: Manifest) -> str:
    every = result["suites"].get("all") or {"n": sum(cell["n"] for cell in result["tasks"].values())}
    if about.get("about"):
        what = f": {about['about']}"
    elif data.get("recipe", {}).get("source") == "pictures":
        what = " about drawings of an art family never trained on"
    else:
        what = " about held-out samples"
    licence = f" Questions: {about['licence']}." if about.get("licence") else ""
    source = f" Source: {about['source']}." if about.get("source") else ""
    return f"{every['n']:,} questions{what}.{source}{licence}"


def _remote(evaluation: Evaluation) -> str:
    if not evaluation.remote:
        return ""
    return " The model was asked through an endpoint: that it had these weights was not checked."


def _by_language(result: Manifest, tasks: Sequence[str], cells: Mapping[Any, Manifest]) -> list[str]:
    heads = [*tasks, "mean", "above chance", "wrong format", "right language"]
    lines = [f"| language | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for code, mean in result["languages"].items():
        row = [score(cells[task, code]) if (task, code) in cells else "" for task in tasks]
        lines.append(f"| {LANGUAGES[code]} | {' | '.join(row)} | {score(mean)} | {_tail(mean)} |")
    for suite, mean in result["suites"].items():
        row = [score(result["tasks"][task]) if suite == "all" else "" for task in tasks]
        lines.append(f"| **{suite}** | {' | '.join(row)} | **{score(mean)}** | {_tail(mean)} |")
    return lines


def _languages(result: Manifest) -> list[str]:
    heads = ["questions", "score", "above chance", "wrong format", "right language"]
    lines = [f"| language | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    groups = [(LANGUAGES[code], mean) for code, mean in result["languages"].items()]
    groups += [(f"**{suite}**", mean) for suite, mean in result["suites"].items()]
    return lines + [f"| {label} | {mean['n']:,} | {score(mean)} | {_tail(mean)} |" for label, mean in groups]


def _tasks(result: Manifest) -> list[str]:
    heads = ["questions", "chance", "score", "above chance", "wrong format", "right language"]
    lines = [f"| task | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for task, mean in result["tasks"].items():
        chance = f"{mean['chance'] * 100:.1f}" if mean["chance"] else ""
        lines.append(f"| {task} | {mean['n']:,} | {chance} | {score(mean)} | {_tail(mean)} |")
    return lines


def _matrix(result: Manifest, cells: Mapping[Any, Manifest]) -> list[str]:
    codes = list(result["languages"])
    lines = [
        "Task by language; after each score, how far the farther end of its interval is:",
        "",
        f"| task | {' | '.join(codes)} |",
        "|---|" + "---:|" * len(codes),
    ]
    for task in result["tasks"]:
        row = [_short(cells[task, code]) if (task, code) in cells else "" for code in codes]
        lines.append(f"| {task} | {' | '.join(row)} |")
    return lines


def _comparison(evaluation: Evaluation) -> list[str]:
    """All models side by side, and the final one's lead on each other with its paired interval."""
    models, final, ahead = evaluation.models, evaluation.final, evaluation.ahead
    others = [label for label in models if label != final and ahead.get(label)]
    heads = [*models, *(f"lead on {label}" for label in others)]
    lines = ["The models side by side, means over the tasks; leads are paired by question:", ""]
    lines += [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    groups = [(code, "languages", LANGUAGES[code]) for code in models[final]["languages"]]
    groups += [(suite, "suites", f"**{suite}**") for suite in models[final]["suites"]]
    for key, kind, label in groups:
        row = [
            f"{model[kind][key]['accuracy'] * 100:.1f}" if key in model[kind] else ""
            for model in models.values()
        ]
        row += [_lead(ahead[other].get(key)) for other in others]
        lines.append(f"| {label} | {' | '.join(row)} |")
    return lines


def _lead(gap: Mapping[str, float] | None) -> str:
    if gap is None:
        return ""
    return f"{gap['mean'] * 100:+.1f} [{gap['low'] * 100:+.1f}, {gap['high'] * 100:+.1f}]"


# --- merges


def search(stage: Stage, picture: str) -> list[str]:
    """What a sweep has found (merge.search): its betas and the verdict. picture: the name of one, or ""."""
    figures, recipe = _earlier(stage.metrics), stage.made.get("recipe", {})
    asked = figures["questions"]
    chosen, fresh = figures["chosen"]["beta"], asked["verdict"] > 0
    chosen = chosen if isinstance(chosen, dict) else {"default": chosen}
    betas = ", ".join(
        f"{'the rest' if word == 'default' else word} **{beta:g}**" for word, beta in chosen.items()
    )
    if set(chosen) == {"default"}:
        betas = f"**{chosen['default']:g}** for all"
    rows = sorted(figures["rows"], key=lambda row: -row["score"]["mean"])
    kept = [row for row in rows if row in rows[:ROWS] or row["chosen"] or row["label"] in ("0", "1")]
    lines = [
        f"Shares β of `{short(str(recipe.get('regional', 'the regional parent')))}` in a merge with "
        f"`{short(str(recipe.get('global', 'the global parent')))}`, searched over {len(rows)} merges: "
        f"{betas}. The score is {figures['alpha']:g} · global + {1 - figures['alpha']:g} · regional "
        f"accuracy. The search asked {asked['search']:,} questions about {asked['concepts_search']:,} "
        "concepts, the verdict "
        + (f"{asked['verdict']:,} about {asked['concepts_verdict']:,} others." if fresh else "the same."),
        "",
        f"**{figures['verdict']}**",
        "",
        "| β | global | regional | weighted | asked | |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in kept:
        notes = [{"0": "global parent", "1": "regional parent"}.get(row["label"], "")]
        notes += ["chosen" if row["chosen"] else "", row["stopped"]]
        notes += ["" if row["floors_kept"] else "below a floor"]
        cells = [
            row["label"],
            *(score(row[key]) for key in ("global", "regional", "score")),
            f"{row['asked']:,}",
        ]
        if row["chosen"]:
            cells = [f"**{cell}**" for cell in cells]
        lines.append(f"| {' | '.join(cells)} | {', '.join(filter(None, notes))} |")
    if len(kept) < len(rows):
        lines += ["", f"{len(rows) - len(kept)} more are not shown."]
    for code, floor in figures.get("floors", {}).items():
        state = ("kept" if floor["kept"] else "broken") + ("" if floor["settled"] else ", inside the noise")
        lines += [
            "",
            f"Floor of {LANGUAGES.get(code, code)}: {floor['share']:g} of the global parent's; {state}.",
        ]
    shown = {"pareto.png": "Global score against regional score of all merges, the front marked"}
    shown["sweep.png"] = "Global, regional and weighted score over β"
    return [*lines, "", f"![{shown[picture]}]({picture})"] if picture else lines


def _earlier(figures: Manifest) -> Manifest:
    """A sweep as it is noted now: until 2026-11-25 a grid's verdict came from the search's own questions."""
    if "best_beta" not in figures:
        return figures
    asked = {"search": figures["questions"], "concepts_search": figures["concepts"], "verdict": 0}
    now = {"asked": figures["questions"], "stopped": "", "floors_kept": True}
    rows = [
        {**row, **now, "label": f"{row['beta']:g}", "chosen": row["beta"] == figures["best_beta"]}
        for row in figures["rows"]
    ]
    return {**figures, "chosen": {"beta": figures["best_beta"]}, "questions": asked, "rows": rows}


def rounding(metrics: Manifest) -> str:
    """How much a merge's one rounding took."""
    return f"Summed in fp32 and rounded once{_rounding(metrics)}."


def _rounding(merged: Mapping[str, Any]) -> str:
    if "rounding_mean" not in merged:
        return ""
    return f" to {merged['dtype']} (mean absolute rounding {merged['rounding_mean']:.1e})"


# --- numbers


def score(cell: Mapping[str, Any]) -> str:
    """A score in % with its interval and marks."""
    mean = cell["accuracy"] if "accuracy" in cell else cell["mean"]
    return f"{mean * 100:.1f} [{cell['low'] * 100:.0f}-{cell['high'] * 100:.0f}]{_mark(cell)}"


def _short(cell: Mapping[str, Any]) -> str:
    reach = max(cell["high"] - cell["accuracy"], cell["accuracy"] - cell["low"])
    return f"{cell['accuracy'] * 100:.0f}±{reach * 100:.0f}{_mark(cell).replace('`', '')}"


def _mark(cell: Mapping[str, Any]) -> str:
    marks = ("!" if cell.get("below_chance") else "") + (
        "f" if cell.get("wrong_format", 0) > FORMAT_ALARM else ""
    )
    return f"\u00a0`{marks}`" if marks else ""  # on the same line as its score


def _tail(cell: Mapping[str, Any]) -> str:
    spoken = cell["language_ok"]
    above = (cell["accuracy"] - cell["chance"]) / (1 - cell["chance"]) if cell["chance"] < 1 else 0.0
    above = cell.get("normalised", above)
    return f"{above * 100:.1f} | {cell['wrong_format']:.1%} | {'-' if spoken is None else f'{spoken:.1%}'}"
