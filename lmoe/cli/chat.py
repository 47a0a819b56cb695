"""`lmoe chat`: a conversation in the terminal."""

import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from lmoe.cli.errors import exit_code_of, with_flags
from lmoe.cli.generate import no_text, write
from lmoe.cli.speak import SpeakerFlags, open_speaker


def run(flags: SpeakerFlags, sampling: dict[str, Any]) -> int:
    """Returns the exit code."""

    def action() -> None:
        from lmoe.generate.chat import Chat
        from lmoe.generate.generate import Sampling

        chosen = Sampling(**sampling)  # before a model is loaded
        chat = Chat(speaker=open_speaker(flags), sampling=chosen, write=write, message=with_flags)
        if sys.stdin.isatty():
            write("/help lists the commands, Ctrl-C breaks an answer off, Ctrl-D ends.\n")
        for line in lines():
            try:
                if not chat.line(line):
                    return
            except KeyboardInterrupt:
                write("\n")

    return exit_code_of(action)


def lines() -> Iterator[str]:
    """What the user types, until the end of the input or Ctrl-C at the prompt; echoed where it is not typed.

    A line that is no text in the terminal's encoding is said to be none, and left out.
    """
    typed = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    with suppress(ImportError):  # not on every system
        if typed:
            import readline  # noqa: F401 - gives input() a history
    while True:
        try:
            line = input("> ") if typed else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        if not typed:
            if not line:
                return
            write(f"> {line.rstrip().encode(errors='replace').decode()}\n")
        if (problem := no_text(line)) is not None:
            write(f"this line {problem}; it is left out\n")
            continue
        yield line
