"""Files that hold rows: which of a folder are read, and the records in them with the line that each is from.

A record that cannot be parsed is handed over as the error that says why, so that all of a file can be named at once; a
file that cannot be read at all ends the reading.
"""

import csv
import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from lmoe.errors import DataError, LmoeError
from lmoe.files.small_file import Reader, ordinary_size
from lmoe.files.wording import first_line, quoted

Found = tuple[dict[str, Any] | LmoeError, str, int]
"""A record or why it cannot be parsed, where it is for messages, and its number: the line of a file, from 1, or the row
of a table or list, from 0."""

LINES, LISTS, CSV, TEXT, TABLES = "lines", "lists", "csv", "text", "tables"
KINDS = {
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": LISTS,
    ".csv": CSV,
    ".tsv": CSV,
    ".txt": TEXT,
    ".text": TEXT,
    ".parquet": TABLES,
    ".arrow": TABLES,
}
"""How a file is read, by the end of its name; each may be compressed."""
COMPRESSED = (".gz", ".zst")
SHARD = re.compile(r"-\d{5}-of-\d{5}$")
"""What the hub adds to the names of files that are parts of one."""
BLANK = b" \t\r\n\xef\xbb\xbf"
LONGEST_LINE = 64_000_000
"""Bytes of a line: a row of that length has more tokens than any context, so that a file without lines is no JSONL."""
LARGEST_LIST = 2_000_000_000
"""Bytes of a JSON file that holds one list, which is read whole."""
SHARD_BYTES = 8_000_000
"""About as much of a file is one piece of work."""
ROW = Reader(error=DataError, finite=False)
"""How a line is parsed; what a field that nobody reads holds may be NaN."""


def suffixes(file: Path) -> tuple[str, str]:
    """What the name of a file says of its format, and how it is compressed ("": it is not)."""
    name = file.name.lower()
    packed = next((end for end in COMPRESSED if name.endswith(end)), "")
    return Path(name.removesuffix(packed)).suffix, packed


def kind_of(file: Path) -> str | None:
    """How a file is read, or None where its name does not say."""
    return KINDS.get(suffixes(file)[0])


def stem(file: Path) -> str:
    """The name of a file without suffixes, and without its number among several."""
    end, packed = suffixes(file)
    return SHARD.sub("", file.name[: len(file.name) - len(end) - len(packed)])


@dataclass(slots=True, frozen=True)
class Piece:
    """A part of a file that is read on its own.

    Args:
        file: its path.
        start, stop: bytes; stop None: to the end.
        first: number of its first line.
    """

    file: Path
    start: int = 0
    stop: int | None = None
    first: int = 1

    def __iter__(self) -> Iterator[Found]:
        """Yield the records in order.

        Raises:
            DataError: the file, which is named, cannot be read.
        """
        kind = kind_of(self.file) or LINES
        read = {LINES: self._lines, LISTS: self._list, CSV: self._csv, TEXT: self._text}[kind]
        try:
            ordinary_size(self.file)
            yield from read()
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise DataError(f"{self.file}: cannot be read: {first_line(error)}") from None

    def _lines(self) -> Iterator[Found]:
        with opened(self.file) as stream:
            yield from self._records(stream)

    def _records(self, stream: BinaryIO) -> Iterator[Found]:
        """One JSON object a line; blank lines are passed over."""
        for line, where, number in self._raw_lines(stream):
            if line.strip(BLANK):
                yield _record_of(line, where), where, number

    def _raw_lines(self, stream: BinaryIO) -> Iterator[tuple[bytes, str, int]]:
        if self.start:
            stream.seek(self.start)
        left = None if self.stop is None else self.stop - self.start
        for number, line in enumerate(iter(partial(stream.readline, LONGEST_LINE + 1), b""), start=self.first):
            yield line, f"{self.file}:{number}", number
            if left is not None and (left := left - len(line)) <= 0:
                return
            if len(line) > LONGEST_LINE:
                return

    def _list(self) -> Iterator[Found]:
        """A list of objects, or a file of lines that is called .json."""
        with opened(self.file) as stream:
            head = stream.read(1024).lstrip(BLANK)
        if not head.startswith(b"["):
            yield from self._lines()
            return
        with opened(self.file) as stream:
            content = stream.read(LARGEST_LIST + 1)
        if len(content) > LARGEST_LIST:
            raise ROW.refusal(self.file, f"a list of more than {LARGEST_LIST:,} bytes; write one row a line (.jsonl)")
        records = ROW.parsed(_decoded(content, str(self.file)), self.file)
        for number, record in enumerate(records):
            where = f"{self.file}[{number}]"
            yield _object(record, where), where, number

    def _csv(self) -> Iterator[Found]:
        csv.field_size_limit(LONGEST_LINE)
        tabs = suffixes(self.file)[0] == ".tsv"
        with opened(self.file) as stream:
            lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            reader = csv.reader(lines, delimiter="\t" if tabs else ",", strict=True)
            try:
                header = next(reader, [])
                if doubled := sorted({name for name in header if header.count(name) > 1}):
                    raise ROW.refusal(f"{self.file}:1", f"two columns are called {quoted(doubled[0])}")
                for cells in reader:
                    where, number = f"{self.file}:{reader.line_num}", reader.line_num
                    if cells and len(cells) != len(header):
                        error = ROW.refusal(where, f"{len(cells)} cells, and the header has {len(header)}")
                        yield error, where, number
                    elif cells:
                        yield dict(zip(header, cells, strict=True)), where, number
            except csv.Error as error:
                raise ROW.refusal(f"{self.file}:{reader.line_num}", f"malformed CSV: {error}") from None
            except UnicodeDecodeError as error:
                line = reader.line_num + 1
                raise ROW.refusal(f"{self.file}:{line}", f"not UTF-8: {error.reason}") from None

    def _text(self) -> Iterator[Found]:
        """A row a line."""
        with opened(self.file) as stream:
            for line, where, number in self._raw_lines(stream):
                if line.strip(BLANK):
                    try:
                        yield {"text": _decoded(line, where).rstrip("\r\n")}, where, number
                    except LmoeError as error:
                        yield error, where, number


def opened(file: Path) -> BinaryIO:
    """The bytes of a file, unpacked."""
    packed = suffixes(file)[1]
    if packed == ".gz":
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if packed == ".zst":
        return io.BufferedReader(zstandard.open(file, "rb"))  # type: ignore[arg-type]
    return open(file, "rb")


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ROW.refusal(where, f"not UTF-8: {error.reason} at byte {error.start + 1}") from None


def _record_of(line: bytes, where: str) -> dict[str, Any] | LmoeError:
    try:
        if len(line) > LONGEST_LINE:
            raise ROW.refusal(where, f"a line of more than {LONGEST_LINE:,} bytes; a JSONL file has one row a line")
        return _object(ROW.parsed(_decoded(line, where).strip("\r\n"), where), where)
    except LmoeError as error:
        return error


def _object(record: Any, where: str) -> dict[str, Any] | LmoeError:
    if isinstance(record, dict):
        return record
    return ROW.refusal(where, f"a row must be a JSON object, got {type(record).__name__}")


def whole(file: Path) -> tuple[Piece, str]:
    """A file as one piece of work, and its size in words in place of a digest: a stream may be larger than a disk.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return Piece(file), f"{ordinary_size(file):,} bytes"
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from None


def pieces(file: Path) -> tuple[list[Piece], str]:
    """A file as pieces of work of about SHARD_BYTES, and the SHA-256 of its bytes.

    Only plain files of lines are cut; all others are one piece.

    Raises:
        DataError: the file cannot be read.
    """
    cuts = kind_of(file) in (LINES, TEXT) and not suffixes(file)[1]
    digest, found = hashlib.sha256(), [Piece(file)]
    try:
        ordinary_size(file)
        with open(file, "rb") as stream:
            if not cuts:
                return found, hashlib.file_digest(stream, "sha256").hexdigest()
            start, first = 0, 1
            while block := stream.read(SHARD_BYTES):
                rest = stream.readline(LONGEST_LINE) if not block.endswith(b"\n") else b""
                digest.update(block)
                digest.update(rest)
                stop, lines = start + len(block) + len(rest), block.count(b"\n") + rest.count(b"\n")
                found = [piece for piece in found if piece.stop is not None] + [Piece(file, start, stop, first)]
                start, first = stop, first + lines
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    return found, digest.hexdigest()


def json_records(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Every object of a file, with file and line for messages to the user.

    Raises:
        DataError: a file that cannot be read, or a line that holds no JSON object.
    """
    for record, where, _ in Piece(file):
        if isinstance(record, LmoeError):
            raise record
        yield record, where


@dataclass(slots=True, frozen=True)
class Folder:
    """The files of a folder.

    Args:
        files: those that hold rows, in the order of their names.
        domains: of each file: its own name, or that of the folder below the top one that it is in.
        unread: names of those that are not read.
    """

    files: list[Path]
    domains: list[str]
    unread: list[str]


def folder_of(path: Path) -> Folder:
    """The files below a folder; hidden ones do not count.

    Raises:
        DataError: none that can be read, or two that give one domain.
    """
    inside = sorted(
        (file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path))),
        key=lambda file: file.relative_to(path).parts,
    )
    files = [file for file in inside if kind_of(file)]
    unread = [str(file.relative_to(path)) for file in inside if not kind_of(file)]
    if not files:
        there = f"; it holds {', '.join(unread[:5])}" if unread else ""
        raise DataError(f"{path}: no file of rows in this folder ({', '.join(KINDS)}, each also .gz or .zst){there}")
    domains = [stem(file) if file.parent == path else file.relative_to(path).parts[0] for file in files]
    origins: dict[str, str] = {}
    for file, domain in zip(files, domains, strict=True):
        origin = "".join(suffixes(file)) if file.parent == path else "/"
        if origins.setdefault(domain, origin) != origin:
            raise DataError(f"{file}: another file or folder of {path} gives the domain {domain!r} too; rename one")
    return Folder(files, domains, unread)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
