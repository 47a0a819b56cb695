"""Sources of rows: files, folders, tables and data sets of the hub, as pieces of work with a digest of what they hold.

Tables (Parquet, Arrow, folders of `save_to_disk`, the hub) are mapped from disk by `datasets`. Files of lines are read
as they are: `datasets` gives the objects of a JSON file one common type, which adds the keys of one row to the
arguments of another.
"""

import hashlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from lmoe.config.data import DataConfig, SourceConfig
from lmoe.data.cache import cache_folder
from lmoe.data.contract import row_of
from lmoe.data.files import TABLES, Found, Piece, folder_of, is_saved_to_disk, kind_of, opened, pieces, suffixes
from lmoe.data.row import Row
from lmoe.errors import DataError, LmoeError
from lmoe.files.places import exists, expanded, is_dir, is_file, is_local
from lmoe.files.wording import LONGEST_REASON, first_line, shown

BUNDLED = "bundled"
"""What data.path calls the rows that ship with lmoe."""
DEFAULT_DOMAIN = "all"
SHARD_ROWS = 10_000
"""Rows of a table that are one piece of work."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Source:
    """Where rows are from, and how they are read.

    Args:
        key: that the user gives it by, for messages.
        path: file, folder, folder of `save_to_disk`, or name on the hub.
        domain: of all its rows that name none; None: from files and folders.
        weight: share of its rows in training, as a part of the weights of all sources; None: as many as there are.
        split, config, revision: of a data set.
        columns: what it calls our keys.
    """

    key: str
    path: str
    domain: str | None = None
    weight: float | None = None
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def named(self) -> str:
        """Key and path, for messages."""
        return f"{self.key[:-1]}={self.path}`" if self.key.endswith("`") else f"{self.key}={self.path}"

    @property
    def split_key(self) -> str:
        """The key that names a split."""
        of_source = self.key.startswith("data.sources.")
        return f"{self.key.removesuffix('.path')}.split" if of_source else "data.sources.<name>.split"


def sources_of(config: DataConfig, bundled: Path) -> list[Source]:
    """The sources of the training rows.

    Args:
        bundled: folder with train/ and val/, what path "bundled" means.
    """
    if not config.sources:
        if config.path == BUNDLED:
            return [Source(key="data.path", path=str(bundled / "train"))]
        return [Source(key="data.path", path=config.path, columns=config.columns)]
    return [_source_of(name, given, bundled) for name, given in config.sources.items()]


def _source_of(name: str, given: SourceConfig, bundled: Path) -> Source:
    return Source(
        key=f"data.sources.{name}.path",
        path=str(bundled / "train") if given.path == BUNDLED else given.path,
        domain=name if given.domain is None else given.domain,
        weight=given.weight,
        split=given.split,
        config=given.config,
        revision=given.revision,
        columns=given.columns,
    )


def val_source(config: DataConfig, bundled: Path) -> Source | None:
    """Where the validation rows of a config are; None: they are split off its training rows.

    Args:
        bundled: folder with val/, what path "bundled" means.
    """
    path = config.val_path or (BUNDLED if config.path == BUNDLED and not config.sources else None)
    if path is None:
        return None
    if path == BUNDLED:
        return Source(key="data.val_path", path=str(bundled / "val"))
    return Source(key="data.val_path", path=path, columns=config.columns)


@dataclass(slots=True, frozen=True)
class TablePiece:
    """Rows of a table.

    Args:
        table: a `datasets.Dataset`, or a list of records.
        name: for messages.
        start, stop: rows.
    """

    table: Any
    name: str
    start: int
    stop: int

    def __iter__(self) -> Iterator[Found]:
        """The records, null in lists and objects taken for a field that is not there."""
        for number in range(self.start, self.stop):
            where = f"{self.name}[{number}]"
            try:
                record = self.table[number]
            except Exception as error:  # of datasets, which decodes what others wrote
                yield DataError(f"{where}: cannot be read: {first_line(error)}"), where, number
            else:
                yield {key: _filled(value) for key, value in record.items()}, where, number


def _filled(value: Any) -> Any:
    """A value without the empty fields of its objects: a table gives each object the fields of all others."""
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


@dataclass(slots=True, frozen=True, kw_only=True)
class Part:
    """A piece of work: records that are read one after the other.

    Args:
        records: iterable of Found; may be read again, and in another process.
        place: index of its file (or of its table) in `Opened.places`.
        domain: of records that name none.
        columns: what they call our keys.
    """

    records: Piece | TablePiece
    place: int
    domain: str
    columns: Mapping[str, str]

    def rows(self) -> Iterator[tuple[Row | LmoeError, int]]:
        """Each row, or why it is none, with its number.

        Raises:
            DataError: a file that cannot be read.
        """
        for record, where, number in self.records:
            if isinstance(record, LmoeError):
                yield record, number
                continue
            try:
                yield row_of(record, where, self.domain, self.columns), number
            except LmoeError as error:
                yield error, number


@dataclass(slots=True, frozen=True, kw_only=True)
class Opened:
    """A source that was found.

    Args:
        parts: its rows, in order.
        content: digest of what it holds.
        places: files, or the one name of a data set.
        hashes: digest of each file by path.
        unread: files of a folder that are not read.
    """

    parts: list[Part]
    content: str
    places: list[str]
    hashes: dict[str, str]
    unread: list[str]

    def rows(self) -> Iterator[Row]:
        """All rows.

        Raises:
            DataError: the first one that is none.
        """
        for part in self.parts:
            for row, _ in part.rows():
                if isinstance(row, LmoeError):
                    raise row
                yield row


def open_source(source: Source, cache: Path) -> Opened:
    """Find what a source holds.

    Args:
        cache: folder for unpacked and converted tables.

    Raises:
        DataError: no such file, folder or data set, one that cannot be read, or that holds nothing.
    """
    path = expanded(source.path)
    if exists(path):
        if is_dir(path) and is_saved_to_disk(path):
            return _saved_to_disk(source, path)
        _check_no_split(source)
        return _files(source, path, cache)
    if is_local(source.path):
        raise DataError(f"{source.path}: no such file or folder (from {Path.cwd()})")
    return _from_hub(source)


def _files(source: Source, path: Path, cache: Path) -> Opened:
    folder = folder_of(path) if path.is_dir() else None
    files = [path] if folder is None else folder.files
    domains = [DEFAULT_DOMAIN] if folder is None else folder.domains
    parts: list[Part] = []
    hashes: dict[str, str] = {}
    for place, (file, of_file) in enumerate(zip(files, domains, strict=True)):
        domain = of_file if source.domain is None else source.domain
        found, hashes[str(file)] = pieces(file)
        records = _table_pieces(_table(file, hashes[str(file)], cache), str(file)) if kind_of(file) == TABLES else found
        parts += [Part(records=piece, place=place, domain=domain, columns=source.columns) for piece in records]
    names = ["" if folder is None else file.relative_to(path).as_posix() for file in files]
    content = hashlib.sha256(json.dumps(list(zip(names, hashes.values(), strict=True))).encode()).hexdigest()
    unread = [] if folder is None else folder.unread
    return Opened(parts=parts, content=content, places=[str(f) for f in files], hashes=hashes, unread=unread)


def _table_pieces(table: Any, name: str) -> list[TablePiece]:
    count = len(table)
    starts = range(0, count, SHARD_ROWS)
    return [TablePiece(table, name, start, min(start + SHARD_ROWS, count)) for start in starts]


def _table(file: Path, digest: str, cache: Path) -> Any:
    """A Parquet or Arrow file, mapped from disk: as Arrow in the cache, where its name says what it holds."""
    import datasets  # heavy, and only tables need it
    import pyarrow

    to = cache / "tables" / f"{digest[:32]}.arrow"
    try:
        if not is_file(to):
            with _writing_folder(to.parent) as folder:
                _convert(file, folder).replace(to)
        return datasets.Dataset.from_file(str(to))
    except (
        *(OSError, EOFError, ValueError, RuntimeError, TypeError, KeyError),
        *(zlib.error, zstandard.ZstdError, pyarrow.ArrowException),
    ) as error:
        raise DataError(f"{file}: cannot be read: {first_line(error)}") from None


@contextmanager
def _writing_folder(cache: Path) -> Iterator[Path]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=cache, prefix=".writing-")
    except OSError as error:
        raise DataError(
            f"data.cache_dir: {cache} cannot be written, where tables are unpacked to: {first_line(error)}"
        ) from None
    with folder as name:
        yield Path(name)


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


def _check_no_split(source: Source) -> None:
    if source.split != "train":
        raise DataError(f"{source.split_key} is {source.split}, but {source.path} has no splits; leave it out")


def _saved_to_disk(source: Source, path: Path) -> Opened:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # of datasets, which trusts what its files hold
        raise DataError(f"{source.named}: cannot be read: {first_line(error)}") from None
    return _data_set(source, _split(source, loaded), str(path))


def _from_hub(source: Source) -> Opened:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        loaded = datasets.load_dataset(source.path, source.config, split=source.split, revision=source.revision)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, DatasetsError) as error:
        reason = shown(" ".join(str(error).split()), longest=LONGEST_REASON) if str(error) else "no reason given"
        raise DataError(
            f"{source.named}: neither a local path nor a data set that could be loaded "
            f"({type(error).__name__}: {reason}). data.sources.<name>.config, split and revision choose a part of "
            "a data set. Without network, give a file, a folder of them, or a folder of save_to_disk"
        ) from None
    return _data_set(source, loaded, source.path)


def _split(source: Source, loaded: Any) -> Any:
    """One split of a DatasetDict; a Dataset has none."""
    if not isinstance(loaded, dict):
        _check_no_split(source)
        return loaded
    if source.split not in loaded:
        raise DataError(
            f"{source.named}: no split {source.split!r}; {source.split_key} may be {', '.join(map(str, loaded))}"
        )
    return loaded[source.split]


def _data_set(source: Source, table: Any, name: str) -> Opened:
    domain = DEFAULT_DOMAIN if source.domain is None else source.domain
    found = _table_pieces(table, name)
    parts = [Part(records=piece, place=0, domain=domain, columns=source.columns) for piece in found]
    content = _table_digest(table)
    return Opened(parts=parts, content=content, places=[name], hashes={name: content}, unread=[])


def _table_digest(table: Any) -> str:
    """Of the rows, whatever files they lie in."""
    digest = hashlib.sha256()
    for batch in (table if table._indices is None else table.flatten_indices()).data.to_batches():
        digest.update(batch.serialize())
    return digest.hexdigest()


def read_rows(path: str, cache: Path | None = None) -> list[Row]:
    """Every row of a file, a folder or a data set.

    Args:
        cache: folder for unpacked and converted tables; None: the user's own.

    Raises:
        DataError: one that is missing, empty or malformed (with file and line).
    """
    opened_source = open_source(Source(key="data.path", path=path), cache or cache_folder(None))
    rows = list(opened_source.rows())
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows
