"""Suites: what is asked, as data. A YAML file with a version, a change log, and tasks.

    name: cvqa
    version: 1.0.0
    about: one line
    source: afaji/cvqa            # where its files come from, for data sets that do not ship with seavlm
    licence: CC-BY-4.0
    size: 40 questions a language, 3 GB
    languages: [id, ms]           # rows in others are left out
    max_new_tokens: 512           # the longest reply, where it is not 128
    changes: {1.0.0: first}       # the version above is the last one
    include: [pictures, flags]    # other suites, asked before the tasks
    tasks:
      - {name: cvqa, adapter: cvqa, files: "*test-*"}    # a data set's rows (adapters.py): of the folder that
                                                         # --data names, the files whose path in it matches
                                                         # (one of them, where it is a list)
      - {name: own, adapter: samples, data: own.parquet}           # a file beside the suite's
      - {name: json, generator: formats, form: json, each: 20}     # made here (offline.py)

Results name the suite, its version, and the SHA-256 of all that was asked: equal hashes, equal questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from seavlm.errors import SeavlmError, nearest
from seavlm.evals.adapters import ADAPTERS, Row, Skipped, Source
from seavlm.evals.offline import GENERATORS
from seavlm.evals.seahelm import seahelm
from seavlm.evals.tasks import (
    Pictures,
    Question,
    known_languages,
    known_tasks,
    limited,
    question_of,
    with_chance,
)
from seavlm.text.language import LANGUAGES

FOLDER = Path(__file__).parent / "suites"
READERS = {**ADAPTERS, "seahelm": seahelm}
KEYS = {
    "name", "version", "about", "source", "licence", "languages", "size", "max_new_tokens", "changes",
    "include", "tasks",
}  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """A suite's file, read. `folder` is where its data files are looked for."""

    name: str
    version: str
    about: str
    folder: Path
    source: str = ""
    licence: str = ""
    languages: tuple[str, ...] = tuple(LANGUAGES)
    size: str = ""
    max_new_tokens: int | None = None
    changes: dict[str, str] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    tasks: tuple[dict[str, Any], ...] = ()

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Chosen:
    """The questions of a suite, and how many rows were left out, by reason."""

    suite: Suite
    questions: list[Question]
    skipped: Counter[str]


def names() -> list[str]:
    """The suites that ship with seavlm."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "prompts")


def load_suite(name: str | Path) -> Suite:
    """A suite by its name, or by its file. SeavlmError for what is neither, or no suite."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if str(name) not in names():
            known = names()
            hint = f"Known: {', '.join(known)}.{nearest(str(name), known)} seavlm eval --list tells of each."
            raise SeavlmError(f"there is no suite {name!s}", hint=hint)
        path = FOLDER / f"{name}.yaml"
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SeavlmError(f"cannot read the suite {path}: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict) or not {"name", "version"} <= set(raw):
        raise SeavlmError(f"{path} is not a suite", hint="It needs a name, a version and tasks.")
    for key in sorted(set(raw) - KEYS):
        hint = f"Known: {', '.join(sorted(KEYS))}.{nearest(key, KEYS)}"
        raise SeavlmError(f"{path}: unknown key {key!r}", hint=hint)
    tasks = tuple(raw.get("tasks") or ())
    for task in tasks:
        how = [key for key in ("adapter", "generator") if key in task]
        if "name" not in task or len(how) != 1:
            raise SeavlmError(f"{path}: a task needs a name and either an adapter or a generator")
        known_ways = list(READERS if how[0] == "adapter" else GENERATORS)
        if task[how[0]] not in known_ways:
            raise SeavlmError(
                f"{path}: there is no {how[0]} {task[how[0]]!r}{nearest(task[how[0]], known_ways)}",
                hint=f"Known: {', '.join(known_ways)}.",
            )
    version = str(raw["version"])
    changes = {str(key): str(value) for key, value in (raw.get("changes") or {}).items()}
    if version not in changes:
        raise SeavlmError(f"{path}: its changes do not say what version {version} is")
    if version != list(changes)[-1]:
        raise SeavlmError(f"{path}: version {version} is not the last of its changes, {list(changes)[-1]}")
    languages = tuple(map(str, raw.get("languages") or LANGUAGES))
    for code in languages:
        if code not in LANGUAGES:
            raise SeavlmError(f"{path}: unknown language {code!r}", hint=f"Known: {' '.join(LANGUAGES)}.")
    return Suite(
        name=str(raw["name"]),
        version=version,
        about=str(raw.get("about", "")),
        folder=path.parent,
        source=str(raw.get("source", "")),
        licence=str(raw.get("licence", "")),
        languages=languages,
        size=str(raw.get("size", "")),
        max_new_tokens=int(raw["max_new_tokens"]) if raw.get("max_new_tokens") else None,
        changes=changes,
        include=tuple(raw.get("include") or ()),
        tasks=tasks,
    )


def described(suite: Suite) -> str:
    """What a suite asks, in which languages, how much, under which licence, and where its files are from."""
    every = set(suite.languages) == set(LANGUAGES)
    lines = [
        suite.about,
        f"{'all eleven languages' if every else ' '.join(suite.languages)}; {suite.size or 'size not told'}",
        f"licence: {suite.licence or 'not told'}",
        f"data: {suite.source}, for --data" if suite.source else "data: nothing to download",
        f"changes in {suite.version}: {suite.changes[suite.version]}",
    ]
    return "\n".join([suite.label, *(f"    {line}" for line in lines)])


def ask(
    name: str | Path,
    *,
    data: Path | None = None,
    tasks: Iterable[str] | None = None,
    languages: Iterable[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Chosen:
    """The questions of a suite.

    data: a file, or a folder of files, of a data set that does not ship with seavlm. tasks, languages: only
    these. limit: at most so many questions of each task and language, drawn by concept. SeavlmError where no
    question is left.
    """
    suite = load_suite(name)
    wanted = known_languages(languages) or set(LANGUAGES)
    only = set(tasks) if tasks is not None else None
    questions: list[Question] = []
    skipped: Counter[str] = Counter()
    seen: set[str] = set()
    pictures = Pictures()
    for row in _rows(suite, data):
        if isinstance(row, Skipped):
            skipped[row.reason] += 1
            continue
        seen.add(row["task"])
        if row["language"] not in suite.languages:
            skipped["another language"] += 1
        elif row["language"] in wanted and (only is None or row["task"] in only):
            try:
                questions.append(question_of(row, pictures))
            except (KeyError, TypeError, AttributeError) as error:
                why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
                raise SeavlmError(f"{suite.label}: question {row.get('id')} cannot be read: {why}") from error
    if only is not None and not skipped:
        known_tasks(only, seen, suite.label)
    ids = Counter(question.id for question in questions)
    if doubled := [one for one, count in ids.items() if count > 1]:
        raise SeavlmError(f"{suite.label}: {len(doubled)} questions have one id, such as {doubled[0]}")
    questions = with_chance(questions)  # of guessing among all, not among the few that a limit leaves
    if limit is not None:
        questions = limited(questions, limit, seed)
    if not questions:
        why = "; ".join(f"{count} rows: {reason}" for reason, count in skipped.most_common(3))
        raise SeavlmError(f"{suite.label} has no question left" + (f" ({why})" if why else ""))
    return Chosen(suite, questions, skipped)


def _rows(suite: Suite, data: Path | None) -> Iterator[Row | Skipped]:
    for other in suite.include:
        yield from _rows(load_suite(other), data)
    for task in suite.tasks:
        options = dict(task)
        if "generator" in task:
            yield from GENERATORS[task["generator"]](options)
            continue
        where = suite.folder / task["data"] if "data" in task else data
        if where is None:
            raise SeavlmError(
                f"{suite.label} reads files that do not ship with seavlm",
                hint=f"Download {suite.source or 'them'} and say where they are with --data. "
                f"Licence: {suite.licence or 'not told'}.",
            )
        paths = _files(where, options.get("files", "*"), only=len(suite.tasks) == 1)
        if not paths:
            yield Skipped(f"task {task['name']} has no file {options['files']}")
        folder = (where if where.is_dir() else where.parent).resolve()
        yield from READERS[task["adapter"]](Source(paths, folder, options))


def _files(where: Path, patterns: str | list[str], *, only: bool) -> tuple[Path, ...]:
    """The Parquet and JSONL files of a folder whose path in it matches, in order; or the one file that is
    named, whatever it is called where it can be but for the `only` task. SeavlmError where there are none."""
    root = (where if where.is_dir() else where.parent).resolve()
    found = sorted(root.rglob("*")) if where.is_dir() else [root / where.name]
    found = [path for path in found if path.suffix in (".parquet", ".jsonl") and path.is_file()]
    if not found:
        raise SeavlmError(f"there is no Parquet or JSONL file at {where}", hint="Check --data.")
    if where.is_file() and only:
        return tuple(found)
    wanted = [patterns] if isinstance(patterns, str) else patterns
    return tuple(path for path in found if any(_matches(path, root, pattern) for pattern in wanted))


def _matches(path: Path, root: Path, pattern: str) -> bool:
    """Whether a path matches from `root` on; a pattern that names folders may begin with the root's own."""
    inside = path.relative_to(root).as_posix()
    return fnmatch(inside, pattern) or ("/" in pattern and fnmatch(f"{root.name}/{inside}", pattern))
