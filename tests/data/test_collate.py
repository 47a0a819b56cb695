"""Batches of single rows and of packed ones."""

import torch

from lmoe.data.collate import Collate
from lmoe.data.encoded import EncodedRow, EncodedRows


def encoded(length: int, first_id: int, domain: int) -> EncodedRow:
    is_label = torch.arange(length) >= length // 2
    return EncodedRow(torch.arange(first_id, first_id + length, dtype=torch.int32), is_label, domain)


def test_single_rows_are_padded_on_the_right_to_a_multiple_of_8() -> None:
    batch = Collate(pad_token_id=9, max_length=64, packed=False)([encoded(5, 10, 2), encoded(9, 30, 1)])
    assert set(batch) == {"input_ids", "labels", "valid_mask", "domain_ids", "attention_mask"}
    for name in ("input_ids", "labels", "domain_ids", "attention_mask"):
        assert batch[name].shape == (2, 16) and batch[name].dtype == torch.int64
    assert batch["valid_mask"].dtype == torch.bool and batch["valid_mask"].sum(1).tolist() == [5, 9]
    assert batch["attention_mask"].equal(batch["valid_mask"].long())
    assert batch["input_ids"][0].tolist() == [10, 11, 12, 13, 14] + [9] * 11
    assert batch["labels"][0].tolist() == [-100, -100, 12, 13, 14] + [-100] * 11
    assert batch["domain_ids"][0].tolist() == [2] * 5 + [0] * 11


def test_length_never_exceeds_max_length() -> None:
    batch = Collate(pad_token_id=0, max_length=13, packed=False)([encoded(13, 1, 0), encoded(4, 1, 0)])
    assert batch["input_ids"].shape == (2, 13)


def test_packed_rows_restart_positions_and_come_without_a_mask() -> None:
    rows = (encoded(3, 10, 1), encoded(2, 20, 2))
    batch = Collate(pad_token_id=9, max_length=64, packed=True)([rows, (encoded(8, 40, 0),)])
    assert "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], list(range(8))]
    assert batch["domain_ids"][0].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    assert batch["labels"][0].tolist() == [-100, 11, 12, -100, 21, -100, -100, -100]
    assert batch["valid_mask"][0].tolist() == [True] * 5 + [False] * 3


def test_the_first_token_of_a_row_never_has_a_label() -> None:
    row = EncodedRow(torch.tensor([5, 6], dtype=torch.int32), torch.tensor([True, True]), 0)
    assert Collate(pad_token_id=0, max_length=8, packed=False)([row])["labels"][0].tolist() == [-100, 6] + [-100] * 6
    packed = Collate(pad_token_id=0, max_length=8, packed=True)([(row, row)])
    assert packed["labels"][0].tolist() == [-100, 6, -100, 6] + [-100] * 4


def test_label_tokens_are_those_of_the_batch() -> None:
    rows = [encoded(n, 10, 0) for n in (1, 2, 5, 9)]
    batch = Collate(pad_token_id=0, max_length=64, packed=False)(rows)
    assert EncodedRows.of(rows).label_tokens() == int((batch["labels"] != -100).sum())


def test_flat_rows_give_back_what_was_put_in() -> None:
    rows = [encoded(n, 10 * n, n % 3) for n in (4, 1, 7)]
    flat = EncodedRows.of(rows)
    assert flat.lengths.tolist() == [4, 1, 7] and len(list(flat)) == 3
    for row, back in zip(rows, flat, strict=True):
        assert back.input_ids.equal(row.input_ids) and back.is_label.equal(row.is_label) and back.domain == row.domain
    assert flat.subset([2, 0]).lengths.tolist() == [7, 4]
    assert flat.with_domains([5, 6, 7]).domains.tolist() == [6, 6, 6]
