"""Rows are drawn once for all seeds, within domains, and seeds once for all rows."""

import numpy as np
import pytest

from lmoe.statistics.bootstrap import bootstrap_estimates, bootstrap_interval
from lmoe.statistics.strata import Strata

STRATA = Strata.of_rows([1.0] * 40, ["a"] * 10 + ["b"] * 30)
DRAWS = 4000


def spread(delta: np.ndarray) -> float:
    return float(bootstrap_estimates(delta, STRATA, draws=DRAWS, seed=1).var())


def test_seeds_alone_spread_as_a_mean_of_seeds_drawn_with_replacement():
    by_seed = np.array([0.0, 1.0, 5.0, 2.0])
    assert spread(np.outer(by_seed, np.ones(40))) == pytest.approx(by_seed.var() / 4, rel=0.1)


def test_rows_alone_spread_the_same_however_many_seeds_saw_them():
    rows = np.random.default_rng(0).standard_normal(40)
    expected = (rows[:10].var() / 10 + rows[10:].var() / 30) / 4
    assert spread(np.stack([rows] * 2)) == pytest.approx(expected, rel=0.1)
    assert spread(np.stack([rows] * 9)) == pytest.approx(expected, rel=0.1)


def test_domains_keep_their_rows():
    by_domain = np.where(STRATA.domain_ids == 0, 3.0, -1.0)
    found = bootstrap_estimates(np.stack([by_domain] * 3), STRATA, draws=50)
    assert found == pytest.approx(np.ones(50))


def test_an_interval_holds_the_estimate_and_is_the_same_for_the_same_seed():
    delta = np.random.default_rng(2).normal(0.5, 1, (5, 40))
    low, high = bootstrap_interval(delta, STRATA, draws=600, seed=3)
    assert low < (delta[:, :10].mean() + delta[:, 10:].mean()) / 2 < high
    assert bootstrap_interval(delta, STRATA, draws=600, seed=3) == (low, high)
    assert bootstrap_interval(delta, STRATA, draws=600, seed=4) != (low, high)
    inner = bootstrap_interval(delta, STRATA, level=0.5, draws=600, seed=3)
    assert low < inner[0] < inner[1] < high
