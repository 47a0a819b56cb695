"""Read rows from JSONL files, folders of them, or a hub data set, and bring them to one shape."""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lmoe.data.contract import row_of
from lmoe.data.row import Row
from lmoe.errors import DataError
from lmoe.files.small_file import Reader, ordinary_size
from lmoe.files.wording import first_line

SUFFIXES = (".jsonl", ".jsonl.gz")
DEFAULT_DOMAIN = "all"
BLANK = b" \t\r\n\xef\xbb\xbf"

LONGEST_LINE = 64_000_000
"""Bytes of a line: a row of that length has more tokens than any context, so that a file without lines is no JSONL."""
ROW = Reader(error=DataError, finite=False)
"""How a line is parsed; what a field that nobody reads holds may be NaN."""


def data_files(path: Path) -> list[Path]:
    """The JSONL files behind a path: itself, or all of a folder in name order."""
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.name.endswith(SUFFIXES))
        if not files:
            raise DataError(f"{path}: no .jsonl or .jsonl.gz file in this folder")
        return files
    return [path]


def read_rows(source: str) -> list[Row]:
    """Every row of a JSONL file, of a folder of them, or of a hub data set.

    Raises:
        DataError: a file that is missing, empty or malformed (with file and line), or a name that is neither a path
            nor a reachable data set.
    """
    path = Path(source).expanduser()
    if path.exists():
        rows = [row for file in data_files(path) for row in _file_rows(file, by_name=path.is_dir())]
    elif source.endswith(SUFFIXES) or source.startswith((".", "/", "~")):
        raise DataError(f"{source}: no such file or folder (from {Path.cwd()})")
    else:
        rows = list(_hub_rows(source))
    if not rows:
        raise DataError(f"{source}: no rows")
    return rows


def _file_rows(file: Path, *, by_name: bool) -> Iterator[Row]:
    default_domain = file.name.split(".")[0] if by_name else DEFAULT_DOMAIN
    for record, where in json_records(file):
        yield row_of(record, where, default_domain)


def json_records(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Every object of a JSONL file, with file and line for messages to the user; blank lines are passed over.

    Raises:
        DataError: a file that cannot be read, or a line that holds no JSON object.
    """
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        ordinary_size(file)
        with opener(file, "rb") as stream:
            for number, line in enumerate(iter(partial(stream.readline, LONGEST_LINE + 1), b""), start=1):
                if line.strip(BLANK):
                    yield _parse(line, f"{file}:{number}"), f"{file}:{number}"
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {first_line(error)}") from None


def _parse(line: bytes, where: str) -> dict[str, Any]:
    if len(line) > LONGEST_LINE:
        raise ROW.refusal(where, f"a line of more than {LONGEST_LINE:,} bytes; a JSONL file has one row a line")
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ROW.refusal(where, f"not UTF-8: {error.reason} at byte {error.start + 1}") from None
    record = ROW.parsed(text.strip("\r\n"), where)
    if not isinstance(record, dict):
        raise ROW.refusal(where, f"a row must be a JSON object, got {type(record).__name__}")
    return record


def _hub_rows(name: str) -> Iterable[Row]:
    import datasets  # heavy, and only hub data needs it
    from datasets.exceptions import DatasetsError

    try:
        loaded = datasets.load_dataset(name, split="train")
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"data.path={name}: neither a local path nor a data set that could be loaded "
            f"({type(error).__name__}: {first_line(error)}). "
            "Without network, give a JSONL file or a folder of them."
        ) from None
    for number, record in enumerate(loaded):
        yield row_of(dict(record), f"{name}[{number}]", DEFAULT_DOMAIN)
