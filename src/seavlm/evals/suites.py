"""Suites: what is asked, as data. A YAML file with a version, a change log, and tasks.

    name: cvqa
    version: 1.0.0
    about: one line
    source: afaji/cvqa            # where its files come from, for data sets that do not ship with seavlm
    licence: CC-BY-4.0
    changes: {1.0.0: first}
    include: [pictures, flags]    # other suites, asked before the tasks
    tasks:
      - {name: cvqa, adapter: cvqa, files: "*test-*"}    # a data set's rows (adapters.py): of the folder that
                                                         # --data names, the files whose path matches
      - {name: own, adapter: samples, data: own.parquet}           # a file beside the suite's
      - {name: json, generator: formats, form: json, each: 20}     # made here (offline.py)

Results name the suite, its version, and the SHA-256 of all that was asked: equal hashes, equal questions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from seavlm.errors import SeavlmError, nearest
from seavlm.evals.adapters import ADAPTERS, Row, Skipped, Source
from seavlm.evals.offline import GENERATORS
from seavlm.evals.tasks import Pictures, Question, limited, question_of, with_chance
from seavlm.text.language import LANGUAGES

FOLDER = Path(__file__).parent / "suites"
KEYS = {"name", "version", "about", "source", "licence", "changes", "include", "tasks"}


@dataclass(frozen=True)
class Suite:
    """A suite's file, read. `folder` is where its data files are looked for."""

    name: str
    version: str
    about: str
    folder: Path
    source: str = ""
    licence: str = ""
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
            hint = f"Known: {', '.join(known)}.{nearest(str(name), known)}"
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
        known_ways = list(ADAPTERS if how[0] == "adapter" else GENERATORS)
        if task[how[0]] not in known_ways:
            raise SeavlmError(
                f"{path}: there is no {how[0]} {task[how[0]]!r}{nearest(task[how[0]], known_ways)}",
                hint=f"Known: {', '.join(known_ways)}.",
            )
    version = str(raw["version"])
    changes = {str(key): str(value) for key, value in (raw.get("changes") or {}).items()}
    if version not in changes:
        raise SeavlmError(f"{path}: its changes do not say what version {version} is")
    return Suite(
        name=str(raw["name"]),
        version=version,
        about=str(raw.get("about", "")),
        folder=path.parent,
        source=str(raw.get("source", "")),
        licence=str(raw.get("licence", "")),
        changes=changes,
        include=tuple(raw.get("include") or ()),
        tasks=tasks,
    )


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
    wanted = set(languages) if languages is not None else set(LANGUAGES)
    only = set(tasks) if tasks is not None else None
    questions: list[Question] = []
    skipped: Counter[str] = Counter()
    pictures = Pictures()
    for row in _rows(suite, data):
        if isinstance(row, Skipped):
            skipped[row.reason] += 1
        elif row["language"] in wanted and (only is None or row["task"] in only):
            questions.append(question_of(row, pictures))
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
                hint=f"Download {suite.source or 'them'} and say where they are with --data.",
            )
        pattern = str(options.get("files", "*"))
        yield from ADAPTERS[task["adapter"]](Source(_read(where, pattern), options))


def _read(where: Path, pattern: str) -> Iterator[tuple[Path, Row]]:
    """(file, row) of a Parquet or JSONL file, or of all in a folder; in order, where the path matches."""
    paths = sorted(where.rglob("*")) if where.is_dir() else [where]
    paths = [path for path in paths if path.suffix in (".parquet", ".jsonl") and path.is_file()]
    if not paths:
        raise SeavlmError(f"there is no Parquet or JSONL file at {where}", hint="Check --data.")
    paths = [path for path in paths if fnmatch(path.as_posix(), pattern)]
    for path in paths:
        try:
            if path.suffix == ".jsonl":
                with path.open(encoding="utf-8") as lines:
                    yield from ((path, json.loads(line)) for line in lines if line.strip())
            else:
                with pq.ParquetFile(path) as file:
                    for batch in file.iter_batches(batch_size=64):
                        yield from ((path, row) for row in batch.to_pylist())
        except (OSError, ValueError) as error:
            raise SeavlmError(f"cannot read {path}: {' '.join(str(error).split())}") from error
