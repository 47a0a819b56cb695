"""Critical values, intervals and p values: t tests at both ends, inverse of one another between them."""

import numpy as np
import pytest
from scipy import stats

from lmoe.statistics.crossed import CrossedEstimate, crossed_estimate
from lmoe.statistics.crossed_t import critical, upper_tail
from lmoe.statistics.inference import difference_p, equivalence_p, interval, rows_interval, smallest_effect
from lmoe.statistics.strata import Strata
from tests.reference import dumb_study as dumb


def seeds_alone(by_seed: list[float]) -> CrossedEstimate:
    """Rows that all have the same difference by token, so that seeds are all the noise there is."""
    tokens = np.array([4.0, 1.0, 9.0])
    return crossed_estimate(np.outer(by_seed, tokens), Strata.of_rows(tokens, ["a"] * 3))


def test_without_noise_of_rows_it_is_the_t_test_over_seeds():
    by_seed = [0.2, -0.1, 0.5, 0.35]
    expected = stats.ttest_1samp(by_seed, 0)
    found = seeds_alone(by_seed)
    assert difference_p(found) == pytest.approx(expected.pvalue, rel=1e-9)
    assert interval(found, 0.9) == pytest.approx(tuple(expected.confidence_interval(0.9)), rel=1e-9)
    error = np.std(by_seed, ddof=1) / 2
    assert smallest_effect(found, 0.05, 0.8) == pytest.approx(error * (stats.t.ppf(0.975, 3) + stats.t.ppf(0.8, 3)))
    for margin in (0.1, 0.3, 2.0):
        by_hand = dumb.two_one_sided_tests(float(np.mean(by_seed)), error, 3, margin)
        assert equivalence_p(found, margin) == pytest.approx(by_hand, rel=1e-9)


def test_over_rows_alone_it_is_the_t_test_of_the_rows_also_of_a_single_seed():
    delta = np.random.default_rng(0).standard_normal((3, 12))
    strata = Strata.of_rows([1.0] * 12, ["a"] * 12)
    for seeds in (delta, delta[:1]):
        expected = stats.ttest_1samp(seeds.mean(0), 0)
        assert rows_interval(seeds, strata, 0.9) == pytest.approx(tuple(expected.confidence_interval(0.9)), rel=1e-9)
    tokens, domains = np.arange(1.0, 13.0), ["a", "b", "b"] * 4
    parts = dumb.crossed_parts(delta.tolist(), tokens.tolist(), domains)
    width = np.sqrt(parts.of_rows) * stats.t.ppf(0.975, parts.row_df)
    expected = (parts.estimate - width, parts.estimate + width)
    assert rows_interval(delta, Strata.of_rows(tokens, domains)) == pytest.approx(expected)


def test_seeds_that_agree_leave_the_t_test_over_rows():
    rows = np.random.default_rng(0).standard_normal(12)
    found = crossed_estimate(np.stack([rows] * 3), Strata.of_rows([1.0] * 12, ["a"] * 12))
    expected = stats.ttest_1samp(rows, 0)
    assert difference_p(found) == pytest.approx(expected.pvalue, rel=1e-9)
    assert interval(found) == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-9)


def test_two_seeds_have_an_interval():
    low, high = interval(seeds_alone([0.1, 0.3]))
    assert (low, high) == pytest.approx((0.2 - 0.1 * stats.t.ppf(0.975, 1), 0.2 + 0.1 * stats.t.ppf(0.975, 1)))


@pytest.mark.parametrize("tail", [0.4, 0.1, 0.025, 1e-4])
def test_a_critical_value_is_the_power_mean_of_the_two_ends_and_its_tail_gives_it_back(tail):
    shares = np.array([0.0, 0.1, 0.5, 0.9, 1.0])
    found = critical(tail, shares, 2, 70)
    assert found == pytest.approx([dumb.critical(tail, float(w), 2, 70) for w in shares])
    assert np.all(np.diff(found) > 0)
    assert upper_tail(found, shares, 2, 70) == pytest.approx(np.full(5, tail), rel=1e-9)
    assert upper_tail(-found, shares, 2, 70) == pytest.approx(np.full(5, 1 - tail), rel=1e-9)


def test_tails_far_out_and_at_zero_are_probabilities():
    found = upper_tail(np.array([0.0, 50.0, 1e6, np.inf, -np.inf]), np.array([0.3, 0.0, 1.0, 0.5, 0.5]), 2, 40)
    assert found[0] == pytest.approx(0.5) and found[4] == pytest.approx(1.0)
    assert np.all((found[1:4] >= 0) & (found[1:4] < 1e-11))


def test_an_interval_leaves_zero_out_where_the_p_value_is_below_its_level():
    generator = np.random.default_rng(1)
    strata = Strata.of_rows(generator.integers(1, 30, 20).astype(float), ["a", "b"] * 10)
    delta = generator.normal(0.6, 1, (200, 3, 1)) + generator.normal(0, 1, (200, 1, 20))
    delta = (delta + generator.normal(0, 1, (200, 3, 20))) * strata.tokens
    found = crossed_estimate(delta, strata)
    p, (low, high) = difference_p(found), interval(found, 0.8)
    assert np.array_equal(p < 0.2, (low > 0) | (high < 0)) and 20 < np.count_nonzero(p < 0.2) < 180
    low, high = interval(found, 0.6)
    p = equivalence_p(found, 1.0)
    assert np.array_equal(p < 0.2, (low > -1) & (high < 1)) and 20 < np.count_nonzero(p < 0.2) < 180


@pytest.mark.parametrize("by_seed", [[0.0, 0.0], [0.0, 0.0, 0.0], [3.7e-16, 3.7e-16, 3.7e-16], [1e-16, -2e-16, 1e-12]])
def test_models_that_are_the_same_differ_by_nothing_and_are_equivalent(by_seed):
    """But for rounding; with two seeds the tails are those of one degree of freedom."""
    found = seeds_alone(by_seed)
    assert difference_p(found) == 1 and equivalence_p(found, 0.01) < 1e-12 and interval(found) == (0, 0)


def test_a_margin_that_is_not_above_zero_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        equivalence_p(seeds_alone([0.1, 0.2]), 0.0)
