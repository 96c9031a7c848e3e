"""Results for people: a Markdown table, a table for the terminal, and what is wrong in a line each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from seavlm.evals.tasks import counted
from seavlm.text.language import LANGUAGES

if TYPE_CHECKING:
    from seavlm.evals.scores import Cell, Results

WIDEST = 6  # tasks that a table has columns for
LANGUAGE_ALARM = 0.10  # more replies than this in another language are told
FORMAT_ALARM = 0.10
"""A cell with more replies than this in the wrong format is marked: it measures the format, not the
knowledge.
"""


def markdown(results: Results) -> str:
    """The scores as a Markdown table: languages down, tasks across."""
    tasks = list(results.tasks)
    lines = [
        f"# {results.name}",
        "",
        "Accuracy in %, with its 95 % interval (questions resampled by concept). "
        f"`!` below chance, `f` more than {FORMAT_ALARM:.0%} of the replies in the wrong format.",
        "",
        "| language | " + " | ".join(tasks) + " | mean | wrong format | wrong answer | right language |",
        "|---|" + "---:|" * (len(tasks) + 4),
    ]
    for label, row in _rows(results):
        lines.append(f"| {label} | " + " | ".join(row) + " |")
    lines += ["", *(f"- {line}" for line in diagnosis(results))] if diagnosis(results) else []
    return "\n".join(lines) + "\n"


def diagnosis(results: Results) -> list[str]:
    """What the scores do not say by themselves, a line each: form, language, guessing, missing replies."""
    lines = []
    for task, mean in results.tasks.items():
        cells = [cell for cell in results.cells if cell.task == task and counted(task)]
        slips = [cell.language for cell in cells if cell.wrong_format > FORMAT_ALARM]
        worse = [cell.language for cell in cells if cell.below_chance]
        if slips:
            share = f"{mean.wrong_format:.0%} of the replies are in the wrong format"
            so = (
                "the score is of form, not of knowledge"
                if mean.wrong_format > 0.5
                else "that much is of form"
            )
            if "held" in mean.measures:
                so += f"; {mean.measures['held']:.0%} of those replies hold the right answer"
            lines.append(f"{task}: {share} ({_those(slips, cells)}): {so}")
        if mean.measures.get("false_call"):
            share = f"{mean.measures['false_call']:.0%} of the questions that need no function"
            lines.append(f"{task}: {share} are answered with a call")
        if worse:
            lines.append(f"{task}: worse than guessing ({_those(worse, cells)})")
    for code, mean in results.languages.items():
        if mean.language_ok is not None and mean.language_ok < 1 - LANGUAGE_ALARM:
            name = LANGUAGES[code].english_name
            lines.append(f"{name}: {1 - mean.language_ok:.0%} of the replies are in another language")
    for code, found in results.fidelity.items():
        if found["change"]["high"] < 0:
            share = f"{-found['change']['mean']:.0%} more of them with the picture than without"
            lines.append(f"{LANGUAGES[code].english_name}: replies leave the language, {share}")
    if results.usage["no_reply"]:
        lines.append(f"{results.usage['no_reply']} questions got no reply, and count as wrong")
    if left_out := results.about.get("asked_without"):
        lines.append(f"the endpoint does not take {', '.join(left_out)}: another run may give other replies")
    if results.usage["cut"]:
        line = f"{results.usage['cut']} replies were cut at the longest that was asked for (--max-new-tokens)"
        empty = results.usage["cut_empty"]
        lines.append(
            line + (f", {empty} of them before they said a word: it thinks for longer" if empty else "")
        )
    if results.usage["withheld"]:
        lines.append(f"{results.usage['withheld']} replies were kept back, in part or whole, by a filter")
    return lines


def _those(codes: Sequence[str], cells: Sequence[Cell]) -> str:
    return "all languages" if len(codes) == len(cells) > 1 else " ".join(codes)


def table(results: Results, width: int = 100) -> Table:
    """The same for the terminal: after each score, how far the farther end of its interval is. With more than
    six tasks, or wider than `width` columns, the tasks' means and the languages' only.
    """
    if len(results.tasks) > WIDEST:
        return _long_table(results)
    grid = Table(title=f"{results.name}: accuracy %, ± at 95 %", title_justify="left", box=SIMPLE)
    grid.add_column("language", no_wrap=True)
    for head in (*results.tasks, "mean"):
        grid.add_column(head, justify="right", no_wrap=True)
    for head in ("wrong\nformat", "right\nlang."):
        grid.add_column(head, justify="right", no_wrap=True, style="dim")
    cells = {(cell.task, cell.language): cell for cell in results.cells}
    for code, mean in results.languages.items():
        row = [_short(cells.get((task, code))) for task in results.tasks]
        grid.add_row(LANGUAGES[code].english_name, *row, _short(mean), *_percents(mean))
    grid.add_section()
    for suite, mean in results.suites.items():
        across = [_short(results.tasks[task]) if suite == "all" else Text() for task in results.tasks]
        grid.add_row(suite, *across, _short(mean), *_percents(mean), style="bold")
    if Console(width=1000).measure(grid).maximum > width:
        return _long_table(results)
    grid.caption = "red !: worse than guessing; yellow f: many replies in the wrong format"
    grid.caption_justify = "left"
    return grid


JUDGED = {
    "verdicts": ("replies", "automatic", "judge", "agree", "kappa"),
    "grades": ("replies", "automatic", "judge", "rank correlation"),
}
"""What the columns of `judge_rows` are."""


def judge_table(found: Mapping[str, Any]) -> list[Table]:
    """A judge's opinion beside the automatic score, for the terminal."""
    grids = []
    for kind, heads in JUDGED.items():
        if not found[kind]:
            continue
        title = Text(f"{found['run']}: {found['model']} as a judge, beside the automatic score", "italic")
        grid = Table(title=title, title_justify="left", box=SIMPLE)
        grid.add_column("", no_wrap=True)
        for head in heads:
            grid.add_column(head, justify="right", no_wrap=True)
        for label, row in judge_rows(found[kind]):
            grid.add_row(Text(label), *row, style="bold" if label == "all" else "")
        grids.append(grid)
    return grids


def judge_rows(levels: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """A label, and how far a judge agrees: for each task, each language, and all."""
    yield from ((task, _judged(one)) for task, one in levels["tasks"].items())
    languages = levels["languages"]
    yield from (
        (LANGUAGES[code].english_name, _judged(languages[code])) for code in LANGUAGES if code in languages
    )
    yield "all", _judged(levels["all"])


def _judged(one: Mapping[str, Any]) -> list[str]:
    cells = [f"{one['n']:,}", f"{one['automatic'] * 100:.0f}", f"{one['judge'] * 100:.0f}"]
    if "agreement" in one:
        return [*cells, f"{one['agreement']:.0%}", coefficient(one["kappa"])]
    return [*cells, coefficient(one["spearman"])]


def coefficient(one: Mapping[str, float] | None) -> str:
    """Kappa, or a rank correlation, with its interval."""
    return "-" if one is None else f"{one['value']:.2f} [{one['low']:.2f} to {one['high']:.2f}]"


def judge_remarks(found: Mapping[str, Any]) -> list[str]:
    """What must be said beside the figures: warnings, what was not judged, where the two are apart."""
    lines = list(found["warnings"])
    if found["not_judged"]:
        why = "; ".join(f"{count:,} {reason}" for reason, count in found["not_judged"].items())
        lines.append(f"not judged: {found['asked'] - found['judged']:,} of {found['asked']:,} ({why})")
    lines += [f"furthest apart: {apart(one)}" for one in found["disagreements"][:3]]
    return lines


def apart(one: Mapping[str, Any]) -> str:
    """A cell in which judge and score are far apart, and how far."""
    far = (
        f"{one['apart']:.0%} of {one['n']:,} replies judged otherwise"
        if one["kind"] == "verdicts"
        else f"{one['n']:,} replies, whose ranks are {one['apart'] * 100:.0f} of 100 places apart"
    )
    return f"{one['task']}, {LANGUAGES[one['language']].english_name}: {far}"


def _long_table(results: Results) -> Table:
    """A line a task, a line a language, a line a suite."""
    grid = Table(title=f"{results.name}: score %, ± at 95 %", title_justify="left", box=SIMPLE)
    grid.add_column("", no_wrap=True)
    for head in ("asked", "score", "above\nchance", "wrong\nformat", "wrong\nanswer", "right\nlang."):
        grid.add_column(head, justify="right", no_wrap=True)
    grid.add_column("cer", justify="right", no_wrap=True, style="dim")
    groups = (results.tasks, results.languages, results.suites)
    for number, group in enumerate(groups):
        if number:
            grid.add_section()
        for label, cell in group.items():
            known = LANGUAGES.get(label)
            spoken = "-" if cell.language_ok is None else f"{cell.language_ok:.0%}"
            grid.add_row(
                known.english_name if known else label,
                f"{cell.n:,}",
                _short(cell),
                f"{cell.normalised * 100:.0f}",
                f"{cell.wrong_format:.0%}",
                f"{cell.wrong_answer:.0%}",
                spoken,
                f"{cell.measures['cer']:.2f}" if "cer" in cell.measures and not number else "",
            )
    grid.caption = "red !: worse than guessing; yellow f: many replies in the wrong format"
    grid.caption_justify = "left"
    return grid


def _short(cell: Cell | None) -> Text:
    if cell is None:
        return Text()
    colour = {"!": "red", "f": "yellow"}.get(_mark(cell), "")
    reach = max(cell.high - cell.accuracy, cell.accuracy - cell.low)
    return Text(f"{cell.accuracy * 100:.0f} ±{reach * 100:.0f}{_mark(cell)}", style=colour)


def _percents(cell: Cell) -> tuple[str, str]:
    return f"{cell.wrong_format:.0%}", "-" if cell.language_ok is None else f"{cell.language_ok:.0%}"


def _mark(cell: Cell) -> str:
    return "!" if cell.below_chance else "f" if cell.wrong_format > FORMAT_ALARM else ""


def _rows(results: Results) -> Iterable[tuple[str, list[str]]]:
    """A label and the texts of a line, for each language, suite and the mean of each task."""
    cells = {(cell.task, cell.language): cell for cell in results.cells}
    for code, mean in results.languages.items():
        row = [_show(cells.get((task, code))) for task in results.tasks]
        yield f"{code} {LANGUAGES[code].english_name}", row + _tail(mean)
    for suite, mean in results.suites.items():
        across = [_show(results.tasks[task]) if suite == "all" else "" for task in results.tasks]
        yield suite, across + _tail(mean)


def _tail(mean: Cell) -> list[str]:
    language = "-" if mean.language_ok is None else f"{mean.language_ok:.1%}"
    return [_show(mean), f"{mean.wrong_format:.1%}", f"{mean.wrong_answer:.1%}", language]


def _show(cell: Cell | None) -> str:
    if cell is None:
        return ""
    interval = f"[{cell.low * 100:.0f}-{cell.high * 100:.0f}]"
    return f"{cell.accuracy * 100:.1f} {interval} {_mark(cell)}".strip()
