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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from lmoe.config.limits import DOMAIN_IN_WORDS, is_domain
from lmoe.data.rows.zst import ZstFile
from lmoe.errors import DataError, LmoeError
from lmoe.files.small_file import Reader, ordinary_size, unreadable
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
NUMBER = r"-\d{5}-of-\d{5}(-[0-9a-f]{16})?"
"""What the hub adds to the names of files that are parts of one, at times with the digest of each."""
SHARD = re.compile(NUMBER + "$")
SPLIT = re.compile(
    rf"(?P<split>train|test|validation|valid|val|dev|eval)(?P<rest>[-_.].*?)??({NUMBER})?",
    re.IGNORECASE,
)
"""How files and folders of a data set are called that are one of its splits, perhaps with a number among several."""
NOT_UTF8 = "not UTF-8; convert the file, for example with iconv -f latin1 -t utf8"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
"""What a file of UTF-16 begins with."""
BLANK = b" \t\r\n\xef\xbb\xbf"
LONGEST_LINE = 64_000_000
"""Bytes of a line: a row of that length has more tokens than any context, so that a file without lines is no JSONL."""
LARGEST_LIST = 2_000_000_000
"""Bytes of a JSON file that holds one list, which is read whole."""
SHARD_BYTES = 1_000_000
"""About as much of a file is one piece of work."""
ROW = Reader(error=DataError, finite=False, keys_once=True)
"""How a line is parsed; what a field that nobody reads holds may be NaN."""


def suffixes(file: Path) -> tuple[str, str]:
    """What the name of a file says of its format, and how it is compressed ("": it is not)."""
    name = file.name.lower()
    packed = next((end for end in COMPRESSED if name.endswith(end)), "")
    return Path(name.removesuffix(packed)).suffix, packed


def kind_of(file: Path) -> str | None:
    """How a file is read, or None where its name does not say."""
    return KINDS.get(suffixes(file)[0])


def place_of(file: str, number: int) -> str:
    """Where a record is, as messages say it.

    Args:
        file: or the name of a data set.
        number: of the record, as it is handed over with it.
    """
    path = Path(file)
    if not path.is_file() or kind_of(path) == TABLES:
        return f"{file}[{number}]"
    return next((where for _, where, found in Piece(path) if found == number), file)


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

    @property
    def size(self) -> int:
        """Bytes; 0 of a file that cannot be found."""
        if self.stop is not None:
            return self.stop - self.start
        try:
            return self.file.stat().st_size
        except OSError:
            return 0

    def __iter__(self) -> Iterator[Found]:
        """Yield the records in order.

        Raises:
            DataError: the file, which is named, cannot be read.
        """
        kind = kind_of(self.file) or LINES
        read = {LINES: self._lines, LISTS: self._list, CSV: self._csv, TEXT: self._text}[kind]
        try:
            ordinary_size(self.file)
            self._check_not_utf16()
            for record, where, number in read():
                if isinstance(record, LmoeError) and kind_of(self.file) is None:
                    ends = ", ".join(KINDS)
                    record = DataError(f"{record} (read as lines of JSON, because its name ends in none of {ends})")
                yield record, where, number
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            reason = unreadable(error) if isinstance(error, OSError) else f"cannot be read: {first_line(error)}"
            raise DataError(f"{self.file}: {reason}") from None

    def _check_not_utf16(self) -> None:
        """Refuse a file all of whose rows would be refused."""
        with opened(self.file) as stream:
            begins = stream.read(2)
        if begins in UTF16_MARKS:
            raise ROW.refusal(
                self.file, "UTF-16, not UTF-8; convert the file, for example with iconv -f utf-16 -t utf8"
            )

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
            where = f"{self.file}:{number}"
            if len(line) > LONGEST_LINE:
                raise ROW.refusal(where, f"a line of more than {LONGEST_LINE:,} bytes; a file has one row a line")
            yield line, where, number
            if left is not None and (left := left - len(line)) <= 0:
                return

    def _list(self) -> Iterator[Found]:
        """A list of objects, or a file of lines that is called .json."""
        with opened(self.file) as stream:
            lines = (line.strip(BLANK) for line in iter(partial(stream.readline, LONGEST_LINE), b""))
            first = next((line for line in lines if line), b"")
        if first == b"{":
            raise ROW.refusal(
                self.file, "begins with an object over several lines; a file of rows holds a list, or one row a line"
            )
        if not first.startswith(b"["):
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
        with _cells_as_long_as_lines(), opened(self.file) as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
            reader = csv.reader(self._csv_lines(text), delimiter=self._delimiter(), strict=True)
            number = 1
            try:
                header: list[str] = []
                for cells in reader:
                    where = f"{self.file}:{number}"
                    if cells and not header:
                        header = self._header(cells, where)
                    elif cells:
                        yield _record_of_cells(header, cells, where), where, number
                    number = reader.line_num + 1
            except csv.Error as error:
                raise ROW.refusal(f"{self.file}:{number}", f"malformed CSV: {error}") from None

    def _delimiter(self) -> str:
        return "\t" if suffixes(self.file)[0] == ".tsv" else ","

    def _csv_lines(self, text: io.TextIOWrapper) -> Iterator[str]:
        for number, line in enumerate(iter(partial(text.readline, LONGEST_LINE + 1), ""), start=1):
            if len(line) > LONGEST_LINE:
                where = f"{self.file}:{number}"
                raise ROW.refusal(where, f"a line of more than {LONGEST_LINE:,} characters; a file has one row a line")
            yield line

    def _header(self, cells: list[str], where: str) -> list[str]:
        if doubled := sorted({name for name in cells if cells.count(name) > 1}):
            raise ROW.refusal(where, f"two columns are called {quoted(doubled[0])}")
        if len(cells) == 1 and any(mark in cells[0] for mark in ";\t|"):
            by = "tabs" if self._delimiter() == "\t" else "commas"
            raise ROW.refusal(where, f"one column, called {quoted(cells[0])}; cells are parted by {by} here")
        _check_utf8(cells, where)
        return cells

    def _text(self) -> Iterator[Found]:
        """A row a line."""
        with opened(self.file) as stream:
            for line, where, number in self._raw_lines(stream):
                if line.strip(BLANK):
                    try:
                        yield {"text": _decoded(line, where).rstrip("\r\n")}, where, number
                    except LmoeError as error:
                        yield error, where, number


def _record_of_cells(header: list[str], cells: list[str], where: str) -> dict[str, Any] | LmoeError:
    try:
        if len(cells) != len(header):
            raise ROW.refusal(where, f"{len(cells)} cells, and the header has {len(header)}")
        _check_utf8(cells, where)
    except LmoeError as error:
        return error
    return dict(zip(header, cells, strict=True))


def _check_utf8(cells: list[str], where: str) -> None:
    """Refuse cells with bytes that are no UTF-8, which were read as halves of surrogate pairs."""
    if not _is_utf8("".join(cells)):
        raise ROW.refusal(where, NOT_UTF8)


@contextmanager
def _cells_as_long_as_lines() -> Iterator[None]:
    """Lift the limit of Python's csv, which is one for the whole process, for as long as a file is read."""
    before = csv.field_size_limit(LONGEST_LINE)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def opened(file: Path) -> BinaryIO:
    """The bytes of a file, unpacked."""
    packed = suffixes(file)[1]
    if packed == ".gz":
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if packed == ".zst":
        return io.BufferedReader(ZstFile(file))
    return open(file, "rb")


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ROW.refusal(where, NOT_UTF8) from None


def _record_of(line: bytes, where: str) -> dict[str, Any] | LmoeError:
    try:
        return _object(ROW.parsed(_decoded(line, where).strip("\r\n"), where), where)
    except LmoeError as error:
        return error


def _object(record: Any, where: str) -> dict[str, Any] | LmoeError:
    if isinstance(record, dict):
        return record
    hint = "; a list of rows is a .json file" if isinstance(record, list) else ""
    return ROW.refusal(where, f"a row must be a JSON object, got {type(record).__name__}{hint}")


def whole(file: Path) -> tuple[Piece, str]:
    """A file as one piece of work, and its size in words in place of a digest: a stream may be larger than a disk.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return Piece(file), f"{ordinary_size(file):,} bytes"
    except OSError as error:
        raise DataError(f"{file}: {unreadable(error)}") from None


def pieces(file: Path) -> tuple[list[Piece], str]:
    """A file as pieces of work of about SHARD_BYTES, and the SHA-256 of its bytes.

    Only plain files of lines are cut; all others are one piece.

    Raises:
        DataError: the file cannot be read.
    """
    cuts = kind_of(file) in (LINES, TEXT) and not suffixes(file)[1]
    digest = hashlib.sha256()
    found: list[Piece] = []
    try:
        ordinary_size(file)
        with open(file, "rb") as stream:
            if not cuts:
                return [Piece(file)], hashlib.file_digest(stream, "sha256").hexdigest()
            start, first = 0, 1
            while block := stream.read(SHARD_BYTES):
                rest = b"" if block.endswith(b"\n") else stream.readline(LONGEST_LINE)
                digest.update(block)
                digest.update(rest)
                stop = start + len(block) + len(rest)
                found.append(Piece(file, start, stop, first))
                first += block.count(b"\n") + rest.count(b"\n")
                start = stop
    except OSError as error:
        raise DataError(f"{file}: {unreadable(error)}") from None
    return found or [Piece(file)], digest.hexdigest()


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
    """The files below a folder; hidden ones do not count, and links to folders are not followed.

    Raises:
        DataError: none that can be read, or two that give one domain.
    """
    inside = sorted(
        (
            file
            for file in path.rglob("*")
            if (file.is_symlink() or not file.is_dir()) and not _is_hidden(file.relative_to(path))
        ),
        key=lambda file: file.relative_to(path).parts,
    )
    if saved := next(filter(is_saved_to_disk, sorted({file.parent for file in inside})), None):
        raise DataError(f"{saved}: a folder of save_to_disk; give it on its own, as data.path or one of data.sources")
    files = [file for file in inside if kind_of(file) and not file.is_dir()]
    unread = [str(file.relative_to(path)) for file in inside if not kind_of(file) or file.is_dir()]
    if not files:
        there = f"; it holds {', '.join(unread[:5])}" if unread else ""
        raise DataError(f"{path}: no file of rows in this folder ({', '.join(KINDS)}, each also .gz or .zst){there}")
    domains = [stem(file) if file.parent == path else file.relative_to(path).parts[0] for file in files]
    if strange := [domain for domain in domains if not is_domain(domain)]:
        reason = f"must be {DOMAIN_IN_WORDS}" if _is_utf8(strange[0]) else "is not UTF-8"
        raise DataError(f"{path}: the name of {strange[0]!r} {reason}, since it is a domain; rename it")
    origins: dict[str, str] = {}
    for file, domain in zip(files, domains, strict=True):
        origin = "".join(suffixes(file)) if file.parent == path else "/"
        if origins.setdefault(domain, origin) != origin:
            raise DataError(f"{file}: another file or folder of {path} gives the domain {domain!r} too; rename one")
    return Folder(files, domains, unread)


def splits_among(files: Iterable[Path], top: Path) -> tuple[Path, Path] | None:
    """A training split and another one of the same data set, as files or folders beside one another, such as train.csv
    and test.csv, or train_sft and test_sft; None where there are none.

    Args:
        files: below `top`.
    """
    found: dict[tuple[Path, str], dict[bool, Path]] = {}
    for file in files:
        inside = [part for part in file.parents if part.is_relative_to(top) and part != top]
        for part, name in ((file, stem(file)), *((folder, folder.name) for folder in inside)):
            if (called := SPLIT.fullmatch(name)) is not None:
                splits = found.setdefault((part.parent, (called["rest"] or "").lower()), {})
                splits.setdefault(called["split"].lower() == "train", part)
    return next(((splits[True], splits[False]) for splits in found.values() if len(splits) == 2), None)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_saved_to_disk(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` has written a folder."""
    marks = (("dataset_dict.json",), ("state.json", "dataset_info.json"))
    return any(all((folder / name).is_file() for name in names) for names in marks)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
