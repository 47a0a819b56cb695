"""From a data config to tokenised training and validation rows, and a report of what became of them."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lmoe.config.data import DataConfig
from lmoe.data.encoded import EncodedRows
from lmoe.data.pack import PackedRows, packing_supported
from lmoe.data.reader import BUNDLED, Reader, val_source
from lmoe.data.report import PrepareReport, split_report
from lmoe.data.split import first_of_each, split_rows
from lmoe.errors import DataError


@dataclass(slots=True, kw_only=True)
class PreparedData:
    """Rows ready for batches.

    Args:
        train: training rows, or with data.packing the sequences they were packed into.
        val: validation rows, never packed.
        domains: sorted names of the domains of both; rows point into it.
        report: what was read, dropped, cut and cached.
    """

    train: EncodedRows | PackedRows
    val: EncodedRows
    domains: list[str]
    report: PrepareReport


def prepare(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    bundled: Path,
    packing_model_type: str | None,
) -> PreparedData:
    """Read, tokenise (or take from the cache), split and pack.

    Args:
        seed: of the split and of the packing.
        bundled: folder with train/ and val/, what path "bundled" means.
        packing_model_type: config.model_type of the backbone; None: not known, packing is not checked.

    Raises:
        DataError: rows that cannot be read or masked, nothing left to learn, or packing that the backbone refuses.
    """
    packing = _packs(config.packing, packing_model_type)
    reader = Reader(config, tokenizer)
    source = reader.read(str(bundled / "train") if config.path == BUNDLED else config.path, "data.path")
    val_path = val_source(config, bundled)
    if val_path is None:
        names = [source.domains[i] for i in source.rows.domains.tolist()]
        chosen, held_out = split_rows(names, config.val_fraction, seed)
        train, val, domains = source.rows.subset(chosen), source.rows.subset(held_out), source.domains
    else:
        other = reader.read(val_path, "data.val_path")
        domains = sorted({*source.domains, *other.domains})
        train, val = (s.rows.with_domains([domains.index(d) for d in s.domains]) for s in (source, other))
    if config.val_rows_per_domain:
        val = val.subset(first_of_each(val.domains.tolist(), config.val_rows_per_domain))
    report = PrepareReport(
        sources=reader.reports,
        train=split_report(train, domains),
        val=split_report(val, domains),
        data_hashes=reader.hashes,
    )
    packed = PackedRows.of(train, config.max_length, seed) if packing else None
    if packed is not None:
        report.train.packed_sequences = len(packed)
        report.train.fill = report.train.tokens / (len(packed) * config.max_length)
    return PreparedData(train=train if packed is None else packed, val=val, domains=domains, report=report)


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
