"""The commands as a person meets them."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import seavlm

VERBS = (
    "ask",
    "chat",
    "build",
    "init",
    "data",
    "train",
    "merge",
    "sweep",
    "eval",
    "report",
    "card",
    "models",
    "trim",
    "version",
)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    return path


def test_help_names_every_verb(cli: Callable) -> None:
    done = cli("--help")
    assert done.code == 0
    for verb in VERBS:
        assert f" {verb} " in done.out


@pytest.mark.parametrize("verb", [*VERBS[:-1], "data samples", "data pictures"])
def test_every_verb_explains_itself(cli: Callable, verb: str) -> None:
    done = cli(*verb.split(), "--help")
    assert done.code == 0 and "Usage: seavlm " + verb in done.out


def test_examples_of_help_fit_a_terminal_and_name_real_options() -> None:
    """Of 80 columns help has 76 for an example; every option in it is one of its verb's."""
    from typer.main import get_command

    from seavlm.cli import app

    top = get_command(app).commands  # type: ignore[attr-defined]
    shown = 0
    for name in ("merge", "sweep", "eval", "report", "card", "delta make", "delta apply", "delta base"):
        command = top[name] if name in top else top["delta"].commands[name.removeprefix("delta ")]
        for line in re.findall(r"^ *(?:Example:  )?(seavlm .*)$", command.help, flags=re.M):
            assert len(line) <= 76, line
            verb, *rest = shlex.split(line)[1:]
            if verb == "delta":
                of, rest = top["delta"].commands[rest[0]], rest[1:]
            else:
                of = top[verb]
            known = {option for parameter in of.params for option in parameter.opts}
            assert {word for word in rest if word.startswith("-")} <= known, line
            shown += 1
    assert shown > 20


def test_version(cli: Callable) -> None:
    assert seavlm.__version__ in cli("version").out


def test_ask_takes_pictures_then_a_question(cli: Callable, model_dir: Path, picture: Path) -> None:
    done = cli("ask", picture, "What is this?", "--model", model_dir, "--max-new-tokens", 5)
    assert done.code == 0 and done.err == ""
    two = cli("ask", picture, picture, "What is this?", "-m", model_dir, "--max-new-tokens", 5, "--json")
    text = cli("ask", "What is this?", "-m", model_dir, "--max-new-tokens", 5, "--json")
    counts = [json.loads(d.out)["prompt_tokens"] for d in (two, text)]
    assert counts[0] > counts[1] + 2 * 4


def test_ask_is_greedy_and_streams_the_same(cli: Callable, model_dir: Path, picture: Path) -> None:
    call = ("ask", picture, "ນີ້ແມ່ນຫຍັງ?", "-m", model_dir, "--max-new-tokens", 20)
    first, again, streamed = cli(*call), cli(*call), cli(*call, "--stream")
    assert first == again == streamed and first.code == 0
    facts = json.loads(cli(*call, "--json").out)
    assert facts["text"] == first.out.removesuffix("\n")
    assert facts["finish_reason"] in ("stop", "length") and facts["model"] == str(model_dir)


def test_ask_reads_standard_input(cli: Callable, model_dir: Path, picture: Path) -> None:
    options = ("-m", model_dir, "--max-new-tokens", 8)
    usual = cli("ask", picture, "What is this?", *options)
    assert cli("ask", "-", "What is this?", *options, stdin=picture.read_bytes()) == usual
    assert cli("ask", picture, "-", *options, stdin=b"What is this?\n") == usual
    twice = cli("ask", "-", "-", *options)
    assert twice.code == 2 and "standard input was asked for twice" in twice.err
    assert "no question on standard input" in cli("ask", picture, "-", *options).err


def test_ask_without_a_question_says_so(cli: Callable, picture: Path) -> None:
    done = cli("ask", picture)
    assert done.code == 2 and "nothing was asked about it" in done.err
    missing = cli("ask", picture.with_name("pictur.png"), "What?")
    assert missing.code == 2 and "there is no file" in missing.err and "picture.png" in missing.err


def test_ask_fetches_only_when_allowed(cli: Callable) -> None:
    done = cli("ask", "https://example.invalid/p.png", "What is this?")
    assert done.code == 2 and "--allow-urls" in done.err


def test_complete_continues_text(cli: Callable, model_dir: Path, picture: Path) -> None:
    done = cli("ask", "--complete", "-m", model_dir, "What is", "--max-new-tokens", 4, "--json")
    assert json.loads(done.out)["new_tokens"] <= 4
    assert "takes no pictures" in cli("ask", picture, "What?", "--complete", "-m", model_dir).err


def test_chat_remembers_and_obeys(cli: Callable, model_dir: Path, picture: Path) -> None:
    typed = f"""\
/help
What is this?
/image {picture}
What is this?
/imag x.png
/image nowhere.png
/reset
/system a cat
What is this?
/quit
never asked
"""
    done = cli("chat", "-m", model_dir, "--max-new-tokens", 4, "--temperature", 0, stdin=typed.encode())
    assert done.code == 0
    assert (
        "/image PATH" in done.err
        and "Did you mean '/image'" in done.err
        and "there is no file nowhere" in done.err
    )
    assert len(done.out.splitlines()) == 3
    plain = cli("chat", "-m", model_dir, "--max-new-tokens", 4, "--temperature", 0, stdin=b"What is this?\n")
    assert plain.out.splitlines()[0] == done.out.splitlines()[0]


def test_a_verb_that_does_not_exist_names_the_nearest(cli: Callable) -> None:
    done = cli("biuld")
    assert done.code == 2 and "build" in done.err


def test_merge_of_two_models(cli: Callable, model_dir: Path, other_model_dir: Path, tmp_path: Path) -> None:
    done = cli("merge", model_dir, other_model_dir, "--beta", 0.25, "--out", tmp_path / "merged")
    assert done.code == 0, done.err
    from seavlm.weights.checkpoint import open_checkpoint

    regional, parent, merged = (open_checkpoint(p) for p in (model_dir, other_model_dir, tmp_path / "merged"))
    for name in merged.names():
        expected = 0.25 * regional.get(name).float() + 0.75 * parent.get(name).float()
        assert (merged.get(name).float() - expected).abs().max() < 1e-6
    assert cli("merge", model_dir, other_model_dir).code == 2


def test_trim(cli: Callable, model_dir: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("What is this?\n", encoding="utf-8")
    done = cli("trim", model_dir, tmp_path / "small", "--corpus", corpus)
    assert done.code == 0, done.err
    before = cli("ask", "What is this?", "-m", model_dir, "--json", "--max-new-tokens", 1)
    after = cli("ask", "What is this?", "-m", tmp_path / "small", "--json", "--max-new-tokens", 1)
    assert json.loads(before.out)["prompt_tokens"] == json.loads(after.out)["prompt_tokens"]


def test_models_lists_the_built_in_ones(cli: Callable) -> None:
    done = cli("models")
    assert done.code == 0 and "nano" in done.out and "gemma3-270m" in done.out


def test_ctrl_c_ends_quietly(model_dir: Path) -> None:
    """A chat waiting for input, and Ctrl-C: exit code 130, one line, no traceback."""
    process = subprocess.Popen(
        [sys.executable, "-m", "seavlm.cli", "chat", "-m", str(model_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # Where the tests run in the background, Ctrl-C is ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdin and process.stderr
    process.stdin.write("What is this?\n/help\n")
    process.stdin.flush()
    while "/quit" not in process.stderr.readline():  # the last line of the help: it waits for more
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip() == "seavlm: stopped"


def test_debug_shows_the_traceback(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAVLM_DEBUG", "1")
    with pytest.raises(seavlm.SeavlmError):
        cli("ask", "nowhere.png", "What?")
