"""The rows that a trained model is measured on: those that the run validated on, or others."""

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lmoe.config.data import DataConfig
from lmoe.data.domains import dealt_anew, names_of, of_domains
from lmoe.data.encoded import EncodedRows
from lmoe.data.prepare import read_all, split_off
from lmoe.data.reader import Reader
from lmoe.data.report import SourceReport
from lmoe.data.rows.sources import sources_of, val_source
from lmoe.data.split import first_of_each
from lmoe.errors import DataError


@dataclass(slots=True, kw_only=True)
class EvaluationRows:
    """Rows to measure on.

    Args:
        rows: tokenised, never packed.
        domains: names, rows.domains points into it.
        reports: what was read, dropped and cut, of each source.
        permuted: whether domains were dealt anew, as in the run.
    """

    rows: EncodedRows
    domains: list[str]
    reports: list[SourceReport]
    permuted: bool = False


def prepare_evaluation(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    bundled: Path,
    named: tuple[str, str],
    limit: int = 0,
) -> EvaluationRows:
    """The validation rows of a config; its training rows are read only where the others are split off from them.

    Args:
        seed: of the split.
        bundled: folder with train/ and val/, what path "bundled" means.
        named: what the user calls the rows and the length, for messages.
        limit: rows of each domain, the first ones of those of the config; 0: all.

    Raises:
        DataError: rows that cannot be read or masked, or none of them usable.
    """
    reader = Reader(config, tokenizer, length_name=named[1], has_keys=False)
    val_from = val_source(config, bundled)
    if val_from is None:
        sources = sources_of(config, bundled)
        whole, domains, _ = read_all(reader, [replace(sources[0], key=named[0])] if len(sources) == 1 else sources)
        rows = whole.subset(split_off(whole, domains, config, seed)[1])
    else:
        source = reader.read(replace(val_from, key=named[0]))
        rows, domains = source.rows, source.domains
    if config.domains is not None:
        there = [domains[d] for d in rows.domains.unique().tolist()]
        rows, _ = of_domains(rows, domains, config.domains)
        domains = [name for name in domains if name in config.domains]
        if not len(rows):
            raise DataError(f"no row is of the run's data.domains, {names_of(config.domains)}, but {names_of(there)}")
    if config.val_rows_per_domain:
        rows = rows.subset(first_of_each(rows.domains.tolist(), config.val_rows_per_domain))
    if config.permute_domains:
        rows = dealt_anew(rows)
    if limit:
        rows = rows.subset(first_of_each(rows.domains.tolist(), limit))
    return EvaluationRows(rows=rows, domains=domains, reports=reader.reports, permuted=config.permute_domains)
