"""When a site counts as collapsed."""

import math

import pytest

from lmoe.metrics.routing import SiteRouting
from lmoe.training.callbacks.collapse_watch import collapse_reason


def site(*load: float, importance: tuple[float, ...] | None = None) -> SiteRouting:
    return SiteRouting(
        load=list(load), entropy=0.5, effective=1.0, importance=load if importance is None else importance
    )


def with_load_entropy(entropy: float) -> SiteRouting:
    """Four experts, all in use, whose load has an entropy just above or below; found by bisection."""
    low, high = 0.25, 0.75
    for _ in range(60):
        top = (low + high) / 2
        found = site(top, *[(1 - top) / 3] * 3)
        low, high = (top, high) if found.load_entropy > entropy else (low, top)
    return found


@pytest.mark.parametrize(
    ("load", "said"),
    [
        ((0.9, 0.05, 0.05), "expert 0 has 90% of the routing weight"),
        ((0.0, 1.0), "expert 1 has 100% of the routing weight"),
        ((0.5, 0.5, 0.0, 0.0), "only 2 of 4 experts get more than 5% of the tokens"),
        ((0.48, 0.48, 0.04, 0.0), "only 2 of 4"),
        ((0.96, 0.04), "expert 0 has 96% of the routing weight"),
        ((0.79, 0.21), None),
        ((0.25, 0.25, 0.25, 0.25), None),
        ((0.4, 0.4, 0.2, 0.0), None),
        ((0.5, 0.5), None),  # every token goes to both
        ((1.0,), None),  # there is no other expert
    ],
)
def test_collapse_by_the_share_of_the_experts(load, said):
    reason = collapse_reason(site(*load), entropy_at_start=0.0)
    assert (reason is None) if said is None else (said in str(reason))


@pytest.mark.parametrize(
    ("importance", "said"),
    [((0.05, 0.85, 0.05, 0.05), "expert 1 has 85% of the routing weight"), ((0.1, 0.79, 0.1, 0.01), None)],
)
def test_collapse_by_weight_shows_although_the_load_is_even(importance, said):
    """As in soft or top-2 routing, where every expert gets its share of the tokens and one has all the weight."""
    reason = collapse_reason(site(0.25, 0.25, 0.25, 0.25, importance=importance), entropy_at_start=1.0)
    assert (reason is None) if said is None else (said in str(reason))


@pytest.mark.parametrize(("third", "collapsed"), [(0.006, True), (0.0065, False)])
def test_with_more_than_eight_experts_one_is_in_use_from_two_fifths_of_a_uniform_load(third, collapsed):
    """Of 64 experts: 0.4 / 64 = 0.625 %, which is what the third one has not, or has; the other 61 have less."""
    load = [0.35, 0.35, third] + [(0.3 - third) / 61] * 61
    reason = collapse_reason(site(*load), entropy_at_start=0.0)
    assert (reason is not None) is collapsed
    if collapsed:
        assert "only 2 of 64 experts get more than 0.62% of the tokens" in str(reason)


@pytest.mark.parametrize(("share", "collapsed"), [(0.74, True), (0.76, False)])
def test_collapse_by_an_entropy_of_the_load_below_three_quarters_of_what_it_was(share, collapsed):
    found = with_load_entropy(share * 0.96)
    assert found.load_entropy == pytest.approx(share * 0.96)
    assert max(found.importance) < 0.8
    reason = collapse_reason(found, entropy_at_start=0.96)
    assert (reason is not None) is collapsed
    if collapsed:
        said = f"the entropy of the load fell to {share * 0.96:.2f}, from 0.96 at the start of the phase"
        assert said in str(reason)


def test_an_entropy_that_was_low_from_the_start_is_no_collapse():
    found = with_load_entropy(0.7)
    assert collapse_reason(found, entropy_at_start=0.7) is None
    assert collapse_reason(found, entropy_at_start=1.0) is not None
    assert math.isclose(found.load_entropy, 0.7, abs_tol=1e-6)
