"""Read one source of rows after another: from the cache, or parsed and tokenised."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lmoe.config.data import DataConfig
from lmoe.data.cache import cache_file, cache_folder, cache_key, load_source, save_source
from lmoe.data.encode import EncodedSource, Encoder, cut_reason
from lmoe.data.report import SourceReport
from lmoe.data.row import Row
from lmoe.data.rows import data_files, read_rows
from lmoe.data.template import ChatTemplate
from lmoe.errors import DataError
from lmoe.files.small_file import ordinary_size

BUNDLED = "bundled"
"""What data.path calls the rows that ship with lmoe."""


def val_source(config: DataConfig, bundled: Path) -> str | None:
    """Where the validation rows of a config are; None: they are split off its training rows.

    Args:
        bundled: folder with val/, what path "bundled" means.
    """
    path = config.val_path or (BUNDLED if config.path == BUNDLED else None)
    return str(bundled / "val") if path == BUNDLED else path


class Reader:
    """Reads sources, and keeps account of them.

    Args:
        config: length, template and cache.
        tokenizer: of the backbone.
        length_name: what the user calls data.max_length, for messages.
    """

    def __init__(
        self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, length_name: str = "data.max_length"
    ) -> None:
        self.config, self.tokenizer, self.length_name = config, tokenizer, length_name
        self.template = ChatTemplate.of_data(tokenizer, config)
        self.reports: list[SourceReport] = []
        self.hashes: dict[str, str] = {}

    def read(self, path: str, key_name: str) -> EncodedSource:
        """The usable rows of one source, from the cache if they are there."""
        rows, content = self._content(path)
        key = cache_key(content, self.tokenizer, self.template.identity, self.config.max_length)
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
                key=key,
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
            self.hashes[path] = hashlib.sha256(json.dumps(parts, sort_keys=True, default=sorted).encode()).hexdigest()
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
            remedy = f"raise {self.length_name} (now {self.config.max_length}), or shorten the rows"
        raise DataError(f"{key_name}={path}: all {source.read} rows were dropped ({counts}); {remedy}")


def _file_digest(file: Path) -> str:
    try:
        ordinary_size(file)
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
