"""A file of questions: all answered once, whatever happens in between."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[object]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def questions(tmp_path: Path, root: Path) -> Path:
    for name in ("elephant", "watermelon", "pineapple"):
        (tmp_path / f"{name}.png").write_bytes((root / "docs" / f"{name}.png").read_bytes())
    content = [{"type": "image", "path": "pineapple.png"}, {"type": "text", "text": "Ano ito?"}]
    message = {"role": "user", "content": content}
    return write(
        tmp_path / "in.jsonl",
        [
            {"id": "a", "prompt": "ນີ້ແມ່ນຫຍັງ?", "image": "elephant.png"},
            {"prompt": "Ini gambar apa?", "images": ["watermelon.png"]},
            "",
            {"custom_id": 7, "body": {"messages": [message], "max_tokens": 24}},
            {"messages": [message], "max_tokens": 1},
            "{not json",
            {"prompt": "Apa ini?", "image": "missing.png"},
            {"question": "Apa ini?"},
            {"prompt": "Apa ini?", "image": "elephant.png", "temperature": -1},
            "null",
            '["id"]',
        ],
    )


def test_rows_are_answered_and_bad_ones_set_aside(cli: Callable, questions: Path) -> None:
    out = questions.parent / "answers" / "out.jsonl"
    done = cli("batch", questions, out)
    assert done.code == 0, done.err
    answers = {row["row"]: row for row in rows_of(out)}
    assert {n: a["text"] for n, a in answers.items() if n != 5} == {1: "ຊ້າງ", 2: "semangka", 4: "pinya"}
    assert answers[1]["id"] == "a" and answers[4]["custom_id"] == 7
    assert answers[5]["new_tokens"] == 1 and answers[5]["finish_reason"] == "length"
    bad = {row["row"]: row["error"] for row in rows_of(out.with_name("out.bad.jsonl"))}
    reasons = {6: "not JSON", 7: "missing.png", 8: "neither prompt nor", 9: "temperature is -1"}
    reasons |= {10: "not a JSON object", 11: "not a JSON object"}
    assert sorted(bad) == sorted(reasons)
    for number, text in reasons.items():
        assert text in bad[number]
    assert "4 answers; 6 set aside in" in done.err
    before = out.read_bytes()
    again = cli("batch", questions, out)
    assert again.code == 0 and out.read_bytes() == before and "10 rows from before" in again.err


def test_it_goes_on_only_with_what_it_was_begun(cli: Callable, questions: Path) -> None:
    out = questions.parent / "out.jsonl"
    cli("batch", questions, out)
    other = cli("batch", questions, out, "--temperature", "0.5")
    assert other.code == 2 and "begun with other settings (temperature)" in other.err
    lines = questions.read_text().splitlines()
    write(questions, [lines[1], lines[0], *lines[2:]])
    other = cli("batch", questions, out)
    assert other.code == 2 and "The input has changed" in other.err
    precious = questions.parent / "precious.jsonl"
    precious.write_text('{"precious": 1}')
    other = cli("batch", questions, precious)
    assert other.code == 2 and "holds a line that is no answer" in other.err
    assert precious.read_text() == '{"precious": 1}'
    itself = cli("batch", questions, questions)
    assert itself.code == 2 and "is the input" in itself.err
    empty = cli("batch", write(questions.parent / "empty.jsonl", []), questions.parent / "x.jsonl")
    assert empty.code == 2 and "has no rows" in empty.err
    nothing = cli("batch", questions.parent / "nothing.jsonl", questions.parent / "x.jsonl")
    assert nothing.code == 2 and "cannot be read" in nothing.err


def test_killed_ten_times_it_loses_and_doubles_nothing(questions: Path) -> None:
    """kill -9 at random moments; once the last line is torn as well."""
    texts = ["Apa ini?", "นี่คืออะไร", "Ano ito?", "What is this?", "Đây là gì?"]
    names = ["elephant", "watermelon", "pineapple"]
    rows = [{"id": i, "prompt": texts[i % 5], "image": f"{names[i % 3]}.png"} for i in range(1500)]
    source = write(questions.parent / "many.jsonl", rows)
    out = questions.parent / "many.out.jsonl"
    command = [sys.executable, "-m", "seavlm.cli", "batch", str(source), str(out), "--quiet"]
    chance = random.Random(0)
    sizes = []
    for number in range(10):
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        size = out.stat().st_size if out.exists() else 0
        while process.poll() is None and (out.stat().st_size if out.exists() else 0) <= size:
            time.sleep(0.01)  # until it has begun to answer
        time.sleep(chance.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        process.wait()
        sizes.append(out.stat().st_size)
        if number == 3:
            with out.open("ab") as file:
                file.write(b'{"row": 1499, "te')
    assert len(rows_of(out)) < 1500, "it was killed too late to show anything"
    assert sizes == sorted(set(sizes)), "each run got on"
    subprocess.run(command, check=True, env={**os.environ})
    answers = rows_of(out)
    assert sorted(row["id"] for row in answers) == list(range(1500))
    told: dict[tuple[int, int], set[str]] = {}
    for row in answers:
        told.setdefault((row["id"] % 5, row["id"] % 3), set()).add(row["text"])
    assert all(len(texts) == 1 for texts in told.values()), "the same question, the same answer"
