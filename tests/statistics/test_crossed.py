"""Variance parts of crossed seeds and rows, beside explicit sums of squares."""

import numpy as np
import pytest

from lmoe.errors import DataError
from lmoe.statistics.crossed import crossed_estimate
from lmoe.statistics.strata import Strata
from tests.reference import dumb_study as dumb


def table(seeds: int, rows: int, generator: np.random.Generator) -> np.ndarray:
    return (
        0.3 + generator.standard_normal((seeds, 1)) + generator.standard_normal(rows)
        + 0.5 * generator.standard_normal((seeds, rows))
    )  # fmt: skip


def test_equal_tokens_in_one_domain_give_the_mean_squares_of_the_two_way_layout():
    delta = table(4, 9, np.random.default_rng(0))
    squares = dumb.anova(delta.tolist())
    found = crossed_estimate(delta, Strata.of_rows([1.0] * 9, ["all"] * 9))
    assert found.seed_part == pytest.approx((squares.seeds - squares.rest) / 36)
    assert found.row_part == pytest.approx((squares.rows - squares.rest) / 36)
    assert found.rest_part == pytest.approx(squares.rest / 36)
    assert found.standard_error**2 == pytest.approx((squares.seeds + squares.rows - squares.rest) / 36)
    assert (found.seed_df, found.row_df) == (3, pytest.approx(8))
    assert found.estimate == pytest.approx(delta.mean())


def test_unequal_tokens_and_domains_agree_with_loops():
    generator = np.random.default_rng(1)
    tokens = generator.integers(1, 60, size=17).astype(float)
    domains = ["a"] * 5 + ["b"] * 8 + ["c"] * 4
    delta = table(3, 17, generator) * tokens
    expected = dumb.crossed_parts(delta.tolist(), tokens.tolist(), domains)
    found = crossed_estimate(delta, Strata.of_rows(tokens, domains))
    variance = expected.of_seeds + max(expected.of_rows - expected.of_rest, 0)
    assert found.estimate == pytest.approx(expected.estimate)
    assert found.standard_error == pytest.approx(np.sqrt(variance))
    assert found.seed_part == pytest.approx(max(expected.of_seeds - expected.of_rest, 0))
    assert found.row_part == pytest.approx(max(expected.of_rows - expected.of_rest, 0))
    assert found.rest_part == pytest.approx(expected.of_rest)
    assert found.seed_share == pytest.approx(expected.of_seeds / variance)
    assert found.row_df == pytest.approx(expected.row_df)


def test_many_studies_at_once_are_each_study_alone():
    generator = np.random.default_rng(2)
    strata = Strata.of_rows(generator.integers(1, 9, size=10).astype(float), ["a", "b"] * 5)
    studies = np.stack([table(3, 10, generator) for _ in range(4)])
    together = crossed_estimate(studies, strata)
    for number, delta in enumerate(studies):
        alone = crossed_estimate(delta, strata)
        for name in ("estimate", "standard_error", "seed_part", "row_part", "rest_part", "seed_share", "row_df"):
            assert getattr(together, name)[number] == pytest.approx(getattr(alone, name))


def test_a_negative_part_is_shown_as_zero_and_that_of_seeds_is_not_cut_off_in_the_standard_error():
    # Two seeds that differ in every row and agree on average: the mean square of seeds is 0, that of the rest is not.
    rest = np.array([1.0, -1.0, 1.0, -1.0])
    rows = np.array([5.0, 1.0, -4.0, 3.0])
    found = crossed_estimate(np.stack([rows + rest, rows - rest]), Strata.of_rows([1.0] * 4, ["a"] * 4))
    assert found.seed_part == 0 and found.row_part > 0 and found.rest_part > 0
    assert found.standard_error**2 == pytest.approx(found.row_part) and found.seed_share == 0
    # Rows that agree on average: the part of rows is cut off, and the seeds alone make the standard error.
    found = crossed_estimate(np.array([[3.0, 1.0], [1.0, 3.0], [9.0, 9.0]]), Strata.of_rows([1.0] * 2, ["a"] * 2))
    assert found.row_part == 0 and found.seed_share == 1
    assert found.standard_error == pytest.approx(np.std([2.0, 2.0, 9.0], ddof=1) / np.sqrt(3))


def test_satterthwaites_df_lie_between_those_of_seeds_and_the_sum():
    found = crossed_estimate(table(3, 40, np.random.default_rng(3)), Strata.of_rows([1.0] * 40, ["a"] * 40))
    share = found.seed_share
    assert found.satterthwaite_df == pytest.approx(1 / (share**2 / 2 + (1 - share) ** 2 / 39))
    assert 2 < found.satterthwaite_df < 41


@pytest.mark.parametrize(
    ("delta", "words"),
    [
        (np.zeros((1, 4)), "1 seed"),
        (np.zeros((3, 5)), "4 rows"),
        (np.zeros(4), "4 rows"),
        (np.array([[0.0, np.inf, 0.0, 0.0]] * 3), "not finite"),
    ],
)
def test_what_has_no_spread_over_seeds_is_refused(delta, words):
    with pytest.raises(DataError, match=words):
        crossed_estimate(delta, Strata.of_rows([1.0] * 4, ["a"] * 4))
