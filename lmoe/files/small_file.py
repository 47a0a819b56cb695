"""Read the small files of runs, adapters and models, which others may have written.

Limits hold before anything is parsed, nothing is evaluated, and every failure is an error that names the file and says
what to do about it. What is read is data: an interpolation in it is refused, never resolved.
"""

import csv
import errno
import io
import json
import math
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import AliasEvent, CollectionEndEvent, CollectionStartEvent, MappingStartEvent, NodeEvent, YAMLError, parse

from lmoe.errors import CheckpointError, LmoeError
from lmoe.files.wording import LONGEST_REASON, quoted, shown

BYTES = 4_000_000
"""Of a config, at most."""
LEVELS = 100
"""Of lists and objects in one another, at most."""
INTERPOLATION = "${"
"""With which OmegaConf would read the environment, or another key."""
WANDB = "wandb"
NO_FILE = "is no ordinary file"
"""A folder, a pipe, a device."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Reader:
    """How a kind of file is read, and refused.

    Args:
        cure: what to do about a file that is refused, for the end of the message; "": the reason says it.
        error: type of the refusal.
        most: bytes, at most.
        what: such a file is called.
        finite: whether a JSON number that is infinite or none is refused.
        keys_once: whether a JSON object is refused that has a key twice, of which Python keeps the last.
    """

    cure: str = ""
    error: type[LmoeError] = CheckpointError
    most: int = BYTES
    what: str = "a config"
    finite: bool = True
    keys_once: bool = False

    def refusal(self, where: object, reason: object) -> LmoeError:
        """The error that names a file, or a file and line."""
        return self.error(f"{where}: {_in_one_line(reason)}" + (f"; {self.cure}" if self.cure else ""))

    def bytes_of(self, path: Path) -> bytes:
        """All bytes of a file.

        Raises:
            LmoeError: missing, no ordinary file (a pipe would be waited for without end), or too large.
        """
        try:
            size = ordinary_size(path)
            if size > self.most:
                raise self.refusal(path, f"{size:,} bytes; {self.what} has at most {self.most:,}")
            with open(path, "rb") as file:
                content = file.read(self.most + 1)
        except (OSError, ValueError) as error:
            raise self.refusal(path, unreadable(error)) from None
        if len(content) > self.most:
            raise self.refusal(path, f"more than {self.most:,} bytes")
        return content

    def decoded(self, content: bytes, where: object) -> str:
        """Bytes of a file as text.

        Raises:
            LmoeError: not UTF-8.
        """
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refusal(where, f"cannot be read: not UTF-8: {error.reason} at byte {error.start + 1}") from None

    def text(self, path: Path) -> str:
        """All of a file as text.

        Raises:
            LmoeError: as `bytes_of`, or not UTF-8.
        """
        return self.decoded(self.bytes_of(path), path)

    def json(self, path: Path, kind: type = dict) -> Any:
        """What a JSON file holds.

        Args:
            kind: of the top value, dict or list.

        Raises:
            LmoeError: as `text`, not JSON, nested too deeply, or another top value.
        """
        content = self.parsed(self.text(path).removeprefix("\ufeff"), path, "cannot be read: ")
        if not isinstance(content, kind):
            names = {dict: "an object", list: "a list"}
            raise self.refusal(path, f"must hold {names[kind]}, holds {type(content).__name__}")
        return content

    def parsed(self, text: str, where: object, before: str = "") -> Any:
        """What a JSON text holds, as Python values.

        Args:
            where: the file, or file and line, for messages.
            before: the reason of a refusal.

        Raises:
            LmoeError: not JSON, nested too deeply, a number that is none or endless, half a character, or a key twice.
        """
        pairs_hook = _object_of if self.keys_once else None
        try:
            content = json.loads(
                text, parse_constant=self._constant, parse_float=self._float, object_pairs_hook=pairs_hook
            )
            if is_deeper(content, LEVELS):
                raise RecursionError
            json.dumps(content, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
            raise self.refusal(where, f"{before}malformed JSON: {error.msg} at {place}") from None
        except UnicodeEncodeError:
            raise self.refusal(
                where, f"{before}half of a surrogate pair (\\ud800 to \\udfff) is no character"
            ) from None
        except RecursionError:
            raise self.refusal(where, f"{before}lists and objects are nested more than {LEVELS} deep") from None
        except ValueError as error:
            digits = sys.get_int_max_str_digits()
            endless = f"a whole number of more than {digits:,} digits"
            reason = endless if "int_max_str_digits" in str(error) else error
            raise self.refusal(where, f"{before}{reason}") from None
        return content

    def _constant(self, name: str) -> float:
        if self.finite:
            raise ValueError(f"{name} is no finite number")
        return float(name)

    def _float(self, text: str) -> float:
        value = float(text)
        if self.finite and not math.isfinite(value):
            raise ValueError(f"{text[:40]} is too large for a number")
        return value

    def yaml(self, path: Path) -> dict[str, Any]:
        """What a YAML file holds, as plain lists and dicts; nothing of it is resolved.

        Raises:
            LmoeError: as `text`, not YAML, nested too deeply, no mapping, with references, tags or interpolations.
        """
        text = self.text(path)
        try:
            _check_events(text)
            loaded = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
        except (YAMLError, OmegaConfBaseException, RecursionError, ValueError, TypeError, OSError) as error:
            reason = shown(_in_one_line(error) or type(error).__name__, longest=LONGEST_REASON)
            raise self.refusal(path, f"cannot be read: {reason}") from None
        assert isinstance(loaded, dict)
        for key, value in texts(loaded):
            if INTERPOLATION in value:
                named = shown(key, longest=LONGEST_REASON) if key else "a key"
                raise self.refusal(
                    path, f"{named} is {quoted(value)}, an interpolation; a saved config holds plain values"
                )
        return {str(key): value for key, value in loaded.items()}

    def rows(self, lines: Iterable[str], where: object) -> Iterator[list[str]]:
        """The rows of a CSV file.

        Raises:
            LmoeError: what no CSV file holds.
        """
        try:
            yield from csv.reader(lines)
        except csv.Error as error:
            raise self.refusal(where, f"cannot be read: {error}") from None

    def word(self, path: Path, most: int = 128) -> str | None:
        """What a file of one short word holds; None for a blank one.

        Raises:
            LmoeError: as `text`, or something else.
        """
        word = self.text(path).strip()
        if len(word) > most or not word.isprintable():
            raise self.refusal(path, f"must hold one line of at most {most} characters")
        return word or None


def whole_lines(text: str) -> Iterator[str]:
    """The lines of a file to which lines are added, without a last one that has no line break: a crash has torn it, and
    its last number may lack digits.

    NOTE not str.splitlines, which breaks lines at a dozen characters that a name may have.
    """
    return (line for line in io.StringIO(text, newline="\n") if line.endswith("\n"))


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON text.

    Raises:
        ValueError: a key comes twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {quoted(doubled)} comes twice in one object; leave one of them out")
    return found


def ordinary_size(path: Path) -> int:
    """Bytes of a file.

    Raises:
        OSError: it is not there, or no ordinary file.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(NO_FILE)
    return found.st_size


def make_way(path: Path) -> None:
    """Remove a link that lies where a file is to be written, so that nothing is written to where it leads.

    Raises:
        OSError: a folder or a pipe is in the way.
    """
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        ordinary_size(path)


def link_outside(path: Path) -> str | None:
    """The problem of a file that is a link out of its folder, from where an export would copy what nobody meant to give
    away; None: it is none, or leads to the blobs of the hub's cache, which are its own.
    """
    if not path.is_symlink():
        return None
    place, root = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    blobs = [folder.parent.parent / "blobs" for folder in (root, *root.parents) if folder.parent.name == "snapshots"]
    if place.is_file() and (root in place.parents or place.parent in blobs):
        return None
    return f"{path} is a link to {shown(os.readlink(path))}, which is no file of this folder; put the file in its place"


def leading_out(folder: Path) -> str | None:
    """The first thing in a folder through which what is written there would land elsewhere, or be waited for: a link to
    a file outside, a pipe, a device. Links to folders may stay: a large disk elsewhere is a good place for checkpoints;
    and so may what W&B keeps, which links to its own logs and writes into new folders.
    """
    root = folder.resolve()
    for place, folders, names in os.walk(folder):
        if WANDB in folders:
            folders.remove(WANDB)
        for name in sorted(names):
            path = Path(place, name)
            if path.is_symlink():
                try:
                    path.stat()
                except OSError as error:
                    if error.errno == errno.ELOOP:
                        return f"{path} is a link that leads to itself; remove it"
                if root not in path.resolve().parents:
                    return f"{path} is a link to {os.readlink(path)}, outside this folder; remove it"
            elif not path.is_file() and path.exists():
                return f"{path} is no ordinary file; remove it"
    return None


def is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and dicts are nested deeper than so many levels; without recursion."""
    layer = [value]
    for _ in range(levels):
        outer = [one for one in layer if isinstance(one, dict | list)]
        if not outer:
            return False
        layer = [inner for one in outer for inner in (one.values() if isinstance(one, dict) else one)]
    return any(isinstance(one, dict | list) for one in layer)


def texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in nested lists and dicts; of a key that is text, ("", key)."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            if isinstance(name, str):
                yield "", name
            yield from texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from texts(item, f"{key}[{number}]")


def _check_events(text: str) -> None:
    """Refuse YAML that is no plain mapping, before anything is built of it.

    Raises:
        ValueError: no mapping, nested too deeply, or a reference, of which a few lines can make more than any memory
            holds.
    """
    level, top = 0, None
    for event in parse(text):
        top = top or (event if isinstance(event, NodeEvent) else None)
        if isinstance(event, AliasEvent):
            raise ValueError(f"*{event.anchor} refers to another value; a saved config holds plain ones")
        level += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if level > LEVELS:
            raise ValueError(f"lists and mappings are nested more than {LEVELS} deep")
    if not isinstance(top, MappingStartEvent):
        raise ValueError("must hold a mapping")


def unreadable(error: Exception) -> str:
    """Why a file could not be opened."""
    if isinstance(error, FileNotFoundError):
        return "cannot be read: no such file"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return reason if reason == NO_FILE else f"cannot be read: {reason}"


def _in_one_line(reason: object) -> str:
    return " ".join(str(reason).split())


CONFIG = Reader()
"""Of lmoe's and PEFT's own configs in JSON."""


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        CheckpointError: missing, too large, not JSON, not an object, nested too deeply, or with a number that is not
            finite.
    """
    return CONFIG.json(path)
