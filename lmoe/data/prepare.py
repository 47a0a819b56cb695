"""From a data config to tokenised training and validation rows, and a report of what became of them."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lmoe.data.cache import cache_file, cache_folder, cache_key, load_source, save_source
from lmoe.data.encode import EncodedSource, Encoder, cut_reason
from lmoe.data.encoded import EncodedRows
from lmoe.data.pack import PackedRows, packing_supported
from lmoe.data.report import PrepareReport, SourceReport, split_report
from lmoe.data.rows import Row, data_files, read_rows
from lmoe.data.split import first_of_each, split_rows
from lmoe.data.template import ChatTemplate
from lmoe.errors import DataError
from lmoe.schema.data import DataConfig

BUNDLED = "bundled"


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
    reader = _Reader(config, tokenizer)
    source = reader.read(str(bundled / "train") if config.path == BUNDLED else config.path, "data.path")
    val_path = config.val_path or (BUNDLED if config.path == BUNDLED else None)
    if val_path is None:
        names = [source.domains[i] for i in source.rows.domains.tolist()]
        chosen, held_out = split_rows(names, config.val_fraction, seed)
        train, val, domains = source.rows.subset(chosen), source.rows.subset(held_out), source.domains
    else:
        other = reader.read(str(bundled / "val") if val_path == BUNDLED else val_path, "data.val_path")
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


class _Reader:
    """Reads sources, and keeps account of them."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.template = ChatTemplate.of(tokenizer, config.chat_template)
        self.reports: list[SourceReport] = []
        self.hashes: dict[str, str] = {}

    def read(self, path: str, key_name: str) -> EncodedSource:
        """The usable rows of one source, from the cache if they are there."""
        rows, content = self._content(path)
        key = cache_key(content, self.tokenizer, self.template.source, self.config.max_length)
        file = cache_file(cache_folder(self.config.cache_dir), key)
        source = load_source(file, key)
        hit, stored = source is not None, True
        if source is None:
            encoder = Encoder(self.tokenizer, self.template, self.config.max_length)
            source = encoder.encode(read_rows(path) if rows is None else rows)
            self._check(source, path, key_name)
            stored = save_source(source, file, key)
        self.reports.append(
            SourceReport(
                path=path,
                read=source.read,
                kept=len(source.rows),
                dropped=source.dropped,
                truncated=source.truncated,
                cache_hit=hit,
                cache_path=str(file) if stored else None,
            )
        )
        return source

    def _content(self, path: str) -> tuple[list[Row] | None, str]:
        """Digest of the rows: of local files without parsing them, of a hub data set after reading it."""
        local = Path(path).expanduser()
        if not local.exists():
            rows = read_rows(path)
            parts = [{**asdict(row), "where": None} for row in rows]
            self.hashes[path] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
            return rows, self.hashes[path]
        digests = []
        for file in data_files(local):
            self.hashes[str(file)] = _file_digest(file)
            digests.append((file.name if local.is_dir() else "", self.hashes[str(file)]))
        return None, hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def _check(self, source: EncodedSource, path: str, key_name: str) -> None:
        if len(source.rows):
            return
        counts = "; ".join(f"{count} {reason}" for reason, count in source.dropped.items())
        remedy = "change the rows"
        if cut_reason(self.config.max_length) in source.dropped:
            remedy = f"raise data.max_length (now {self.config.max_length}), or shorten the rows"
        raise DataError(f"{key_name}={path}: all {source.read} rows were dropped ({counts}); {remedy}")


def _file_digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
