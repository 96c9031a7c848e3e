"""How much of the tuned weights to keep: every beta of a grid merged, asked, scored; the best one kept.

    theta(beta) = beta * regional + (1 - beta) * global
    score(beta) = alpha * accuracy on the global suite (en, zh) + (1 - alpha) * accuracy on the regional suite

Both parents are in the grid (beta 0 and 1). All betas answer the same questions, so that their differences
are paired; intervals resample the concepts asked about. A suite's accuracy is the mean over its tasks and
languages.

    out/model/        the best merge
    out/sweep.json    every score with its interval, and whether the best beats the better parent
    out/sweep.csv     a line a beta
    out/sweep.png     the curves
    out/betas/<beta>/ the replies: a sweep that was killed asks only what is missing
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import time
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from seavlm import manifest, recipe
from seavlm.carbon import Meter
from seavlm.errors import SeavlmError
from seavlm.evals.run import SUITES, Results, evaluate
from seavlm.evals.stats import Interval, bootstrap
from seavlm.evals.tasks import Answerer, Messages, load_questions
from seavlm.merge.stream import merge_checkpoints

COLOURS = {"global": "#2a78b5", "regional": "#d9661f", "score": "#1d1d1f"}


def run(
    cfg: recipe.Merge,
    *,
    global_parent: Path,
    regional_parent: Path,
    questions_parquet: Path,
    out: Path,
    answerer_factory: Callable[[Path], Answerer],
    asked_with: str = "",
    seed: int = 0,
    batch_size: int = 64,
    resamples: int = 1000,
    progress: bool = True,
    meter: Meter | None = None,
) -> dict[str, Any]:
    """Sweep `cfg.betas` (and both parents), keep the best merge in out/model, return what is in sweep.json.

    answerer_factory: makes an answerer of a model's directory; the directory is removed once all is asked.
    asked_with: names the answerer's settings (such as its token limit); replies of other settings are not
    reused. meter: it runs, and what it says goes into the manifest. Raises SeavlmError when the parents
    cannot be merged, or when the questions lack one of the suites.
    """
    began = time.monotonic()
    questions = load_questions(questions_parquet)
    for suite, codes in SUITES.items():
        if not any(question.language in codes for question in questions):
            raise SeavlmError(
                f"{questions_parquet} has no question for the {suite} suite ({' '.join(codes)})",
                hint="A sweep weighs both suites: ask in all languages (data.eval_languages).",
            )
    inputs = {
        "global": manifest.sha256_tree(global_parent),
        "regional": manifest.sha256_tree(regional_parent),
        "questions": manifest.sha256_file(questions_parquet),
    }
    parents = [regional_parent, global_parent]
    betas = sorted({0.0, 1.0, *cfg.betas})
    out.mkdir(parents=True, exist_ok=True)

    for left in out.glob("merging.tmp-*"):  # by a sweep that was killed
        shutil.rmtree(left)
    merged = out / f"merging.tmp-{os.getpid()}"

    def merge_and_load(beta: float) -> Answerer:
        merge_checkpoints(parents, [beta, 1.0 - beta], merged, cfg.dtype)
        return answerer_factory(merged)

    scored: list[Results] = []
    for position, beta in enumerate(betas):
        identity = f"{inputs['global']} {inputs['regional']} {beta!r} {cfg.dtype} {asked_with}"
        try:
            scored.append(
                evaluate(
                    _lazy(partial(merge_and_load, beta)),
                    questions,
                    out / "betas" / f"{beta:g}",
                    name=f"beta {beta:g} ({position + 1}/{len(betas)})",
                    key=manifest.sha256_bytes(identity.encode()),
                    batch_size=batch_size,
                    resamples=resamples,
                    seed=seed,
                    progress=progress,
                )
            )
        finally:
            shutil.rmtree(merged, ignore_errors=True)

    report = summarise(betas, scored, alpha=cfg.alpha, resamples=resamples, seed=seed)
    best = report["best_beta"]
    report["merge"] = merge_checkpoints(parents, [best, 1.0 - best], out / "model", cfg.dtype)
    manifest.write_json(out / "sweep.json", report)
    _write(out / "sweep.csv", _csv(report).encode())
    _write(out / "sweep.png", plot(report))
    manifest.write_manifest(
        out,
        stage="merge",
        recipe=cfg.model_dump(mode="json"),
        seed=seed,
        inputs=inputs,
        metrics=report | ({"carbon": meter.report()} if meter else {}),
        duration_s=round(time.monotonic() - began, 3),
    )
    return report


def summarise(
    betas: list[float], scored: list[Results], *, alpha: float, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """The report of a sweep: `betas[i]` got `scored[i]`; the first and the last are the parents."""
    records = scored[0].records
    cells: list[Hashable] = [(record["task"], record["language"]) for record in records]
    right = [[record["verdict"] == "correct" for record in result.records] for result in scored]
    draws = bootstrap(
        np.array(right, dtype=np.float64).T,
        [record["concept"] for record in records],
        cells,
        resamples=resamples,
        seed=seed,
    )
    suites = {suite: [cell for cell in draws.cells if cell[1] in codes] for suite, codes in SUITES.items()}
    weights = {cell: alpha / len(suites["global"]) for cell in suites["global"]}
    weights |= {cell: (1.0 - alpha) / len(suites["regional"]) for cell in suites["regional"]}
    wins = draws.wins(weights)
    rows: list[dict[str, Any]] = []
    for index, (beta, result) in enumerate(zip(betas, scored, strict=True)):
        rows.append(
            {
                "beta": beta,
                "global": _dict(draws.interval(suites["global"], index)),
                "regional": _dict(draws.interval(suites["regional"], index)),
                "score": _dict(draws.interval(weights, index)),
                "wins": float(wins[index]),
                "wrong_format": result.suites["all"].wrong_format,
                "language_ok": result.suites["all"].language_ok,
                "languages": {code: cell.accuracy for code, cell in result.languages.items()},
                "tasks": {task: cell.accuracy for task, cell in result.tasks.items()},
            }
        )
    scores = [row["score"]["mean"] for row in rows]
    best = int(np.argmax(scores))
    better_parent = 0 if scores[0] >= scores[-1] else len(rows) - 1
    gain = draws.difference(best, better_parent, weights)
    return {
        "alpha": alpha,
        "best_beta": betas[best],
        "better_parent": betas[better_parent],
        "gain": _dict(gain),
        "inside_noise": not gain.low > 0,
        "verdict": _verdict(betas[best], betas[better_parent], gain),
        "questions": len(records),
        "concepts": len({record["concept"] for record in records}),
        "suite": scored[0].suite,
        "rows": rows,
    }


def _lazy(make: Callable[[], Answerer]) -> Answerer:
    """An answerer that is made when the first question comes: a beta finished earlier costs no merge."""
    made: list[Answerer] = []

    def ask(batch: list[Messages]) -> list[str]:
        if not made:
            made.append(make())
        return list(made[0](batch))

    return ask


def _verdict(best: float, parent: float, gain: Interval) -> str:
    name = "global" if parent == 0 else "regional"
    if best == parent:
        return f"No merge scores higher than the {name} parent: beta {best:g} is that parent."
    points = f"{gain.mean * 100:+.1f} points, 95 % interval {gain.low * 100:+.1f} to {gain.high * 100:+.1f}"
    if gain.low > 0:
        return f"beta {best:g} scores higher than the better parent ({name}): {points}."
    return f"beta {best:g} scores highest, but its lead on the {name} parent is inside the noise: {points}."


def table(report: dict[str, Any]) -> Table:
    """The sweep for the terminal."""
    title = f"merge sweep, alpha {report['alpha']:g}: accuracy % and 95 % interval"
    grid = Table(title=title, title_justify="left", box=SIMPLE)
    grid.add_column("beta", justify="right", no_wrap=True)
    for head in ("global", "regional", "weighted"):
        grid.add_column(head, justify="right", no_wrap=True)
    for head in ("best\nin", "wrong\nformat", "right\nlang."):
        grid.add_column(head, justify="right", no_wrap=True, style="dim")
    grid.add_column("", no_wrap=True)
    for row in report["rows"]:
        language = "-" if row["language_ok"] is None else f"{row['language_ok']:.0%}"
        numbers = [_show(row[key]) for key in ("global", "regional", "score")]
        best = row["beta"] == report["best_beta"]
        grid.add_row(
            f"{row['beta']:g}",
            *numbers,
            f"{row['wins']:.0%}",
            f"{row['wrong_format']:.0%}",
            language,
            " ".join(filter(None, (_parent(row["beta"]), "<- best" if best else ""))),
            style="bold" if best else "",
        )
    return grid


def plot(report: dict[str, Any]) -> bytes:
    """The sweep as a PNG: three curves with their intervals over beta, both parents, the best beta."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = report["rows"]
    betas = [row["beta"] for row in rows]
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    labels = {
        "global": "global suite (en, zh)",
        "regional": "regional suite (nine languages)",
        "score": f"weighted score ({report['alpha']:g} global + {1 - report['alpha']:g} regional)",
    }
    for key, label in labels.items():
        mean, low, high = (
            np.array([row[key][part] for row in rows]) * 100 for part in ("mean", "low", "high")
        )
        axes.fill_between(betas, low, high, color=COLOURS[key], alpha=0.13, linewidth=0)
        main = key == "score"
        axes.plot(
            betas,
            mean,
            color=COLOURS[key],
            label=label,
            marker="o",
            linewidth=2.4 if main else 1.6,
            markersize=5 if main else 4,
            zorder=3 if main else 2,
        )
        axes.plot(  # the parents: hollow
            [betas[0], betas[-1]],
            [mean[0], mean[-1]],
            linestyle="none",
            marker="o",
            markersize=8,
            markerfacecolor="white",
            markeredgecolor=COLOURS[key],
            markeredgewidth=1.8,
            zorder=4,
        )
    best = next(row for row in rows if row["beta"] == report["best_beta"])
    axes.axvline(best["beta"], color=COLOURS["score"], linestyle=(0, (4, 4)), linewidth=1, zorder=1)
    axes.plot(best["beta"], best["score"]["mean"] * 100, marker="*", markersize=17, color="#e0a800",
              markeredgecolor=COLOURS["score"], linestyle="none", zorder=5)  # fmt: skip
    bottom, top = axes.get_ylim()
    top += 0.1 * (top - bottom)  # room for the line's name above the bands
    axes.set_ylim(bottom, top)
    axes.annotate(
        f"β* = {best['beta']:g}: {best['score']['mean'] * 100:.1f}",
        (best["beta"], top),
        xytext=(-8 if best["beta"] > 0.7 else 8, -6),
        textcoords="offset points",
        ha="right" if best["beta"] > 0.7 else "left",
        va="top",
        fontsize=10,
        fontweight="bold",
    )
    axes.set_xticks(
        [0, 0.2, 0.4, 0.6, 0.8, 1], ["0\nglobal\nparent", "0.2", "0.4", "0.6", "0.8", "1\nregional\nparent"]
    )
    axes.set_xlabel("β, the share of the regional parent")
    axes.set_ylabel("accuracy, %")
    axes.set_title("Merge sweep", loc="left", fontweight="bold")
    axes.set_title(
        f"{report['questions']} questions on {report['concepts']} concepts, bands: 95 %",
        loc="right",
        fontsize=9,
        color="#666",
    )
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _csv(report: dict[str, Any]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    parts = [f"{key}_{part}" for key in ("global", "regional", "score") for part in ("mean", "low", "high")]
    languages = list(report["rows"][0]["languages"])
    tasks = list(report["rows"][0]["tasks"])
    writer.writerow(["beta", *parts, "wins", "wrong_format", "language_ok", *languages, *tasks])
    for row in report["rows"]:
        scores = [
            row[key][part] for key in ("global", "regional", "score") for part in ("mean", "low", "high")
        ]
        rest = [
            row["wins"],
            row["wrong_format"],
            row["language_ok"],
            *row["languages"].values(),
            *row["tasks"].values(),
        ]
        writer.writerow(
            [row["beta"], *(value if value is None else round(value, 6) for value in scores + rest)]
        )
    return buffer.getvalue()


def _parent(beta: float) -> str:
    return {0.0: "= global", 1.0: "= regional"}.get(beta, "")


def _dict(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def _show(interval: dict[str, float]) -> str:
    return f"{interval['mean'] * 100:.1f} [{interval['low'] * 100:.0f}-{interval['high'] * 100:.0f}]"


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
