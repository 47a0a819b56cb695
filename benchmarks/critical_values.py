"""Rules for the critical value of a study, by how often they call a difference where there is none.

In the limit of many rows the part of rows is known and only that of the seeds is not: with b the variance of the row
part, a the true variance of seeds and rest, A = a X the one that is found, X chi-square over its S - 1 degrees of
freedom, a rule calls a difference where |estimate| > rule(A, b) sqrt(A + b), and the estimate is normal with variance
a + b. That share is an integral over X, free of simulation.
"""

from collections.abc import Callable

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit
from scipy.stats import chi2

from lmoe.statistics.crossed_t import critical
from lmoe.statistics.strata import Floats

Rule = Callable[[Floats, int, float], Floats]
"""Of the share A / (A + b), the degrees of freedom of A and the tail of one side: the critical value."""

SHARES = tuple(np.linspace(0.02, 0.99, 40).tolist())
"""a / (a + b), at which the rules are tried."""
POINTS = 4000


def satterthwaite(w: Floats, df: int, tail: float) -> Floats:
    """t with the degrees of freedom df / w^2 (Satterthwaite 1946)."""
    return -stdtrit(df / w**2, tail)


def welch(w: Floats, df: int, tail: float) -> Floats:
    """t with (df + 2) / w^2 - 2, by the unbiased estimate of the squared variance (Welch 1947)."""
    return -stdtrit((df + 2) / w**2 - 2, tail)


def linear_df(w: Floats, df: int, tail: float) -> Floats:
    """t with df / w: fewer degrees of freedom than Satterthwaite's."""
    return -stdtrit(df / w, tail)


def least_df(w: Floats, df: int, tail: float) -> Floats:
    """t with df whatever the share."""
    return np.full_like(w, -stdtrit(df, tail))


def cochran_cox(w: Floats, df: int, tail: float) -> Floats:
    """The two critical values, weighted by their variances (Cochran and Cox 1950)."""
    return (1 - w) * -ndtri(tail) + w * -stdtrit(df, tail)


def power_mean(order: float) -> Rule:
    """The power mean of `lmoe/statistics/crossed_t.py` of another order; 1 is the bound of Banerjee (1961)."""

    def rule(w: Floats, df: int, tail: float) -> Floats:
        z, t = -ndtri(tail), -stdtrit(df, tail)
        return ((1 - w**order) * z ** (2 * order) + (w * t * t) ** order) ** (1 / (2 * order))

    return rule


def ours(w: Floats, df: int, tail: float) -> Floats:
    """What lmoe uses."""
    return critical(tail, w, df, np.inf)


RULES: dict[str, Rule] = {
    "t, Satterthwaite's df": satterthwaite,
    "t, Welch's df": welch,
    "t, df / w": linear_df,
    "t, df of the seeds": least_df,
    "Cochran and Cox": cochran_cox,
    "power mean of order 1 (Banerjee)": power_mean(1),
    "power mean of order 2": power_mean(2),
    "power mean of order 3 (lmoe)": ours,
    "power mean of order 4": power_mean(4),
}


def false_alarms(rule: Rule, df: int, alpha: float, true_share: float) -> float:
    """Share of studies in which the rule calls a difference at a two-sided alpha."""
    quantiles = (np.arange(POINTS) + 0.5) / POINTS
    a = true_share / (1 - true_share)
    found = a * chi2.ppf(quantiles, df) / df
    width = rule(found / (found + 1), df, alpha / 2) * np.sqrt(found + 1)
    return float(np.mean(2 * ndtr(-width / np.sqrt(a + 1))))


def extremes(rule: Rule, df: int, alpha: float) -> tuple[float, float]:
    """(least, most) false alarms over all true shares."""
    found = [false_alarms(rule, df, alpha, share) for share in SHARES]
    return min(found), max(found)
