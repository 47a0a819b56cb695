"""Rows that lie one behind the other in one sequence, as flash attention is told of them.

Shapes: B sequences of T tokens, which hold R rows together; padding counts as a row.
"""

from typing import Any

import torch
from torch import Tensor

BOUNDS = "cu_seq_lens_q"
"""The input of a model that says where rows begin."""


def row_bounds(position_ids: Tensor) -> Tensor:
    """(R + 1,) int32: where each row begins in the B T tokens of a batch, and their number.

    Args:
        position_ids: (B, T), which begin at 0 in each row and nowhere else.
    """
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([position_ids.numel()])]).int()


def row_bounds_inputs(bounds: Tensor, length: int) -> dict[str, Any]:
    """What Transformers hands to flash attention of packed rows (its FlashAttentionKwargs).

    Args:
        bounds: as of `row_bounds`.
        length: T, which no row exceeds. NOTE the longest row itself would have to be read from the device.
    """
    return {BOUNDS: bounds, "cu_seq_lens_k": bounds, "max_length_q": length, "max_length_k": length}
