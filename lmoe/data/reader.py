"""Read one source of rows after another: from the cache, or parsed and tokenised, in several processes if need be."""

import os
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lmoe.config.data import DataConfig
from lmoe.data.cache import cache_file, cache_key, collect, load_source
from lmoe.data.chats.template import ChatTemplate
from lmoe.data.encode import Chunk, EncodedSource, Encoder, cut_reason
from lmoe.data.report import SourceReport
from lmoe.data.rows.sources import Opened, Part, Source, open_source
from lmoe.errors import DataError, LmoeError
from lmoe.files.places import cache_folder
from lmoe.vocabulary import OnBadRow, RowKind

BYTES_FOR_PROCESSES = 8_000_000
"""A smaller source is tokenised in one process, in however many files: others would take longer to start."""
SHOWN_AFTER = 2.0
"""Seconds after which tokenising shows how far it is."""


class Reader:
    """Reads sources, and keeps account of them.

    Args:
        config: length, template and cache.
        tokenizer: of the backbone.
        length_name: what the user calls data.max_length, for messages.
        num_embeddings: of the backbone; None: not known.
        has_keys: whether the user has the keys of the section, for advice in messages.
        kind: of what is learnt from the rows.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        length_name: str = "data.max_length",
        num_embeddings: int | None = None,
        *,
        has_keys: bool = True,
        kind: RowKind = RowKind.answers,
    ) -> None:
        self.has_keys, self.kind = has_keys, kind
        self.config, self.tokenizer, self.length_name = config, tokenizer, length_name
        self.num_embeddings = num_embeddings
        self.template = ChatTemplate.of_data(tokenizer, config)
        self.reports: list[SourceReport] = []
        self.hashes: dict[str, str] = {}

    def read(self, source: Source) -> EncodedSource:
        """The usable rows of one source, from the cache if they are there.

        Raises:
            DataError: rows that cannot be read, tokenised or used.
        """
        opened = open_source(source, cache_folder(self.config.cache_dir), kind=self.kind)
        self.hashes |= opened.hashes
        found, report = self._encoded(source, opened, None)
        if self.num_embeddings is not None and found.account.largest_token >= self.num_embeddings:
            found, report = self._encoded(source, opened, self.num_embeddings)
        self.reports.append(report)
        return found

    def encoder(self) -> Encoder:
        """Makes tokens of rows, of which those that the backbone has no embedding for cannot be used."""
        return self._encoder(self.num_embeddings)

    def _encoder(self, num_embeddings: int | None) -> Encoder:
        config = self.config
        return Encoder(
            self.tokenizer, self.template, config.max_length, num_embeddings, config.prompt_prefix, self.kind
        )

    def key(self, source: Source, opened: Opened, num_embeddings: int | None = None) -> str:
        """Digest of all that the tokenised rows of a source depend on."""
        how = {
            "domain": source.domain,
            "columns": dict(source.columns),
            "num_embeddings": num_embeddings,
            "prompt_prefix": self.config.prompt_prefix,
            "kind": None if self.kind is RowKind.answers else str(self.kind),
        }
        return cache_key(
            opened.content,
            self.tokenizer,
            self.template.identity,
            self.config.max_length,
            {name: value for name, value in how.items() if value},
        )

    def _encoded(
        self, source: Source, opened: Opened, num_embeddings: int | None
    ) -> tuple[EncodedSource, SourceReport]:
        """The rows from the cache, or tokenised now.

        Args:
            num_embeddings: rows with tokens beyond them cannot be used; None: all can.
        """
        key = self.key(source, opened, num_embeddings)
        file = cache_file(cache_folder(self.config.cache_dir), key)

        def check(found: EncodedSource) -> None:
            self._check(found, source)

        stored, kept = load_source(file, key), True
        if stored is not None:
            check(stored)
            found = stored
        else:
            found, kept = collect(self._chunks(self._encoder(num_embeddings), opened), file, key, check)
        report = SourceReport(
            path=source.path,
            key=key,
            account=found.account,
            kept=len(found.rows),
            unread=opened.unread,
            cache_hit=stored is not None,
            cache_path=str(file) if kept else None,
            files=opened.places,
        )
        return found, report

    def _chunks(self, encoder: Encoder, opened: Opened) -> Iterator[Chunk]:
        """All rows as tokens, in their order, with a line of progress where it takes long."""
        with tqdm(desc="tokenising", unit=" rows", delay=SHOWN_AFTER, leave=False, disable=None) as progress:
            processes = min(self.config.num_proc or torch.get_num_threads(), len(opened.parts))
            size = sum(part.records.size for part in opened.parts)
            enough = self.config.num_proc is not None or size >= BYTES_FOR_PROCESSES
            chunks = (
                _in_processes(opened.parts, encoder, processes)
                if processes > 1 and enough
                else (chunk for part in opened.parts for chunk in encoder.chunks(part.rows(), part.place))
            )
            for chunk in chunks:
                progress.update(chunk.account.read)
                yield chunk

    def _check(self, found: EncodedSource, source: Source) -> None:
        if self.config.on_bad_row is OnBadRow.error:
            found.account.check(advise=self.has_keys)
        if len(found.rows):
            return
        if not found.account.read:
            raise DataError(f"{source.named}: no rows")
        counts = [f"{count} {reason}" for reason, count in sorted(found.account.dropped.items())]
        if found.account.bad:
            counts.append(f"{found.account.bad} cannot be used, such as {found.account.first_bad[0]}")
        remedy = "change the rows"
        if cut_reason(self.config.max_length) in found.account.dropped:
            remedy = f"raise {self.length_name} (now {self.config.max_length}), or shorten the rows"
        raise DataError(f"{source.named}: all {found.account.read} rows were dropped ({'; '.join(counts)}); {remedy}")


def _in_processes(parts: list[Part], encoder: Encoder, processes: int) -> Iterator[Chunk]:
    """The same chunks in the same order; `datasets` deals the parts to processes."""
    import datasets  # heavy, and only large sources need it

    stream: Any = datasets.IterableDataset.from_generator(
        _encoded, gen_kwargs={"parts": list(enumerate(parts)), "encoder": encoder}
    )
    given = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork of threads waits for ever
    try:
        turn, early = 0, defaultdict[int, deque[Chunk | None]](deque)
        for found in DataLoader(stream, batch_size=None, num_workers=processes):
            if isinstance(found["chunk"], LmoeError):
                raise found["chunk"]
            early[found["part"]].append(found["chunk"])
            while early[turn]:
                chunk = early[turn].popleft()
                if chunk is None:
                    del early[turn]
                    turn += 1
                else:
                    yield chunk
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if given is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = given


def _encoded(parts: list[tuple[int, Part]], encoder: Encoder) -> Iterator[dict[str, Any]]:
    """Chunks of each part, and None behind its last; or why it cannot be read."""
    for number, part in parts:
        try:
            for chunk in encoder.chunks(part.rows(), part.place):
                yield {"part": number, "chunk": chunk}
        except LmoeError as error:
            yield {"part": number, "chunk": error}
        yield {"part": number, "chunk": None}
