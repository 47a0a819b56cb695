"""CSV files of a study hold the numbers of study.json, whole."""

import csv
import json
from dataclasses import asdict
from typing import Any

from lmoe.statistics.verdict import Verdict
from lmoe.study.results.csv_tables import COMPARED, TESTS, csv_tables
from lmoe.study.results.result import StudyResult
from tests.study.made_results import (
    DOMAINS,
    RATE,
    RATES,
    arm,
    bare_result,
    comparison,
    large_result,
    result,
    usual_result,
)


def rows_of(given: StudyResult, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(csv_tables(given)[name].splitlines()))


def number(cell: str) -> Any:
    return None if cell == "" else json.loads(cell)


def odd() -> StudyResult:
    """Whose numbers have many digits, and a classifier."""
    arms = [arm("plain", 2.0), arm("good", 1.9 + 1 / 3e9, classifier_accuracy=2 / 3, reading_share=1 / 7)]
    return result(arms, [comparison("good", -1 / 30, Verdict.BETTER, bootstrap_low=-0.1 / 3, smallest_effect=1 / 3)])


def test_verdicts_hold_every_number_of_a_comparison_with_all_its_digits() -> None:
    given = odd()
    baseline, good, base = rows_of(given, "verdicts.csv")
    for name in (*COMPARED[:-1], *TESTS):
        assert number(good[name]) == asdict(given.primary[0])[name] is not None
    assert number(good["loss"]) == given.arm("good").loss and good["verdict"] == "better"
    assert baseline["verdict"] == "baseline" and baseline["low"] == baseline["estimate"] == ""
    assert base["arm"] == "" and number(base["loss"]) == 3.5


def test_an_arm_without_a_verdict_says_why() -> None:
    given = large_result(9)
    given.arms[4].title = 'a,\n"b"'
    failed = next(row for row in rows_of(given, "verdicts.csv") if row["arm"] == given.arms[4].name)
    assert failed["verdict"] == "failed" and failed["loss"] == "" and failed["seeds"] == "0"
    given.arms[4].failed = False
    failed = next(row for row in rows_of(given, "verdicts.csv") if row["arm"] == given.arms[4].name)
    assert failed["verdict"] == "not judged"
    assert len(rows_of(given, "verdicts_longer.csv")) == len(given.longer_arms)


def test_domains_have_a_row_for_each_arm_and_domain() -> None:
    given = usual_result(more_domains={"plain text": 7})
    given.arms[1].domain_losses["plain text"] = 4.25
    rows = rows_of(given, "domains.csv")
    assert len(rows) == 5 * len(DOMAINS) + 1 + len(DOMAINS)
    first = next(row for row in rows if row["arm"] == "good" and row["domain"] == "code")
    found = next(one for one in given.secondary if one.arm == "good" and one.domain == "code")
    assert number(first["estimate"]) == found.estimate and first["verdict"] == "better"
    assert first["in_the_mean"] == "true" and first["rows"] == "400"
    more = next(row for row in rows if row["domain"] == "plain text")
    assert (more["in_the_mean"], more["rows"], more["loss"]) == ("false", "7", "4.25")


def test_what_is_matched_is_in_plain_numbers_with_a_column_for_each_tuned_key() -> None:
    given = odd()
    plain, good = rows_of(given, "matched.csv")
    assert (good["total_parameters"], good["peak_memory_mb"], good["seconds_per_step"]) == ("1000", "500.0", "0.25")
    assert number(good["classifier_accuracy"]) == 2 / 3 and plain["classifier_accuracy"] == ""
    assert number(good["reading_share"]) == 1 / 7
    assert (number(good[f"chosen {RATE}"]), number(good[f"second {RATE}"]), good[f"edge {RATE}"]) == (*RATES[1:], "")


def test_tuning_has_the_values_and_scores_of_each_try_and_why_it_failed() -> None:
    given = usual_result()
    given.arms[0].tries[2].scores = {}
    given.arms[0].tries[2].mean = None
    given.arms[0].tries[2].failures = {"101": "no memory"}
    rows = rows_of(given, "tuning.csv")
    first, _, failed = rows[:3]
    assert number(first[RATE]) == RATES[0] and number(first["seed 100"]) == given.arms[0].tries[0].scores["100"]
    assert [row["chosen"] for row in rows[:3]] == ["false", "true", "false"]
    assert (failed["mean"], failed["seed 101"], failed["failures"]) == ("", "", "seed 101: no memory")


def test_what_there_is_nothing_of_has_no_file_and_no_number() -> None:
    given = bare_result()
    assert list(csv_tables(given)) == ["verdicts.csv", "matched.csv"]
    assert rows_of(given, "verdicts.csv")[1]["low"] == ""
    given.arms[1].loss = float("nan")
    assert rows_of(given, "verdicts.csv")[1]["loss"] == ""
