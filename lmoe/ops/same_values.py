"""Whether two tensors hold the same numbers, in whatever floating-point types."""

import torch
from torch import Tensor


def same_values(one: Tensor, other: Tensor) -> bool:
    """Equal in shape, and in value once both are in the coarser of their types."""
    if one.shape != other.shape:
        return False
    dtype = min(one.dtype, other.dtype, key=lambda kind: torch.finfo(kind).bits) if one.is_floating_point() else None
    return torch.equal(one.to(dtype or other.dtype), other.to(dtype or other.dtype))
