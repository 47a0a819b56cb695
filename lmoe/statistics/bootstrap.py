"""Resampling seeds and rows, beside the interval of the model.

Shapes: S seeds, N rows, D domains, M draws.
"""

import numpy as np

from lmoe.statistics.strata import Floats, Strata

AT_ONCE = 250
"""Draws held in memory at the same time."""


def bootstrap_estimates(delta: Floats, strata: Strata, *, draws: int = 2000, seed: int = 0) -> Floats:
    """Estimates of studies drawn anew from this one: rows once for all seeds, seeds once for all rows.

    The pigeonhole bootstrap (Owen 2007, Annals of Applied Statistics 1): each draw takes n_d rows of each domain and S
    seeds, both with replacement, and the estimate of what the taken seeds have on the taken rows. Its spread over many
    rows is that of (S - 1) / S of the seeds' part, the rows' part and about three times the rest: too narrow for few
    seeds, too wide where the rest is large. It asks for no distribution.

    Args:
        delta: (S, N) nats, arm less baseline.

    Returns:
        (M,) nats a token.
    """
    generator = np.random.default_rng(seed)
    seeds, domains = delta.shape[0], len(strata.names)
    members = [np.flatnonzero(strata.domain_ids == domain) for domain in range(domains)]
    estimates = np.empty(draws)
    for start in range(0, draws, AT_ONCE):
        count = min(AT_ONCE, draws - start)
        times_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)
        total = np.zeros(count)
        for rows in members:
            times_row = generator.multinomial(rows.size, np.full(rows.size, 1 / rows.size), size=count)
            sums = times_row @ delta[:, rows].T
            total += (times_seed * sums).sum(-1) / (times_row @ strata.tokens[rows])
        estimates[start : start + count] = total / (seeds * domains)
    return estimates


def bootstrap_interval(
    delta: Floats, strata: Strata, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The middle share `level` of `bootstrap_estimates`: (low, high) in nats a token."""
    estimates = bootstrap_estimates(delta, strata, draws=draws, seed=seed)
    low, high = np.quantile(estimates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
