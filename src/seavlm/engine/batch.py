"""Thousands of questions from one file, answered into another; stopped or killed, the same command goes on.

A row of the input is JSON: {"prompt": "...", "image": "a.jpg"} (or "images": [..]), or {"messages": [..]} as
chat models take them, or a row of OpenAI's batch format ({"custom_id": .., "body": {"messages": [..]}}). "id"
names it. Paths are relative to the input's folder.

An answer is appended as soon as it is there, in one write, with the number and the SHA-256 of its row. What
is in the output is therefore whole, except perhaps for its last line, which is cut off before going on. Rows
that cannot be answered go to a second file with the reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seavlm.engine.sequence import Prompt, Sequence
from seavlm.engine.vlm import VLM
from seavlm.errors import SeavlmError

_ADDRESS = re.compile(r"[a-z]+://|data:")
AHEAD = 32  # rows whose pictures are read while others are answered


@dataclass(frozen=True)
class Row:
    """A line of the input."""

    number: int  # from 1
    sha256: str
    text: str


@dataclass
class Progress:
    """How far it is."""

    total: int
    done: int = 0
    bad: int = 0
    before: int = 0  # of those done, in earlier runs
    new_tokens: int = 0


def run_batch(
    vlm: VLM,
    source: Path,
    out: Path,
    *,
    max_new_tokens: int = 256,
    settings: Mapping[str, Any] | None = None,
    show: Callable[[Progress], None] = lambda _: None,
    **sampling: Any,
) -> Progress:
    """Answer the rows of `source` that `out` does not answer yet.

    settings: what else decides the answers (the model, say); an output that was begun with others is refused.
    show: called after each answer. SeavlmError when the output belongs to another input or other settings.
    """
    if out.exists() and out.samefile(source):
        raise SeavlmError(f"{out} is the input", hint="Give another file for the answers.")
    rows = list(_rows(source))
    if not rows:
        raise SeavlmError(f"{source} has no rows", hint='A row is {"prompt": "...", "image": "a.jpg"}.')
    bad = bad_path(out)
    told = {**(settings or {}), **sampling, "max_new_tokens": max_new_tokens}
    _same_settings(out, told)
    finished = {**_finished(out, rows, source), **_finished(bad, rows, source)}
    progress = Progress(len(rows), len(finished), sum(finished.values()), len(finished))
    show(progress)
    todo = (row for row in rows if row.number not in finished)
    with _Appender(out) as answers, _Appender(bad) as reasons, ThreadPoolExecutor(2) as pool:

        def set_aside(row: Row, error: Exception) -> None:
            told = str(error) if isinstance(error, SeavlmError) else f"{type(error).__name__}: {error}"
            reasons.append({**_identity(row), "error": told})
            progress.done += 1
            progress.bad += 1
            show(progress)

        reading: list[tuple[Row, Future[tuple[Prompt, dict[str, Any]]]]] = []
        running: dict[Sequence, Row] = {}
        more = True
        try:
            while more or reading or running:
                while more and len(reading) < AHEAD:
                    row = next(todo, None)
                    more = row is not None
                    if row is not None:
                        reading.append((row, pool.submit(_prompt, vlm, row, source.parent)))
                # Take over what is ready; wait only where there is nothing else to do.
                while reading and len(running) < AHEAD and (reading[0][1].done() or not running):
                    row, future = reading.pop(0)
                    try:
                        prompt, own = future.result()
                        options = {**sampling, **own}
                        limit = options.pop("max_new_tokens", max_new_tokens)
                        sequence = vlm.engine.add(prompt, vlm.sampling(**options), max_new_tokens=limit)
                        running[sequence] = row
                    except Exception as error:
                        set_aside(row, error)
                for sequence in vlm.engine.step():
                    if not sequence.finished or sequence not in running:
                        continue
                    row = running.pop(sequence)
                    if sequence.error is not None:
                        set_aside(row, sequence.error)
                        continue
                    answers.append(
                        {
                            **_identity(row),
                            "text": sequence.text,
                            "finish_reason": sequence.finish_reason,
                            "prompt_tokens": len(sequence.prompt.ids),
                            "new_tokens": len(sequence.ids),
                            "seconds": round(time.perf_counter() - sequence.started, 3),
                        }
                    )
                    progress.done += 1
                    progress.new_tokens += len(sequence.ids)
                    show(progress)
        finally:
            for sequence in running:
                vlm.engine.cancel(sequence)
            for _, future in reading:
                future.cancel()
    return progress


def bad_path(out: Path) -> Path:
    """Where the rows go that could not be answered."""
    return out.with_name(f"{out.stem}.bad{out.suffix}")


def _rows(source: Path) -> Iterator[Row]:
    try:
        data = source.read_bytes()
    except OSError as error:
        raise SeavlmError(f"{source} cannot be read ({error.strerror})", hint="Check the path.") from None
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            yield Row(number, hashlib.sha256(line).hexdigest()[:16], line.decode("utf-8", "replace"))


def _identity(row: Row) -> dict[str, Any]:
    identity: dict[str, Any] = {"row": row.number, "sha256": row.sha256}
    with suppress(ValueError, RecursionError):
        content = json.loads(row.text)
        if isinstance(content, dict):
            identity |= {name: content[name] for name in ("id", "custom_id") if name in content}
    return identity


def _prompt(vlm: VLM, row: Row, folder: Path) -> tuple[Prompt, dict[str, Any]]:
    """What the model reads for a row, and the row's own options."""
    try:
        content = json.loads(row.text)
    except (ValueError, RecursionError) as error:
        raise SeavlmError(f"not JSON ({error})", hint="One object a line.") from None
    if not isinstance(content, dict):
        raise SeavlmError("not a JSON object", hint='A row is {"prompt": "...", "image": "a.jpg"}.')
    body = content.get("body", content)
    options = {
        name: body[name]
        for name in ("temperature", "top_p", "top_k", "seed", "stop", "max_new_tokens")
        if body.get(name) is not None
    }
    if isinstance(options.get("stop"), str):
        options["stop"] = [options["stop"]]
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name) is not None:
            options["max_new_tokens"] = body[name]
    if "messages" in body:
        return vlm.prompt(_with_paths(body["messages"], folder)), options
    if "prompt" not in body:
        raise SeavlmError("neither prompt nor messages", hint='A row is {"prompt": "...", "image": "a.jpg"}.')
    images = body.get("images", [body["image"]] if "image" in body else [])
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    parts.append({"type": "text", "text": body["prompt"]})
    return vlm.prompt(_with_paths([{"role": "user", "content": parts}], folder)), options


def _with_paths(messages: Any, folder: Path) -> Any:
    """The messages, paths of pictures made relative to the input's folder."""
    if isinstance(messages, list):
        return [_with_paths(message, folder) for message in messages]
    if not isinstance(messages, dict):
        return messages
    changed = {key: _with_paths(value, folder) for key, value in messages.items()}
    for key in ("image", "path"):
        value = messages.get(key)
        if messages.get("type") == "image" and isinstance(value, str) and not _ADDRESS.match(value):
            changed[key] = str(folder / value)
    return changed


def _same_settings(out: Path, told: Mapping[str, Any]) -> None:
    """Beside an output lies what decided its answers; going on with something else would mix two."""
    file = out.with_name(f"{out.name}.settings.json")
    text = json.dumps(told, indent=2, ensure_ascii=False, sort_keys=True, default=str) + "\n"
    if (
        file.exists()
        and (out.exists() or bad_path(out).exists())
        and (before := file.read_text(encoding="utf-8")) != text
    ):
        old, new = json.loads(before), json.loads(text)
        changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        raise SeavlmError(
            f"{out} was begun with other settings ({', '.join(changed)})",
            hint=f"Use those of {file.name}, or another output.",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def _finished(path: Path, rows: list[Row], source: Path) -> dict[int, bool]:
    """Number of each row that an earlier run dealt with -> whether it was set aside. A torn last line is cut
    off."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    torn = data[len(whole) :]
    known = {row.number: row.sha256 for row in rows}
    found = {}
    for line in whole.splitlines():
        try:
            content = json.loads(line)
            number, sha256 = content["row"], content["sha256"]
        except (ValueError, KeyError, TypeError):
            raise SeavlmError(f"{path} holds a line that is no answer", hint="Use another output.") from None
        if known.get(number) != sha256:
            raise SeavlmError(
                f"{path} answers a row {number} that {source} does not have",
                hint="The input has changed. Use another output.",
            )
        found[number] = "error" in content
    if torn:
        if not b'{"row": '.startswith(torn[:8]):
            raise SeavlmError(f"{path} holds a line that is no answer", hint="Use another output.")
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return found


class _Appender:
    """Lines at the end of a file, each in one write; the file is made with the first."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, -1

    def __enter__(self) -> _Appender:
        return self

    def append(self, content: Mapping[str, Any]) -> None:
        if self.file < 0:
            self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            _lock(self.file, self.path)
        line = (json.dumps(content, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        if os.write(self.file, line) != len(line):
            raise SeavlmError(f"{self.path}: the disk is full", hint="Make room, and run it again.")

    def __exit__(self, *_: object) -> None:
        if self.file >= 0:
            os.fsync(self.file)
            os.close(self.file)


def _lock(file: int, path: Path) -> None:
    """Nobody else appends to it: two would answer everything twice."""
    try:
        import fcntl
    except ImportError:  # not a Unix
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise SeavlmError(
            f"another process writes {path}", hint="Wait for it, or use another output."
        ) from None
