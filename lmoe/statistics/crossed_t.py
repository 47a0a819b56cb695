"""The distribution of estimate / standard error, where a share of the variance is known from a few seeds only.

Student's t with Satterthwaite's degrees of freedom does not hold here: with 3 seeds whose effects are three times those
of the rows it calls 7.8 % of no-differences a difference at the level of 5 %, and at the level 5 %/12, which Holm needs
for twelve arms, 2.5 %, six times too many. Where chance makes the seeds look alike, the standard error is too small and
the degrees of freedom are too many, both at once. What is used instead interpolates between the two ends that are
exact, t with the df of rows (no share of seeds) and t with the df of seeds (nothing but seeds).
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, stdtrit

from lmoe.statistics.strata import Floats

ORDER = 3
"""k of `critical`."""
LARGEST_Z = 37.0
"""Where the tail of a normal distribution ends in double precision."""
LARGEST_T = 1e150
"""Whose square is still a number: with one degree of freedom t comes beyond it."""
HALVINGS = 60


def critical(tail: ArrayLike, seed_share: ArrayLike, seed_df: ArrayLike, row_df: ArrayLike) -> Floats:
    """The value that (estimate - mu) / standard error passes with probability `tail` on each side.

        c^2 = ((1 - w^k) (z^2)^k + (w t^2)^k)^(1/k),  k = 3
        w = seed_share, t = t_{seed_df}(1 - tail), z = t_{row_df}(1 - tail)

    A power mean of squared t values; w = 0 gives z, w = 1 gives t. k = 1 is the bound of Banerjee (1961, JASA 56),
    which never calls too often, and with few seeds calls half as often as it may. With k = 3 and many rows, least and
    most that is called where there is no difference, over all sizes of the noise of seeds, in %:

        seeds      2             3             5             10
        5 %        2.1 to 4.9    4.0 to 5.0    5.0 to 5.2    5.0 to 5.3
        5 %/12     0.03 to 0.40  0.12 to 0.42  0.33 to 0.44  0.42 to 0.48

    `benchmarks/critical_values.py` has the others that were tried, `docs/LOG.md` their figures.

    Args:
        tail: probability of one side, above 0 and below 0.5.
    """
    tail, share = np.asarray(tail, dtype=np.float64), np.asarray(seed_share, dtype=np.float64)
    z2 = np.minimum(np.abs(stdtrit(row_df, tail)), LARGEST_T) ** 2
    t2 = np.minimum(np.abs(stdtrit(seed_df, tail)), LARGEST_T) ** 2
    # Over the larger one, so that no power overflows far out.
    largest = np.maximum(np.maximum(z2, t2), np.finfo(np.float64).tiny)
    mean = (1 - share**ORDER) * (z2 / largest) ** ORDER + (share * t2 / largest) ** ORDER
    return np.sqrt(largest) * mean ** (1 / (2 * ORDER))


def upper_tail(value: ArrayLike, seed_share: ArrayLike, seed_df: ArrayLike, row_df: ArrayLike) -> Floats:
    """Probability of one side beyond `value`, of either sign: the inverse of `critical`, by bisection.

    Args:
        value: (estimate - mu) / standard error.
    """
    value, share, seed_df, row_df = np.broadcast_arrays(
        *(np.asarray(a, dtype=np.float64) for a in (value, seed_share, seed_df, row_df))
    )
    size = np.abs(value)
    # A t value is at least the normal one with the same tail, so that the normal one lies between 0 and the value.
    low, high = np.zeros_like(size), np.minimum(size, LARGEST_Z)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        below = critical(np.clip(ndtr(-middle), np.finfo(np.float64).tiny, 0.5), share, seed_df, row_df) < size
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    tail = ndtr(-(low + high) / 2)
    return np.where(value >= 0, tail, 1 - tail)
