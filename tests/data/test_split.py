"""The seeded split."""

import pytest

from lmoe.data.split import first_of_each, split_in_three, split_rows
from lmoe.errors import DataError

DOMAINS = ["a"] * 60 + ["b"] * 40 + ["c"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.3, 0.5, 0.99])
def test_splits_are_disjoint_whole_and_deterministic(fraction: float, seed: int) -> None:
    train, val = split_rows(DOMAINS, fraction, seed)
    assert sorted(train + val) == list(range(101)) and train == sorted(train) and val == sorted(val)
    assert (train, val) == split_rows(DOMAINS, fraction, seed)
    assert {DOMAINS[i] for i in train} == {"a", "b", "c"}


def test_domains_share_validation_by_their_size() -> None:
    _, val = split_rows(DOMAINS, 0.1, 0)
    assert [sum(DOMAINS[i] == name for i in val) for name in "abc"] == [6, 4, 0]


def test_another_seed_chooses_other_rows() -> None:
    assert split_rows(DOMAINS, 0.1, 0) != split_rows(DOMAINS, 0.1, 1)


def test_there_is_always_a_validation_and_a_training_row() -> None:
    for domains in (["a", "a"], ["a", "b"], ["a", "b", "c"], ["a"] * 10):
        for fraction in (0.01, 0.5, 0.99):
            train, val = split_rows(domains, fraction, 0)
            assert train and val
    with pytest.raises(DataError, match=r"data\.val_path"):
        split_rows(["a"], 0.5, 0)


def test_another_domain_does_not_change_the_choice_within_one() -> None:
    _, alone = split_rows(["a"] * 60, 0.1, 7)
    _, beside = split_rows(["a"] * 60 + ["b"] * 60, 0.1, 7)
    assert [i for i in beside if i < 60] == alone


def test_first_rows_of_each_domain() -> None:
    assert first_of_each([0, 0, 1, 0, 1, 1], 2) == [0, 1, 2, 4]
    assert first_of_each([0, 0, 1], 0) == [0, 1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_rows_for_judging_are_split_off_before_those_for_validation(seed: int) -> None:
    split = split_in_three(DOMAINS, val_fraction=0.1, judge_fraction=0.2, seed=seed)
    assert sorted(split.train + split.val + split.judge) == list(range(101))
    assert (len(split.judge), len(split.val)) == (20, 8)
    assert split.judge == split_in_three(DOMAINS, val_fraction=0.5, judge_fraction=0.2, seed=seed).judge
    assert split.judge != split_rows(DOMAINS, 0.2, seed)[1]


def test_without_a_share_for_judging_the_split_is_as_it_was() -> None:
    split = split_in_three(DOMAINS, val_fraction=0.1, judge_fraction=0.0, seed=3)
    assert (split.train, split.val) == split_rows(DOMAINS, 0.1, 3) and split.judge == []
    assert split_in_three(DOMAINS, val_fraction=0.0, judge_fraction=0.0, seed=3).train == list(range(101))
