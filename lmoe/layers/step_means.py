"""Means over the tokens of an optimizer step, by site."""

from collections.abc import Callable

import torch
from torch import Tensor

OverRanks = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


def of_this_process(values: Tensor) -> Tensor:
    """The sum over one process."""
    return values


class StepMeans:
    """Means over the valid tokens of an optimizer step so far, by site.

    Args:
        over_ranks: sums each addition over all processes.
    """

    def __init__(self, over_ranks: OverRanks = of_this_process) -> None:
        self._over_ranks = over_ranks
        self._sums: dict[str, Tensor] = {}
        self._tokens: Tensor | None = None

    def __bool__(self) -> bool:
        """Whether anything was added."""
        return self._tokens is not None

    def add(self, means: dict[str, Tensor], tokens: Tensor) -> None:
        """Add a micro-batch.

        Args:
            means: (E,) by site, over the valid tokens of this process.
            tokens: () their number.
        """
        flat = torch.cat([*(values * tokens for values in means.values()), tokens.view(1).float()])
        self._add_sums(self._over_ranks(flat), {site: values.numel() for site, values in means.items()})

    def _add_sums(self, flat: Tensor, sizes: dict[str, int]) -> None:
        *parts, tokens = flat.split([*sizes.values(), 1])
        for site, part in zip(sizes, parts, strict=True):
            self._sums[site] = self._sums[site] + part if site in self._sums else part
        self._tokens = tokens if self._tokens is None else self._tokens + tokens

    def summed(self, over_ranks: OverRanks) -> "StepMeans":
        """The sums of all processes, of what each has added to its own."""
        assert self._tokens is not None
        flat = torch.cat([*self._sums.values(), self._tokens])
        result = StepMeans()
        result._add_sums(over_ranks(flat), {site: values.numel() for site, values in self._sums.items()})
        return result

    def means(self) -> dict[str, Tensor]:
        """The mean for each expert, (E,), by site."""
        assert self._tokens is not None
        return {site: values / self._tokens.clamp(min=1) for site, values in self._sums.items()}

    def reset(self) -> None:
        """Start the next step."""
        self._sums.clear()
        self._tokens = None
