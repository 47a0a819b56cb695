"""One arm beside the baseline: the difference, how sure it is, and what could have been seen.

Shapes: S seeds, N rows.
"""

from dataclasses import dataclass

import numpy as np

from lmoe.errors import DataError
from lmoe.statistics.bootstrap import bootstrap_interval
from lmoe.statistics.crossed import SEEDS_FOR_SPREAD, CrossedEstimate, crossed_estimate, without_rounding
from lmoe.statistics.inference import difference_p, equivalence_p, interval, smallest_effect
from lmoe.statistics.strata import Floats, Strata, measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What two seeds or more tell of how sure a difference is. Nats a token, variances in their square.

    Args:
        standard_error: of the estimate.
        satterthwaite_df: for the reader (`CrossedEstimate.satterthwaite_df`).
        low, high: the interval of `level`, by the two-way random-effects model.
        bootstrap_low, bootstrap_high: the same by resampling seeds and rows, to look at; None where it was left out.
        seed_part, row_part, rest_part: parts of the variance, each at least 0.
        difference_p: two-sided p value of no difference.
        equivalence_p: p value of a difference of `margin` or more.
        smallest_effect: that could have been seen with `power`, two-sided at 1 - level.
    """

    standard_error: float
    satterthwaite_df: float
    low: float
    high: float
    bootstrap_low: float | None
    bootstrap_high: float | None
    seed_part: float
    row_part: float
    rest_part: float
    difference_p: float
    equivalence_p: float
    smallest_effect: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """An arm less the baseline on the same rows.

    Args:
        name: of the claim, such as the arm, or the arm and the domain.
        estimate: mean over seeds of the difference in nats a token; below 0 the arm is better.
        by_seed: the difference of each seed.
        seeds: S.
        rows: N.
        margin: nats a token; differences below it do not matter.
        level: of the intervals.
        power: of `Spread.smallest_effect`.
        spread: None with a single seed.
    """

    name: str
    estimate: float
    by_seed: tuple[float, ...]
    seeds: int
    rows: int
    margin: float
    level: float
    power: float
    spread: Spread | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a comparison is asked, alike for every arm.

    Args:
        margin: nats a token, above 0, chosen before the study.
        level: of the intervals.
        power: of `Spread.smallest_effect`.
        draws: of the bootstrap; 0 leaves it out.
        seed: of the bootstrap.
    """

    margin: float
    level: float = 0.95
    power: float = 0.8
    draws: int = 2000
    seed: int = 0


def compare(name: str, arm: Floats, baseline: Floats, strata: Strata, terms: Terms) -> Comparison:
    """The comparison of an arm with the baseline on all rows, or those of one domain (see `compare_domains`).

    Args:
        arm: (S, N) nats, loss summed over the label tokens of each row, a line a seed.
        baseline: (S, N) nats, of the same rows; its seeds stand in the same order as those of the arm.
        strata: of the N rows.
        terms: what is asked.

    Raises:
        DataError: shapes that do not fit, no seed, or a loss that is not finite.
    """
    arm, baseline = np.asarray(arm, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if arm.shape != baseline.shape or arm.ndim != 2 or not arm.shape[0] or arm.shape[1] != strata.tokens.size:
        raise DataError(
            f"{name}: losses of shape {arm.shape} beside {baseline.shape} of the baseline, for {strata.tokens.size} "
            "rows. Both must be (seeds, rows), of the same seeds and rows."
        )
    delta = arm - baseline
    if not np.isfinite(delta).all():
        places = np.flatnonzero(~np.isfinite(delta).all(1)).tolist()
        raise DataError(
            f"{name}: losses of model {places[0] + 1} of {len(delta)}, or of the one beside it, are not finite: a "
            "model that diverged cannot be compared."
        )
    by_seed = without_rounding(measure(delta, strata))
    spread = None
    if delta.shape[0] >= SEEDS_FOR_SPREAD:
        estimate = crossed_estimate(delta, strata)
        resampled = None, None
        if terms.draws:
            resampled = bootstrap_interval(delta, strata, level=terms.level, draws=terms.draws, seed=terms.seed)
        spread = _spread(estimate, terms, resampled)
    return Comparison(
        name=name,
        estimate=float(by_seed.mean()),
        by_seed=tuple(by_seed.tolist()),
        seeds=delta.shape[0],
        rows=delta.shape[1],
        margin=terms.margin,
        level=terms.level,
        power=terms.power,
        spread=spread,
    )


def compare_domains(name: str, arm: Floats, baseline: Floats, strata: Strata, terms: Terms) -> dict[str, Comparison]:
    """A comparison for each domain, on its rows alone, named "NAME, DOMAIN"; arguments as for `compare`."""
    found = {}
    for domain in strata.names:
        rows = strata.rows_of(domain)
        found[domain] = compare(
            f"{name}, {domain}",
            np.asarray(arm)[:, rows],
            np.asarray(baseline)[:, rows],
            strata.only(domain),
            terms,
        )
    return found


def _spread(of: CrossedEstimate, terms: Terms, resampled: tuple[float | None, float | None]) -> Spread:
    low, high = interval(of, terms.level)
    return Spread(
        standard_error=float(of.standard_error),
        satterthwaite_df=float(of.satterthwaite_df),
        low=float(low),
        high=float(high),
        bootstrap_low=resampled[0],
        bootstrap_high=resampled[1],
        seed_part=float(of.seed_part),
        row_part=float(of.row_part),
        rest_part=float(of.rest_part),
        difference_p=float(difference_p(of)),
        equivalence_p=float(equivalence_p(of, terms.margin)),
        smallest_effect=float(smallest_effect(of, 1 - terms.level, terms.power)),
    )
