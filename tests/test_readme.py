"""The README is run: its commands print what it shows, its Python works, its files exist.

After a change that is meant, SEAVLM_UPDATE_README=1 pytest tests/test_readme.py writes in the new output.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "COLUMNS": "110",
    "PYTHONUTF8": "1",
}


@dataclass
class Command:
    """A line after "$ ", and the lines that the README shows below it."""

    line: str
    shown: list[str] = field(default_factory=list)


def blocks(language: str) -> list[str]:
    """The contents of the fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands(block: str) -> list[Command]:
    found: list[Command] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append(Command(line[2:]))
        else:
            found[-1].shown.append(line)
    return found


def run(line: str) -> list[str]:
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return [text.rstrip() for text in done.stdout.splitlines()]


def test_commands_print_what_is_shown() -> None:
    readme = README.read_text(encoding="utf-8")
    wrong = []
    for block in blocks("console"):
        printed = []
        for command in commands(block):
            output = run(command.line)
            assert output, f"{command.line} printed nothing"
            if output != command.shown:
                wrong.append(f"$ {command.line}\nshown: {command.shown}\nis:    {output}")
            printed += [f"$ {command.line}", *output]
        readme = readme.replace(f"```console\n{block}```", "```console\n" + "\n".join(printed) + "\n```")
    if os.environ.get("SEAVLM_UPDATE_README"):
        README.write_text(readme, encoding="utf-8")
    else:
        assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("number", range(2))
def test_python_runs(number: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", blocks("python")[number]],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_python_block_is_run() -> None:
    assert len(blocks("python")) == 2


def test_the_longer_commands_exist() -> None:
    """What takes minutes is not run here; but make knows the targets, and the verbs take the options."""
    from typer.main import get_command

    from seavlm.cli import app

    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    assert lines
    for line in lines:
        program, verb, *rest = shlex.split(line)
        if program == "make":
            subprocess.run(["make", "--dry-run", verb], cwd=ROOT, check=True, capture_output=True)
        else:
            command = get_command(app).commands[verb]  # type: ignore[attr-defined]
            if verb == "delta":
                command, rest = command.commands[rest[0]], rest[1:]
            known = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in rest if word.startswith("--")} <= known
            for word in rest:
                if word.endswith((".yaml", ".png")) and not word.startswith("out/"):
                    assert (ROOT / word).is_file(), word


def test_the_map_has_every_room() -> None:
    """And every module beside the rooms."""
    shown = set(
        re.findall(r"\(src/seavlm/([\w.]+)\)", README.read_text(encoding="utf-8").split("## The map")[1])
    )
    source = ROOT / "src" / "seavlm"
    there = {path.name for path in source.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))} - {
        "__init__.py"
    }
    assert there <= shown, there - shown


def test_links_lead_somewhere() -> None:
    text = README.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert len(targets) > 10
    for target in targets:
        if "://" not in target:
            assert (ROOT / target).exists(), target
