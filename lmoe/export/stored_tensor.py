"""A tensor of a weights file that is made while it is written, and the rounding of what is merged.

Shapes: D in, O out, R rank.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor

from lmoe.ops.merge import merged_weight


@dataclass(slots=True, frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a file.

    Args:
        name: its key.
        shape: of the whole.
        dtype: of the whole.
        parts: makes it, in one piece or in several along its first dimension, one after the other.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterable[Tensor]]

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """How many bytes it fills."""
        return self.numbers * self.dtype.itemsize


class Merging:
    """Folds branches into weights, in the type that is written, and keeps count of what the rounding takes.

    Args:
        dtype: that is written.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._change, self._error = 0.0, 0.0

    @torch.no_grad()
    def merged(
        self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor | None = None
    ) -> Tensor:
        """`merged_weight` in the type that is written; arguments as there."""
        exact = merged_weight(weight, lora_A, lora_B, scaling, magnitude)
        written = exact.to(self.dtype)
        self._change += float((exact - weight).square().sum())
        self._error += float((exact - written).square().sum())
        return written

    def lost(self) -> float | None:
        """|exact - written| / |exact - base| over all that was merged so far; None: nothing was, or nothing lost."""
        return sqrt(self._error / self._change) if self._change and self._error else None
