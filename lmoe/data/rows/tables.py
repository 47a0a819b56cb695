"""Tables as rows: Parquet and Arrow files, mapped from disk by `datasets` or read while training."""

import hashlib
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import zstandard

from lmoe.data.rows.files import Found, opened, suffixes
from lmoe.errors import DataError
from lmoe.files.places import is_file
from lmoe.files.wording import first_line
from lmoe.files.writing_folder import writing_folder

SHARD_ROWS = 10_000
"""Rows of a table that are one piece of work."""
BATCH_ROWS = 1_000
"""Rows of a Parquet file that are read at a time while training."""


@dataclass(slots=True, frozen=True)
class TablePiece:
    """Rows of a table.

    Args:
        table: a `datasets.Dataset`.
        name: for messages.
        start, stop: rows.
    """

    table: Any
    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes, as Arrow counts them."""
        return self.table.data.nbytes * (self.stop - self.start) // max(1, len(self.table))

    def __iter__(self) -> Iterator[Found]:
        """The records, null in lists and objects taken for a field that is not there."""
        for number in range(self.start, self.stop):
            where = f"{self.name}[{number}]"
            try:
                record = self.table[number]
            except Exception as error:  # of datasets, which decodes what others wrote
                yield DataError(f"{where}: cannot be read: {first_line(error)}"), where, number
            else:
                yield _record_of(record), where, number


def _record_of(record: dict[str, Any]) -> dict[str, Any]:
    """A row of a table as a record: null stays where a field of the row is null, so that it is refused by name."""
    return {key: _filled(value) for key, value in record.items()}


def _filled(value: Any) -> Any:
    """A value without the empty fields of its objects: a table gives each object the fields of all others."""
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


@dataclass(slots=True, frozen=True)
class StreamPiece:
    """Rows of a table that is read while they are needed.

    Args:
        table: a `datasets.IterableDataset`.
        name: for messages.
    """

    table: Any
    name: str
    size: int = 0
    """Bytes, which are not known."""

    def __iter__(self) -> Iterator[Found]:
        """Yield the records, as those of a TablePiece.

        Raises:
            DataError: the table cannot be read on.
        """
        records = iter(self.table)
        for number in count():
            where = f"{self.name}[{number}]"
            try:
                record = next(records)
            except StopIteration:
                return
            except Exception as error:  # of datasets, which decodes what others wrote
                raise DataError(f"{where}: cannot be read: {first_line(error)}") from None
            yield _record_of(record), where, number


def table_pieces(table: Any, name: str) -> list[TablePiece]:
    """Cut a table into pieces of work."""
    rows = len(table)
    starts = range(0, rows, SHARD_ROWS)
    return [TablePiece(table, name, start, min(start + SHARD_ROWS, rows)) for start in starts]


def mapped_table(file: Path, digest: str, cache: Path) -> Any:
    """A Parquet or Arrow file, mapped from disk: as Arrow in the cache, where its name says what it holds.

    Args:
        digest: of the file.

    Raises:
        DataError: it cannot be read, or the cache not be written.
    """
    import datasets  # heavy, and only tables need it
    import pyarrow

    to = cache / "tables" / f"{digest[:32]}.arrow"
    try:
        if not is_file(to):
            with _folder_for(to.parent) as folder:
                _convert(file, Path(folder)).replace(to)
        return datasets.Dataset.from_file(str(to))
    except (
        *(OSError, EOFError, ValueError, RuntimeError, TypeError, KeyError),
        *(zlib.error, zstandard.ZstdError, pyarrow.ArrowException),
    ) as error:
        raise DataError(f"{file}: cannot be read: {first_line(error)}") from None


def _folder_for(cache: Path) -> "tempfile.TemporaryDirectory[str]":
    try:
        return writing_folder(cache)
    except OSError as error:
        raise DataError(
            f"data.cache_dir: {cache} cannot be written, where tables are unpacked to: {first_line(error)}"
        ) from None


def _convert(file: Path, folder: Path) -> Path:
    """Write a table as a stream of Arrow into a folder, a batch at a time, categories as what they stand for."""
    import pyarrow
    from pyarrow import parquet

    end, packed = suffixes(file)
    if packed:
        unpacked = folder / "unpacked"
        with opened(file) as stream, open(unpacked, "wb") as target:
            shutil.copyfileobj(stream, target)
        file = unpacked
    with pyarrow.memory_map(str(file)) as source:
        if end == ".parquet":
            found: Any = parquet.ParquetFile(source)
            schema, batches = found.schema_arrow, found.iter_batches()
        else:
            found, batches = _arrow_batches(source)
            schema = found.schema
        plain = pyarrow.schema([_without_categories(one) for one in schema], metadata=schema.metadata)
        with pyarrow.OSFile(str(folder / "table"), "wb") as sink, pyarrow.ipc.new_stream(sink, plain) as writer:
            for batch in batches:
                batch.validate(full=True)  # a damaged one would crash who reads it
                writer.write_batch(batch.cast(plain))
    return folder / "table"


def _arrow_batches(source: Any) -> tuple[Any, Iterator[Any]]:
    """Reader and batches of an Arrow file, which may be a stream."""
    import pyarrow

    try:
        reader = pyarrow.ipc.open_file(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        stream = pyarrow.ipc.open_stream(source)
        return stream, iter(stream)
    return reader, (reader.get_batch(index) for index in range(reader.num_record_batches))


def _without_categories(column: Any) -> Any:
    import pyarrow

    kind = column.type
    return column.with_type(kind.value_type) if pyarrow.types.is_dictionary(kind) else column


def streamed_table(file: Path) -> Any:
    """A Parquet or Arrow file that is read while its rows are needed.

    Raises:
        DataError: it is compressed, or cannot be read.
    """
    import datasets
    import pyarrow
    from datasets.exceptions import DatasetsError

    end, packed = suffixes(file)
    if packed:
        raise DataError(
            f"{file}: a compressed table cannot be read while training; unpack it, or set data.streaming=false"
        )
    options: dict[str, Any] = {"batch_size": BATCH_ROWS} if end == ".parquet" else {}  # or an empty file has none
    try:
        return datasets.load_dataset(
            end.removeprefix("."), data_files=str(file), split="train", streaming=True, **options
        )
    except (OSError, ValueError, RuntimeError, pyarrow.ArrowException, DatasetsError) as error:
        raise DataError(f"{file}: cannot be read: {first_line(error.__cause__ or error)}") from None


def table_digest(table: Any) -> str:
    """Return a digest of the rows, whatever files they lie in."""
    digest = hashlib.sha256()
    for batch in (table if table._indices is None else table.flatten_indices()).data.to_batches():
        digest.update(batch.serialize())
    return digest.hexdigest()
