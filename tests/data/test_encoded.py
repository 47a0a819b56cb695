"""Flat tensors against lists of rows."""

import random

import pytest
import torch

from lmoe.data.encoded import EncodedRow, EncodedRows
from lmoe.data.pack import PackedRows


def drawn(draw: random.Random, count: int) -> list[EncodedRow]:
    rows = []
    for _ in range(count):
        length = draw.randrange(1, 6)
        ids = torch.tensor([draw.randrange(3) for _ in range(length)], dtype=torch.int32)
        labels = torch.tensor([draw.random() < 0.5 for _ in range(length)])
        rows.append(EncodedRow(ids, labels, draw.randrange(3)))
    return rows


def check(found: EncodedRows, expected: list[EncodedRow]) -> None:
    """Every field against the rows one by one."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.input_ids.equal(other.input_ids) and one.is_label.equal(other.is_label)
        assert one.domain == other.domain
    assert found.lengths.tolist() == [len(row) for row in expected]
    assert found.label_counts.tolist() == [int(row.is_label[1:].sum()) for row in expected]
    assert found.label_tokens() == sum(found.label_counts.tolist())
    assert found.domains.tolist() == [row.domain for row in expected]
    tokens = [tuple(row.input_ids.tolist()) for row in expected]
    digests = found.digests.tolist()
    assert [[a == b for b in digests] for a in digests] == [[a == b for b in tokens] for a in tokens]


@pytest.mark.parametrize("seed", range(3))
def test_rows_chosen_joined_and_renamed_are_those_of_lists(seed: int) -> None:
    draw = random.Random(seed)
    lists = [drawn(draw, count) for count in (7, 0, 5)]
    parts = [EncodedRows.of(rows) for rows in lists]
    check(parts[0], lists[0])
    whole, joined = [row for rows in lists for row in rows], EncodedRows.joined(parts)
    check(joined, whole)
    chosen = [draw.randrange(12) for _ in range(20)]
    check(joined.subset(chosen), [whole[index] for index in chosen])
    check(joined.subset(torch.tensor(chosen)).subset([3, 3, 0]), [whole[chosen[index]] for index in (3, 3, 0)])
    check(EncodedRows.joined([joined.subset(chosen), joined]), [*(whole[index] for index in chosen), *whole])
    renamed = joined.with_domains([2, 0, 1])
    check(renamed, [EncodedRow(row.input_ids, row.is_label, [2, 0, 1][row.domain]) for row in whole])
    check(joined.subset([]), [])


def test_of_pairs_the_chosen_answers_are_left_and_stay_the_rows_that_they_were() -> None:
    draw = random.Random(0)
    chosen, rejected, plain = (drawn(draw, 4) for _ in range(3))
    pairs = [
        EncodedRow(
            torch.cat([one.input_ids, other.input_ids]), torch.cat([one.is_label, other.is_label]), 1, second=len(one)
        )
        for one, other in zip(chosen, rejected, strict=True)
    ]
    order = [5, 2, 7, 0]
    rows = EncodedRows.joined([EncodedRows.of(plain), EncodedRows.of(pairs)]).subset(order)
    found = rows.preferred()
    expected = [*plain, *(EncodedRow(one.input_ids, one.is_label, 1) for one in chosen)]
    check(found, [expected[index] for index in order])
    assert not found.seconds.any()
    assert found.places.equal(rows.places) and found.source.equal(rows.source)
    assert EncodedRows.of(plain).preferred().lengths.tolist() == [len(row) for row in plain]


def test_a_choice_shares_the_tokens_and_an_index_beyond_the_end_is_none() -> None:
    rows = EncodedRows.of(drawn(random.Random(0), 4))
    assert rows.subset([1, 1]).tokens[0].input_ids.data_ptr() == rows.tokens[0].input_ids.data_ptr()
    for index in (4, -1):
        with pytest.raises(IndexError):
            rows[index]


@pytest.mark.parametrize("seed", range(3))
def test_sums_of_packed_sequences_are_those_of_a_loop(seed: int) -> None:
    rows = EncodedRows.of(drawn(random.Random(seed), 40))
    packed = PackedRows.of(rows, 8, seed)
    for name in ("lengths", "label_counts"):
        of_rows = getattr(rows, name).tolist()
        assert getattr(packed, name).tolist() == [sum(of_rows[row] for row in rows) for rows in packed.sequences]
