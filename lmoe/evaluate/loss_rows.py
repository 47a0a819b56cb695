"""The rows that a trained model is measured on: those that the run validated on, or others."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lmoe.config.data import DataConfig
from lmoe.data.encoded import EncodedRows
from lmoe.data.reader import Reader, val_source
from lmoe.data.report import SourceReport
from lmoe.data.split import first_of_each, split_rows


@dataclass(slots=True, kw_only=True)
class EvaluationRows:
    """Rows to measure on.

    Args:
        rows: tokenised, never packed.
        domains: names, rows.domains points into it.
        report: what was read, dropped and cut.
    """

    rows: EncodedRows
    domains: list[str]
    report: SourceReport


def prepare_evaluation(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, bundled: Path, named: tuple[str, str]
) -> EvaluationRows:
    """The validation rows of a config; its training rows are read only where the others are split off from them.

    Args:
        seed: of the split.
        bundled: folder with train/ and val/, what path "bundled" means.
        named: what the user calls the rows and the length, for messages.

    Raises:
        DataError: rows that cannot be read or masked, or none of them usable.
    """
    reader = Reader(config, tokenizer, length_name=named[1])
    val_path = val_source(config, bundled)
    if val_path is None:
        whole = reader.read(config.path, named[0])
        names = [whole.domains[i] for i in whole.rows.domains.tolist()]
        rows, domains = whole.rows.subset(split_rows(names, config.val_fraction, seed)[1]), whole.domains
    else:
        source = reader.read(val_path, named[0])
        rows, domains = source.rows, source.domains
    if config.val_rows_per_domain:
        rows = rows.subset(first_of_each(rows.domains.tolist(), config.val_rows_per_domain))
    return EvaluationRows(rows=rows, domains=domains, report=reader.reports[0])
