"""The answer of a study in one sentence claims no more than its comparisons do."""

from lmoe.statistics.verdict import Verdict
from lmoe.study.results.answer import answer, shortened
from lmoe.study.results.result import EDGE
from tests.study.made_results import RATE, arm, comparison, result, usual_result


def test_the_answer_says_of_every_arm_what_was_found() -> None:
    assert answer(usual_result()) == (
        "Beside “the arm plain”, “the arm good” is better; “the arm bad” is worse; “the arm same” is equivalent within "
        "0.01 nats; it cannot be told whether “the arm unsure” differs."
    )


def test_arms_of_one_verdict_are_named_together_the_best_first() -> None:
    given = usual_result()
    given.primary = [comparison("good", -0.1, Verdict.BETTER), comparison("bad", -0.2, Verdict.BETTER)]
    given.primary += [comparison("same", 0.02), comparison("unsure", 0.01)]
    assert answer(given) == (
        "Beside “the arm plain”, “the arm bad” and “the arm good” are better; it cannot be told whether “the arm "
        "unsure” and “the arm same” differ."
    )


def test_a_difference_that_is_too_small_to_matter_is_said_to_be() -> None:
    given = usual_result()
    given.primary = [comparison("good", -0.002, Verdict.BETTER, equivalence_p=0.01)]
    assert "“the arm good” is better by less than 0.01 nats" in answer(given)


def test_no_verdict_is_claimed_of_an_arm_at_the_edge() -> None:
    given = usual_result()
    given.arms[1].edges = {RATE: "upper"}
    given.primary[0].verdict = EDGE
    said = answer(given)
    assert "Beside “the arm plain”, “the arm bad” is worse" in said
    assert said.endswith(
        "; as far as it was tuned, “the arm good” is better, but the best value of “the arm good” is the outermost "
        "tried, so that this is no verdict."
    )


def test_no_verdict_is_claimed_where_the_baseline_is_at_the_edge() -> None:
    given = usual_result()
    given.arms[0].edges = given.arms[2].edges = {RATE: "lower"}
    for found in given.primary:
        found.verdict = EDGE
    assert answer(given).startswith("Beside “the arm plain”, as far as it was tuned, “the arm good” is better, ")
    assert answer(given).endswith(
        "but the best values of “the arm plain” and “the arm bad” are the outermost tried, so that this is no verdict."
    )


def test_too_few_seeds_are_no_verdict() -> None:
    given = usual_result()
    given.primary = [comparison("good", -0.5, seeds=2)]
    assert "there are too few seeds to judge “the arm good” (2, and a verdict needs 3)" in answer(given)


def test_arms_that_were_not_judged_are_named() -> None:
    given = result(
        [arm("plain", 2.0), arm("good", 1.9), arm("a", None), arm("b", None), arm("c", 2.0)],
        [comparison("good", -0.1, Verdict.BETTER)],
    )
    assert answer(given) == (
        "Beside “the arm plain”, “the arm good” is better; “the arm a” and “the arm b” were not judged; “the arm c” "
        "was judged with no seed of the baseline."
    )


def test_without_comparisons_nothing_is_told() -> None:
    assert answer(result([arm("plain", None), arm("good", 1.9)], [])) == (
        "Nothing can be told, because “the arm plain” was not judged."
    )
    assert answer(result([arm("plain", 2.0), arm("good", 1.9)], [])) == (
        "Nothing can be told, because no arm was judged with a seed of the baseline."
    )


def test_a_long_title_is_cut() -> None:
    assert shortened("a" * 60) == "a" * 60 and shortened("a" * 61) == "a" * 59 + "…"
