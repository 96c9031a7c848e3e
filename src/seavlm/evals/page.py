"""A report as one HTML file: styles, charts and pictures are inside, and nothing is fetched or run.

What models and files say is hostile until escaped: `_e` is the only way of a text into the page, pictures
come in as base64, and the page forbids scripts and requests to the browser (Content-Security-Policy) besides.
Texts stand in elements of their own direction and language, with room for stacked scripts.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from seavlm.evals.report import (
    JUDGE_NOTE,
    Report,
    automatic,
    chance_of,
    cut,
    expected,
    judge_footing,
    label,
    settled,
    title,
)
from seavlm.evals.show import FORMAT_ALARM, JUDGED, apart, judge_remarks, judge_rows
from seavlm.evals.stats import front
from seavlm.evals.tasks import counted
from seavlm.text.language import LANGUAGES, script_of

Facts = Mapping[str, Any]
_Point = tuple[str, Mapping[str, float], Mapping[str, float]]  # a name, regional and global score
VERDICTS = {
    "correct": "right",
    "wrong_answer": "wrong answer",
    "wrong_format": "wrong format",
    "graded": "graded",
    "no_reply": "no reply",
}
COLOURS = ("#1f7a8c", "#c2571a", "#6b4fa0", "#3f7d20", "#a8325e", "#5f5f5f")
STYLE = """
:root { color-scheme: light dark; --back: #fff; --fore: #1b1d21; --soft: #5b616b; --line: #d9dce1;
  --card: #f6f7f9; --heat: 24 138 152; --bad: #b3261e; --warn: #6f4700; --good: #1d6f42; }
@media (prefers-color-scheme: dark) { :root { --back: #14161a; --fore: #e8eaed; --soft: #a2a9b4;
  --line: #343942; --card: #1c1f25; --heat: 22 140 155; --bad: #ff8a80; --warn: #f3bf5f; --good: #7fd6a2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--back); color: var(--fore);
  font: 15px/1.55 system-ui, "Noto Sans", "Noto Sans Myanmar", "Noto Sans Khmer", "Noto Sans Lao",
  "Noto Sans Thai", "Noto Sans Tamil", "Noto Sans SC",
  "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.3; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.3rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 60rem; }
.soft { color: var(--soft); font-size: .87rem; }
nav a { margin-right: 1rem; color: inherit; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0 .8rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .5rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  font-weight: normal; }
thead th { color: var(--soft); vertical-align: bottom; font-size: .87rem; max-width: 8rem; }
th:first-child { text-align: left; }
td { white-space: nowrap; }
svg.bar { min-width: 160px; vertical-align: middle; }
.wide th:first-child { position: sticky; left: 0; background: var(--back); }
.wide tbody th { min-width: 5.5rem; }
.heat td { padding: .25rem .4rem; border: 1px solid var(--back); line-height: 1.25; min-width: 4.1rem; }
.heat td b { font-weight: 600; }
.heat td small { display: block; font-size: .72rem; color: inherit; opacity: .85; white-space: nowrap; }
.heat .apart th, .heat .apart td { font-style: italic; }
.heat .mean th, .heat .mean td { font-weight: 600; border-top: 2px solid var(--line); }
.below { white-space: nowrap; outline: 2px solid var(--bad); outline-offset: -3px; }
.form, .heat td small.form { color: var(--warn); opacity: 1; }
.scale { display: inline-block; width: 9rem; height: .8rem; vertical-align: middle;
  border: 1px solid var(--line);
  background: linear-gradient(90deg, rgb(var(--heat) / 0), rgb(var(--heat) / .62)); }
.yes { color: var(--good); font-weight: 600; }
.worse { color: var(--bad); font-weight: 600; }
.no { color: var(--soft); }
.charts { display: flex; flex-wrap: wrap; gap: 1.5rem; }
.charts > * { min-width: 0; max-width: 100%; }
figure { margin: 0; max-width: 520px; }
svg { max-width: 100%; height: auto; font: 12px system-ui, "Noto Sans", sans-serif; fill: var(--fore); }
@media (max-width: 34rem) { figure svg { font-size: 15px; } }
svg text { paint-order: stroke; stroke: var(--back); stroke-width: 3px; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: .8rem; }
.example { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .7rem;
  contain: paint; break-inside: avoid; min-width: 0; }
.example img { max-width: 8rem; max-height: 8rem; margin: .2rem .4rem .2rem 0; background: #fff;
  border-radius: 3px; }
.example dl { margin: 0; display: grid; grid-template-columns: max-content minmax(0, 1fr);
  gap: .15rem .6rem; }
.example dt { color: var(--soft); font-size: .82rem; line-height: 1.9rem; max-width: 7rem;
  overflow-wrap: anywhere; }
.example dd { margin: 0; min-width: 0; }
.text { unicode-bidi: isolate; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; }
thead .text { white-space: nowrap; font-size: 15px; }
.text:lang(my), .text:lang(km), .text:lang(lo) { line-height: 2.15; }
.text:lang(th), .text:lang(ta) { line-height: 2; }
.verdict { font-size: .78rem; border: 1px solid currentColor; border-radius: 3px; padding: 0 .3rem;
  white-space: nowrap; }
.correct { color: var(--good); } .wrong_answer, .no_reply { color: var(--bad); }
.wrong_format, .graded { color: var(--warn); }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  .wide { overflow: visible; } .heat td { min-width: 0; padding: .15rem .2rem; font-size: 7.5pt; }
  .heat td, .scale { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  tr, figure { break-inside: avoid; } h2, h3 { break-after: avoid; }
  @page { size: A4 landscape; margin: 12mm; } }
"""


def page(report: Report) -> str:
    """The HTML of a report."""
    facts = report.facts
    sections = [
        ("scores", "Scores", _scores(facts)),
        ("differences", "Differences", "".join(map(_difference, facts["comparisons"]))),
        ("merges", "Trade-offs", _tradeoffs(facts)),
        ("fidelity", "Language with and without the picture", _fidelity(facts["runs"])),
        ("judges", "A judge beside the score", _judges(facts["runs"])),
        ("tokens", "Tokens by language", _tokens(facts["runs"])),
        ("speed", "Speed and use", _speed(facts["runs"])),
        ("carbon", "Energy and carbon", _carbon(facts["carbon"])),
        ("examples", "Examples of what went wrong", _examples(report)),
        ("notes", "How to read this", _list(facts["notes"])),
    ]
    kept = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{_e(head)}</a> ' for key, head, _ in kept)
    body = "".join(f'<section id="{key}"><h2>{_e(head)}</h2>{text}</section>\n' for key, head, text in kept)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_e(title(facts))}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_e(title(facts))}</h1>\n<p class='soft'>{_e(_subject(facts))}</p>\n<nav>{links}</nav>\n"
        f"{body}</body>\n</html>\n"
    )


def _e(text: Any) -> str:
    """A text that is no markup, with nothing that is invisible and moves what follows."""
    return html.escape(cut(str(text)), quote=True)


def _subject(facts: Facts) -> str:
    asked = [run["results"].get("about", {}) for run in facts["runs"]]
    suites = dict.fromkeys(
        f"{one['suite']} {one.get('version', '')}".strip() for one in asked if "suite" in one
    )
    of = f", suite {', '.join(suites)}" if suites else ""
    return f"Report of seavlm {facts['seavlm']}{of}."


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{_e(line)}</li>" for line in lines) + "</ul>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """heads: texts. rows: of HTML, the first of each is its head."""
    top = "".join(f'<th scope="col">{_e(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    said = f'<p class="soft">{_e(caption)}</p>' if caption else ""  # not in what scrolls
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div>{said}<div class="wide">{table}</div></div>'


# --- scores


def _scores(facts: Facts) -> str:
    legend = (
        '<p class="soft">Score in %, below it its 95 % interval. Colour: <span class="scale"></span> from '
        "guessing to perfect. <span class='below'>&nbsp;Framed ▼&nbsp;</span> worse than guessing. "
        '<span class="form">form 40 %</span> so many replies cannot be read as an answer.</p>'
    )
    parts = [legend]
    for run in facts["runs"]:
        results = run["results"]
        found = results.get("diagnosis", [])
        parts.append(f"<h3>{_e(run['name'])}</h3>{_about(results)}{_heat(results)}")
        parts.append(_list(found) if found else "")
    return "".join(parts)


def _about(results: Facts) -> str:
    about = results.get("about", {})
    keys = {"model": "model", "quantize": "quantised", "max_new_tokens": "longest reply, tokens"}
    said = [f"{name}: {about[key]}" for key, name in keys.items() if about.get(key)]
    said.append(f"questions {results['suite'][:12]}")
    said += [f"left out {count} ({why})" for why, count in about.get("left_out", {}).items()]
    if about.get("detectable"):
        said.append(f"finds differences from {about['detectable'] * 100:.1f} points on")
    return f'<p class="soft">{_e("; ".join(said))}</p>'


def _heat(results: Facts) -> str:
    codes = list(results["languages"])
    cells = {(cell["task"], cell["language"]): cell for cell in results["cells"]}
    top = "".join(f'<th scope="col">{_e(LANGUAGES[code].english_name)}{_native(code)}</th>' for code in codes)
    # The tasks that count, their means, then those that ask the same questions once more.
    lines = {
        kind: "".join(
            f'<tr class="{kind}"><th scope="row">{_e(task)}</th>'
            f"{''.join(_heat_cell(cells.get((task, code))) for code in codes)}{_heat_cell(mean)}</tr>"
            for task, mean in results["tasks"].items()
            if counted(task) == (kind == "main")
        )
        for kind in ("main", "apart")
    }
    means = "".join(map(_heat_cell, [*results["languages"].values(), results["suites"].get("all")]))
    mean = f'<tr class="mean"><th scope="row">mean</th>{means}</tr>'
    names = {"global": "global (English, Mandarin)", "regional": "regional (the others)"}
    suites = "; ".join(
        f"{names.get(suite, suite)} {one['accuracy'] * 100:.1f} "
        f"[{one['low'] * 100:.0f}–{one['high'] * 100:.0f}]"
        for suite, one in results["suites"].items()
    )
    return (
        f'<div class="wide"><table class="heat"><thead><tr><th>task</th>{top}<th scope="col">all</th></tr>'
        f"</thead><tbody>{lines['main']}{mean}{lines['apart']}</tbody></table></div>"
        f"<p>Means: {_e(suites)}.</p>"
    )


def _native(code: str) -> str:
    """A language's own name, where its script is another."""
    known = LANGUAGES[code]
    return (
        ""
        if known.script == "Latn"
        else f'<br><span lang="{code}" class="text">{_e(known.native_name)}</span>'
    )


def _heat_cell(cell: Facts | None) -> str:
    if cell is None:
        return "<td></td>"
    shade = max(0.0, min(1.0, cell["normalised"])) * 0.62
    spoken = "" if cell["language_ok"] is None else f", {cell['language_ok']:.0%} in the language"
    hint = (
        f"{cell['n']} questions, chance {cell['chance']:.0%}, above chance {cell['normalised'] * 100:.0f}, "
        f"wrong answer {cell['wrong_answer']:.0%}, wrong format {cell['wrong_format']:.0%}{spoken}"
    )
    form = ""
    if cell["wrong_format"] > 0:
        loud = ' class="form"' if cell["wrong_format"] > FORMAT_ALARM else ""
        form = f"<small{loud}>form {cell['wrong_format']:.0%}</small>"
    kind, mark = (' class="below"', " ▼") if cell["below_chance"] else ("", "")
    return (
        f'<td{kind} title="{_e(hint)}" style="background:rgb(var(--heat) / {shade:.3f})">'
        f"<b>{cell['accuracy'] * 100:.0f}{mark}</b>"
        f"<small>{cell['low'] * 100:.0f}–{cell['high'] * 100:.0f}</small>{form}</td>"
    )


# --- differences and trade-offs


def _difference(compared: Facts) -> str:
    head = f"<h3>{_e(compared['a'])} minus {_e(compared['b'])}</h3>"
    if "not_compared" in compared:
        return f"{head}<p>Not compared: {_e(compared['not_compared'])}.</p>"
    groups = compared["groups"]
    reach = max(0.01, *(abs(gap[end]) for gap in groups.values() for end in ("low", "high")))
    rows = []
    for group, gap in groups.items():
        kind = ("yes" if gap["mean"] > 0 else "worse") if gap["significant"] else "no"
        verdict = f'<span class="{kind}">{_e(settled(gap))}</span>'
        adjusted = "" if gap["p_holm"] is None else _e(chance_of(gap["p_holm"]))
        points = f"{gap['mean'] * 100:+.1f} [{gap['low'] * 100:+.1f} to {gap['high'] * 100:+.1f}]"
        rows.append([_e(label(group)), _bar(gap, reach), points, _e(chance_of(gap["p"])), adjusted, verdict])
    heads = ("", f"±{reach * 100:.0f} points", "difference", "p", "Holm's p", "")
    caption = f"{compared['questions']:,} questions that both were asked; points of 100, 95 % intervals."
    table = _table(heads, rows, caption)
    if kept := compared.get("retention"):
        lines = [
            [
                _e(label(code)),
                f"{one['a']:.2f}",
                f"{one['b']:.2f}",
                f"{one['change']:+.2f} [{one['low']:+.2f} to {one['high']:+.2f}]",
            ]
            for code, one in kept.items()
        ]
        table += _table(
            ("", compared["a"], compared["b"], "change"),
            lines,
            "Bits per character of plain text: fewer is better foretold.",
        )
    return head + table


def _bar(gap: Facts, reach: float, width: int = 160) -> str:
    """A difference and its interval around nought."""
    low, middle, high = (width / 2 * (1 + gap[key] / reach) for key in ("low", "mean", "high"))
    colour = ("var(--good)" if gap["mean"] > 0 else "var(--bad)") if gap["significant"] else "var(--soft)"
    return (
        f'<svg class="bar" width="{width}" height="16" role="img" aria-label="{gap["mean"] * 100:+.1f}">'
        f'<path d="M{width / 2} 0v16" stroke="var(--soft)"/>'
        f'<path d="M{low:.1f} 8H{high:.1f}" stroke="{colour}" stroke-width="2"/>'
        f'<circle cx="{middle:.1f}" cy="8" r="4" style="fill:{colour}"/></svg>'
    )


def _tradeoffs(facts: Facts) -> str:
    parts = []
    for sweep in facts["sweeps"]:
        # Those that were asked everything; one with betas by module has a name too long for a picture.
        asked, points, best = sweep["questions"], [], ""
        for row in sweep["rows"]:
            plain = "=" not in row["label"]
            name = f"β {row['label']}" if plain else "β by module" if row["chosen"] else ""
            best = name if row["chosen"] else best
            if not row["stopped"]:
                points.append((name, row["regional"], row["global"]))
        said = (
            f"{sweep['verdict']} Shown: {asked['search']:,} questions, {asked['concepts_search']:,} concepts."
        )
        parts.append(_scatter("Merges of a sweep", points, said, best))
    alike: dict[str, list[_Point]] = {}  # runs on the same questions
    for run in facts["runs"]:
        suites = run["results"]["suites"]
        if "global" in suites and "regional" in suites:
            points = alike.setdefault(run["results"]["suite"], [])
            points.append((run["name"], _span(suites["regional"]), _span(suites["global"])))
    for suite, points in alike.items():
        if len(points) > 1:
            parts.append(_scatter("The runs", points, f"Runs on the same questions ({suite[:12]})."))
    return f'<div class="charts">{"".join(parts)}</div>' if parts else ""


def _span(cell: Facts) -> dict[str, float]:
    return {"mean": cell["accuracy"], "low": cell["low"], "high": cell["high"]}


def _scatter(head: str, points: Sequence[_Point], said: str, best: str = "") -> str:
    """Global against regional score with intervals; filled where no other is better in both."""
    width, height, left, bottom = 520, 400, 52, 44
    axes = [across for _, across, _ in points], [up for *_, up in points]
    ends = [[one[key] for one in axis for key in ("low", "high")] for axis in axes]
    spans = [(max(0.0, min(end) - 0.03), min(1.0, max(end) + 0.03)) for end in ends]

    def x(value: float) -> float:
        return left + (width - left - 12) * (value - spans[0][0]) / (spans[0][1] - spans[0][0])

    def y(value: float) -> float:
        return (height - bottom) - (height - bottom - 12) * (value - spans[1][0]) / (
            spans[1][1] - spans[1][0]
        )

    parts = []
    for axis, place in ((0, x), (1, y)):
        for tick in _ticks(*spans[axis]):
            at = place(tick)
            line = f"M{at:.1f} 12V{height - bottom}" if axis == 0 else f"M{left} {at:.1f}H{width - 12}"
            parts.append(f'<path d="{line}" stroke="var(--line)"/>')
            where = (
                f'x="{at:.1f}" y="{height - bottom + 16}" text-anchor="middle"'
                if axis == 0
                else f'x="{left - 6}" y="{at + 4:.1f}" text-anchor="end"'
            )
            parts.append(f"<text {where}>{tick * 100:.0f}</text>")
    parts.append(
        f'<text x="{(left + width) / 2}" y="{height - 8}" text-anchor="middle">regional score, %</text>'
    )
    parts.append(
        f'<text transform="translate(14 {(height - bottom) / 2}) rotate(-90)" text-anchor="middle">'
        "global score, %</text>"
    )
    leading = front((one[1]["mean"], one[2]["mean"]) for one in points)
    steps = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in leading)
    parts.append(f'<polyline points="{steps}" fill="none" stroke="var(--soft)" stroke-dasharray="5 4"/>')
    named: dict[tuple[float, float], list[str]] = {}
    for place_, (name, across, up) in enumerate(points):
        colour = COLOURS[place_ % len(COLOURS)] if not best else COLOURS[0]
        spot = (across["mean"], up["mean"])
        whiskers = (
            f"M{x(across['low']):.1f} {y(spot[1]):.1f}H{x(across['high']):.1f}"
            f"M{x(spot[0]):.1f} {y(up['low']):.1f}V{y(up['high']):.1f}"
        )
        parts.append(f'<path d="{whiskers}" stroke="{colour}" opacity=".5"/>')
        inside = colour if spot in leading else "var(--back)"
        parts.append(
            f'<circle cx="{x(spot[0]):.1f}" cy="{y(spot[1]):.1f}" r="{7 if name == best else 5}" '
            f'style="fill:{inside};stroke:{colour};stroke-width:2"/>'
        )
        if name:
            named.setdefault(spot, []).append(f"{name} (chosen)" if name == best else name)
    dots = [(x(across["mean"]), y(up["mean"])) for _, across, up in points]
    taken = [(a - 7, a + 7, b - 7, b + 7) for a, b in dots]  # and the labels so far: both ends, top, foot
    for spot, names in named.items():
        label_ = _short(names)
        side = -1 if x(spot[0]) > width * 0.6 else 1
        # Beside the point, above or below it, on the roomier side first; failing that, further up.
        tries = [(way, -9 - 15 * up) for up in (0, -2, 1, -3) for way in (side, -side)]
        tries += [(side, -9 - 15 * up) for up in range(2, 20)]
        for way, lift in tries:
            start, at_ = x(spot[0]) + 9 * way, y(spot[1]) + lift
            low, high = sorted((start, start + way * 7 * len(label_)))
            free = all(high < a or low > b or at_ + 3 < c or at_ - 10 > d for a, b, c, d in taken)
            if free and low > left and high < width and 10 < at_ < height - bottom:
                break
        taken.append((low, high, at_ - 10, at_ + 3))
        anchor = "end" if way < 0 else "start"
        parts.append(f'<text x="{start:.1f}" y="{at_:.1f}" text-anchor="{anchor}">{_e(label_)}</text>')
    chart = (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{_e(head)}: global against regional score">{"".join(parts)}</svg>'
    )
    key = "Filled, dashed line: no other is better in one without being worse in the other. Bars: 95 %."
    caption = f'<figcaption class="soft">{_e(said)}<br>{key}</figcaption>'
    return f"<figure><h3>{_e(head)}</h3>{chart}{caption}</figure>"


def _short(names: Sequence[str]) -> str:
    """Names that share a point, on one line."""
    said = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return said if len(said) <= 48 else said[:47] + "…"


def _ticks(low: float, high: float) -> list[float]:
    step = next(size for size in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / size <= 8)
    first = int(low / step) + (0 if low % step == 0 else 1)
    return [round(step * place, 4) for place in range(first, int(high / step + 1e-9) + 1)]


# --- judges


def _judges(runs: Sequence[Facts]) -> str:
    parts = []
    for run in runs:
        for found in run["judges"]:
            parts.append(f"<h3>{_e(found['model'])} as a judge of {_e(run['name'])}</h3>")
            remarks = judge_remarks(found)
            parts.append(_list(remarks) if remarks else "")
            tables = [
                _table(("", *heads), [[_e(name), *map(_e, row)] for name, row in judge_rows(found[kind])])
                for kind, heads in JUDGED.items()
                if found[kind]
            ]
            if found["verdicts"]:
                levels = found["verdicts"]
                rows = [
                    [_e(VERDICTS.get(verdict, verdict)), f"{row['right']:,}", f"{row['wrong']:,}"]
                    for verdict, row in levels["all"]["confusion"].items()
                ]
                tables.append(_table(("automatic", "judge: right", "wrong"), rows))
                tables.append(_judge_cells(levels["cells"]))
            parts.append(f'<div class="charts">{"".join(tables)}</div>')
            parts += [_apart(one) for one in found["disagreements"]]
            parts.append(f'<p class="soft">{_e(judge_footing(found))}</p>')
    return f'<p class="soft">{_e(JUDGE_NOTE)}</p>{"".join(parts)}' if parts else ""


def _judge_cells(cells: Sequence[Facts]) -> str:
    """The share in which judge and score agree, task by language."""
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    codes = [code for code in LANGUAGES if any(cell["language"] == code for cell in cells)]
    known = {(cell["task"], cell["language"]): cell for cell in cells}
    rows = [
        [
            _e(task),
            *(
                f"{known[task, code]['agreement'] * 100:.0f}" if (task, code) in known else ""
                for code in codes
            ),
        ]
        for task in tasks
    ]
    return _table(("agree, %", *codes), rows)


def _apart(one: Facts) -> str:
    """A cell in which judge and score are far apart, with examples."""
    cards = []
    for example in one["examples"]:
        code = example["language"]
        texts = {"asked": example["prompt"], "reply": example["reply"]}
        lines = [f"<dt>{head}</dt><dd>{_text(text, _tag(text, code))}</dd>" for head, text in texts.items()]
        wanted = _text(expected(example), code if example["answers"] else "en")
        lines.insert(1, f"<dt>expected</dt><dd>{wanted}</dd>")
        lines.append(f"<dt>automatic</dt><dd>{_e(automatic(example))}</dd>")
        why = _text(example["reason"], "en") if example["reason"] else ""
        lines.append(f"<dt>judge</dt><dd><b>{_e(example['judge'])}</b> {why}</dd>")
        cards.append(f'<article class="example"><dl>{"".join(lines)}</dl></article>')
    return f'<p>{_e(apart(one))}</p><div class="examples">{"".join(cards)}</div>'


# --- what it took


def _fidelity(runs: Sequence[Facts]) -> str:
    parts = []
    for run in runs:
        found = run["results"].get("fidelity", {})
        rows = [
            [
                _e(label(code)),
                f"{one['n']:,}",
                f"{one['with_picture']:.0%}",
                f"{one['without_picture']:.0%}",
                f"{one['change']['mean'] * 100:+.1f} [{one['change']['low'] * 100:+.1f} to "
                f"{one['change']['high'] * 100:+.1f}]",
                '<span class="wrong_answer">leaves the language</span>' if one["change"]["high"] < 0 else "",
            ]
            for code, one in found.items()
        ]
        if rows:
            heads = ("", "pairs", "with picture", "without", "change, points", "")
            parts.append(_table(heads, rows, f"{run['name']}: replies in the language asked for"))
    return f'<div class="charts">{"".join(parts)}</div>' if parts else ""


def _tokens(runs: Sequence[Facts]) -> str:
    counted_ = [run for run in runs if run["tokens"]]
    if not counted_:
        return ""
    said = (
        "As the runs have counted them. Against English: prompt tokens of a language's questions over those "
        "of the same tasks in English. A grapheme is what a reader sees as one letter. Prompts: those "
        "without pictures and functions, with the frame of the chat; replies: with the token that ends them."
    )
    heads = (
        "",
        "against English",
        "tokens a grapheme, prompts",
        "tokens a grapheme, replies",
        "bits a character",
    )
    parts = [f'<p class="soft">{_e(said)}</p>', '<div class="charts">']
    for run in counted_:
        rows = []
        for code, row in run["tokens"].items():
            keys = ("against_english", "prompt_per_grapheme", "reply_per_grapheme")
            times, *others = (f"{row[key]:.2f}" if key in row else "" for key in keys)
            bits = run["retention"].get(code)
            rows.append(
                [_e(label(code)), times and f"{times} ×", *others, "" if bits is None else f"{bits:.2f}"]
            )
        parts.append(_table(heads if run["retention"] else heads[:4], _fit(rows, run), run["name"]))
    return "".join(parts) + "</div>"


def _fit(rows: list[list[str]], run: Facts) -> list[list[str]]:
    return rows if run["retention"] else [row[:4] for row in rows]


def _speed(runs: Sequence[Facts]) -> str:
    rows, priced = [], any("cost" in run["speed"] for run in runs)
    for run in runs:
        one = run["speed"]
        rates = [
            f"{one[key]:,.1f}" if one.get(key) else "" for key in ("questions_per_s", "new_tokens_per_s")
        ]
        unanswered = run["results"].get("usage", {}).get("no_reply", 0)
        rows.append(
            [
                _e(run["name"]),
                f"{one['questions']:,}",
                f"{one['seconds']:,.1f}" if one["seconds"] else "",
                *rates,
                *(f"{one[key]:,}" if one[key] else "not counted" for key in ("prompt_tokens", "new_tokens")),
                f"{unanswered:,}",
                *([f"{one['cost']:,.4f}" if "cost" in one else ""] if priced else []),
            ]
        )
    heads = (
        "",
        "questions",
        "seconds",
        "questions/s",
        "new tokens/s",
        "tokens read",
        "tokens written",
        "no reply",
        *(["cost"] if priced else []),
    )
    said = "The whole run on its machine, all its sittings; judging included."
    return _table(heads, rows, said)


def _carbon(stages: Sequence[Facts]) -> str:
    rows = [
        [
            _e(one["stage"]),
            f"{one['hours']:.3g}",
            f"{one['watts']:,.0f} ({_e(one.get('watts_source', 'assumed'))})",
            f"{one['kwh']:.3g}",
            f"{one['kg_per_kwh']:g} ({_e(one.get('region', 'not recorded'))})",
            f"{one['kg_co2e']:.3g}",
        ]
        for one in stages
    ]
    heads = ("stage", "hours", "watts", "kWh", "kg a kWh", "kg CO2e")
    return _table(heads, rows, "As the manifests beside the runs and stages have it.") if rows else ""


# --- examples


def _examples(report: Report) -> str:
    parts = []
    examples = report.facts["examples"]
    for code in dict.fromkeys(one["language"] for one in examples):
        cards = "".join(_example(one, report.pictures) for one in examples if one["language"] == code)
        known = LANGUAGES[code]
        native = _native(code).removeprefix("<br>")
        parts.append(f'<h3>{_e(known.english_name)} {native}</h3><div class="examples">{cards}</div>')
    said = "The lowest scores, a task in turn; pictures are small copies."
    return f'<p class="soft">{_e(said)}</p>{"".join(parts)}' if parts else ""


def _example(example: Facts, pictures: Mapping[str, bytes]) -> str:
    code = example["language"]
    shown = "".join(
        f'<img alt="" src="data:{kind};base64,{base64.b64encode(pictures[name]).decode()}">'
        for name in example["pictures"]
        if (kind := _kind(pictures.get(name, b"")))
    )
    lines = [
        f"<dt>asked</dt><dd>{_text(example['prompt'], _tag(example['prompt'], code))}</dd>",
        f"<dt>expected</dt><dd>{_text(expected(example), code if example['answers'] else 'en')}</dd>",
    ]
    for one in example["replies"]:
        left = (
            ' <span class="verdict wrong_format">another language</span>'
            if one["language_ok"] is False
            else ""
        )
        verdict = one["verdict"] if one["verdict"] in VERDICTS else "graded"
        said = _text(one["reply"], _tag(one["reply"], code)) if one["reply"].strip() else "<i>nothing</i>"
        error = f' <span class="soft">{_e(one["error"])}</span>' if one["error"] else ""
        lines.append(
            f"<dt>{_e(one['run'])}</dt><dd>{said} <span class='verdict {verdict}'>"
            f"{_e(VERDICTS.get(one['verdict'], one['verdict']))}</span>{left}{error}</dd>"
        )
    head = f'<div class="soft">{_e(example["task"])}</div>'
    return f'<article class="example">{head}{shown}<dl>{"".join(lines)}</dl></article>'


def _text(text: str, tag: str) -> str:
    return f'<span class="text" dir="auto" lang="{_e(tag)}">{_e(text)}</span>'


def _tag(text: str, code: str) -> str:
    """The language that a text is set in: the one asked for, else whose script it is in."""
    script = script_of(text)
    if script is None or script == LANGUAGES[code].script:
        return code
    fits = [one.code for one in LANGUAGES.values() if one.script == script]
    return fits[0] if len(fits) == 1 else "und"


def _kind(data: bytes) -> str:
    """The type of a picture by its first bytes; nothing for what is none."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return {b"\x89PNG": "image/png", b"\xff\xd8\xff\xe0": "image/jpeg"}.get(data[:4], "")
