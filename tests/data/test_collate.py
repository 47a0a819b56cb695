"""Batches of single rows and of packed ones."""

import torch

from lmoe.data.collate import Collate
from lmoe.data.encoded import EncodedRow, EncodedRows


def encoded(length: int, first_id: int, domain: int) -> EncodedRow:
    is_label = torch.arange(length) >= length // 2
    return EncodedRow(torch.arange(first_id, first_id + length, dtype=torch.int32), is_label, domain)


def test_single_rows_are_padded_on_the_right_to_a_multiple_of_8() -> None:
    batch = Collate(pad_token_id=9, max_length=64, packed=False)([encoded(5, 10, 2), encoded(9, 30, 1)])
    names = ("input_ids", "labels", "domain_ids", "attention_mask", "row_ids")
    assert set(batch) == {*names, "valid_mask", "prompt_mask"}
    for name in names:
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
    assert batch["row_bounds"].tolist() == [0, 3, 5, 8, 16] and batch["row_bounds"].dtype == torch.int32
    assert batch["domain_ids"][0].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    assert batch["labels"][0].tolist() == [-100, 11, 12, -100, 21, -100, -100, -100]
    assert batch["valid_mask"][0].tolist() == [True] * 5 + [False] * 3


def test_row_ids_number_the_rows_of_a_sequence_and_padding_is_0() -> None:
    rows = (encoded(3, 10, 1), encoded(2, 20, 2), encoded(1, 30, 0))
    packed = Collate(pad_token_id=9, max_length=64, packed=True)([rows, (encoded(8, 40, 0),)])
    assert packed["row_ids"].dtype == torch.int64
    assert packed["row_ids"].tolist() == [[0, 0, 0, 1, 1, 2, 0, 0], [0] * 8]
    single = Collate(pad_token_id=9, max_length=64, packed=False)([encoded(5, 10, 2), encoded(9, 30, 1)])
    assert not single["row_ids"].any()


def test_prompt_mask_marks_each_rows_tokens_before_its_first_label() -> None:
    """A row of 3 has its labels from token 1 on, one of 8 from token 4; (B, P, T), with P the most rows of any."""
    rows = (encoded(3, 10, 1), encoded(2, 20, 2))
    packed = Collate(pad_token_id=9, max_length=64, packed=True)([rows, (encoded(8, 40, 0),)])
    assert packed["prompt_mask"].dtype == torch.bool
    assert packed["prompt_mask"].long().tolist() == [
        [[1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0]],
        [[1, 1, 1, 1, 0, 0, 0, 0], [0] * 8],
    ]
    single = Collate(pad_token_id=9, max_length=64, packed=False)([encoded(5, 10, 2), encoded(9, 30, 1)])
    assert single["prompt_mask"].long().tolist() == [[[1] * 2 + [0] * 14], [[1] * 4 + [0] * 12]]


def test_what_stands_for_the_prompt_of_a_plain_text_is_marked_apart() -> None:
    text = EncodedRow(torch.arange(6, dtype=torch.int32), torch.ones(6, dtype=torch.bool), 0)
    packed = Collate(pad_token_id=9, max_length=64, packed=True)([(encoded(2, 20, 2), text)])
    assert packed["opening_mask"].long().tolist() == [[[0] * 8, [0, 0, 1, 1, 1, 0, 0, 0]]]
    assert packed["prompt_mask"].long().tolist() == [[[1] + [0] * 7, [0, 0, 1, 0, 0, 0, 0, 0]]]
    long = EncodedRow(torch.arange(300, dtype=torch.int32), torch.ones(300, dtype=torch.bool), 0)
    assert Collate(pad_token_id=0, max_length=512, packed=False)([long])["opening_mask"].sum() == 128


def test_the_prompt_ends_at_the_first_label_though_later_turns_have_none() -> None:
    row = EncodedRow(torch.arange(6, dtype=torch.int32), torch.tensor([0, 0, 1, 0, 0, 1]).bool(), 0)
    batch = Collate(pad_token_id=0, max_length=6, packed=False)([row])
    assert batch["prompt_mask"].long().tolist() == [[[1, 1, 0, 0, 0, 0]]]


def test_no_label_and_no_padding_is_in_a_prompt_and_every_prompt_token_is_in_its_row() -> None:
    rows = [tuple(encoded(n, 10, 0) for n in lengths) for lengths in ((5, 3, 4), (9,), (1, 2))]
    batch = Collate(pad_token_id=0, max_length=64, packed=True)(rows)
    prompt, row_ids = batch["prompt_mask"], batch["row_ids"]
    assert prompt.shape == (3, 3, 16)
    assert not (prompt & (batch["labels"] != -100).unsqueeze(1)).any()
    assert not (prompt & ~batch["valid_mask"].unsqueeze(1)).any()
    for number in range(prompt.shape[1]):
        assert (row_ids[prompt[:, number]] == number).all()


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
