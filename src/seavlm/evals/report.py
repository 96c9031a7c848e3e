"""What runs have found, gathered into one report: the facts (for JSON), and the same in Markdown.

Nothing is asked or judged again: scores are those of results.json, replies those of questions.parquet. Only
what no single run knows is computed: differences between runs, the share that each language pays in tokens,
the examples to show. `page.py` makes the facts an HTML file.
"""

from __future__ import annotations

import html
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from seavlm import __version__, manifest
from seavlm.errors import SeavlmError
from seavlm.evals.scores import Results, comparison, retention_change
from seavlm.evals.show import FORMAT_ALARM, JUDGED, apart, coefficient, judge_remarks, judge_rows
from seavlm.evals.similarity import graphemes
from seavlm.evals.tasks import RANKED, counted
from seavlm.text.language import LANGUAGES

EXAMPLES = 6
"""Examples shown for each language."""
LONGEST = 400
"""Graphemes of a text that are shown."""
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_DEFAULTS: dict[str, Any] = {  # of columns that files of earlier versions lack
    "checks": "",
    "context": "",
    "functions": (),
    "prompt_tokens": 0,
    "new_tokens": 0,
    "error": "",
}
NOTES = (
    "95 of 100 intervals hold the truth. Questions on one concept rise and fall together, so concepts are "
    "what is resampled, each with all its questions (cluster bootstrap). The interval of a score is exact "
    "(binomial, mid-p) where each concept is asked once, else Wilson's for as many independent questions as "
    "would vary like that, with Student's t for the number of concepts. Averages that hold a task of a dozen "
    "questions have wider intervals than they need.",
    "Differences are paired: only questions that both models were asked, concept by concept. p is of sign "
    "flips. Holm's p is for all languages of a pair of runs at once; a difference is called one where it is "
    "below 0.05. It says nothing of other pairs of runs, nor of single tasks.",
    "Colour is the score above chance: 0 is guessing, 100 is perfect. Worse than guessing means that the "
    "whole interval lies below chance.",
    f"Wrong format: replies that cannot be read as an answer. Above {FORMAT_ALARM:.0%} a score measures form "
    "more than knowledge, and is marked.",
    "Averages weigh tasks and languages alike. Questions asked once more, without their picture (/blind) or "
    "with the options ranked (ranked), are in no average.",
)

JUDGE_NOTE = (
    "A model's opinion of the same replies, beside the automatic score and in no average. Kappa and the rank "
    "correlation are 0 where the two agree as by chance and 1 where they always do, with 95 % intervals "
    "(concepts resampled); - where one of them says the same of all. In %: scores, and how often they agree."
)


@dataclass(frozen=True)
class Run:
    """A folder of `seavlm eval`."""

    name: str
    results: dict[str, Any]  # results.json, as it is
    records: list[dict[str, Any]]  # the rows of questions.parquet
    pictures: dict[str, bytes]  # SHA-256 -> a small copy
    retention: dict[str, Any]  # retention.json, or nothing
    judges: list[dict[str, Any]]  # each judge-*.json


@dataclass(frozen=True)
class Report:
    """The facts, and the pictures that the examples show."""

    facts: dict[str, Any]
    pictures: dict[str, bytes] = field(default_factory=dict)


def gather(folders: Sequence[Path | str], *, examples: int = EXAMPLES) -> Report:
    """The report of folders: of `seavlm eval`, of a merge sweep, of any stage with a manifest, or of a build.

    Each run is compared with the first one that was asked some of the same questions. Raises SeavlmError
    when no folder holds a run.
    """
    runs: list[Run] = []
    sweeps: list[dict[str, Any]] = []
    carbon: list[dict[str, Any]] = []
    for folder in _expanded(folders):
        of = ""
        if (folder / "questions.parquet").is_file():
            runs.append(_run(folder, {run.name for run in runs}))
            of = f" of {runs[-1].name}"
        if (folder / "sweep.json").is_file():
            sweeps.append(manifest.read_json(folder / "sweep.json"))
        if (folder / manifest.MANIFEST).is_file():
            made = manifest.read_manifest(folder)
            found = made.get("metrics", {}).get("carbon", {})
            if "kg_co2e" in found:  # of what ran behind an endpoint it is not known
                carbon.append({"stage": made["stage"] + of, **found})
    if not runs:
        raise SeavlmError(
            "there is no run to report on",
            hint="Give folders of `seavlm eval MODEL --suite offline --out DIR`.",
        )
    shown = _examples(runs, examples)
    wanted = {name for one in shown for name in one["pictures"]}
    pictures = {name: data for run in runs for name, data in run.pictures.items() if name in wanted}
    facts = {
        "seavlm": __version__,
        "runs": [
            {
                "name": run.name,
                "results": run.results,
                "speed": _speed(run),
                "tokens": _tokens(run.records),
                "retention": {code: one["bits_per_character"] for code, one in run.retention.items()},
                "judges": run.judges,
            }
            for run in runs
        ],
        "comparisons": [_compared(run, runs[:place]) for place, run in enumerate(runs) if place],
        "sweeps": sweeps,
        "carbon": carbon,
        "examples": shown,
        "notes": list(NOTES),
    }
    return Report(facts, pictures)


# --- reading


def _expanded(folders: Sequence[Path | str]) -> Iterable[Path]:
    """The folders; for one that holds neither run nor sweep (a build's, its evaluation's), those below."""
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise SeavlmError(f"there is no folder {folder}", hint="Give what `seavlm eval --out` has made.")
        yield folder
        if not any((folder / name).is_file() for name in ("questions.parquet", "sweep.json")):
            stages = [stage for stage in sorted(folder.iterdir()) if stage.is_dir()]
            for stage in stages:
                yield stage
                yield from (one for one in sorted(stage.iterdir()) if (one / "questions.parquet").is_file())


def _run(folder: Path, taken: set[str]) -> Run:
    results = manifest.read_json(folder / "results.json")
    try:
        rows = pq.read_table(folder / "questions.parquet").to_pylist()
        kept = folder / "pictures.parquet"
        pictures = pq.read_table(kept).to_pylist() if kept.is_file() else []
    except (OSError, ValueError) as error:
        raise SeavlmError(f"cannot read the run in {folder}: {error}", hint="Evaluate again.") from error
    for row in rows:
        row.setdefault("score", float(row["verdict"] == "correct"))
        for key, default in _DEFAULTS.items():
            row.setdefault(key, default)
    name, number = str(results.get("name", folder.name)), 2
    while name in taken:
        name, number = f"{results.get('name', folder.name)} ({number})", number + 1
    return Run(
        name,
        results,
        rows,
        {row["sha256"]: row["image"] for row in pictures},
        manifest.read_json(folder / "retention.json") if (folder / "retention.json").is_file() else {},
        [manifest.read_json(path) for path in sorted(folder.glob("judge-*.json"))],
    )


# --- what no single run knows


def _compared(run: Run, earlier: Sequence[Run]) -> dict[str, Any]:
    """A run against the first that was asked some of the same questions, or why there is none."""
    for first in earlier:
        one, other = (Results(r.name, "", [], {}, {}, {}, {}, {}, 0.0, r.records) for r in (run, first))
        try:
            found = comparison(one, other)
        except SeavlmError:
            continue
        if common := {code: text for code, text in run.retention.items() if code in first.retention}:
            found["retention"] = retention_change(common, first.retention)
        return found
    others = " or ".join(other.name for other in earlier)
    return {"a": run.name, "b": others, "not_compared": "they have no question in common"}


def _speed(run: Run) -> dict[str, float]:
    """Seconds, questions, tokens, and what they cost where a price was given."""
    seconds = float(run.results.get("seconds") or 0.0)
    used = {key: sum(record[key] or 0 for record in run.records) for key in ("prompt_tokens", "new_tokens")}
    rates = {"questions_per_s": len(run.records), "new_tokens_per_s": used["new_tokens"]} if seconds else {}
    return {
        "questions": len(run.records),
        "seconds": seconds,
        **used,
        **{key: value / seconds for key, value in rates.items()},
        **({"cost": float(run.results["cost"])} if "cost" in run.results else {}),
    }


def _tokens(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """What a language pays in tokens: language -> figures, as far as the run has counted tokens.

    prompt_per_grapheme: of prompts without pictures, the chat's frame included. against_english: prompt
    tokens of the same tasks over those in English (mean of the tasks). reply_per_grapheme: of replies.
    """
    asked: dict[str, dict[str, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    said: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for record in records:
        code, task = record["language"], record["task"]
        bare = not record["image_sha256"] and not record["functions"] and task != RANKED
        if bare and record["prompt_tokens"]:
            length = len(graphemes(record["prompt"].replace("<image>\n", "")))
            asked[code][task].append((record["prompt_tokens"], length))
        if record["new_tokens"] and record["reply"]:
            said[code].append((record["new_tokens"], len(graphemes(record["reply"]))))
    found: dict[str, dict[str, float]] = {}
    for code in LANGUAGES:
        row: dict[str, float] = {}
        pairs = [pair for task in asked[code].values() for pair in task]
        if pairs:
            row["prompts"] = len(pairs)
            row["prompt_per_grapheme"] = _ratio(pairs)
        shared = [task for task in asked[code] if task in asked["en"]]
        if shared:
            rates = [_mean_first(asked[code][task]) / _mean_first(asked["en"][task]) for task in shared]
            row["against_english"] = sum(rates) / len(rates)
        if said[code]:
            row["replies"] = len(said[code])
            row["reply_per_grapheme"] = _ratio(said[code])
        if row:
            found[code] = row
    return found


def _ratio(pairs: Sequence[tuple[int, int]]) -> float:
    return sum(one for one, _ in pairs) / max(1, sum(other for _, other in pairs))


def _mean_first(pairs: Sequence[tuple[int, int]]) -> float:
    return sum(one for one, _ in pairs) / len(pairs)


def _examples(runs: Sequence[Run], each: int) -> list[dict[str, Any]]:
    """Questions that went wrong, for each language: the lowest scores, in turns of the tasks.

    A question that several runs were asked stands once, with all their replies. Those whose picture was kept
    come first.
    """
    kept = {name for run in runs for name in run.pictures}
    asked: dict[tuple[Any, ...], list[tuple[str, dict[str, Any]]]] = {}
    for run in runs:
        for record in run.records:
            if counted(record["task"]):
                key = (record["id"], record["prompt"], *record["image_sha256"])
                asked.setdefault(key, []).append((run.name, record))
    queues: dict[str, dict[str, list[tuple[float, bool, str, list[tuple[str, dict[str, Any]]]]]]] = {}
    for group in asked.values():
        record = group[0][1]
        score = sum(one["score"] for _, one in group) / len(group)
        if score < 1:
            hidden = not set(record["image_sha256"]) & kept
            queue = queues.setdefault(record["language"], {}).setdefault(record["task"], [])
            queue.append((score, hidden, record["id"], group))
    shown = []
    for code in (code for code in LANGUAGES if code in queues):
        tasks = [sorted(queue, key=lambda one: one[:3]) for queue in queues[code].values()]
        tasks.sort(key=lambda queue: queue[0][:2][::-1])
        depth = max(len(queue) for queue in tasks)
        turns = [queue[place] for place in range(depth) for queue in tasks if place < len(queue)]
        shown += [_example(group, kept) for *_, group in turns[:each]]
    return shown


def _example(group: Sequence[tuple[str, dict[str, Any]]], kept: set[str]) -> dict[str, Any]:
    record = group[0][1]
    return {
        "id": record["id"],
        "task": record["task"],
        "language": record["language"],
        "prompt": record["prompt"].replace("<image>\n", ""),
        "answers": list(record["answers"] or ()),
        "checks": record["checks"] or "",
        "pictures": [name for name in record["image_sha256"] if name in kept],
        "replies": [
            {
                "run": name,
                "reply": one["reply"],
                "parsed": one["parsed"],
                "verdict": one["verdict"],
                "score": one["score"],
                "language_ok": one["language_ok"],
                "error": one["error"] or "",
            }
            for name, one in group
        ],
    }


# --- Markdown


def markdown(facts: Mapping[str, Any]) -> str:
    """The report as Markdown, without pictures. What models and files say is escaped."""
    lines = [f"# {_md(title(facts))}", ""]
    for run in facts["runs"]:
        lines += [f"## {_md(run['name'])}", "", *_md_scores(run["results"]), ""]
        found = run["results"].get("diagnosis", [])
        lines += [*(f"- {_md(line)}" for line in found), ""] if found else []
        lines += _md_fidelity(run["results"].get("fidelity", {}))
        for found in run["judges"]:
            lines += _md_judge(found)
    for compared in facts["comparisons"]:
        lines += _md_difference(compared)
    for sweep in facts["sweeps"]:
        lines += ["## Merges", "", "| beta | global | regional | weighted |", "|---:|---:|---:|---:|"]
        for row in sweep["rows"]:
            cells = [_interval(row[key]) for key in ("global", "regional", "score")]
            best, guess = " *" if row["chosen"] else "", "~" if row["stopped"] else ""
            lines.append(f"| {_md(row['label'])}{best} | {' | '.join(guess + cell for cell in cells)} |")
        lines += ["", _md(sweep["verdict"]), ""]
    lines += _md_tokens(facts["runs"]) + _md_speed(facts["runs"])
    if facts["carbon"]:
        lines += ["## Energy and carbon", "", "| stage | hours | kWh | kg CO2e |", "|---|---:|---:|---:|"]
        for one in facts["carbon"]:
            lines.append(
                f"| {_md(one['stage'])} | {one['hours']:.3g} | {one['kwh']:.3g} | {one['kg_co2e']:.3g} |"
            )
        lines.append("")
    if facts["examples"]:
        lines += ["## Examples of what went wrong", ""]
    for example in facts["examples"]:
        head = f"{LANGUAGES[example['language']].english_name}, {example['task']}"
        lines += [f"- **{_md(head)}**: {_md(cut(example['prompt']))}"]
        lines += [f"  - expected: {_md(cut(expected(example)))}"]
        for reply in example["replies"]:
            lines.append(
                f"  - {_md(reply['run'])}: {_md(cut(reply['reply'])) or '(empty)'} "
                f"[{_md(reply['verdict'].replace('_', ' '))}]"
            )
    lines += ["", "## How to read this", "", *(f"- {_md(note)}" for note in facts["notes"])]
    return "\n".join(lines) + "\n"


def judge_markdown(found: Mapping[str, Any]) -> str:
    """What a judge says of one run, beside the automatic score."""
    return "\n".join(_md_judge(found)) + "\n"


def _md_judge(found: Mapping[str, Any]) -> list[str]:
    lines = [f"## {_md(found['model'])} as a judge of {_md(found['run'])}", "", JUDGE_NOTE, ""]
    lines += [*(f"- {_md(line)}" for line in judge_remarks(found)), ""] if judge_remarks(found) else []
    for kind, heads in JUDGED.items():
        if found[kind]:
            lines += [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
            lines += [f"| {_md(name)} | {' | '.join(row)} |" for name, row in judge_rows(found[kind])]
            lines.append("")
    if found["verdicts"]:
        lines += ["| automatic | judge: right | wrong |", "|---|---:|---:|"]
        for verdict, row in found["verdicts"]["all"]["confusion"].items():
            lines.append(f"| {_md(verdict.replace('_', ' '))} | {row['right']:,} | {row['wrong']:,} |")
        lines.append("")
    for one in found["disagreements"]:
        lines.append(f"- {_md(apart(one))}")
        for example in one["examples"]:
            lines.append(
                f"  - {_md(cut(example['prompt']))} expected: {_md(cut(expected(example)))}; "
                f"reply: {_md(cut(example['reply'])) or '(empty)'} [{_md(automatic(example))}; "
                f"judge: {_md(example['judge'])}, {_md(cut(example['reason']))}]"
            )
    return [*lines, "", _md(judge_footing(found)), ""]


def automatic(example: Mapping[str, Any]) -> str:
    """The automatic verdict on an example that a judge was asked about."""
    words = str(example["verdict"]).replace("_", " ")
    return f"{words} {example['score'] * 100:.0f}" if example["verdict"] == "graded" else words


def judge_footing(found: Mapping[str, Any]) -> str:
    """What a judge's figures rest on, in a line."""
    parts = [f"rubric {found['rubric']['version']} ({found['rubric']['sha256'][:12]})"]
    parts.append("shown the pictures" if found["pictures"] else "not shown the pictures")
    measures = found["grades"]["all"]["measures"] if found["grades"] else {}
    parts += [f"grades with {name} {coefficient(one)}" for name, one in measures.items()]
    for kind, one in found["length"].items():
        if one and None not in one.values():
            told = f"automatic {one['automatic']:+.2f}, judge {one['judge']:+.2f}"
            parts.append(f"{kind} with the length of a reply: {told}")
    used = found["usage"]
    return f"{'; '.join(parts)}; {used['prompt_tokens']:,} tokens read, {used['new_tokens']:,} written."


def title(facts: Mapping[str, Any]) -> str:
    """The names of the runs."""
    return ", ".join(run["name"] for run in facts["runs"])


def expected(example: Mapping[str, Any]) -> str:
    """What the reply should have been, in words."""
    return " / ".join(example["answers"]) or f"checks: {example['checks']}"


def cut(text: str) -> str:
    """A text of the length that is shown, without characters that control terminals or turn what follows."""
    text = _CONTROLS.sub("\ufffd", text)
    units = graphemes(text)
    shown = "".join(units[:LONGEST])[: 8 * LONGEST]  # one grapheme may have marks without end
    left = len(units) - LONGEST
    return shown + (f" … (+{left:,})" if left > 0 else "")


def _md(text: Any) -> str:
    """On one line, and nothing in it is markup."""
    line = " ".join(html.escape(str(text), quote=False).split())
    return re.sub(r"([\\`*_{}\[\]#|~!])", r"\\\1", line)


def _interval(one: Mapping[str, float], key: str = "mean", sign: str = "") -> str:
    return f"{one[key] * 100:{sign}.1f} [{one['low'] * 100:{sign}.0f} to {one['high'] * 100:{sign}.0f}]"


def _md_scores(results: Mapping[str, Any]) -> list[str]:
    codes = list(results["languages"])
    cells = {(cell["task"], cell["language"]): cell for cell in results["cells"]}
    lines = [f"| | {' | '.join([*codes, 'all'])} |", "|---|" + "---:|" * (len(codes) + 1)]
    for task, mean in results["tasks"].items():
        row = [*(cells.get((task, code)) for code in codes), mean]
        lines.append(f"| {_md(task)} | {' | '.join(map(_md_cell, row))} |")
    row = [*results["languages"].values(), results["suites"].get("all")]
    lines.append(f"| **mean** | {' | '.join(map(_md_cell, row))} |")
    return [*lines, "", "`!` worse than guessing, `f` share of replies in the wrong format."]


def _md_cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    marks = " !" if cell["below_chance"] else ""
    marks += f" f{cell['wrong_format']:.0%}" if cell["wrong_format"] > FORMAT_ALARM else ""
    return f"{cell['accuracy'] * 100:.0f} [{cell['low'] * 100:.0f} to {cell['high'] * 100:.0f}]{marks}"


def _md_fidelity(fidelity: Mapping[str, Any]) -> list[str]:
    if not fidelity:
        return []
    lines = ["| replies in the language | n | with picture | without | change |", "|---|---:|---:|---:|---:|"]
    for code, one in fidelity.items():
        lines.append(
            f"| {LANGUAGES[code].english_name} | {one['n']} | {one['with_picture']:.0%} "
            f"| {one['without_picture']:.0%} | {_interval(one['change'], sign='+')} |"
        )
    return [*lines, ""]


def _md_difference(compared: Mapping[str, Any]) -> list[str]:
    lines = [f"## {_md(compared['a'])} minus {_md(compared['b'])}", ""]
    if "not_compared" in compared:
        return [*lines, f"Not compared: {_md(compared['not_compared'])}.", ""]
    lines += [f"{compared['questions']:,} questions that both were asked.", ""]
    lines += ["| | points | p | Holm's p | |", "|---|---:|---:|---:|---|"]
    for group, gap in compared["groups"].items():
        adjusted = "" if gap["p_holm"] is None else chance_of(gap["p_holm"])
        points, p = _interval(gap, sign="+"), chance_of(gap["p"])
        lines.append(f"| {label(group)} | {points} | {p} | {adjusted} | {settled(gap)} |")
    return [*lines, ""]


def settled(gap: Mapping[str, Any]) -> str:
    """Whether a difference is one, in words, and what would settle it."""
    if gap["significant"]:
        return "higher" if gap["mean"] > 0 else "lower"
    if gap["p"] < 0.05:
        return "by itself, not among all languages"
    needed = gap["concepts_needed"]
    return "inside the noise" + (f", {needed:,} concepts would settle it" if needed > gap["concepts"] else "")


def chance_of(p: float) -> str:
    """A p-value as it is written: none is nought."""
    return f"{p:.3f}" if p >= 0.0005 else "< 0.001"


def label(group: str) -> str:
    """A language's name, or the name of a suite as it is."""
    return LANGUAGES[group].english_name if group in LANGUAGES else group


def _md_tokens(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    if not any(run["tokens"] for run in runs):
        return []
    lines = ["## Tokens by language", ""]
    for run in runs:
        lines += [f"{_md(run['name'])}:", ""]
        lines += [
            "| | a grapheme of prompts | against English | a grapheme of replies |",
            "|---|---:|---:|---:|",
        ]
        for code, row in run["tokens"].items():
            keys = ("prompt_per_grapheme", "against_english", "reply_per_grapheme")
            figures = [f"{row[key]:.2f}" if key in row else "" for key in keys]
            lines.append(f"| {label(code)} | {' | '.join(figures)} |")
        lines.append("")
    return lines


def _md_speed(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "## Speed",
        "",
        "| | questions | seconds | tokens read | tokens written | cost |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        one = run["speed"]
        cost = f"{one['cost']:,.4f}" if "cost" in one else ""
        lines.append(
            f"| {_md(run['name'])} | {one['questions']:,} | {one['seconds']:,.1f} "
            f"| {one['prompt_tokens']:,} | {one['new_tokens']:,} | {cost} |"
        )
    return [*lines, ""]
