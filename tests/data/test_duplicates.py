"""Counting rows that say the same."""

import torch

from lmoe.data.duplicates import repeated_rows
from lmoe.data.encoded import EncodedRow, EncodedRows


def rows(*ids: list[int]) -> EncodedRows:
    return EncodedRows.of(
        EncodedRow(torch.tensor(i, dtype=torch.int32), torch.ones(len(i), dtype=torch.bool), n)
        for n, i in enumerate(ids)
    )


def test_a_row_counts_where_an_earlier_one_has_the_same_tokens() -> None:
    assert repeated_rows(rows([1, 2], [3], [1, 2], [1, 2, 3], [1, 2])) == 2
    assert repeated_rows(rows([1, 2], [2, 1], [1], [2])) == 0
    assert repeated_rows(rows()) == 0
