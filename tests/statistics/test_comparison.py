"""One arm beside the baseline, on all rows and on those of each domain."""

import numpy as np
import pytest

from lmoe.errors import DataError
from lmoe.statistics.bootstrap import bootstrap_interval
from lmoe.statistics.comparison import Terms, compare, compare_domains
from lmoe.statistics.crossed import crossed_estimate
from lmoe.statistics.inference import difference_p, equivalence_p, interval, smallest_effect
from lmoe.statistics.strata import Strata
from lmoe.statistics.verdict import Verdict, judge

GENERATOR = np.random.default_rng(0)
STRATA = Strata.of_rows(GENERATOR.integers(5, 50, 30).astype(float), ["a"] * 12 + ["b"] * 18)
BASELINE = STRATA.tokens * (2 + 0.2 * GENERATOR.standard_normal((4, 30)))
ARM = BASELINE - STRATA.tokens * (0.5 + 0.1 * GENERATOR.standard_normal((4, 30)))


def test_an_arm_with_less_loss_has_an_estimate_below_zero():
    found = compare("ours", ARM, BASELINE, STRATA, Terms(margin=0.1, draws=0))
    assert found.estimate == pytest.approx(-0.5, abs=0.05)
    assert np.mean(found.by_seed) == pytest.approx(found.estimate)
    assert (found.seeds, found.rows) == (4, 30)
    assert found.spread is not None and found.spread.low < found.estimate < found.spread.high < 0


def test_figures_are_those_of_the_functions():
    found = compare("ours", ARM, BASELINE, STRATA, Terms(margin=0.1, level=0.9, power=0.7, draws=200, seed=5)).spread
    of = crossed_estimate(ARM - BASELINE, STRATA)
    assert found is not None
    assert (found.low, found.high) == interval(of, 0.9)
    assert (found.bootstrap_low, found.bootstrap_high) == bootstrap_interval(
        ARM - BASELINE, STRATA, level=0.9, draws=200, seed=5
    )
    assert found.difference_p == difference_p(of) and found.equivalence_p == equivalence_p(of, 0.1)
    assert found.smallest_effect == pytest.approx(smallest_effect(of, 0.1, 0.7))
    assert found.standard_error**2 <= found.seed_part + found.row_part + found.rest_part + 1e-15


def test_a_single_seed_has_an_estimate_and_no_spread():
    found = compare("ours", ARM[:1], BASELINE[:1], STRATA, Terms(margin=0.1))
    assert found.spread is None and found.estimate == found.by_seed[0]


def test_rounding_is_no_difference():
    found = compare("same", BASELINE + 1e-14 * STRATA.tokens, BASELINE, STRATA, Terms(margin=0.1, draws=0))
    assert found.estimate == 0 and set(found.by_seed) == {0.0}
    [judged] = judge([found])
    assert judged.verdict is Verdict.EQUIVALENT


def test_seeds_are_paired_by_their_order():
    apart = compare("ours", ARM[::-1], BASELINE, STRATA, Terms(margin=0.1, draws=0))
    paired = compare("ours", ARM, BASELINE, STRATA, Terms(margin=0.1, draws=0))
    assert apart.estimate == pytest.approx(paired.estimate)
    assert apart.spread is not None and paired.spread is not None
    assert apart.spread.standard_error > paired.spread.standard_error


def test_a_domain_is_compared_on_its_rows_alone():
    found = compare_domains("ours", ARM, BASELINE, STRATA, Terms(margin=0.1, draws=0))
    assert [c.name for c in found.values()] == ["ours, a", "ours, b"] and list(found) == ["a", "b"]
    own = Strata.of_rows(STRATA.tokens[12:], ["b"] * 18)
    assert found["b"] == compare("ours, b", ARM[:, 12:], BASELINE[:, 12:], own, Terms(margin=0.1, draws=0))
    whole = compare("ours", ARM, BASELINE, STRATA, Terms(margin=0.1, draws=0))
    assert (found["a"].estimate + found["b"].estimate) / 2 == pytest.approx(whole.estimate)


def test_losses_that_do_not_fit_are_refused_with_the_name_of_the_arm():
    with pytest.raises(DataError, match=r"ours: losses of shape \(3, 30\) beside \(4, 30\)"):
        compare("ours", ARM[:3], BASELINE, STRATA, Terms(margin=0.1))
    broken = ARM.copy()
    broken[2, 7] = np.nan
    with pytest.raises(DataError, match="ours: losses of model 3 of 4, or of the one beside it, are not finite"):
        compare("ours", broken, BASELINE, STRATA, Terms(margin=0.1))
