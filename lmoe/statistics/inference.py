"""Interval, p values and the smallest effect that could have been seen, of a CrossedEstimate.

All of them go by the one distribution of `lmoe/statistics/crossed_t.py`, so that an interval leaves 0 out exactly where
the p value is below 1 - level. Arrays keep the shape (...) of the estimate; nats a token.
"""

import numpy as np

from lmoe.statistics.crossed import SEEDS_FOR_SPREAD, CrossedEstimate, crossed_estimate
from lmoe.statistics.crossed_t import critical, upper_tail
from lmoe.statistics.strata import Floats, Strata


def half_width(of: CrossedEstimate, alpha: float) -> Floats:
    """Standard error times the critical value of alpha/2 on each side: a two-sided test at alpha rejects beyond it."""
    return of.standard_error * critical(alpha / 2, of.seed_share, of.seed_df, of.row_df)


def interval(of: CrossedEstimate, level: float = 0.95) -> tuple[Floats, Floats]:
    """(low, high) = estimate -+ half width: holds the true difference in a share `level` of studies."""
    width = half_width(of, 1 - level)
    return of.estimate - width, of.estimate + width


def rows_interval(delta: Floats, strata: Strata, level: float = 0.95) -> tuple[Floats, Floats]:
    """(low, high) of the mean difference of these very models over other rows of the same kind.

        estimate -+ sqrt(B) t_{row_df}((1 + level) / 2)

    with B and row_df of `crossed_estimate`. It says nothing of other seeds: the models are taken as they are, so that a
    single seed has such an interval too. As if every seed had given the mean of all of them: no spread over seeds.

    Args:
        delta: (..., S, N) nats, as for `crossed_estimate`.
    """
    mean = delta.mean(-2, keepdims=True)
    return interval(crossed_estimate(np.repeat(mean, SEEDS_FOR_SPREAD, -2), strata), level)


def difference_p(of: CrossedEstimate) -> Floats:
    """Two-sided p value of "no difference": P(|T| >= |estimate| / standard error)."""
    return 2 * _tail(of, np.abs(of.estimate))


def equivalence_p(of: CrossedEstimate, margin: float) -> Floats:
    """p value of "the difference is margin or more", by two one-sided tests (Schuirmann 1987).

    The larger of P(T >= (estimate + margin) / se), against -margin, and P(T <= (estimate - margin) / se), against
    +margin. Below alpha exactly where the interval of level 1 - 2 alpha lies within -+margin.

    Raises:
        ValueError: a margin that is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"margin must be above 0 nats a token, got {margin!r}.")
    return _tail(of, margin - np.abs(of.estimate))


def smallest_effect(of: CrossedEstimate, alpha: float = 0.05, power: float = 0.8) -> Floats:
    """The smallest difference that a study like this one calls a difference with the given power, two-sided at alpha.

        se (c(alpha / 2) + c(1 - power))

    with c the critical value for a tail (Bloom 1995, Evaluation Review 19). A study knows its standard error from few
    seeds only. This sum is what is found with that power by studies that each state it from their own noise: with 2
    degrees of freedom 5.36 se, against 2.80 se by a normal approximation. The noncentral t answers for a known standard
    error instead; put in the place of an estimated one, its 5.65 se is found in 84.6 % rather than 80 % with 2 degrees
    of freedom, and in 80.1 % with 9. With the noise known, studies find what this sum gives in 77 % with 2 degrees of
    freedom and in 79 to 80 % from 4 on (`benchmarks/results/statistics.md`).

    It is no plan for another study: a new one finds the size that an earlier one stated in 60 % with 2 degrees of
    freedom, 68 % with 4 and 74 % with 9, since the noise of both was estimated.
    """
    found = critical(1 - power, of.seed_share, of.seed_df, of.row_df)
    return half_width(of, alpha) + of.standard_error * found


def _tail(of: CrossedEstimate, distance: Floats) -> Floats:
    """P(T >= distance / standard error); without any spread 0 beyond a distance of 0, else 1."""
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.where(of.standard_error > 0, distance / of.standard_error, np.sign(distance) * np.inf)
    value = np.where(np.isnan(value), 0.0, value)
    return upper_tail(value, of.seed_share, of.seed_df, of.row_df)
