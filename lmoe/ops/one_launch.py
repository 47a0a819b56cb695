"""Matrices, copies and products as one launch each, for what computes its own gradients."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into others of the same shapes and of one type, in one launch for all of them."""
    pairs = [pair for pair in zip(targets, sources, strict=True) if pair[0].numel()]
    if pairs:
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])


def rows(values: Tensor) -> Tensor:
    """Values with all dimensions but the last made one, (N, ...)."""
    return values.reshape(math.prod(values.shape[:-1]), values.shape[-1])  # which may be 0 wide


def in_type(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in a type, all brought there in one launch; unchanged where every one has it already."""
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    copy_each(cast, tensors)
    return cast


def times(scale: float, left: Tensor, right: Tensor) -> Tensor:
    """scale * left right, without an operation for the scale.

    Args:
        scale: any number.
        left: (N, M).
        right: (M, P).
    """
    product = left.new_empty(left.shape[0], right.shape[1])
    return product.addmm_(left, right, beta=0, alpha=scale)
