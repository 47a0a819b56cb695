"""The measure of a model on held-out rows, and its linearisation row by row.

Shapes: S seeds, N rows, D domains; `...` any leading axes, such as simulated studies or arms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmoe.errors import DataError

Floats = NDArray[np.float64]

FEWEST_ROWS = 2
"""Rows that a domain needs: the spread of one row cannot be told."""


@dataclass(frozen=True, kw_only=True)
class Strata:
    """Rows that models are judged on, as strata by domain.

    Args:
        tokens: (N,) label tokens of each row, above 0.
        domain_ids: (N,) position in `names` of each row's domain.
        names: the D domains.
    """

    tokens: Floats
    domain_ids: NDArray[np.intp]
    names: tuple[str, ...]

    @classmethod
    def of_rows(cls, tokens: Sequence[float] | NDArray[Any], domains: Sequence[str]) -> "Strata":
        """The strata of N rows, domains in the order of their first row.

        Raises:
            DataError: lengths differ, a row without label tokens, or a domain with a single row.
        """
        counts = np.asarray(tokens, dtype=np.float64)
        if counts.shape != (len(domains),):
            raise DataError(f"{counts.size} counts of label tokens for {len(domains)} rows: each row needs one.")
        if not len(domains):
            raise DataError("no rows to judge on: a comparison needs at least two rows of each domain.")
        empty = np.flatnonzero(~(counts > 0) | ~np.isfinite(counts))
        if empty.size:
            row = int(empty[0])
            raise DataError(
                f"row {row} has {counts[row]:g} label tokens, and {empty.size - 1} other rows have none either: leave "
                "rows without label tokens out, of every arm and seed alike."
            )
        names = tuple(dict.fromkeys(domains))
        number = {name: index for index, name in enumerate(names)}
        strata = cls(tokens=counts, domain_ids=np.array([number[d] for d in domains], dtype=np.intp), names=names)
        few = [name for name, rows in zip(names, strata.rows, strict=True) if rows < FEWEST_ROWS]
        if few:
            raise DataError(
                f"a single row of {', '.join(few)}: the spread over rows needs at least {FEWEST_ROWS} rows of each "
                "domain. Judge on more rows, or leave these domains out."
            )
        return strata

    @cached_property
    def member(self) -> Floats:
        """(N, D): 1 where the row is of the domain."""
        return (self.domain_ids[:, None] == np.arange(len(self.names))).astype(np.float64)

    @cached_property
    def rows(self) -> Floats:
        """(D,) rows of each domain."""
        return self.member.sum(0)

    @cached_property
    def domain_tokens(self) -> Floats:
        """(D,) label tokens of each domain."""
        return self.tokens @ self.member

    def only(self, name: str) -> "Strata":
        """The rows of one domain, as one stratum."""
        kept = self.rows_of(name)
        return Strata(tokens=self.tokens[kept], domain_ids=np.zeros(kept.size, dtype=np.intp), names=(name,))

    def rows_of(self, name: str) -> NDArray[np.intp]:
        """Positions of a domain's rows."""
        return np.flatnonzero(self.domain_ids == self.names.index(name))


def domain_losses(loss_sums: Floats, strata: Strata) -> Floats:
    """Mean loss of a label token in each domain: sum_{r in d} loss_sum[s, r] / sum_{r in d} t_r.

    Args:
        loss_sums: (..., S, N) nats, summed over the label tokens of each row.

    Returns:
        (..., S, D) nats a token.
    """
    return (loss_sums @ strata.member) / strata.domain_tokens


def measure(loss_sums: Floats, strata: Strata) -> Floats:
    """The measure of each model: the mean over domains of `domain_losses`, every domain alike.

    Args:
        loss_sums: (..., S, N) nats.

    Returns:
        (..., S) nats a token.
    """
    return domain_losses(loss_sums, strata).mean(-1)


def linearised(loss_sums: Floats, strata: Strata) -> Floats:
    """What each row adds to its domain's ratio: e[s, r] = (loss_sum[s, r] - m_{d,s} t_r) / mean t in d.

    A ratio of sums moves with its rows as the mean of e does, to first order (Cochran 1977, Sampling Techniques,
    section 6.4). The e of a domain sum to 0 for every seed.

    Args:
        loss_sums: (..., S, N) nats, or differences of them.

    Returns:
        (..., S, N) nats a token.
    """
    ratio = domain_losses(loss_sums, strata)
    mean_tokens = strata.domain_tokens / strata.rows
    return (loss_sums - ratio[..., strata.domain_ids] * strata.tokens) / mean_tokens[strata.domain_ids]
