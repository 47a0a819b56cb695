"""Tokenised rows, held as flat tensors: no Python object for each row, and nothing to copy into a worker process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.utils.data import Dataset

from lmoe.ops.lengths import opening_length


@dataclass(slots=True, frozen=True)
class EncodedRow:
    """One tokenised row of n tokens.

    Args:
        input_ids: (n,) int32.
        is_label: (n,) bool, the tokens to be learnt; what is at position 0 is predicted by nothing and never counts.
        domain: index into the list of domains.
        cluster: that its prompt was put into; -1: none.
        second: of a pair of answers the token at which prompt and rejected answer begin, behind prompt and chosen
            answer; 0: the row is one sequence.
        good: whether its answer is a good one; False only for what a data set marks as bad.
    """

    input_ids: Tensor
    is_label: Tensor
    domain: int
    cluster: int = -1
    second: int = 0
    good: bool = True

    def __len__(self) -> int:
        return len(self.input_ids)

    def pair(self) -> tuple[EncodedRow, EncodedRow]:
        """Returns prompt and chosen answer, and prompt and rejected answer, of a row that is a pair."""
        assert self.second
        ids, labels = self.input_ids, self.is_label
        chosen = EncodedRow(ids[: self.second], labels[: self.second], self.domain, self.cluster)
        return chosen, EncodedRow(ids[self.second :], labels[self.second :], self.domain, self.cluster)


def opening(row: EncodedRow) -> int:
    """Tokens of a row that are its prompt: those before its first label, or the head of a plain text."""
    first = int(row.is_label.int().argmax())
    return first or opening_length(len(row))


def row_digest(input_ids: np.ndarray) -> int:
    """Number by which equal rows, or equal parts of rows, are found, of 64 bits with a sign.

    Args:
        input_ids: (n,) int32.
    """
    return int(np.uint64(xxhash.xxh3_64_intdigest(input_ids.tobytes())).astype(np.int64))


@dataclass(slots=True, frozen=True)
class Tokens:
    """Tokens of rows behind one another; may be mapped from disk.

    Args:
        input_ids: (M,) int32.
        is_label: (M,) bool.
    """

    input_ids: Tensor
    is_label: Tensor


@dataclass(slots=True, frozen=True, kw_only=True)
class EncodedRows(Dataset[EncodedRow]):
    """N rows, each a span of tokens; a choice of rows shares the tokens with all others.

    Args:
        tokens: of one source or several.
        source: (N,) int64, index into `tokens`.
        starts: (N,) int64, first token of each row.
        lengths: (N,) int64, tokens of each row.
        label_counts: (N,) int64, tokens of each row that carry a label: the first token of a row never does.
        domains: (N,) int64, index into the list of domains.
        digests: (N,) int64, equal for rows of equal tokens.
        places: (N, 2) int64: index of the file in its source, and number of the row in it.
        seconds: (N,) int64 `second` of each row.
        good: (N,) int64, 0 for an answer that is marked as bad, else 1.
        clusters: (N,) int64 cluster of each row's prompt; None: they were put into none.
    """

    tokens: tuple[Tokens, ...]
    source: Tensor
    starts: Tensor
    lengths: Tensor
    label_counts: Tensor
    domains: Tensor
    digests: Tensor
    places: Tensor
    seconds: Tensor
    good: Tensor
    clusters: Tensor | None = None

    def __len__(self) -> int:
        return len(self.domains)

    def __getitem__(self, index: int) -> EncodedRow:
        if not 0 <= index < len(self):
            raise IndexError(index)
        tokens, start = self.tokens[int(self.source[index])], int(self.starts[index])
        place = slice(start, start + int(self.lengths[index]))
        cluster = -1 if self.clusters is None else int(self.clusters[index])
        return EncodedRow(
            tokens.input_ids[place],
            tokens.is_label[place],
            int(self.domains[index]),
            cluster,
            int(self.seconds[index]),
            bool(self.good[index]),
        )

    def __iter__(self) -> Iterator[EncodedRow]:
        return (self[index] for index in range(len(self)))

    def label_tokens(self) -> int:
        """Tokens that carry a label, over all rows."""
        return int(self.label_counts.sum())

    def subset(self, indices: Sequence[int] | Tensor) -> EncodedRows:
        """The chosen rows, in the order of `indices`, which may name a row twice."""
        chosen = torch.as_tensor(indices, dtype=torch.long)
        clusters = None if self.clusters is None else self.clusters[chosen]
        return replace(self, clusters=clusters, **{name: getattr(self, name)[chosen] for name in BY_ROW})

    def with_domains(self, new_index: Sequence[int]) -> EncodedRows:
        """The same rows where domain d has become new_index[d]."""
        table = torch.tensor(list(new_index), dtype=torch.long)
        return replace(self, domains=table[self.domains])

    def preferred(self) -> EncodedRows:
        """The same rows where of a pair of answers only prompt and chosen answer are left."""
        if not bool(self.seconds.any()):
            return self
        lengths = torch.where(self.seconds > 0, self.seconds, self.lengths)
        chosen = replace(self, lengths=lengths, seconds=torch.zeros_like(self.seconds))
        counts = torch.tensor([int(row.is_label[1:].sum()) for row in chosen], dtype=torch.long)
        digests = torch.tensor([row_digest(row.input_ids.numpy()) for row in chosen], dtype=torch.long)
        return replace(chosen, label_counts=counts, digests=digests)

    @staticmethod
    def joined(parts: Sequence[EncodedRows]) -> EncodedRows:
        """The rows of all parts behind one another."""
        shifts = np.cumsum([0, *(len(part.tokens) for part in parts)])[:-1]
        shifted = [replace(part, source=part.source + int(by)) for part, by in zip(parts, shifts, strict=True)]
        columns = {name: torch.cat([getattr(part, name) for part in shifted]) for name in BY_ROW}
        return EncodedRows(tokens=tuple(tokens for part in parts for tokens in part.tokens), **columns)

    @staticmethod
    def of(rows: Iterable[EncodedRow]) -> EncodedRows:
        """Rows behind one another."""
        kept = list(rows)
        lengths = torch.tensor([len(row) for row in kept], dtype=torch.long)
        return EncodedRows(
            tokens=(
                Tokens(
                    torch.cat([torch.empty(0, dtype=torch.int32), *(row.input_ids for row in kept)]),
                    torch.cat([torch.empty(0, dtype=torch.bool), *(row.is_label for row in kept)]),
                ),
            ),
            source=torch.zeros(len(kept), dtype=torch.long),
            starts=lengths.cumsum(0) - lengths,
            lengths=lengths,
            label_counts=torch.tensor([int(row.is_label[1:].sum()) for row in kept], dtype=torch.long),
            domains=torch.tensor([row.domain for row in kept], dtype=torch.long),
            digests=torch.tensor([row_digest(row.input_ids.numpy()) for row in kept], dtype=torch.long),
            places=torch.tensor([(0, number) for number in range(len(kept))], dtype=torch.long).reshape(-1, 2),
            seconds=torch.tensor([row.second for row in kept], dtype=torch.long),
            good=torch.tensor([row.good for row in kept], dtype=torch.long),
        )


BY_ROW = ("source", "starts", "lengths", "label_counts", "domains", "digests", "places", "seconds", "good")
"""Fields of EncodedRows that hold a value for each row, clusters aside."""
