"""Tokenised rows on disk, found again by what they were made from.

A file that is torn, damaged or of another version is as good as none; a folder that cannot be written costs a warning.
"""

import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmoe.data.encode import EncodedSource
from lmoe.data.encoded import EncodedRows

FORMAT_VERSION = 1
FIELDS = ("input_ids", "is_label", "offsets", "domains")
METADATA_KEY = "lmoe"
"""One entry only: with several, the bytes of a safetensors file are not reproducible."""
UNREADABLE = (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError, OverflowError)


def cache_folder(cache_dir: str | None) -> Path:
    """data.cache_dir, or lmoe/ in the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "lmoe"


def cache_key(content: str, tokenizer: PreTrainedTokenizerBase, template: str | None, max_length: int) -> str:
    """SHA-256 of everything that tokenised rows depend on.

    Args:
        content: digest of the rows.
        tokenizer: its vocabulary, merges, normalisation and special tokens count; padding and truncation do not.
        template: the chat template's text.
        max_length: tokens.
    """
    parts = {
        "format_version": FORMAT_VERSION,
        "content": content,
        "tokenizer": _tokenizer_digest(tokenizer),
        "template": template,
        "max_length": max_length,
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
    return folder / f"rows-{key[:32]}.safetensors"


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()


def load_source(file: Path, key: str) -> EncodedSource | None:
    """What was stored under a key, or None if there is nothing usable."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in FIELDS}
            about = json.loads(stored.metadata()[METADATA_KEY])
        if about["key"] != key or about["checksum"] != _checksum(tensors):
            return None
        return EncodedSource(
            rows=EncodedRows(**{field: tensors[field] for field in FIELDS}),
            domains=list(about["domains"]),
            read=int(about["read"]),
            dropped=dict(about["dropped"]),
            truncated=int(about["truncated"]),
        )
    except UNREADABLE:
        return None


def save_source(source: EncodedSource, file: Path, key: str) -> bool:
    """Store rows under a key, all or nothing; False (and a warning) if the folder cannot be written."""
    rows = source.rows
    tensors: dict[str, Tensor] = dict(
        zip(FIELDS, (rows.input_ids, rows.is_label, rows.offsets, rows.domains), strict=True)
    )
    about = {
        "key": key,
        "checksum": _checksum(tensors),
        "domains": source.domains,
        "read": source.read,
        "dropped": source.dropped,
        "truncated": source.truncated,
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".writing-") as folder:
            part = Path(folder) / file.name
            save_file(tensors, part, metadata={METADATA_KEY: json.dumps(about, sort_keys=True)})
            os.replace(part, file)
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"tokenised rows are not cached, the run goes on: {file} cannot be written ({error}); see data.cache_dir",
            stacklevel=2,
        )
        return False
    return True
