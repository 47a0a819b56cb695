"""Holm's adjustment."""

import random

import pytest

from lmoe.statistics.families import holm
from tests.reference import dumb_study as dumb


def test_adjusted_p_values_of_a_small_family_by_hand():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(found) == ["a", "b", "c", "d"]


def test_adjusted_p_values_agree_with_the_step_down_procedure_taken_claim_by_claim():
    draw = random.Random(0)
    for size in (1, 2, 5, 12, 30):
        values = [draw.choice([draw.random(), draw.random() ** 4, 0.02]) for _ in range(size)]
        found = holm({str(number): p for number, p in enumerate(values)})
        assert list(found.values()) == pytest.approx(dumb.holm(values))


def test_a_family_of_one_is_left_alone_and_an_empty_one_is_empty():
    assert holm({"only": 0.3}) == {"only": 0.3} and holm({}) == {}
