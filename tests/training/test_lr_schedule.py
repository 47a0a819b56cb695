"""Warm-up, shape and end of the learning rate."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmoe.training.lr_schedule import LrShape, lr_factor
from lmoe.vocabulary import LrSchedule


def factors(*, warmup: int, total: int, **shape: Any) -> list[float]:
    return [lr_factor(step, warmup=warmup, total=total, shape=LrShape(**shape)) for step in range(total)]


@settings(deadline=None)  # a slow machine is no failure
@given(st.integers(0, 300), st.integers(1, 200), st.sampled_from(LrSchedule), st.floats(0, 1))
def test_the_first_step_moves_and_no_step_leaves_zero_to_one(warmup, total, schedule, min_ratio):
    values = factors(warmup=warmup, total=total, schedule=schedule, min_ratio=min_ratio)
    assert values[0] > 0
    assert all(0 <= value <= 1 for value in values)
    assert max(values) == pytest.approx(1.0)


def test_warm_up_is_linear_and_reaches_the_peak_at_its_end():
    assert factors(warmup=4, total=10)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_cosine_by_hand():
    """Four steps after two of warm-up: (1 + cos(pi * i / 4)) / 2 for i = 0 to 3."""
    values = factors(warmup=2, total=6)[2:]
    assert values == pytest.approx([1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


@pytest.mark.parametrize("schedule", [LrSchedule.cosine, LrSchedule.linear, LrSchedule.wsd])
def test_the_end_of_the_phase_is_the_smallest_ratio(schedule):
    shape = LrShape(schedule=schedule, min_ratio=0.1)
    assert lr_factor(100, warmup=10, total=100, shape=shape) == pytest.approx(0.1)
    assert lr_factor(500, warmup=10, total=100, shape=shape) == pytest.approx(0.1)


def test_constant_stays_at_the_peak():
    assert factors(warmup=2, total=5, schedule=LrSchedule.constant) == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_wsd_stays_at_the_peak_and_goes_down_over_its_last_share():
    values = factors(warmup=2, total=12, schedule=LrSchedule.wsd, decay_share=0.4, min_ratio=0.2)
    assert values == pytest.approx([0.5, *[1.0] * 8, 0.8, 0.6, 0.4])


def test_a_warm_up_longer_than_the_phase_is_clipped_to_it():
    assert factors(warmup=100, total=4) == pytest.approx([0.25, 0.5, 0.75, 1.0])
