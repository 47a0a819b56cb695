"""What verdicts promise, on simulated studies; `make bench-statistics` tries all kinds of rows and more studies."""

from functools import cache

import numpy as np
import pytest

from benchmarks.critical_values import extremes, ours, satterthwaite
from benchmarks.simulated_studies import DESIGNS, Noise, bounds, family_share, selection, share

FEW_ROWS = DESIGNS[2]
"""The hardest: 2 domains of 40 rows, unequal tokens, row effects with heavy tails."""
CELLS = [(seeds, noise) for seeds in (3, 5, 10) for noise in (0.0, 1.0, 3.0)]


@cache
def shares(seeds: int, seed_noise: float) -> dict[str, float]:
    return share(FEW_ROWS, Noise(seed=seed_noise), seeds, 3000, np.random.default_rng(7))


@pytest.mark.parametrize(("seeds", "noise"), CELLS)
@pytest.mark.parametrize("name", ["false_alarms", "covered", "found", "false_equivalence"])
def test_shares_of_simulated_studies_are_what_is_promised(seeds, noise, name):
    bound = bounds(seeds)[name]
    assert bound.least <= shares(seeds, noise)[name] <= bound.most


def test_student_t_with_satterthwaites_df_breaks_the_promise_with_three_seeds():
    assert shares(3, 3.0)["student"] > 0.065 > shares(3, 3.0)["false_alarms"]


@pytest.mark.parametrize(("seeds", "noise"), [(3, 0.0), (3, 3.0), (5, 3.0), (10, 1.0)])
def test_twelve_arms_with_one_baseline_are_called_falsely_in_few_studies(seeds, noise):
    called = family_share(FEW_ROWS, Noise(seed=noise), seeds, 1500, np.random.default_rng(8))
    assert called <= bounds(seeds)["family"].most


@pytest.mark.parametrize(("alpha", "df"), [(alpha, df) for alpha in (0.05, 0.01, 0.05 / 12) for df in (2, 4, 9)])
def test_critical_values_keep_their_level_for_every_share_of_the_seeds(alpha, df):
    least, most = extremes(ours, df, alpha)
    assert most <= 1.16 * alpha and least >= 0.28 * alpha
    assert alpha < 0.05 or least >= 0.035
    assert extremes(satterthwaite, 2, 0.05 / 12)[1] > 5 * 0.05 / 12


def test_choosing_a_learning_rate_on_the_judging_rows_flatters_it_and_choosing_elsewhere_does_not():
    found = selection(FEW_ROWS, Noise(seed=1.0), 3, 1000, np.random.default_rng(9))
    assert found["judging rows"].bias < -0.5 and found["judging rows"].better > 0.065
    assert abs(found["other rows and seeds"].bias) < 0.1 and found["other rows and seeds"].better < 0.04
