"""What is said of a family: differences and equivalences are two questions."""

import pytest

from lmoe.statistics.comparison import Comparison, Spread
from lmoe.statistics.verdict import Verdict, judge


def comparison(
    name: str, estimate: float, difference_p: float = 1.0, equivalence_p: float = 1.0, seeds: int = 5
) -> Comparison:
    spread = Spread(
        standard_error=0.01, satterthwaite_df=4.0, low=estimate - 0.02, high=estimate + 0.02, bootstrap_low=None,
        bootstrap_high=None, seed_part=1e-5, row_part=1e-5, rest_part=1e-5, difference_p=difference_p,
        equivalence_p=equivalence_p, smallest_effect=0.0321,
    )  # fmt: skip
    return Comparison(
        name=name, estimate=estimate, by_seed=(estimate,) * seeds, seeds=seeds, rows=100, margin=0.05, level=0.95,
        power=0.8, spread=spread if seeds > 1 else None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("estimate", "difference_p", "equivalence_p", "verdict", "sentence"),
    [
        (-0.2, 0.01, 1.0, Verdict.BETTER, "better"),
        (0.2, 0.01, 1.0, Verdict.WORSE, "worse"),
        (-0.02, 0.01, 0.01, Verdict.BETTER, "better, by less than 0.05"),
        (0.02, 0.01, 0.01, Verdict.WORSE, "worse, by less than 0.05"),
        (-0.02, 0.3, 0.01, Verdict.EQUIVALENT, "equivalent within 0.05"),
        (-0.2, 0.3, 0.3, Verdict.UNDECIDED, "cannot be told: a difference of 0.032 could have been seen"),
        (-0.2, 0.05, 0.05, Verdict.UNDECIDED, "cannot be told"),
    ],
)
def test_a_difference_and_its_smallness_are_said_apart(estimate, difference_p, equivalence_p, verdict, sentence):
    (judged,) = judge([comparison("ours", estimate, difference_p, equivalence_p)])
    assert judged.verdict is verdict and judged.sentence().startswith(sentence)
    assert judged.within_margin == (equivalence_p < 0.05)


def test_each_question_is_a_family_of_its_own_and_a_p_value_needs_more_in_a_larger_one():
    arms = [comparison(str(number), -0.02, 0.02, 0.001) for number in range(3)]
    assert judge(arms[:1])[0].verdict is Verdict.BETTER
    found = judge(arms)
    assert [j.verdict for j in found] == [Verdict.EQUIVALENT] * 3
    assert [(j.difference_p, j.equivalence_p, j.family) for j in found] == [
        (pytest.approx(0.06), pytest.approx(0.003), 3)
    ] * 3


@pytest.mark.parametrize("seeds", [1, 2])
def test_nothing_is_claimed_below_three_seeds_and_such_arms_do_not_count_in_the_family(seeds):
    few, enough = judge([comparison("few", -1.0, 1e-9, seeds=seeds), comparison("enough", -1.0, 0.04, seeds=3)])
    assert few.verdict is Verdict.TOO_FEW_SEEDS and few.difference_p is None and not few.within_margin
    assert few.sentence() == f"too few seeds: {seeds}, and a verdict needs 3"
    assert enough.verdict is Verdict.BETTER and enough.family == 1


def test_comparisons_of_one_name_are_refused():
    with pytest.raises(ValueError, match="names of their own"):
        judge([comparison("ours", 0.1), comparison("ours", 0.2)])
