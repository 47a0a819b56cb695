"""Tokenised rows on disk, found again by what they were made from, and mapped into memory.

A file that is torn, damaged or of another version is as good as none; a folder that cannot be written costs a warning.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmoe.data.account import Account
from lmoe.data.domains import domain_places
from lmoe.data.encode import Chunk, EncodedSource
from lmoe.data.encoded import EncodedRows, Tokens
from lmoe.errors import DataError
from lmoe.files.places import is_file
from lmoe.files.writing_folder import writing_folder

KEY_VERSION = 1
"""Of what the key says; older runs know their rows by it."""
FILE_VERSION = 5
"""Of a file, and of what is made of records: a file of another version is not read."""
TOKENS = {"input_ids": torch.int32, "is_label": torch.bool}
"""Tensors with an entry for each token."""
ROWS = ("lengths", "label_counts", "digests", "domains", "places", "seconds", "good")
"""Tensors with an entry for each row."""
METADATA_KEY = "lmoe"
"""One entry only: with several, the bytes of a safetensors file are not reproducible."""
UNREADABLE = (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError, OverflowError)


def cache_key(
    content: str,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    max_length: int,
    source: dict[str, object] | None = None,
) -> str:
    """SHA-256 of everything that tokenised rows depend on.

    Args:
        content: digest of the rows.
        tokenizer: its vocabulary, merges, normalisation and special tokens count; padding and truncation do not.
        template: the chat template's text.
        max_length: tokens.
        source: how the source is read, where that is not the usual way.
    """
    parts = {
        "format_version": KEY_VERSION,
        "content": content,
        "tokenizer": _tokenizer_digest(tokenizer),
        "template": template,
        "max_length": max_length,
        **({"source": source} if source else {}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        del backend["padding"], backend["truncation"]
    else:
        backend = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    parts = [backend, sorted(tokenizer.special_tokens_map.items()), sorted(tokenizer.all_special_tokens)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def cache_file(folder: Path, key: str) -> Path:
    """Where the rows of a key are."""
    return folder / f"rows-{key[:32]}.v{FILE_VERSION}.safetensors"


def load_source(file: Path, key: str) -> EncodedSource | None:
    """What was stored under a key, or None if there is nothing usable."""
    if (found := load_tensors(file, key, (*TOKENS, *ROWS))) is None:
        return None
    tensors, about = found
    try:
        return _source_of(tensors, list(about["domains"]), Account.of_json(about["account"]))
    except UNREADABLE:
        return None


def load_tensors(file: Path, key: str, names: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors that were stored under a key, and what was said of them; None where there is nothing usable."""
    if not is_file(file):  # NOTE nor in a folder that may not be read
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in names}
            about = json.loads(stored.metadata()[METADATA_KEY])
        return (tensors, about) if about["key"] == key and about["checksum"] == _checksum(tensors) else None
    except UNREADABLE:
        return None


def save_tensors(tensors: dict[str, Tensor], about: dict[str, Any], part: Path, file: Path, key: str) -> None:
    """Store tensors under a key, all or nothing.

    Args:
        about: what is said of them, for JSON.
        part: where they are written first, on the same file system.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    said = json.dumps({"key": key, "checksum": _checksum(tensors), **about}, sort_keys=True)
    save_file(tensors, part, metadata={METADATA_KEY: said})
    os.replace(part, file)


def _source_of(tensors: dict[str, Tensor], domains: list[str], account: Account) -> EncodedSource:
    lengths = tensors["lengths"]
    rows = EncodedRows(
        tokens=(Tokens(tensors["input_ids"], tensors["is_label"]),),
        source=torch.zeros_like(lengths),
        starts=lengths.cumsum(0) - lengths,
        **{name: tensors[name] for name in ROWS},
    )
    return EncodedSource(rows, domains, account)


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()


class Collected:
    """Chunks on their way into the cache: tokens go to files at once, so that memory does not grow with them.

    Args:
        folder: for these files; None: they stay in memory.
        stack: closes them.
    """

    def __init__(self, folder: Path | None, stack: ExitStack) -> None:
        self._folder = folder
        self._blocks: dict[str, list[np.ndarray]] = {name: [] for name in (*TOKENS, *ROWS)}
        self._files: dict[str, BinaryIO] = {}
        if folder is not None:
            self._files = {name: stack.enter_context((folder / name).open("wb")) for name in TOKENS}
        self._domains: dict[str, int] = {}
        self.account = Account()

    def add(self, chunks: Iterable[Chunk]) -> None:
        """Take chunks in the order of their rows."""
        for chunk in chunks:
            self.account.add(chunk.account)
            numbers = [self._domains.setdefault(name, len(self._domains)) for name in chunk.domains]
            places = np.stack([np.full_like(chunk.numbers, chunk.place), chunk.numbers], axis=1)
            columns = {"domains": np.array(numbers, dtype=np.int64), "places": places}
            for name, blocks in self._blocks.items():
                block = columns[name] if name in columns else getattr(chunk, name)
                if name in self._files:
                    block.tofile(self._files[name])
                else:
                    blocks.append(block)

    def source(self) -> EncodedSource:
        """All rows, domains in the order of their names."""
        for file in self._files.values():
            file.close()
        names = sorted(self._domains)
        order = torch.tensor(domain_places(self._domains, names), dtype=torch.long)
        tensors = {name: self._tensor(name) for name in (*TOKENS, *ROWS)}
        tensors["domains"] = order[tensors["domains"]] if len(order) else tensors["domains"]
        return _source_of(tensors, names, self.account)

    def _tensor(self, name: str) -> Tensor:
        kind, shape = TOKENS.get(name, torch.int64), (-1, 2) if name == "places" else (-1,)
        if name in self._files:
            assert self._folder is not None
            file = self._folder / name
            size = file.stat().st_size // kind.itemsize
            if not size:
                return torch.empty(0, dtype=kind)
            return torch.from_file(str(file), shared=True, size=size, dtype=kind)
        blocks = [torch.from_numpy(block) for block in self._blocks[name]]
        return torch.cat([torch.empty(0, dtype=kind), *(block.flatten() for block in blocks)]).reshape(shape)


def save_source(source: EncodedSource, part: Path, file: Path, key: str) -> None:
    """Store rows under a key, all or nothing.

    Args:
        part: where they are written first, on the same file system.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    rows = source.rows
    tensors = {name: getattr(rows.tokens[0], name) for name in TOKENS} | {name: getattr(rows, name) for name in ROWS}
    about = {"domains": source.domains, "account": source.account.to_json()}
    save_tensors(tensors, about, part, file, key)


def collect(
    chunks: Iterable[Chunk], file: Path, key: str, check: Callable[[EncodedSource], None]
) -> tuple[EncodedSource, bool]:
    """The rows of all chunks, written into the cache and mapped from there.

    Args:
        check: raises where the rows are not to be used, and then nothing is written.

    Returns:
        The rows, and whether they are in the cache; where it cannot be written, a warning says so.

    Raises:
        DataError: what `check` raises, or a disk that is full.
    """
    with ExitStack() as stack:
        folder = _writing_folder(file.parent, stack)
        collected = Collected(folder, stack)
        try:
            collected.add(chunks)
            source = collected.source()
        except OSError as error:
            raise DataError(f"data.cache_dir: {file.parent} cannot be written: {error}") from None
        check(source)
        if folder is None:
            return source, False
        try:
            save_source(source, folder / file.name, file, key)
        except (OSError, SafetensorError) as error:
            _warn(file, error)
            return source, False
        return load_source(file, key) or source, True


def _writing_folder(cache: Path, stack: ExitStack) -> Path | None:
    """A folder in the cache that ends with the stack; None where there cannot be one."""
    try:
        return Path(stack.enter_context(writing_folder(cache)))
    except OSError as error:
        _warn(cache, error)
        return None


def _warn(place: Path, error: Exception) -> None:
    warnings.warn(
        f"tokenised rows are not cached, the run goes on: {place} cannot be written ({error}); see data.cache_dir",
        stacklevel=3,
    )
