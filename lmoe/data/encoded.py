"""Tokenised rows, held as flat tensors: no Python object for each row, and nothing to copy into a worker process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(slots=True, frozen=True)
class EncodedRow:
    """One tokenised row of n tokens.

    Args:
        input_ids: (n,) int32.
        is_label: (n,) bool, the tokens to be learnt; what is at position 0 is predicted by nothing and never counts.
        domain: index into the list of domains.
    """

    input_ids: Tensor
    is_label: Tensor
    domain: int

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(slots=True, frozen=True)
class EncodedRows(Dataset[EncodedRow]):
    """N rows of M tokens in all.

    Args:
        input_ids: (M,) int32.
        is_label: (M,) bool.
        offsets: (N + 1,) int64, row i is offsets[i] to offsets[i + 1].
        domains: (N,) int64, index into the list of domains.
    """

    input_ids: Tensor
    is_label: Tensor
    offsets: Tensor
    domains: Tensor

    def __len__(self) -> int:
        return len(self.domains)

    def __getitem__(self, index: int) -> EncodedRow:
        if not 0 <= index < len(self):
            raise IndexError(index)
        tokens = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return EncodedRow(self.input_ids[tokens], self.is_label[tokens], int(self.domains[index]))

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, (N,) int64."""
        return self.offsets.diff()

    @property
    def label_counts(self) -> Tensor:
        """Tokens of each row that carry a label, (N,) int64: the first token of a row never does."""
        sums = torch.cat([torch.zeros(1, dtype=torch.long), self.is_label.long().cumsum(0)])
        return sums[self.offsets].diff() - self.is_label[self.offsets[:-1]].long()

    def label_tokens(self) -> int:
        """Tokens that carry a label, over all rows."""
        return int(self.label_counts.sum())

    def subset(self, indices: Sequence[int] | Tensor) -> EncodedRows:
        """A copy of the chosen rows, in the order of `indices`."""
        return EncodedRows.of([self[int(i)] for i in indices])

    def with_domains(self, new_index: Sequence[int]) -> EncodedRows:
        """The same rows where domain d has become new_index[d]."""
        table = torch.tensor(list(new_index), dtype=torch.long)
        return EncodedRows(self.input_ids, self.is_label, self.offsets, table[self.domains])

    @staticmethod
    def of(rows: Iterable[EncodedRow]) -> EncodedRows:
        """Rows behind one another."""
        kept = list(rows)
        offsets = torch.tensor([0, *(len(row) for row in kept)], dtype=torch.long).cumsum(0)
        return EncodedRows(
            input_ids=torch.cat([torch.empty(0, dtype=torch.int32), *(row.input_ids for row in kept)]),
            is_label=torch.cat([torch.empty(0, dtype=torch.bool), *(row.is_label for row in kept)]),
            offsets=offsets,
            domains=torch.tensor([row.domain for row in kept], dtype=torch.long),
        )
