"""Ask a model all questions, judge the replies, and write down everything.

out/questions.parquet   every question, its raw reply and verdict: `rescore` needs no model
out/results.json        scores per task and language, their averages, what it took
out/table.md            the same for people
out/pictures.parquet    small copies of pictures whose questions went wrong (sha256, image), for a report
out/replies.jsonl       while the run lasts: what has been answered, so that a killed run goes on
"""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from seavlm import manifest
from seavlm.errors import SeavlmError
from seavlm.evals.metrics import check
from seavlm.evals.scores import COST, Results, question_in, reply_in, score
from seavlm.evals.show import markdown
from seavlm.evals.tasks import (
    RANKED,
    Answerer,
    Messages,
    Question,
    Ranker,
    Reply,
    fingerprint,
    pictures_of,
    with_chance,
    with_ranked,
)
from seavlm.image.decode import decode

KEPT, SIDE = 300, 256  # pictures, pixels

_COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("language", pa.string()),
        ("concept", pa.string()),
        ("family", pa.string()),
        ("prompt", pa.string()),
        ("image_sha256", pa.list_(pa.string())),
        ("answers", pa.list_(pa.string())),
        ("options", pa.list_(pa.string())),
        ("letters", pa.list_(pa.string())),
        ("functions", pa.list_(pa.string())),
        ("chance", pa.float64()),
        ("kind", pa.string()),
        ("checks", pa.string()),
        ("context", pa.string()),
        ("reply", pa.string()),
        ("parsed", pa.string()),
        ("verdict", pa.string()),
        ("score", pa.float64()),
        ("language_ok", pa.bool_()),
        ("measures", pa.map_(pa.string(), pa.float64())),
        ("prompt_tokens", pa.int64()),
        ("new_tokens", pa.int64()),
        ("error", pa.string()),
        ("finish", pa.string()),
    ]
)


def evaluate(
    answerer: Answerer,
    questions: Sequence[Question],
    out: Path | str | None = None,
    *,
    name: str = "model",
    key: str = "",
    batch_size: int = 64,
    ranker: Ranker | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
    about: dict[str, Any] | None = None,
    replace: bool = False,
) -> Results:
    """Ask `answerer` all `questions` and score its replies; with `out`, write them there.

    key: what decides the replies (a hash of the model's files, the settings they are asked with). With a key
    and `out`, the replies are kept as they come: a run that was killed goes on where it stopped, and one that
    was finished is only scored again. SeavlmError, before anything is asked, for a folder that holds a run of
    another model, other settings or other questions (unless `replace`: it gives way), for one that another
    process works in, and for a question that no reply can be right about. Also when the answerer returns
    another number of replies than it was asked for.
    """
    if not questions:
        raise SeavlmError(
            "there are no questions to ask", hint="Check the tasks and languages of the evaluation"
        )
    questions = with_chance(with_ranked(questions) if ranker else questions)
    if ranker is None and (unranked := [one for one in questions if one.reading == RANKED]):
        raise SeavlmError(
            f"{len(unranked)} questions want replies ranked by how likely they are, which {name} cannot do",
            hint="Leave out the tasks " + ", ".join(sorted({one.task for one in unranked})),
        )
    check(questions)
    folder = Path(out) if out is not None else None
    key = f"{key}:{fingerprint(questions)}" if key else ""
    busy = f"another run is working in {folder}"
    with manifest.alone(folder / ".lock", busy) if folder else contextlib.nullcontext():
        replies, spent = _kept(folder, key, replace) if folder and key else ({}, 0.0)
        started = time.monotonic() - spent
        journal = None
        if folder and key and len(replies) < len(questions):
            journal = Journal(folder / "replies.jsonl", key, replies, spent)

        # Alike prompts side by side: a batch is padded to its longest.
        todo = sorted(
            (index for index in range(len(questions)) if index not in replies),
            key=lambda index: (questions[index].task, questions[index].language, index),
        )
        with progress_bar(progress) as bar:
            row = bar.add_task(f"asking {name}", total=len(questions), completed=len(replies))
            for fresh_ones in _replies(questions, todo, answerer, ranker, batch_size):
                replies |= fresh_ones
                if journal:
                    journal.add(fresh_ones, time.monotonic() - started)
                bar.advance(row, len(fresh_ones))

        results = score(
            questions,
            [replies[index] for index in range(len(questions))],
            name=name,
            resamples=resamples,
            seed=seed,
            seconds=time.monotonic() - started if todo else spent,
            about=about,
        )
        if folder:
            write(results, folder, key=key)
            _keep_pictures(questions, results.records, folder / "pictures.parquet")
            (folder / "replies.jsonl").unlink(missing_ok=True)
    return results


def _kept(folder: Path, key: str, replace: bool) -> tuple[dict[int, str], float]:
    """What a folder holds of the run with this key: replies, and the seconds they took.

    SeavlmError where it holds another run, whose replies would be lost, unless that is to be replaced.
    """
    done, journal = folder / "questions.parquet", folder / "replies.jsonl"
    replies: dict[int, str] = {}
    seconds = 0.0
    try:
        metadata = (pq.read_schema(done).metadata or {}) if done.exists() else {}
    except (OSError, ValueError) as error:
        if not replace:
            raise SeavlmError(f"cannot read {done}: {error}", hint="--force begins anew.") from error
        metadata = {}
    if metadata and _same_run(folder, metadata.get(b"seavlm_key", b"").decode(), key, replace):
        seconds = float(metadata.get(b"seavlm_seconds", b"0"))
        known = pq.read_schema(done).names  # earlier versions kept no costs
        columns = [name for name in ("reply", *COST) if name in known]
        rows = enumerate(pq.read_table(done, columns=columns).to_pylist())
        replies = {index: reply_in(row) for index, row in rows if not row.get("error")}
    if journal.exists():
        whose, answered, spent = Journal.read(journal)
        if whose and _same_run(folder, whose, key, replace):
            replies |= answered
            seconds = max(seconds, spent)
    return replies, seconds


def _same_run(folder: Path, theirs: str, key: str, replace: bool) -> bool:
    if theirs == key or replace:
        return theirs == key
    asked, wanted = theirs.rpartition(":"), key.rpartition(":")
    what = "other questions" if asked[0] == wanted[0] else "another model, or other settings"
    raise SeavlmError(
        f"{folder} holds a run of {what}, which would be lost",
        hint="Give another --out, or --force to replace it.",
    )


def _replies(
    questions: Sequence[Question],
    todo: Sequence[int],
    answerer: Answerer,
    ranker: Ranker | None,
    batch_size: int,
) -> Iterator[dict[int, str]]:
    """The replies to the questions of `todo`: batch by batch, or, of an endpoint, each as it comes."""
    each = getattr(answerer, "each", None)
    if each is not None:
        for position, reply in each(questions[index].conversation() for index in todo):
            yield {todo[position]: reply}
        return
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        answers = _ask([questions[index] for index in batch], answerer, ranker)
        if len(answers) != len(batch):
            raise SeavlmError(f"the model gave {len(answers)} replies to {len(batch)} questions")
        yield dict(zip(batch, answers, strict=True))


def _ask(batch: Sequence[Question], answerer: Answerer, ranker: Ranker | None) -> list[str]:
    """The replies to a batch, whose questions of one task stand together."""
    replies: list[str] = []
    for ranked, group in groupby(batch, key=lambda question: question.reading == RANKED):
        asked = list(group)
        messages: list[Messages] = [question.conversation() for question in asked]
        if ranked and ranker:
            replies += ranker(messages, [question.options for question in asked])
        else:
            replies += answerer(messages)
    return replies


def rescore(path: Path | str, *, resamples: int = 1000, seed: int = 0) -> Results:
    """Judge the replies of a questions.parquet (or of the directory that holds it) again, without asking."""
    path = Path(path)
    path = path / "questions.parquet" if path.is_dir() else path
    if not path.exists():
        raise SeavlmError(f"there is no run of `seavlm eval` at {path}", hint="Check the path.")
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise SeavlmError(f"cannot read {path}: {error}", hint="Run `seavlm eval` first") from error
    questions = [question_in(row) for row in rows]
    metadata = pq.read_schema(path).metadata or {}
    return score(
        questions,
        [reply_in(row) for row in rows],
        name=metadata.get(b"seavlm_model", b"model").decode(),
        resamples=resamples,
        seed=seed,
        seconds=float(metadata.get(b"seavlm_seconds", b"0")),
        about=json.loads(metadata.get(b"seavlm_about", b"{}")),
    )


def rewrite(folder: Path, *, price: str | None = None, resamples: int = 1000, seed: int = 0) -> Results:
    """Judge the replies in `folder` again, and write what comes of it there. What was asked stays asked.

    price: of the tokens, when it was not told before, or another (`scores.cost`).
    """
    results = rescore(folder, resamples=resamples, seed=seed)
    if price:
        results.about["price"] = price
    key = (pq.read_schema(folder / "questions.parquet").metadata or {}).get(b"seavlm_key", b"").decode()
    write(results, folder, key=key)
    return results


def write(results: Results, out: Path, *, key: str = "") -> None:
    """Write questions.parquet, results.json and table.md into `out`, each whole or not at all."""
    about = json.dumps(results.about, ensure_ascii=False)
    kept = {"model": results.name, "key": key, "about": about, "seconds": str(results.seconds)}
    schema = _COLUMNS.with_metadata({f"seavlm_{name}": value for name, value in kept.items()})
    rows = pa.Table.from_pylist(results.records, schema=schema)
    manifest.put(out / "questions.parquet", lambda path: pq.write_table(rows, path, compression="zstd"))
    manifest.write_json(out / "results.json", results.to_dict())
    manifest.write_text(out / "table.md", markdown(results))


def _keep_pictures(questions: Sequence[Question], records: Sequence[dict[str, Any]], path: Path) -> None:
    """At most KEPT pictures, made small, of the lowest scores: in turns from each task and language."""
    groups: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
    for index, record in enumerate(records):
        if record["image_sha256"] and record["score"] < 1:
            groups[record["task"], record["language"]].append((record["score"], index))
    turns = zip_longest(*(sorted(group) for group in groups.values()))
    kept: dict[str, bytes] = {}
    for _, index in (one for turn in turns for one in turn if one is not None):
        if len(kept) == KEPT:
            break
        for name, picture in zip(questions[index].image_sha256, pictures_of(questions[index]), strict=False):
            if name not in kept and len(kept) < KEPT:
                with contextlib.suppress(SeavlmError):  # a damaged one, that nobody could look at
                    kept[name] = _small(picture)
    table = pa.table({"sha256": list(kept), "image": pa.array(kept.values(), pa.binary())})
    manifest.put(path, lambda partial: pq.write_table(table, partial))


def _small(picture: bytes) -> bytes:
    image = decode(picture)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


class Journal:
    """The replies so far, a line each, under a first line that says whose they are."""

    def __init__(self, path: Path, key: str, replies: Mapping[int, str], spent: float) -> None:
        """Begin with what is known: whatever was cut off in the middle of writing is gone."""
        self.path = path
        lines = [json.dumps(key) + "\n", *self._lines(replies, spent)]
        manifest.write_text(path, "".join(lines))

    def add(self, replies: Mapping[int, str], spent: float) -> None:
        """One that failed is not kept: it is asked again."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(self._lines(replies, spent)))

    @staticmethod
    def _lines(replies: Mapping[int, str], spent: float) -> list[str]:
        costs = ("prompt_tokens", "new_tokens")
        return [
            json.dumps(
                [
                    index,
                    reply,
                    *(getattr(reply, cost, 0) for cost in costs),
                    round(spent, 3),
                    getattr(reply, "finish", ""),
                ]
            )
            + "\n"
            for index, reply in replies.items()
            if not getattr(reply, "error", "")
        ]

    @staticmethod
    def read(path: Path) -> tuple[str, dict[int, Reply], float]:
        """(key, replies, seconds) of a journal, up to the first line that is not whole; "" for no key."""
        key, replies, spent = "", dict[int, Reply](), 0.0
        with (
            path.open(encoding="utf-8", errors="replace", newline="\n") as file,
            contextlib.suppress(ValueError, TypeError),
        ):
            key = str(json.loads(file.readline()))
            for line in file:
                if not line.endswith("\n"):
                    break
                index, reply, prompt_tokens, new_tokens, seconds, *finish = json.loads(line)
                replies[index] = Reply(reply, prompt_tokens, new_tokens, "", *finish)
                spent = max(spent, seconds)
        return key, replies, spent


def progress_bar(enabled: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not enabled,
    )
