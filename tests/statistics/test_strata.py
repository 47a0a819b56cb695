"""The measure of a model and its linearisation."""

import numpy as np
import pytest

from lmoe.errors import DataError
from lmoe.statistics.strata import Strata, linearised, measure
from tests.reference import dumb_study as dumb

TOKENS = [3.0, 10.0, 1.0, 7.0, 20.0]
DOMAINS = ["code", "chat", "code", "chat", "chat"]


def test_the_measure_is_the_mean_over_domains_of_loss_by_token():
    losses = np.random.default_rng(0).gamma(2.0, size=(4, 3, 5))
    found = measure(losses, Strata.of_rows(TOKENS, DOMAINS))
    assert found.shape == (4, 3)
    for b in range(4):
        for s in range(3):
            assert found[b, s] == pytest.approx(dumb.measure(losses[b, s].tolist(), TOKENS, DOMAINS))


def test_a_domain_counts_alike_however_many_tokens_it_has():
    strata = Strata.of_rows([1.0, 1.0, 1000.0, 1000.0], ["few", "few", "many", "many"])
    assert measure(np.array([[2.0, 2.0, 4000.0, 4000.0]]), strata) == pytest.approx([3.0])


def test_linearised_rows_of_a_domain_sum_to_zero_and_follow_the_measure():
    generator = np.random.default_rng(1)
    strata = Strata.of_rows(TOKENS, DOMAINS)
    losses = generator.gamma(2.0, size=(2, 5)) * strata.tokens
    e = linearised(losses, strata)
    assert e @ strata.member == pytest.approx(np.zeros((2, 2)), abs=1e-12)
    # A row that counts a little more moves the measure by its e over the rows of its domain and the domains.
    row, more = 3, 1e-6
    weight = np.ones(5)
    weight[row] += more
    heavier = Strata(tokens=strata.tokens * weight, domain_ids=strata.domain_ids, names=strata.names)
    slope = (measure(losses * weight, heavier) - measure(losses, strata)) / more
    assert slope == pytest.approx(e[:, row] / 3 / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("tokens", "domains", "words"),
    [
        ([1.0, 2.0], ["a", "a", "a"], "2 counts of label tokens for 3 rows"),
        ([], [], "no rows"),
        ([1.0, 0.0, 2.0], ["a", "a", "a"], "row 1 has 0 label tokens"),
        ([1.0, float("nan")], ["a", "a"], "row 1 has nan label tokens"),
        ([1.0, 1.0, 1.0], ["a", "a", "b"], "a single row of b"),
    ],
)
def test_rows_that_cannot_be_judged_on_are_refused_by_name(tokens, domains, words):
    with pytest.raises(DataError, match=words):
        Strata.of_rows(tokens, domains)


def test_one_domain_is_one_stratum():
    only = Strata.of_rows(TOKENS, DOMAINS).only("chat")
    assert only.names == ("chat",) and only.tokens.tolist() == [10.0, 7.0, 20.0] and only.rows.tolist() == [3.0]
