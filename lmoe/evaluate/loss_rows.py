"""The rows that a trained model is measured on: those that the run validated on, those kept for judging, or others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import xxhash
from transformers import PreTrainedTokenizerBase

from lmoe.config.data import DataConfig
from lmoe.data.domains import dealt_anew, names_of, of_domains
from lmoe.data.encoded import EncodedRows
from lmoe.data.prepare import read_all, split_off
from lmoe.data.reader import Reader
from lmoe.data.report import SourceReport
from lmoe.data.rows.files import place_of
from lmoe.data.rows.sources import Source, judge_source, sources_of, val_source
from lmoe.data.split import first_of_each
from lmoe.errors import DataError
from lmoe.vocabulary import RowKind


@dataclass(slots=True, kw_only=True)
class EvaluationRows:
    """Rows to measure on.

    Args:
        rows: tokenised, never packed.
        domains: names, rows.domains points into it.
        reports: what was read, dropped and cut, of each source of the rows.
        data_hashes: SHA-256 of each file (of the rows, for a data set) by path, in the order in which they were read.
        permuted: whether domains were dealt anew, as in the run.
    """

    rows: EncodedRows
    domains: list[str]
    reports: list[SourceReport]
    data_hashes: dict[str, str]
    permuted: bool = False

    def first_of_each_domain(self, count: int) -> EvaluationRows:
        """The first `count` rows of each domain; 0: all of them."""
        return replace(self, rows=self.rows.subset(first_of_each(self.rows.domains.tolist(), count)))

    def dealt_as(self, config: DataConfig) -> EvaluationRows:
        """The same rows, their domains dealt anew where a run has data.permute_domains."""
        return replace(self, rows=dealt_anew(self.rows), permuted=True) if config.permute_domains else self

    def preferred(self) -> EvaluationRows:
        """The same rows, from the same lines of their files, where of a pair of answers only the chosen one is left."""
        return replace(self, rows=self.rows.preferred())

    @staticmethod
    def joined(parts: Sequence[EvaluationRows]) -> EvaluationRows:
        """The rows of all parts behind one another."""
        if len(parts) == 1:
            return parts[0]
        domains = sorted({name for part in parts for name in part.domains})
        return EvaluationRows(
            rows=EncodedRows.joined(
                [part.rows.with_domains([domains.index(name) for name in part.domains]) for part in parts]
            ),
            domains=domains,
            reports=[report for part in parts for report in part.reports],
            data_hashes={path: digest for part in parts for path, digest in part.data_hashes.items()},
            permuted=any(part.permuted for part in parts),
        )

    def place(self, index: int) -> str:
        """File and line of a row, for messages."""
        file, number = (int(count) for count in self.rows.places[index])
        return place_of(self.reports[int(self.rows.source[index])].files[file], number)

    def row_ids(self) -> list[str]:
        """Return a name of each row, of 16 hexadecimal digits: the same for the same row of the same files, wherever
        they lie and whatever tokenizer, template or prefix has made tokens of them."""
        files = " ".join(self.data_hashes.values())
        places = torch.cat([self.rows.source[:, None], self.rows.places], 1).tolist()
        return [xxhash.xxh3_64_hexdigest(f"{files} {place}".encode()) for place in places]


def prepare_judging(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    bundled: Path,
    length_name: str,
    kind: RowKind = RowKind.answers,
) -> EvaluationRows:
    """The rows of a config that nothing but judging reads, of all domains; of a share that is split off, those whose
    tokens no other row has.

    Args:
        seed: of the split.
        bundled: folder of what ships with lmoe, as `sources_of`.
        length_name: what the user calls the length, for messages.
        kind: what the rows are read as.

    Raises:
        DataError: rows that cannot be read or masked, none of them usable, or no such rows.
    """
    reader = Reader(config, tokenizer, length_name=length_name, has_keys=False, kind=kind)
    judge_from = judge_source(config, bundled)
    if judge_from is not None:
        source = reader.read(judge_from)
        rows, domains = source.rows, source.domains
    elif config.judge_fraction:
        whole, domains, _ = read_all(reader, sources_of(config, bundled))
        split = split_off(whole, domains, config, seed)
        rest, kept = whole.subset(split.train + split.val), whole.subset(split.judge)
        rows = kept.subset((~torch.isin(kept.digests, rest.digests)).nonzero().flatten())
        if not len(rows):
            raise DataError(f"data.judge_fraction={config.judge_fraction}: all of its rows are among the others too")
    else:
        raise DataError(
            "no rows are kept for judging: name some with data.judge_path, or keep a share with data.judge_fraction"
        )
    return EvaluationRows(rows=rows, domains=domains, reports=reader.reports, data_hashes=reader.hashes)


def prepare_evaluation(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    bundled: Path,
    named: tuple[str | None, str],
    limit: int = 0,
    kind: RowKind = RowKind.answers,
) -> EvaluationRows:
    """The validation rows of a config; its training rows are read only where the others are split off from them.

    Args:
        seed: of the split.
        bundled: folder of what ships with lmoe, as `sources_of`.
        named: what the user calls the rows (None: as the config does) and the length, for messages.
        limit: rows of each domain, the first ones of those of the config; 0: all.
        kind: what the rows are read as.

    Raises:
        DataError: rows that cannot be read or masked, or none of them usable.
    """
    reader = Reader(config, tokenizer, length_name=named[1], has_keys=False, kind=kind)
    val_from = val_source(config, bundled)
    if val_from is None:
        sources = sources_of(config, bundled)
        whole, domains, _ = read_all(reader, [_called(sources[0], named[0])] if len(sources) == 1 else sources)
        rows = whole.subset(split_off(whole, domains, config, seed).val)
    else:
        source = reader.read(_called(val_from, named[0]))
        rows, domains = source.rows, source.domains
    if config.domains is not None:
        there = [domains[d] for d in rows.domains.unique().tolist()]
        rows, _ = of_domains(rows, domains, config.domains)
        domains = [name for name in domains if name in config.domains]
        if not len(rows):
            raise DataError(f"no row is of the run's data.domains, {names_of(config.domains)}, but {names_of(there)}")
    found = EvaluationRows(rows=rows, domains=domains, reports=reader.reports, data_hashes=reader.hashes)
    return found.first_of_each_domain(config.val_rows_per_domain).dealt_as(config).first_of_each_domain(limit)


def _called(source: Source, key: str | None) -> Source:
    """The source under the name that the user gives it by."""
    return source if key is None else replace(source, key=key)
