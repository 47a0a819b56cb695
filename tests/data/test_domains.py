"""Domains dealt anew: every label stays, and none says anything of its row."""

import pytest
import torch

from lmoe.data.domains import dealt_anew
from lmoe.data.encoded import EncodedRow, EncodedRows


def rows_of(tokens: list[list[int]], domains: list[int]) -> EncodedRows:
    return EncodedRows.of(
        EncodedRow(torch.tensor(ids, dtype=torch.int32), torch.ones(len(ids), dtype=torch.bool), domain)
        for ids, domain in zip(tokens, domains, strict=True)
    )


def many(count: int = 600) -> EncodedRows:
    """Three domains, of a half, a third and a sixth of the rows."""
    return rows_of([[n, n * 7 % 11, 3] for n in range(count)], [(0, 0, 0, 1, 1, 2)[n % 6] for n in range(count)])


def test_the_deal_equals_the_loop_and_is_the_same_for_ever() -> None:
    rows = rows_of([[5, 6], [7], [8, 9, 10], [11], [12, 13]], [0, 1, 2, 3, 4])
    order = sorted(range(5), key=lambda row: int(rows.digests[row]))
    wanted = {row: int(rows.domains[order[(place + 2) % 5]]) for place, row in enumerate(order)}
    found = dealt_anew(rows).domains.tolist()
    assert found == [wanted[row] for row in range(5)]
    assert found == GOLDEN


GOLDEN = [1, 4, 3, 0, 2]
"""As the first version deals them; XXH3 is the same on every machine."""


def test_each_domain_keeps_its_number_of_rows_and_nothing_else_of_the_rows_changes() -> None:
    rows = many()
    dealt = dealt_anew(rows)
    assert dealt.domains.bincount().tolist() == rows.domains.bincount().tolist() == [300, 200, 100]
    assert dealt.digests.equal(rows.digests) and dealt.lengths.equal(rows.lengths)


def test_false_domains_are_independent_of_the_true_ones() -> None:
    """Chi-squared of the 3 x 3 table, of 4 degrees of freedom: 18.5 is exceeded once in 1,000 times."""
    rows = many()
    pairs = (rows.domains * 3 + dealt_anew(rows).domains).bincount(minlength=9).view(3, 3).double()
    expected = pairs.sum(1, keepdim=True) * pairs.sum(0) / pairs.sum()
    assert float(((pairs - expected) ** 2 / expected).sum()) < 18.5


def test_a_row_has_the_same_false_domain_whatever_the_order_of_the_rows() -> None:
    rows, order = many(), torch.randperm(600, generator=torch.Generator().manual_seed(3))
    assert dealt_anew(rows.subset(order)).domains.equal(dealt_anew(rows).domains[order])


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_rows_stay_as_they_are(count: int) -> None:
    assert dealt_anew(many(count)).domains.tolist() == [0] * count
