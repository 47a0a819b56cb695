"""Batches of tokens, labels and masks.

Shapes: B rows (or packed sequences, of at most P rows) of T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmoe.data.encoded import EncodedRow, opening
from lmoe.ops.labels import IGNORE
from lmoe.ops.packed_rows import row_bounds

MULTIPLE = 8
"""T is rounded up to a multiple of this."""


@dataclass(slots=True, frozen=True)
class Collate:
    """Pad on the right and stack.

    The batch holds input_ids, labels, domain_ids (B, T) int64 and valid_mask (B, T) bool, which is False on padding.
    Labels are not shifted (a Hugging Face model shifts them itself), and the first token of each row has none.
    domain_ids name the domain of each token's row, 0 on padding. row_ids (B, T) int64 number the rows packed into a
    sequence from 0 (padding: 0), and prompt_mask (B, P, T) bool marks the tokens of each of the P rows before its first
    label. Where a row has none of its own, a plain text, opening_mask (B, P, T) bool marks what stands for it
    (`opening`). Rows that were put into clusters come with cluster_ids (B, T) int64, -1 on padding. Single rows come
    with attention_mask (B, T) int64.
    Packed sequences come with position_ids (B, T) int64 instead, which restart at each row and at the padding: a mask
    beside them would make the rows see each other. row_bounds (R + 1,) int32 say the same for flash attention, see
    `row_bounds`.

    Args:
        pad_token_id: fills the padding.
        max_length: largest T.
        packed: items are tuples of rows, not rows.
    """

    pad_token_id: int
    max_length: int
    packed: bool

    def __call__(self, items: Sequence[EncodedRow | tuple[EncodedRow, ...]]) -> dict[str, Tensor]:
        sequences = [item if isinstance(item, tuple) else (item,) for item in items]
        longest = max(sum(len(row) for row in rows) for rows in sequences)
        length = max(longest, min(-(-longest // MULTIPLE) * MULTIPLE, self.max_length))
        shape = (len(sequences), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.long),
            "labels": torch.full(shape, IGNORE, dtype=torch.long),
            "valid_mask": torch.zeros(shape, dtype=torch.bool),
            "domain_ids": torch.zeros(shape, dtype=torch.long),
        }
        if any(row.cluster >= 0 for rows in sequences for row in rows):
            batch["cluster_ids"] = torch.full(shape, -1, dtype=torch.long)
        position_ids = torch.zeros(shape, dtype=torch.long)
        most = max(len(rows) for rows in sequences)
        batch["row_ids"] = torch.zeros(shape, dtype=torch.long)
        batch["prompt_mask"] = torch.zeros(shape[0], most, length, dtype=torch.bool)
        for index, rows in enumerate(sequences):
            start = 0
            for number, row in enumerate(rows):
                place = (index, slice(start, start + len(row)))
                labels = _labels(row)
                batch["input_ids"][place] = row.input_ids.long()
                batch["labels"][place] = labels
                batch["row_ids"][place] = number
                batch["prompt_mask"][index, number, place[1]] = (labels != IGNORE).cumsum(0) == 0
                if row.is_label[0]:
                    mask = batch.setdefault("opening_mask", torch.zeros_like(batch["prompt_mask"]))
                    mask[index, number, start : start + opening(row)] = True
                batch["valid_mask"][place] = True
                batch["domain_ids"][place] = row.domain
                if "cluster_ids" in batch:
                    batch["cluster_ids"][place] = row.cluster
                position_ids[place] = torch.arange(len(row))
                start += len(row)
            position_ids[index, start:] = torch.arange(length - start)
        if self.packed:
            batch |= {"position_ids": position_ids, "row_bounds": row_bounds(position_ids)}
        else:
            batch["attention_mask"] = batch["valid_mask"].long()
        return batch


def _labels(row: EncodedRow) -> Tensor:
    labels = row.input_ids.long().masked_fill(~row.is_label, IGNORE)
    labels[0] = IGNORE
    return labels
