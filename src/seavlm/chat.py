"""A conversation in the terminal: what is typed goes to the model, what begins with / goes to us."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from seavlm.errors import SeavlmError, nearest

HELP = """\
/image PATH    show the model a picture; it goes with your next line (again for several)
/system TEXT   what the model should know beforehand; begins a new conversation
/reset         forget the conversation
/quit          leave (so does Ctrl-D; Ctrl-C stops an answer)"""
COMMANDS = ("/image", "/system", "/reset", "/help", "/quit")


class Model(Protocol):
    """What a conversation needs of a model; `seavlm.load` gives one."""

    name: str

    def stream(self, messages: list[dict[str, Any]], **options: Any) -> Iterator[str]: ...


def converse(model: Model, *, load_picture: Callable[[str], Any], system: str = "", **options: Any) -> None:
    """Read lines until the input ends. Errors are told and the conversation goes on from before them.

    load_picture: from what was typed after /image to a picture. options: handed to `model.stream`.
    """
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input)

        print(f"{model.name}: type a question, or /help", file=sys.stderr)
    prompt = "> " if sys.stdin.isatty() else ""
    messages: list[dict[str, Any]] = []
    pictures: list[Any] = []
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        try:
            if line.startswith("/"):
                command, _, rest = line.partition(" ")
                rest = rest.strip().strip("\"'")
                if command == "/quit":
                    return
                if command == "/image":
                    if not rest:
                        raise SeavlmError("/image needs a path", hint="/image picture.png")
                    pictures.append(load_picture(rest))
                    print(f"{rest}: it goes with your next line", file=sys.stderr)
                elif command in ("/reset", "/system"):
                    messages, pictures = [], []
                    system = rest if command == "/system" else system
                    print("a new conversation", file=sys.stderr)
                elif command == "/help":
                    print(HELP, file=sys.stderr)
                else:
                    hint = nearest(command, COMMANDS).strip() or f"Commands: {', '.join(COMMANDS)}."
                    raise SeavlmError(f"there is no {command}", hint=hint)
            elif line:
                parts = [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": line}]
                turn = {"role": "user", "content": parts}
                before = [{"role": "system", "content": system}] if system else []
                reply = _write(model.stream([*before, *messages, turn], **options))
                # An answer that was stopped, or stayed empty, is no turn to go on from.
                if reply:
                    messages += [turn, {"role": "assistant", "content": reply}]
                    pictures = []
        except SeavlmError as error:
            print(f"seavlm: {error}", file=sys.stderr)


def _write(pieces: Iterator[str]) -> str:
    """Print a reply as it comes and return it; "" when Ctrl-C stopped it."""
    reply = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            reply += piece
    except KeyboardInterrupt:
        print(" [stopped]")
        return ""
    print()
    return reply.strip()
