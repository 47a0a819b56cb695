"""The estimate of a difference over crossed seeds and rows, and its standard error.

delta[s, r] = mu + S_s + R_r + E_sr: every model is judged on the same rows, so that seeds and rows are crossed. Rows
that a lucky draw made easy are easy for all seeds, and a lucky seed is lucky on all rows; neither becomes surer by more
of the other. Shapes: S seeds, N rows, D domains; `...` any leading axes.
"""

from dataclasses import dataclass

import numpy as np

from lmoe.errors import DataError
from lmoe.statistics.strata import Floats, Strata, linearised, measure

SEEDS_FOR_SPREAD = 2
"""Seeds below which the spread over seeds cannot be told at all."""
ROUNDING = 1e-9
"""Nats a token, below which a difference is of rounding alone: of losses in float32 nobody can tell so much."""


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
        row_df: degrees of freedom of the other share, from the rows: of a domain (1 - 1/n_d) / sum_r h_r^2, which is
            n_d - 1 with equal label tokens (effective sample size of Kish 1965, Survey Sampling), pooled over domains
            after Satterthwaite.
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

        For the reader: intervals and p values go by `lmoe/statistics/crossed_t.py`, which says why.
        """
        share = self.seed_share
        return 1 / (share**2 / self.seed_df + (1 - share) ** 2 / self.row_df)


def crossed_estimate(delta: Floats, strata: Strata) -> CrossedEstimate:
    """The mean over seeds of a difference, with its standard error under the two-way random-effects model.

    With L_s the difference of seed s (`measure`), e its linearisation, e_r the mean of e_sr over seeds, n_d the rows of
    domain d and h_r the share of its domain's label tokens that a row has:

        A = sum_s (L_s - L)^2 / ((S - 1) S)                                              of seeds:  V_seed + V_rest
        B = 1/D^2 sum_d 1/n_d^2 sum_{r in d} e_r^2 / (1 - h_r)                           of rows:   V_row + V_rest
        C = 1/D^2 sum_d 1/n_d^2 sum_{r in d, s} (e_sr - e_r)^2 / ((1 - h_r) (S - 1) S)   V_rest
        V = A + max(B - C, 0)

    With equal label tokens these are the mean squares of the two-way layout without replicates over its sizes, and
    A - C, B - C and C the usual unbiased estimates (Searle, Casella and McCulloch 1992, Variance Components, chapter
    4). 1 - h_r in place of 1 - 1/n_d is what a long row takes off its own residual (HC2 of MacKinnon and White 1985,
    Journal of Econometrics 29). A negative A - C or B - C is shown as a part of 0. In V only the part of rows is cut
    off at 0: A stands for seeds and rest together and cannot be negative, and cutting A - C off as well makes V too
    large where seeds have no effect of their own. Seed effects are common to all domains of a model, so A comes from
    the model's measure.

    Args:
        delta: (..., S, N) nats, loss sums of an arm less those of the baseline, seeds paired by their order.

    Raises:
        DataError: fewer than two seeds, rows that do not fit the strata, or a loss that is not finite.
    """
    if delta.ndim < 2 or delta.shape[-1] != strata.tokens.size:
        raise DataError(f"differences of shape {delta.shape}: they must be (seeds, {strata.tokens.size} rows).")
    if not np.isfinite(delta).all():
        raise DataError("a loss is not finite (nan or inf): a model that diverged cannot be averaged with others.")
    seeds = delta.shape[-2]
    if seeds < SEEDS_FOR_SPREAD:
        raise DataError(f"{seeds} seed: the spread over seeds needs at least {SEEDS_FOR_SPREAD}.")
    by_seed = measure(delta, strata)
    tokens_share = strata.tokens / strata.domain_tokens[strata.domain_ids]
    e = linearised(delta, strata) / np.sqrt(1 - tokens_share)
    e_of_row = e.mean(-2)
    squares_of_rows = (e_of_row**2) @ strata.member
    squares_of_rest = np.maximum((e**2).sum(-2) @ strata.member - seeds * squares_of_rows, 0)

    size = (strata.rows * len(strata.names)) ** 2
    of_seeds = by_seed.var(-1, ddof=1) / seeds
    of_rows_by_domain = squares_of_rows / size
    of_rows = of_rows_by_domain.sum(-1)
    of_rest = (squares_of_rest / size).sum(-1) / ((seeds - 1) * seeds)

    row_part = np.maximum(of_rows - of_rest, 0)
    variance = of_seeds + row_part
    domain_df = (1 - 1 / strata.rows) / (tokens_share**2 @ strata.member)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(variance > 0, of_seeds / variance, 1.0)
        row_df = of_rows**2 / (of_rows_by_domain**2 / domain_df).sum(-1)
    return CrossedEstimate(
        estimate=without_rounding(by_seed.mean(-1)),
        standard_error=without_rounding(np.sqrt(variance)),
        seed_part=np.maximum(of_seeds - of_rest, 0),
        row_part=row_part,
        rest_part=of_rest,
        seed_share=share,
        seed_df=seeds - 1,
        row_df=np.where(of_rows > 0, row_df, domain_df.sum()),
    )


def without_rounding(value: Floats) -> Floats:
    """The value, or 0 where it is of rounding alone: two models that are the same differ by nothing."""
    return value * (np.abs(value) >= ROUNDING) + 0.0  # and no -0
