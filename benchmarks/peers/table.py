"""A Markdown table, and a plot beside the file, of what `run.py` measured.

python benchmarks/peers/table.py results.json
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

COLUMNS = {  # (work, batch, context) -> heading
    ("prefill", 1, 128): "prefill 128",
    ("prefill", 1, 512): "prefill 512",
    ("prefill", 1, 4096): "prefill 4096",
    ("decode", 1, 128): "decode at 128",
    ("decode", 1, 4096): "decode at 4096",
    ("decode", 8, 128): "decode, batch 8",
    ("cold start", 1, 128): "cold start, s",
    ("memory, cold start", 1, 128): "MB, cold",
    ("memory, whole run", 8, 4096): "MB, whole run",
}
NOTHING = 1e-6  # a divergence below is rounding
LESS_IS_BETTER = ("cold start, s", "MB, cold", "MB, whole run", "KL, worst", "KL, mean")


def values_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Heading -> engine -> value. The divergences become their mean and their worst language."""
    found: dict[str, dict[str, float]] = {heading: {} for heading in COLUMNS.values()}
    divergences = defaultdict(list)
    for row in rows:
        if row["work"] == "kl":
            divergences[row["engine"]].append(row["value"])
        elif row["work"] != "cores taken by others":
            found[COLUMNS[row["work"], row["batch"], row["context"]]][row["engine"]] = row["value"]
    found["KL, mean"] = {engine: sum(kl) / len(kl) for engine, kl in divergences.items()}
    found["KL, worst"] = {engine: max(kl) for engine, kl in divergences.items()}
    return {heading: values for heading, values in found.items() if values}


def table(rows: list[dict[str, Any]], ours: str) -> str:
    """Engines down, work across; the last line is `ours` / best peer. Of speeds more is better, of the rest
    less."""
    columns = values_of(rows)
    lines = ["| engine | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for engine in dict.fromkeys(row["engine"] for row in rows):
        cells = [number(values[engine]) if engine in values else "" for values in columns.values()]
        lines.append(f"| {engine} | " + " | ".join(cells) + " |")
    ratios = []
    for heading, values in columns.items():
        peers = [value for engine, value in values.items() if not engine.startswith("seavlm")]
        best = (min if heading in LESS_IS_BETTER else max)(peers, default=0)
        shown = ours in values and best > NOTHING
        ratios.append(f"{values[ours] / best:.2f}" if shown else "")
    return "\n".join([*lines, f"| **{ours} / best peer** | " + " | ".join(ratios) + " |"])


def by_language(rows: list[dict[str, Any]]) -> str:
    """The divergences in nats, languages down."""
    values = {(row["language"], row["engine"]): row["value"] for row in rows if row["work"] == "kl"}
    engines = list(dict.fromkeys(engine for _, engine in values))
    lines = ["| KL, nats | " + " | ".join(engines) + " |", "|---" * (len(engines) + 1) + "|"]
    for language in dict.fromkeys(language for language, _ in values):
        cells = [number(values[language, engine]) for engine in engines]
        lines.append(f"| {language} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if values else ""


def number(value: float) -> str:
    if abs(value) < NOTHING:
        return "0"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each column, a bar for each engine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = values_of(rows)
    across = 3
    down = -(-len(columns) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(13, 2.6 * down), squeeze=False)
    for axis in axes.flat[len(columns) :]:
        axis.remove()
    for axis, (heading, values) in zip(axes.flat, columns.items(), strict=False):
        colours = ["tab:red" if engine.startswith("seavlm") else "tab:blue" for engine in values]
        bars = axis.barh(list(values), list(values.values()), color=colours)
        axis.bar_label(bars, [number(value) for value in values.values()], padding=2, fontsize=8)
        unit = "" if heading in LESS_IS_BETTER else ", tokens/s"
        better = "less" if heading in LESS_IS_BETTER else "more"
        axis.set_title(f"{heading}{unit} ({better} is better)", fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.2)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("results", type=Path)
    parser.add_argument("--ours", default="seavlm int8", help="the engine that the ratios are of")
    parser.add_argument("--plot", type=Path, help="default: the results' name with .png")
    options = parser.parse_args()
    rows = json.loads(options.results.read_text())["rows"]
    print(table(rows, options.ours), by_language(rows), sep="\n\n")
    for row in rows:
        if row["work"] == "cores taken by others" and max(row["repeats"]) > 0.1:
            taken = ", ".join(f"{value:.2f}" for value in row["repeats"])
            print(f"\nNot a quiet machine: others took {taken} cores while {row['engine']} ran.")
    plot(rows, options.plot or options.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
