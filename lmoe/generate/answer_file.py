"""The file of a batch of answers, and beside it, until it is whole, the part that is there already.

The part holds what the answers are made of in its first line, and in each further one the answers of one batch, which
is on the disk before the next batch begins. A killed command leaves it, with a torn last line at worst, and the same
command goes on from there.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lmoe.errors import ConfigError, DataError
from lmoe.files.lock import taken_by_others
from lmoe.files.places import expanded
from lmoe.files.small_file import Reader, ordinary_size, unreadable
from lmoe.files.wording import first_line, shown
from lmoe.files.write import write_whole

VERSION = 1
"""Of the part's lines."""
MADE_OF, ANSWERS = "made_of", "answers"
PART = Reader(error=DataError, cure="remove it to begin anew")
Line = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class AnswerFile:
    """Where answers go.

    Args:
        path: of the whole file.
        made_of: what decides the answers, as numbers and short texts by name.
        done: answers of earlier batches, by row.
    """

    path: Path
    made_of: Mapping[str, Any]
    done: dict[int, Line] = field(default_factory=dict)
    _file: IO[bytes] | None = None

    @property
    def part(self) -> Path:
        """Where answers are kept until all are there."""
        return self.path.with_name(f"{self.path.name}.part")

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Open the file for the block, in which batches may be added to what is there.

        Raises:
            ConfigError: the part is of another command.
            DataError: it is in use, damaged, or cannot be written.
        """
        try:
            if self.part.exists() or self.part.is_symlink():
                ordinary_size(self.part)
            file = open(self.part, "a+b")  # noqa: SIM115
        except OSError as error:
            raise DataError(f"{self.part} {unreadable(error)}") from None
        with file:
            if taken_by_others(file):
                raise DataError(f"{self.part} is in use by another process; wait for it, or name another `output`")
            self._file = file
            try:
                self._take_up(file)
                yield
            finally:
                self._file = None

    def add(self, answers: Mapping[int, Line]) -> None:
        """Keep the answers of a batch, by row, whatever happens next.

        Raises:
            DataError: the part cannot be written.
        """
        self._append({ANSWERS: {str(row): line for row, line in answers.items()}})
        self.done |= answers

    def finish(self, lines: list[Line]) -> None:
        """Write the whole file, and remove the part, which is no longer open.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
        write_whole(self.path.parent, {self.path.name: text.encode()})
        self.part.unlink(missing_ok=True)

    def _take_up(self, file: IO[bytes]) -> None:
        """Read what an earlier command has left, or begin."""
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        file.truncate(whole)  # what was being written when the process ended
        lines = content[:whole].splitlines()
        if not lines:
            self._append(self._head)
            return
        head, *rest = [
            PART.parsed(PART.decoded(line, f"{self.part}:{number}"), f"{self.part}:{number}")
            for number, line in enumerate(lines, start=1)
        ]
        if not isinstance(head, dict) or head.get("version") != VERSION or not isinstance(head.get(MADE_OF), dict):
            raise PART.refusal(self.part, f"no part of answers of version {VERSION}")
        for line in rest:
            if not isinstance(line, dict) or not isinstance(line.get(ANSWERS), dict):
                raise PART.refusal(self.part, "a line that holds no answers")
            self.done |= {int(row): answer for row, answer in line[ANSWERS].items()}
        differences = self._differences(head[MADE_OF])
        if differences and not self.done:
            file.truncate(0)  # the first batch was never finished
            self._append(self._head)
        elif differences:
            raise ConfigError(
                f"{self.part} holds {len(self.done):,} answers of another command: {'; '.join(differences)}. Repeat "
                "that command to go on, name another `output`, or remove the file"
            )

    @property
    def _head(self) -> Line:
        return {"version": VERSION, MADE_OF: dict(self.made_of)}

    def _differences(self, before: Mapping[str, Any]) -> list[str]:
        names = [*self.made_of, *(name for name in before if name not in self.made_of)]
        changed = [name for name in names if before.get(name) != self.made_of.get(name)]
        return [f"{name} was {shown(before.get(name))}, is {shown(self.made_of.get(name))}" for name in changed]

    def _append(self, line: Line) -> None:
        assert self._file is not None
        try:
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(f"{self.part} cannot be written: {first_line(error)}") from None


def new_output(output: str) -> Path:
    """The path of a file that is yet to be written.

    Raises:
        ConfigError: standard output, a file that is there already, or a folder that is not.
    """
    if output == "-":
        raise ConfigError("`output=-`: answers of rows are written to a file, from which a killed command can go on")
    path = expanded(output)
    try:
        if path.is_dir():
            raise ConfigError(f"`output={output}` is a folder; name a file in it")
        if (path.exists() and not path.is_file()) or (path.is_file() and path.stat().st_size):
            raise ConfigError(f"`output={output}` exists and is not an empty file; name another one")
        if not path.parent.is_dir():
            raise ConfigError(f"`output={output}`: there is no folder {path.parent}; make it first")
    except (OSError, ValueError) as error:  # what no file system takes for a path
        raise ConfigError(f"`output={output}`: {first_line(error)}") from None
    return path
