"""Losses of the current accumulation window, under their metric names."""

import torch
from torch import Tensor


class WindowLosses:
    """Sums over the micro-batches of one optimizer step; the names are those of the first micro-batch."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None

    def add(self, shares: dict[str, Tensor]) -> None:
        """Add one micro-batch's shares, each ()."""
        values = torch.stack([share.detach().float() for share in shares.values()])
        self._names, self._sums = tuple(shares), values if self._sums is None else self._sums + values

    def finite(self) -> bool:
        """Whether every loss of the window is a number."""
        return self._sums is None or bool(torch.isfinite(self._sums).all())

    def __str__(self) -> str:
        values = [] if self._sums is None else self._sums.tolist()
        return ", ".join(f"{name} {value:.4g}" for name, value in zip(self._names, values, strict=True))

    def take(self) -> dict[str, float]:
        """The window's losses under their metric names; starts a new window."""
        if self._sums is None:
            return {}
        values = self._sums.tolist()
        self._sums = None
        return dict(zip(self._names, values, strict=True))
