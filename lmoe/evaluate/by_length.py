"""Batches of rows of like length, with little padding."""

from collections.abc import Iterator

from torch import Tensor

from lmoe.data.collate import Collate
from lmoe.data.encoded import EncodedRows


def batches_by_length(
    rows: EncodedRows, batch_size: int, pad_token_id: int, max_length: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """All rows once, longest last, as training validates them.

    Args:
        rows: no longer than max_length.
        batch_size: rows in a batch.
        pad_token_id: fills the padding.
        max_length: largest T.

    Yields:
        Indices of the rows in a batch, and the batch as `Collate` describes it.
    """
    collate = Collate(pad_token_id=pad_token_id, max_length=max_length, packed=False)
    order = rows.lengths.argsort(stable=True).tolist()
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        yield chosen, collate([rows[index] for index in chosen])
