"""Mixtures of sources and domains: the shares asked for, and no row of a group that is asked for left out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmoe.data.mixing import MOST_TIMES, domain_shares, mixed, weight_shares
from lmoe.errors import DataError
from tests.reference.counted_work import counted_work


def groups_of(sizes: list[int]) -> Tensor:
    groups = torch.cat([torch.full((size,), group) for group, size in enumerate(sizes)])
    return groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.1, 3.0), min_size=4, max_size=4),
    seed=st.integers(0, 3),
)
def test_shares_are_reached_within_a_row_and_every_row_comes(sizes: list[int], weights: list[float], seed: int) -> None:
    groups, shares = groups_of(sizes), weight_shares(weights[: len(sizes)])
    chosen = mixed(groups, shares, seed)
    counts = torch.bincount(groups[chosen], minlength=len(sizes)).tolist()
    length = max(size / share for size, share in zip(sizes, shares, strict=True))
    assert all(abs(count - share * length) <= 0.5 + 1e-6 for count, share in zip(counts, shares, strict=True))
    times = torch.bincount(chosen, minlength=len(groups))
    for group, size in enumerate(sizes):
        of_group = times[groups == group]
        assert len(of_group) == size and of_group.min() >= 1 and of_group.max() - of_group.min() <= 1
    assert any(count == size for count, size in zip(counts, sizes, strict=True))  # no longer than it must be


def test_one_seed_gives_one_choice_and_another_gives_another() -> None:
    groups, shares = groups_of([20, 5]), [0.5, 0.5]
    assert mixed(groups, shares, 1).equal(mixed(groups, shares, 1))
    uneven = groups_of([20, 13])
    assert not mixed(uneven, shares, 1).equal(mixed(uneven, shares, 2))


def test_a_group_of_weight_0_is_left_out_and_an_empty_one_takes_nothing() -> None:
    groups = torch.tensor([0, 1, 1, 3])
    chosen = mixed(groups, weight_shares([0.0, 1.0, 5.0, 1.0]), 0)
    assert groups[chosen].tolist() == [1, 1, 3, 3]


def test_rows_of_groups_of_weight_0_alone_are_refused() -> None:
    with pytest.raises(DataError, match=r"no rows to train on: data\.sources\.<name>\.weight is 0 for every source"):
        mixed(torch.tensor([1, 1]), weight_shares([1.0, 0.0]), 0)


def test_shares_of_weights_are_their_parts_however_large_they_are() -> None:
    assert weight_shares([1.0, 3.0]) == [0.25, 0.75]
    assert weight_shares([1e308, 1e308]) == [0.5, 0.5] and weight_shares([1e-320, 0.0]) == [1.0, 0.0]


def test_temperature_1_changes_nothing_and_a_high_one_evens_out() -> None:
    sizes = [30, 0, 10]
    assert domain_shares(sizes, 1.0) == [0.75, 0.0, 0.25]
    assert mixed(groups_of(sizes), domain_shares(sizes, 1.0), 0).sort().values.equal(torch.arange(40))
    half = domain_shares(sizes, 2.0)
    assert math.isclose(half[0] / half[2], math.sqrt(3))
    assert domain_shares(sizes, math.inf) == [0.5, 0.0, 0.5]


@pytest.mark.parametrize("temperature", [1e-9, 0.001, 0.05])
def test_a_temperature_that_would_leave_a_domain_out_is_refused(temperature: float) -> None:
    sizes = [1000, 10]
    with pytest.raises(DataError, match=r"data\.temperature, make an epoch of .* of 1,010 rows; at most 100 times"):
        mixed(groups_of(sizes), domain_shares(sizes, temperature), 0)


def test_weights_that_make_an_epoch_far_longer_than_the_rows_are_refused() -> None:
    groups = groups_of([10, 10])
    longest = weight_shares([1.0, 2 * MOST_TIMES - 1.0])
    assert len(mixed(groups, longest, 0)) == MOST_TIMES * 20
    for weights in ([1.0, 2 * MOST_TIMES], [1e-300, 1.0], [5e-324, 1e308]):
        with pytest.raises(DataError, match="the weights, or data.temperature, make an epoch of"):
            mixed(groups, weight_shares(weights), 0)


def test_many_groups_are_gone_through_once_and_not_once_for_each() -> None:
    work = {
        count: counted_work(lambda m=count: mixed(torch.arange(4000) % m, [1 / m] * m, seed=0)) for count in (2, 200)
    }
    assert work[200] < 1.5 * work[2]
