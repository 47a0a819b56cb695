"""Sources of rows: files, folders, tables and data sets of the hub, as pieces of work with a digest of what they hold.

Tables (Parquet, Arrow, folders of `save_to_disk`, the hub) are mapped from disk by `datasets`. Files of lines are read
as they are: `datasets` gives the objects of a JSON file one common type, which adds the keys of one row to the
arguments of another.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lmoe.config.data import BUNDLED_FOLDERS, DataConfig, SourceConfig
from lmoe.data.rows.contract import row_of
from lmoe.data.rows.files import TABLES, Piece, folder_of, is_saved_to_disk, kind_of, pieces, splits_among, whole
from lmoe.data.rows.row import Row
from lmoe.data.rows.tables import StreamPiece, TablePiece, mapped_table, streamed_table, table_digest, table_pieces
from lmoe.errors import DataError, LmoeError
from lmoe.files.places import cache_folder, exists, expanded, is_dir, is_local
from lmoe.files.wording import LONGEST_REASON, first_line, shown
from lmoe.vocabulary import RowKind

DEFAULT_DOMAIN = "all"


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
        bundled: folder of what ships with lmoe, in which the names of BUNDLED_FOLDERS have theirs.
    """
    if not config.sources:
        return [_source_at(config, "data.path", config.path, bundled, "train")]
    return [_source_of(name, given, bundled) for name, given in config.sources.items()]


def _source_of(name: str, given: SourceConfig, bundled: Path) -> Source:
    return Source(
        key=f"data.sources.{name}.path",
        path=_place(given.path, bundled, "train"),
        domain=name if given.domain is None else given.domain,
        weight=given.weight,
        split=given.split,
        config=given.config,
        revision=given.revision,
        columns=given.columns,
    )


def _source_at(config: DataConfig, key: str, path: str, bundled: Path, part: str) -> Source:
    """Rows that one key of the config names."""
    return Source(key=key, path=_place(path, bundled, part), columns=config.columns_of(path))


def _place(path: str, bundled: Path, part: str) -> str:
    """Where rows are: `part` of the folder of those that ship with lmoe, or else the path itself."""
    return str(bundled / BUNDLED_FOLDERS[path] / part) if path in BUNDLED_FOLDERS else path


def val_source(config: DataConfig, bundled: Path) -> Source | None:
    """Where the validation rows of a config are; None: they are split off its training rows.

    Args:
        bundled: as `sources_of`.
    """
    if config.splits_val:
        return None
    return _source_at(config, "data.val_path", config.val_path or config.path, bundled, "val")


def judge_source(config: DataConfig, bundled: Path) -> Source | None:
    """Where the judging rows of a config are; None: they are split off its training rows, or there are none.

    Args:
        bundled: as `sources_of`.
    """
    path = config.judge_path
    if path is None and config.is_bundled and not config.judge_fraction:
        path = config.path
    return None if path is None else _source_at(config, "data.judge_path", path, bundled, "judge")


@dataclass(slots=True, frozen=True, kw_only=True)
class Part:
    """A piece of work: records that are read one after the other.

    Args:
        records: iterable of Found; may be read again, and in another process.
        place: index of its file (or of its table) in `Opened.places`.
        domain: of records that name none.
        columns: what they call our keys.
        kind: what is learnt from them.
    """

    records: Piece | TablePiece | StreamPiece
    place: int
    domain: str
    columns: Mapping[str, str]
    kind: RowKind = RowKind.answers

    def rows(self) -> Iterator[tuple[Row | LmoeError, int]]:
        """Each row, or why it is none, with its number.

        Raises:
            DataError: a file that cannot be read.
        """
        for record, where, number in self.records:
            yield record if isinstance(record, LmoeError) else self.row(record, where), number

    def row(self, record: Mapping[str, Any], where: str) -> Row | LmoeError:
        """The row of one record, or why it is none."""
        try:
            return row_of(record, where, self.domain, self.columns, self.kind)
        except LmoeError as error:
            return error


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
        """Yield all rows in order.

        Raises:
            DataError: a record, which is named, is no row.
        """
        for part in self.parts:
            for row, _ in part.rows():
                if isinstance(row, LmoeError):
                    raise row
                yield row


def open_source(
    source: Source,
    cache: Path,
    *,
    streaming: bool = False,
    kind: RowKind = RowKind.answers,
    all_splits: bool = False,
) -> Opened:
    """Find what a source holds.

    Args:
        cache: folder for unpacked and converted tables.
        streaming: nothing of it is read or converted before it is needed; files are known by their sizes.
        kind: what is learnt from its rows.
        all_splits: read all files of a folder, also where they are called as splits of a data set.

    Raises:
        DataError: no such file, folder or data set, one that cannot be read, or that holds nothing or several splits.
    """
    path = expanded(source.path)
    if exists(path):
        if is_dir(path) and is_saved_to_disk(path):
            return _saved_to_disk(source, path, kind)
        _check_no_split(source)
        return _files(source, path, cache, streaming, kind, all_splits)
    if is_local(source.path):
        raise DataError(f"{source.named}: no such file or folder (from {Path.cwd()})")
    return _from_hub(source, streaming, kind)


def _files(source: Source, path: Path, cache: Path, streaming: bool, kind: RowKind, all_splits: bool) -> Opened:
    folder = folder_of(path) if path.is_dir() else None
    if folder is not None and not all_splits and (splits := splits_among(folder.files, path)) is not None:
        train, other = (split.relative_to(path) for split in splits)
        raise DataError(
            f"{source.named}: {train} and {other} look like splits of one data set, which are not read as one: give "
            f"one of them, a file or a folder of its own, as {source.key}; what is to validate on goes into "
            "data.val_path. Rename them if they are domains"
        )
    files = [path] if folder is None else folder.files
    domains = [DEFAULT_DOMAIN] if folder is None else folder.domains
    parts: list[Part] = []
    hashes: dict[str, str] = {}
    for place, (file, of_file) in enumerate(zip(files, domains, strict=True)):
        domain = of_file if source.domain is None else source.domain
        records, hashes[str(file)] = _file(file, cache, streaming)
        parts += [
            Part(records=piece, place=place, domain=domain, columns=source.columns, kind=kind) for piece in records
        ]
    names = ["" if folder is None else file.relative_to(path).as_posix() for file in files]
    content = hashlib.sha256(json.dumps(list(zip(names, hashes.values(), strict=True))).encode()).hexdigest()
    unread = [] if folder is None else folder.unread
    return Opened(parts=parts, content=content, places=[str(f) for f in files], hashes=hashes, unread=unread)


def _file(file: Path, cache: Path, streaming: bool) -> tuple[Sequence[Piece | TablePiece | StreamPiece], str]:
    """The pieces of one file, and what it is known by."""
    is_table = kind_of(file) == TABLES
    if streaming:
        piece, identity = whole(file)
        return [StreamPiece(streamed_table(file), str(file)) if is_table else piece], identity
    found, digest = pieces(file)
    return table_pieces(mapped_table(file, digest, cache), str(file)) if is_table else found, digest


def _check_no_split(source: Source) -> None:
    if source.split != "train":
        raise DataError(f"{source.split_key} is {source.split}, but {source.path} has no splits; leave it out")


def _saved_to_disk(source: Source, path: Path, kind: RowKind) -> Opened:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # of datasets, which trusts what its files hold
        raise DataError(f"{source.named}: cannot be read: {first_line(error)}") from None
    return _data_set(source, _split(source, loaded), str(path), kind)


def _from_hub(source: Source, streaming: bool, kind: RowKind) -> Opened:
    import datasets
    from datasets.exceptions import DatasetsError

    options: dict[str, Any] = {"split": source.split, "revision": source.revision}
    options |= {"streaming": True} if streaming else {}
    try:
        loaded: Any = datasets.load_dataset(source.path, source.config, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, DatasetsError) as error:
        reason = shown(" ".join(str(error).split()), longest=LONGEST_REASON) if str(error) else "no reason given"
        raise DataError(
            f"{source.named}: neither a local path nor a data set that could be loaded "
            f"({type(error).__name__}: {reason}). data.sources.<name>.config, split and revision choose a part of "
            "a data set. Without network, give a file, a folder of them, or a folder of save_to_disk"
        ) from None
    return _streamed(source, loaded, kind) if streaming else _data_set(source, loaded, source.path, kind)


def _streamed(source: Source, loaded: Any, kind: RowKind) -> Opened:
    """A data set of the hub whose files are read when they are needed."""
    shards = [loaded.shard(loaded.num_shards, number) for number in range(loaded.num_shards)]
    domain = DEFAULT_DOMAIN if source.domain is None else source.domain
    parts = [
        Part(records=StreamPiece(shard, source.path), place=0, domain=domain, columns=source.columns, kind=kind)
        for shard in shards
    ]
    identity = f"{len(shards)} files of revision {source.revision or 'newest'}"
    return Opened(parts=parts, content=identity, places=[source.path], hashes={source.path: identity}, unread=[])


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


def _data_set(source: Source, table: Any, name: str, kind: RowKind) -> Opened:
    domain = DEFAULT_DOMAIN if source.domain is None else source.domain
    found = table_pieces(table, name)
    parts = [Part(records=piece, place=0, domain=domain, columns=source.columns, kind=kind) for piece in found]
    content = table_digest(table)
    return Opened(parts=parts, content=content, places=[name], hashes={name: content}, unread=[])


def read_rows(path: str, cache: Path | None = None, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Every row of a file, a folder or a data set.

    Args:
        cache: folder for unpacked and converted tables; None: the user's own.
        columns: what the rows call our keys, as far as they have it; None: as we do.

    Raises:
        DataError: one that is missing, empty or malformed (with file and line).
    """
    opened = open_source(Source(key="data.path", path=path), cache or cache_folder(None), all_splits=True)
    rows = []
    for part in opened.parts:
        for record, where, _ in part.records:
            if isinstance(record, LmoeError):
                raise record
            here = {ours: theirs for ours, theirs in (columns or {}).items() if theirs in record}
            row = replace(part, columns=here).row(record, where)
            if isinstance(row, LmoeError):
                raise row
            rows.append(row)
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows
