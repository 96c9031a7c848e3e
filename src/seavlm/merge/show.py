"""A sweep for people: a table for the terminal, a CSV file, two pictures, the chosen one as a recipe."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from textwrap import fill
from typing import Any

import yaml
from rich.box import SIMPLE
from rich.table import Table

from seavlm import manifest

JSON = "sweep.json"
PARENTS = {"0": "global parent", "1": "regional parent"}
COLOURS = {"global": "#2a78b5", "regional": "#d9661f", "score": "#1d1d1f"}
INK, GOLD, GREY = "#1d1d1f", "#e0a800", "#666666"


def write(report: dict[str, Any], out: Path) -> None:
    """Everything but the replies."""
    manifest.write_text(out / "sweep.csv", as_csv(report))
    manifest.write_text(out / "best.yaml", recipe(report))
    manifest.put(out / "sweep.png", lambda path: path.write_bytes(curve(report)))
    manifest.put(out / "pareto.png", lambda path: path.write_bytes(pareto(report)))
    manifest.write_json(out / JSON, report)


def recipe(report: dict[str, Any]) -> str:
    """The chosen one as a recipe of `merge.plan`."""
    raw = {**report["parents"], "beta": report["chosen"]["beta"]}
    return f"# {report['verdict']}\n" + yaml.safe_dump(raw, sort_keys=False, width=1000)


def table(report: dict[str, Any], most: int = 16) -> Table:
    """The best candidates and both parents. Figures of those that were stopped are estimates (~)."""
    asked = report["questions"]
    title = (
        f"merge sweep, alpha {report['alpha']:g}: accuracy % on the search's {asked['search']} questions; "
        f"{asked['saved']} of {asked['asked'] + asked['saved']} replies saved"
    )
    grid = Table(title=title, title_justify="left", box=SIMPLE)
    grid.add_column("beta", min_width=18, overflow="fold")
    for head in ("global", "regional", "weighted", "asked"):
        grid.add_column(head, justify="right", no_wrap=True)
    grid.add_column("", min_width=9)
    rows = sorted(report["rows"], key=lambda row: -row["score"]["mean"])
    shown = [row for i, row in enumerate(rows) if i < most or row["label"] in PARENTS or row["chosen"]]
    for row in shown:
        stopped = "behind" if row["stopped"].startswith("behind") else row["stopped"]
        notes = [PARENTS.get(row["label"], ""), stopped]
        notes += ["" if row["floors_kept"] or "floor" in row["stopped"] else "below a floor"]
        notes += ["front" if row["front"] else "", "<- chosen" if row["chosen"] else ""]
        figures = [_figure(row, key) for key in ("global", "regional", "score")]
        style = "bold" if row["chosen"] else "dim" if row["stopped"] else ""
        grid.add_row(row["label"], *figures, str(row["asked"]), "; ".join(filter(None, notes)), style=style)
    if len(rows) > len(shown):
        grid.add_row(f"and {len(rows) - len(shown)} more", *[""] * 5, style="dim")
    return grid


def _figure(row: dict[str, Any], key: str) -> str:
    mean, low, high = (row[key][part] * 100 for part in ("mean", "low", "high"))
    span = f" [{low:.0f}-{high:.0f}]" if key == "score" else ""
    return f"{'~' if row['stopped'] else ''}{mean:.1f}{span}"


def as_csv(report: dict[str, Any]) -> str:
    """A line a candidate: betas, figures, what became of it, accuracy in each language."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    words = [*report["modules"], "default"]
    parts = [(key, part) for key in ("global", "regional", "score") for part in ("mean", "low", "high")]
    ends = ("asked", "floors_kept", "front", "chosen", "stopped")
    languages = list(dict.fromkeys(code for row in report["rows"] for code in row["languages"]))
    writer.writerow([*words, *(f"{key}_{part}" for key, part in parts), *ends, *languages])
    for row in report["rows"]:
        figures = [round(row[key][part], 6) for key, part in parts]
        spoken = [round(row["languages"][code], 6) if code in row["languages"] else "" for code in languages]
        writer.writerow([*(row["betas"][w] for w in words), *figures, *(row[key] for key in ends), *spoken])
    return buffer.getvalue()


# --- pictures


def _linear(report: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [row for row in report["rows"] if len(set(row["betas"].values())) == 1]
    return sorted(rows, key=lambda row: row["betas"]["default"])


def _axes(report: dict[str, Any], title: str, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    asked = report["questions"]
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_title(
        f"{len(report['rows'])} merges, {asked['search']:,} questions, {asked['concepts_search']:,} concepts",
        loc="right",
        fontsize=9,
        color=GREY,
    )
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _halo() -> list[Any]:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=3, foreground="white")]


def curve(report: dict[str, Any]) -> bytes:
    """One beta for all, as a PNG: three curves with their intervals; hollow where a merge was stopped early
    and its figure is an estimate. The chosen one is marked; one with betas by module as a level.
    """
    rows = _linear(report)
    betas = [row["betas"]["default"] for row in rows]
    figure, axes = _axes(report, "Merge sweep: one β for all", 4.8)
    axes.grid(visible=False, axis="x")
    labels = {
        "global": "global score (en, zh)",
        "regional": "regional score",
        "score": f"weighted ({report['alpha']:g} global + {1 - report['alpha']:g} regional)",
    }
    for key, label in labels.items():
        mean, low, high = ([row[key][part] * 100 for row in rows] for part in ("mean", "low", "high"))
        main = key == "score"
        axes.fill_between(betas, low, high, color=COLOURS[key], alpha=0.13, linewidth=0)
        axes.plot(betas, mean, color=COLOURS[key], label=label, linewidth=2.4 if main else 1.6,
                  zorder=3 if main else 2)  # fmt: skip
        for row, beta, y in zip(rows, betas, mean, strict=True):
            face = "white" if row["stopped"] else COLOURS[key]
            axes.plot(beta, y, marker="o", markersize=5, zorder=4, color=COLOURS[key], markerfacecolor=face)
    if any(row["stopped"] for row in rows):
        axes.plot([], [], linestyle="none", marker="o", markerfacecolor="white", markeredgecolor=GREY,
                  label="stopped early: estimated")  # fmt: skip
    best = next(row for row in report["rows"] if row["chosen"])
    score, plain = best["score"]["mean"] * 100, best in rows
    at = best["betas"]["default"] if plain else betas[0]
    dashed: dict[str, Any] = {"color": INK, "linestyle": (0, (4, 4)), "linewidth": 1, "zorder": 1}
    if plain:
        axes.axvline(at, **dashed)
        axes.plot(at, score, marker="*", markersize=17, color=GOLD, markeredgecolor=INK, zorder=5)
    else:
        axes.axhline(score, **dashed)
    bottom, top = axes.get_ylim()
    top += 0.1 * (top - bottom)  # room for the line's name above the bands
    axes.set_ylim(bottom, top)
    right = at > 0.7
    axes.annotate(
        f"chosen: β {best['label'] if plain else 'by module'}, {score:.1f}",
        (at, top if plain else score), xytext=(-8 if right else 8, -6 if plain else 4), va="top" if plain else
        "bottom", textcoords="offset points", ha="right" if right else "left", fontweight="bold", zorder=6,
        path_effects=_halo(),
    )  # fmt: skip
    axes.set_xticks(
        [0, 0.2, 0.4, 0.6, 0.8, 1], ["0\nglobal\nparent", "0.2", "0.4", "0.6", "0.8", "1\nregional\nparent"]
    )
    axes.set_xlabel("β, the share of the regional parent; bands: 95 %")
    axes.set_ylabel("accuracy, %")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return _png(figure)


def pareto(report: dict[str, Any]) -> bytes:
    """Global against regional score as a PNG: one beta as a line, the others as dots, the front marked."""
    figure, axes = _axes(report, "Merge sweep: what is won and lost", 5.4)

    def points(rows: Iterable[dict[str, Any]]) -> tuple[list[float], list[float]]:
        chosen = list(rows)
        return [r["regional"]["mean"] * 100 for r in chosen], [r["global"]["mean"] * 100 for r in chosen]

    rows, linear = report["rows"], _linear(report)
    others = [row for row in rows if row not in linear]
    for some, colour, label in (
        (linear, COLOURS["global"], "one β for all"),
        (others, COLOURS["regional"], "β by module"),
    ):
        if some is linear:
            axes.plot(*points(some), color=colour, alpha=0.5, linewidth=1)
        for row in some:
            axes.plot(*points([row]), marker="o" if row["floors_kept"] else "X", markersize=6, zorder=2,
                      color=colour, markerfacecolor="white" if row["stopped"] else colour)  # fmt: skip
        if some:
            axes.plot([], [], linestyle="none", marker="o", color=colour, label=label)
    front = sorted((row for row in rows if row["front"]), key=lambda row: row["regional"]["mean"])
    axes.plot(*points(front), color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="front", zorder=3,
              marker="o", markersize=10, markerfacecolor="none", markeredgewidth=1.4)  # fmt: skip
    best = next(row for row in rows if row["chosen"])
    axes.plot(*points([best]), marker="*", markersize=18, color=GOLD, markeredgecolor=INK,
              linestyle="none", zorder=5, label="chosen")  # fmt: skip
    for there, marker, face, label in (
        (any(row["stopped"] for row in rows), "o", "white", "stopped early: estimated"),
        (not all(row["floors_kept"] for row in rows), "X", GREY, "below a floor"),
    ):
        if there:
            axes.plot([], [], linestyle="none", marker=marker, markerfacecolor=face, markeredgecolor=GREY,
                      label=label)  # fmt: skip
    axes.margins(0.1, 0.12)
    axes.set_xlabel(f"regional score, accuracy %\n\n{fill('chosen: β ' + best['label'], 100)}")
    axes.set_ylabel("global score (en, zh), accuracy %")
    figure.legend(
        loc="outside lower center",
        ncols=3 if len(axes.get_legend_handles_labels()[0]) > 5 else 5,
        frameon=False,
        fontsize=9,
    )
    _name(figure, axes, [(row, *(one[0] for one in points([row]))) for row in rows])
    return _png(figure)


def _name(figure: Any, axes: Any, points: list[tuple[dict[str, Any], float, float]]) -> None:
    """Names beside the points of one beta: the parents', the chosen one's, then those that find room."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # only now it is known where everything lies
    centres = [axes.transData.transform((x, y)) for _, x, y in points]
    taken = [Bbox.from_extents(x - 9, y - 9, x + 9, y + 9) for x, y in centres]
    named = [point for point in points if len(set(point[0]["betas"].values())) == 1]
    for row, x, y in sorted(
        named, key=lambda point: (point[0]["label"] not in PARENTS, not point[0]["chosen"])
    ):
        for across, up in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            text = axes.annotate(
                PARENTS.get(row["label"], row["label"]), (x, y), xytext=(10 * across, 10 * up),
                textcoords="offset points", fontsize=8, color=COLOURS["global"], zorder=4,
                ha=("right", "center", "left")[across + 1], va=("top", "center", "bottom")[up + 1],
                path_effects=_halo(), in_layout=False,
            )  # fmt: skip
            box = text.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
