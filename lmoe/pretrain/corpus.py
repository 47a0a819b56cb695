"""Text for pre-training: domains of plain text and chats, a held-out tail of each, packed into windows."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from lmoe.data.rows.row import Row
from lmoe.data.rows.sources import Source, open_source
from lmoe.errors import DataError
from lmoe.files.places import cache_folder
from lmoe.files.small_file import ordinary_size
from lmoe.ops.labels import IGNORE

Encode = Callable[[str], list[int]]
CHATS = "chats"
"""What the chats are called beside the domains."""
BORDERS = ("\n\n", "\n", " ")
"""Where a text may be parted, the best first: paragraphs, lines, words."""


@dataclass(slots=True, frozen=True)
class DomainText:
    """One domain's text, split once and for all.

    Args:
        name: domain.
        train: text to learn from.
        held_out: the tail, never trained on.
        file: where it is.
        digest: SHA-256 of the file.
    """

    name: str
    train: str
    held_out: str
    file: str
    digest: str


def read_corpus(
    path: str, held_out_share: float, held_out_min_bytes: int, *, with_chats: bool = False
) -> list[DomainText]:
    """Every <domain>.txt(.gz) of a folder, its tail kept out from a border of paragraphs, lines or words on. Hidden
    files do not count.

    Args:
        with_chats: whether the domain CHATS is taken.

    Raises:
        DataError: no such folder, no text files in it, or two of one domain.
    """
    files = sorted(
        f
        for f in Path(path).expanduser().glob("*")
        if f.name.endswith((".txt", ".txt.gz")) and not f.name.startswith(".")
    )
    if not files:
        raise DataError(f"corpus.path={path}: no <domain>.txt or <domain>.txt.gz file in this folder")
    taken = {CHATS: "corpus.chats_path"} if with_chats else {}
    for file in files:
        domain = _domain(file)
        if domain in taken:
            raise DataError(f"{file}: {taken[domain]} gives the domain {domain!r} too; rename the file")
        taken[domain] = file.name
    return [_split(file, held_out_share, held_out_min_bytes) for file in files]


def _domain(file: Path) -> str:
    return file.name.split(".")[0]


def _split(file: Path, share: float, min_bytes: int) -> DomainText:
    try:
        ordinary_size(file)
        stored = file.read_bytes()
        raw = gzip.decompress(stored) if file.suffix == ".gz" else stored
        text = raw.decode("utf-8").replace("\r\n", "\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}; it must hold UTF-8 text") from None
    tail = max(int(len(text) * share), min_bytes)
    if tail >= len(text) // 2:
        raise DataError(f"{file}: {len(text)} characters are too few to keep {tail} out")
    border = _border(text, len(text) - tail, tail)
    return DomainText(
        name=_domain(file),
        train=text[:border],
        held_out=text[border:],
        file=str(file),
        digest=hashlib.sha256(stored).hexdigest(),
    )


def _border(text: str, last: int, within: int) -> int:
    """The last place at which a text may be parted, from `last - within` to `last`; `last` where there is none."""
    for mark in BORDERS:
        if (found := text.rfind(mark, last - within, last)) >= 0:
            return found + len(mark)
    return last


def read_chats(path: str, exclude: str | None) -> tuple[list[Row], dict[str, str]]:
    """Chat rows, without those of `exclude`, domains taking turns, in an order fixed by their content; and the SHA-256
    of each file of both, by path.

    Raises:
        DataError: rows that cannot be read, or none.
    """
    chats, hashes = _read("corpus.chats_path", path)
    others, hashes_of_others = _read("corpus.chats_exclude", exclude) if exclude else ([], {})
    seen = {_key(row) for row in others}
    ranked: dict[str, list[Row]] = {}
    for row in chats:
        if row.messages and _key(row) not in seen:
            ranked.setdefault(row.domain, []).append(row)
    for rows in ranked.values():
        rows.sort(key=_key)
    longest = max((len(rows) for rows in ranked.values()), default=0)
    in_turn = [rows[i] for i in range(longest) for rows in ranked.values() if i < len(rows)]
    return in_turn, hashes | hashes_of_others


def _read(key: str, path: str) -> tuple[list[Row], dict[str, str]]:
    """All rows that a key names, and the SHA-256 of each file by path."""
    opened = open_source(Source(key=key, path=path), cache_folder(None), all_splits=True)
    rows = list(opened.rows())
    if not rows:
        raise DataError(f"{key}={path}: no rows")
    return rows, opened.hashes


def _key(row: Row) -> str:
    return hashlib.sha256(json.dumps(row.messages, sort_keys=True).encode()).hexdigest()


def encode_stream(texts: Iterable[str], encode: Encode) -> np.ndarray:
    """All texts behind one another as token ids, (N,) uint16 or uint32."""
    pieces = [np.asarray(encode(text), dtype=np.uint32) for text in texts]
    stream = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint32)
    return stream.astype(np.uint16) if len(stream) == 0 or stream.max() < 2**16 else stream


def chats_within(rows: list[Row], render: Callable[[Row], str], encode: Encode, budget: int) -> np.ndarray:
    """Token ids of as many chats as fit into `budget` tokens, (N,)."""
    pieces, total = [], 0
    for row in rows:
        ids = encode(render(row))
        if total + len(ids) > budget:
            break
        pieces.append(np.asarray(ids, dtype=np.uint32))
        total += len(ids)
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint32)


class Windows(Dataset):
    """Windows of length + 1 tokens, neighbours sharing one, so that every token but the first is predicted once.

    Args:
        streams: token ids by domain, each (N,).
        length: predicted tokens of one window.
        keep_tail: also yield the last, shorter window of each domain (padded with label -100).
    """

    def __init__(self, streams: dict[str, np.ndarray], length: int, *, keep_tail: bool) -> None:
        self.domains, self.streams, self.length = list(streams), list(streams.values()), length
        self.windows: list[tuple[int, int]] = []
        for domain, stream in enumerate(self.streams):
            predicted = len(stream) - 1
            count = -(-predicted // length) if keep_tail else predicted // length
            self.windows += [(domain, i * length) for i in range(count)]
        if not self.windows:
            raise DataError(f"corpus: no domain has {length + 1} tokens; lower corpus.sequence_length")

    def digests(self) -> list[str]:
        """Each domain with the SHA-256 of its tokens."""
        named = zip(self.domains, self.streams, strict=True)
        return [f"{domain} {hashlib.sha256(stream.tobytes()).hexdigest()}" for domain, stream in named]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        domain, start = self.windows[index]
        ids = torch.from_numpy(self.streams[domain][start : start + self.length + 1].astype(np.int64))
        missing = self.length + 1 - len(ids)
        inputs = torch.nn.functional.pad(ids, (0, missing))[:-1]
        labels = torch.nn.functional.pad(ids, (0, missing), value=IGNORE)[1:]
        return {"input_ids": inputs, "labels": labels, "domain": torch.tensor(domain)}
