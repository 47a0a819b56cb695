"""From a data config to tokenised training and validation rows, and a report of what became of them."""

import warnings
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lmoe.config.data import DataConfig
from lmoe.data.account import Account
from lmoe.data.domains import check_chosen, check_several, check_some_left, dealt_anew, domain_places, of_domains
from lmoe.data.encode import EncodedSource
from lmoe.data.encoded import EncodedRows
from lmoe.data.mixing import domain_shares, mixed, weight_shares
from lmoe.data.pack import PackedRows, packing_supported
from lmoe.data.reader import Reader
from lmoe.data.report import LeftOut, PrepareReport, split_report, stream_report
from lmoe.data.rows.sources import Source, open_source, sources_of, val_source
from lmoe.data.split import Split, first_of_each, split_in_three
from lmoe.data.stream import ClusterOf, RowStream
from lmoe.errors import DataError
from lmoe.files.places import cache_folder
from lmoe.vocabulary import RowKind


@dataclass(slots=True, kw_only=True)
class PreparedData:
    """Rows ready for batches.

    Args:
        train: training rows, or with data.packing the sequences they were packed into; or a stream of either.
        val: validation rows, never packed.
        domains: sorted names of the domains of both; rows point into it.
        report: what was read, dropped, cut and cached.
    """

    train: EncodedRows | PackedRows | RowStream
    val: EncodedRows
    domains: list[str]
    report: PrepareReport

    @property
    def train_rows(self) -> EncodedRows | None:
        """The training rows one by one, also where they are packed; None: a stream."""
        if isinstance(self.train, RowStream):
            return None
        return self.train.rows if isinstance(self.train, PackedRows) else self.train

    def first_rows(self, count: int) -> EncodedRows:
        """The training rows; of a stream about `count` of them, the first of every file.

        Raises:
            DataError: rows of a stream that cannot be read or used.
        """
        rows = self.train_rows
        if rows is None:
            assert isinstance(self.train, RowStream)
            rows = self.train.first_rows(count)
        return rows

    def with_domains(self, names: list[str]) -> "PreparedData":
        """The same rows, no stream, with indices into a longer list of domains."""
        order = domain_places(self.domains, names)
        rows = self.train_rows
        assert rows is not None
        rows = rows.with_domains(order)
        train = replace(self.train, rows=rows) if isinstance(self.train, PackedRows) else rows
        return replace(self, train=train, val=self.val.with_domains(order), domains=names)

    def with_clusters(self, train: Tensor | ClusterOf, val: Tensor) -> "PreparedData":
        """The same rows, with the cluster of each prompt.

        Args:
            train: int64, in the order of `train_rows`; of a stream what puts the rows of each block into clusters.
            val: int64, in the order of `val`.
        """
        assert len(val) == len(self.val)
        return replace(self, train=self._train_with(train), val=replace(self.val, clusters=val))

    def _train_with(self, clusters: Tensor | ClusterOf) -> EncodedRows | PackedRows | RowStream:
        rows = self.train_rows
        if rows is None:
            assert isinstance(self.train, RowStream) and not isinstance(clusters, Tensor)
            stream = copy(self.train)
            stream.cluster_of = clusters
            return stream
        assert isinstance(clusters, Tensor) and len(clusters) == len(rows)
        rows = replace(rows, clusters=clusters)
        return replace(self.train, rows=rows) if isinstance(self.train, PackedRows) else rows


def prepare(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    bundled: Path,
    packing_model_type: str | None,
    num_embeddings: int | None = None,
    kind: RowKind = RowKind.answers,
) -> PreparedData:
    """Read, tokenise (or take from the cache), split and pack.

    Args:
        seed: of the split and of the packing.
        bundled: folder of what ships with lmoe, as `sources_of`.
        packing_model_type: config.model_type of the backbone; None: not known, packing is not checked.
        num_embeddings: of the backbone; None: not known, tokens are not checked.
        kind: of what is learnt from the rows; only answers are packed.

    Raises:
        DataError: rows that cannot be read or masked, nothing left to learn, or packing that the backbone refuses.
    """
    packing = kind is RowKind.answers and _packs(config.packing, packing_model_type)
    reader = Reader(config, tokenizer, num_embeddings=num_embeddings, kind=kind)
    given, val_from = sources_of(config, bundled), val_source(config, bundled)
    if config.streaming:
        assert val_from is not None
        return _prepare_stream(config, reader, given, val_from, seed=seed, packing=packing)
    whole, domains, of_source = read_all(reader, given)
    split = split_off(whole, domains, config, seed)
    train, val, of_source = whole.subset(split.train), whole.subset(split.val), of_source[split.train]
    if val_from is not None:
        other = reader.read(val_from)
        both = sorted({*domains, *other.domains})
        train, val = train.with_domains(domain_places(domains, both)), _joined([other], both)
        domains = both
    left_out = None
    if config.domains is not None:
        check_chosen(config.domains, domains)
        all_train, all_val = train, val
        train, used = of_domains(train, domains, config.domains)
        val, _ = of_domains(val, domains, config.domains)
        check_some_left(len(train), len(val), config)
        others = sorted({*domains} - {*config.domains})
        left_out = LeftOut(train=len(all_train) - len(train), val=len(all_val) - len(val), domains=others)
        of_source, domains = of_source[used], sorted(config.domains)
    _check_prefix(config, reader)
    val = _first(val, config)
    shares = _shares(config, given, train, of_source)
    if config.permute_domains:  # so that the rows are those of a run that does not
        check_several(train, domains)
        train, val = dealt_anew(train), dealt_anew(val)
    of_train = split_report(train, domains)
    report = PrepareReport(
        sources=reader.reports,
        train=of_train,
        val=split_report(val, domains),
        data_hashes=reader.hashes,
        leaked=int(torch.isin(val.digests, train.digests).sum()),
        left_out=left_out,
        permuted=config.permute_domains,
    )
    if shares is not None:
        groups, parts = shares
        train = train.subset(mixed(groups, parts, seed))
        report.mixed = split_report(train, domains)
    if config.packing is None and packing_model_type is not None and kind is RowKind.answers:
        report.not_packed = packing_supported(packing_model_type)
    packed = PackedRows.of(train, config.max_length, seed) if packing else None
    if packed is not None:
        of_train.packed_sequences = len(packed)
        of_train.fill = int(train.lengths.sum()) / (len(packed) * config.max_length)
    return PreparedData(train=train if packed is None else packed, val=val, domains=domains, report=report)


def _check_prefix(config: DataConfig, reader: Reader) -> None:
    """Refuse a prefix that no row has a place for.

    Raises:
        DataError: no row has a message of the user.
    """
    read = Account.sum(report.account for report in reader.reports)
    if config.prompt_prefix is not None and read.unprefixed == read.formats.total():
        raise DataError(
            "data.prompt_prefix has no effect: no row has a message of the user that it could stand before; leave it "
            "out, or give conversations"
        )


def _first(val: EncodedRows, config: DataConfig) -> EncodedRows:
    """The validation rows that are used."""
    count = config.val_rows_per_domain
    return val.subset(first_of_each(val.domains.tolist(), count)) if count else val


def _prepare_stream(
    config: DataConfig, reader: Reader, sources: Sequence[Source], val_from: Source, *, seed: int, packing: bool
) -> PreparedData:
    """Training rows that are read while training, and validation rows that are read now."""
    cache = cache_folder(config.cache_dir)
    opened = [open_source(source, cache, streaming=True, kind=reader.kind) for source in sources]
    other = reader.read(val_from)
    domains = sorted({*(part.domain for found in opened for part in found.parts), *other.domains})
    val, left_out = _joined([other], domains), None
    if config.domains is not None:
        check_chosen(config.domains, domains)
        val, _ = of_domains(val, domains, config.domains)
        check_some_left(None, len(val), config)
        others = sorted({*domains} - {*config.domains})
        left_out, domains = LeftOut(train=None, val=len(other.rows) - len(val), domains=others), sorted(config.domains)
    streamed = []
    for source, found in zip(sources, opened, strict=True):
        reader.hashes |= found.hashes
        streamed.append(stream_report(source.path, reader.key(source, found), found.unread))
    # NOTE a source of weight 0 is none of the stream's: a pass ends when each of its sources was read to the end.
    weights = {place: source.weight for place, source in enumerate(sources) if source.weight != 0}
    stream = RowStream(
        [opened[place].parts for place in weights],
        weight_shares([1.0 if weight is None else weight for weight in weights.values()]),
        reader.encoder(),
        domains,
        buffer=config.shuffle_buffer,
        seed=seed,
        packing=packing,
        on_bad_row=config.on_bad_row,
        say=warnings.warn,
        only_these=config.domains is not None,
    )
    val = _first(val, config)
    report = PrepareReport(
        sources=[*streamed, *reader.reports],
        train=None,
        val=split_report(val, domains),
        data_hashes=reader.hashes,
        left_out=left_out,
    )
    return PreparedData(train=stream, val=val, domains=domains, report=report)


def read_all(reader: Reader, sources: Sequence[Source]) -> tuple[EncodedRows, list[str], Tensor]:
    """Rows of all sources behind one another, the sorted names of their domains, and (N,) int64 the source of each.

    Raises:
        DataError: rows that cannot be read, tokenised or used.
    """
    found = [reader.read(source) for source in sources]
    domains = sorted({name for source in found for name in source.domains})
    counts = torch.tensor([len(source.rows) for source in found])
    return _joined(found, domains), domains, torch.arange(len(found)).repeat_interleave(counts)


def split_off(rows: EncodedRows, domains: list[str], config: DataConfig, seed: int) -> Split:
    """Which rows are to train on, and which are kept for validation and for judging where these have no place of their
    own; the rows that one record was taken apart into stay together.

    Args:
        seed: of the run, which counts where data.split_seed is null.

    Raises:
        DataError: too few rows.
    """
    places = torch.cat([rows.source.unsqueeze(1), rows.places], dim=1)
    records, record_of_row = places.unique(dim=0, return_inverse=True)
    if len(records) == len(rows):
        record_of_row = torch.arange(len(rows))  # in the order of the rows
    names = dict(zip(record_of_row.tolist(), (domains[i] for i in rows.domains.tolist()), strict=True))
    split = split_in_three(
        [names[record] for record in range(len(records))],
        val_fraction=config.val_fraction if config.splits_val else 0.0,
        judge_fraction=config.judge_fraction,
        seed=seed if config.split_seed is None else config.split_seed,
    )
    if len(records) == len(rows):
        return split
    return Split(**{name: _rows_of(record_of_row, getattr(split, name)) for name in ("train", "val", "judge")})


def _rows_of(record_of_row: Tensor, records: list[int]) -> list[int]:
    """Indices of the rows that were made of some records, ascending."""
    return torch.isin(record_of_row, torch.tensor(records, dtype=torch.long)).nonzero().flatten().tolist()


def _joined(found: Sequence[EncodedSource], domains: list[str]) -> EncodedRows:
    """The rows of all sources behind one another, with indices into one list of domains."""
    parts = [source.rows.with_domains(domain_places(source.domains, domains)) for source in found]
    return parts[0] if len(parts) == 1 else EncodedRows.joined(parts)


def _shares(
    config: DataConfig, sources: Sequence[Source], train: EncodedRows, of_source: Tensor
) -> tuple[Tensor, list[float]] | None:
    """The group of each training row and the share of each group; None where rows come as they are."""
    if config.temperature is not None:
        sizes = torch.bincount(train.domains).tolist()
        return train.domains, domain_shares(sizes, config.temperature)
    weights = [source.weight for source in sources if source.weight is not None]
    return (of_source, weight_shares(weights)) if weights else None


def _packs(asked: bool | None, model_type: str | None) -> bool:
    """Whether to pack; null packs where the backbone is known to keep rows apart.

    Raises:
        DataError: packing was asked for, and the backbone would let rows see each other.
    """
    if asked is None:
        return model_type is not None and packing_supported(model_type) is None
    if asked and model_type and (reason := packing_supported(model_type)):
        raise DataError(f"data.packing=true: {reason}; set data.packing=false")
    return asked
