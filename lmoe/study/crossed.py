"""The estimate of a difference over crossed seeds and rows, and its standard error.

delta[s, r] = mu + S_s + R_r + E_sr: every model is judged on the same rows, so that seeds and rows are crossed. Rows
that a lucky draw made easy are easy for all seeds, and a lucky seed is lucky on all rows; neither becomes surer by more
of the other. Shapes: S seeds, N rows, D domains; `...` any leading axes.
"""

from dataclasses import dataclass

import numpy as np

from lmoe.errors import DataError
from lmoe.study.strata import Floats, Strata, linearised, measure

SEEDS_FOR_SPREAD = 2
"""Seeds below which the spread over seeds cannot be told at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossedEstimate:
    """A mean over seeds, with the variance of this mean taken apart. Arrays of shape (...), or floats.

    Args:
        estimate: nats a token.
        standard_error: nats a token; the root of the variance that stands for all three parts.
        seed_part: part of the variance that only more seeds make smaller. The three parts are shown as at least 0.
        row_part: part that only more rows make smaller.
        rest_part: part that both make smaller.
        seed_share: share of the variance whose size is known from the S seeds alone, 0 to 1.
        seed_df: degrees of freedom of that share, S - 1.
        row_df: degrees of freedom of the rest of the variance, from the rows.
    """

    estimate: Floats
    standard_error: Floats
    seed_part: Floats
    row_part: Floats
    rest_part: Floats
    seed_share: Floats
    seed_df: int
    row_df: Floats

    @property
    def satterthwaite_df(self) -> Floats:
        """V^2 / ((w V)^2 / seed_df + ((1 - w) V)^2 / row_df) with w = seed_share (Satterthwaite 1946).

        For the reader: intervals and p values go by `lmoe/study/crossed_t.py`, which says why.
        """
        share = self.seed_share
        return 1 / (share**2 / self.seed_df + (1 - share) ** 2 / self.row_df)


def crossed_estimate(delta: Floats, strata: Strata) -> CrossedEstimate:
    """The mean over seeds of a difference, with its standard error under the two-way random-effects model.

    With L_s the difference of seed s (`measure`), e its linearisation, n_d the rows of domain d and bars for means:

        A = sum_s (L_s - L)^2 / ((S - 1) S)                                      of seeds:  V_seed + V_rest
        B = 1/D^2 sum_d sum_{r in d} e_r^2 / ((n_d - 1) n_d), e_r = mean_s e_sr  of rows:   V_row + V_rest
        C = 1/D^2 sum_d sum_{s, r in d} (e_sr - e_r)^2 / ((S - 1) (n_d - 1) n_d S)          V_rest
        V = A + max(B - C, 0)

    These are the mean squares of the two-way layout without replicates, over their sizes, so that A - C, B - C and C are
    the usual unbiased estimates (Searle, Casella and McCulloch 1992, Variance Components, chapter 4). A negative A - C or
    B - C is shown as a part of 0. In V only the part of rows is cut off at 0: A stands for the seeds and the rest together
    and cannot be negative, and cutting A - C off as well would make V too large by a tenth and more where seeds have no
    effect of their own. Seed effects are common to all domains of a model, so A comes from the measure of the whole model.

    Args:
        delta: (..., S, N) nats, loss sums of an arm less those of the baseline, seeds paired by their order.

    Raises:
        DataError: fewer than two seeds, rows that do not fit the strata, or a loss that is not finite.
    """
    if delta.ndim < 2 or delta.shape[-1] != strata.tokens.size:
        raise DataError(
            f"differences of shape {delta.shape} for {strata.tokens.size} rows: they must be (seeds, rows)."
        )
    if not np.isfinite(delta).all():
        raise DataError("a loss is not finite (nan or inf): a model that diverged cannot be averaged with others.")
    seeds = delta.shape[-2]
    if seeds < SEEDS_FOR_SPREAD:
        raise DataError(f"{seeds} seed: the spread over seeds needs at least {SEEDS_FOR_SPREAD}.")
    by_seed = measure(delta, strata)
    e = linearised(delta, strata)
    e_of_row = e.mean(-2)
    domain_size = (strata.rows - 1) * strata.rows * len(strata.names) ** 2
    squares_of_rows = (e_of_row**2) @ strata.member
    squares_of_rest = (e**2).sum(-2) @ strata.member - seeds * squares_of_rows

    of_seeds = by_seed.var(-1, ddof=1) / seeds
    of_rows_by_domain = squares_of_rows / domain_size
    of_rows = of_rows_by_domain.sum(-1)
    of_rest = np.maximum(squares_of_rest / (domain_size * (seeds - 1) * seeds), 0).sum(-1)

    row_part = np.maximum(of_rows - of_rest, 0)
    variance = of_seeds + row_part
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(variance > 0, of_seeds / variance, 1.0)
        row_df = of_rows**2 / (of_rows_by_domain**2 / (strata.rows - 1)).sum(-1)
    return CrossedEstimate(
        estimate=by_seed.mean(-1),
        standard_error=np.sqrt(variance),
        seed_part=np.maximum(of_seeds - of_rest, 0),
        row_part=row_part,
        rest_part=of_rest,
        seed_share=share,
        seed_df=seeds - 1,
        row_df=np.where(of_rows > 0, row_df, strata.rows.sum() - len(strata.names)),
    )
