"""Mutual information: identities, the loop, and a null that keeps rows whole."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmoe.ops import mutual_information as module
from lmoe.ops.mutual_information import (
    adjusted_mutual_information,
    entropy,
    expected_mutual_information,
    mutual_information,
    permuted_information,
)
from tests.reference import dumb_metrics as dumb
from tests.reference.counted_work import counted_work

FEW = settings(max_examples=25, derandomize=True, deadline=None, database=None)


def test_an_expert_for_each_domain_tells_the_domain_and_independent_loads_tell_nothing():
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    assert float(mutual_information(torch.diag(shares))) == pytest.approx(float(entropy(shares)))
    independent = shares[:, None] * torch.tensor([0.1, 0.9], dtype=torch.float64)
    assert float(mutual_information(independent)) == pytest.approx(0, abs=1e-15)


def test_no_weight_at_all_is_zero_and_not_nan():
    assert mutual_information(torch.zeros(2, 3, 4)).tolist() == [0.0, 0.0]


@FEW
@given(
    domains=st.lists(st.integers(0, 2), min_size=1, max_size=12),
    experts=st.integers(1, 4),
    scale=st.floats(0.1, 1e6),
    seed=st.integers(0, 99),
)
def test_it_equals_the_loop_whatever_the_scale_and_stays_within_its_bounds(domains, experts, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    a_NE = torch.rand(len(domains), experts, generator=generator, dtype=torch.float64).softmax(-1)
    joint = torch.zeros(3, experts, dtype=torch.float64).index_add_(0, torch.tensor(domains), a_NE)
    found = float(mutual_information(joint * scale))
    assert found == pytest.approx(dumb.mutual_information(domains, a_NE.tolist()), abs=1e-12)
    shares = joint / joint.sum()
    assert 0 <= found <= min(float(entropy(shares.sum(1))), float(entropy(shares.sum(0))), math.log(experts)) + 1e-12


@FEW
@given(rows=st.integers(1, 6), seed=st.integers(0, 99))
def test_each_permuted_value_is_the_loop_over_rows_with_exchanged_domains(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    loads = torch.rand(rows, 2, 3, generator=generator, dtype=torch.float64)
    domains = torch.randint(0, 2, (rows,), generator=generator)
    found = permuted_information(loads, domains, 2, permutations=4, seed=seed)
    orders = torch.Generator().manual_seed(seed)
    for value_S in found:
        labels = domains[torch.randperm(rows, generator=orders)]
        for site in range(2):
            joint = torch.zeros(2, 3, dtype=torch.float64)
            for row in range(rows):
                joint[labels[row]] += loads[row, site]
            assert float(value_S[site]) == pytest.approx(float(mutual_information(joint)), abs=1e-12)


def test_chunks_of_permutations_are_those_of_one_piece(monkeypatch):
    loads, domains = torch.rand(9, 2, 3), torch.arange(9) % 3
    whole = permuted_information(loads, domains, 3, permutations=10, seed=1)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 3 * 9 * 3)
    torch.testing.assert_close(permuted_information(loads, domains, 3, permutations=10, seed=1), whole)
    assert not torch.equal(permuted_information(loads, domains, 3, permutations=10, seed=2), whole)


def table(first: list[int], second: list[int]) -> torch.Tensor:
    """How many items are in both groups, for each two groups."""
    counts = torch.zeros(max(first) + 1, max(second) + 1, dtype=torch.long)
    for a, b in zip(first, second, strict=True):
        counts[a, b] += 1
    return counts


@pytest.mark.parametrize(
    ("first", "second"),
    [([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1]), ([0, 0, 0, 0, 1, 2], [0, 1, 2, 0, 1, 1]), ([0, 1, 1, 1], [1, 0, 1, 1])],
)
def test_what_chance_shows_is_the_mean_over_all_orders(first, second):
    counts = table(first, second)
    a, b = counts.sum(1), counts.sum(0)
    expected = dumb.chance_information(first, second)
    assert expected_mutual_information(a[a > 0], b[b > 0]) == pytest.approx(expected, rel=1e-12)
    ones = [[float(group == g) for g in sorted(set(second))] for group in second]
    shares = [(sizes.double() / sizes.sum()).tolist() for sizes in (a, b)]
    middle = sum(dumb.entropy(one) for one in shares) / 2
    value = (dumb.mutual_information(first, ones) - expected) / (middle - expected)
    assert adjusted_mutual_information(counts) == pytest.approx(value, rel=1e-9)


def test_adjusted_information_is_that_of_scikit_learn():
    """Values of sklearn.metrics.adjusted_mutual_info_score 1.9.1, with its arithmetic mean."""
    counts = torch.tensor([[20, 3, 0, 1], [2, 15, 4, 0], [0, 1, 30, 2]])
    assert adjusted_mutual_information(counts) == pytest.approx(0.5629902360328847, rel=1e-9)
    assert adjusted_mutual_information(counts.t()) == pytest.approx(0.5629902360328847, rel=1e-9)


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [
        ([0, 0, 1, 1], [1, 1, 0, 0], 1),
        ([0, 0, 0, 0], [0, 0, 0, 0], 1),
        ([0, 1, 2, 3], [3, 2, 0, 1], 1),
        ([0, 0, 0, 0], [0, 1, 2, 3], 0),
        ([0, 1, 2, 3], [0, 0, 1, 1], 0),
        ([0, 0, 0, 0], [0, 1, 1, 0], 0),
    ],
)
def test_equal_groupings_agree_wholly_and_trivial_ones_not_at_all(first, second, value):
    assert adjusted_mutual_information(table(first, second)) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("joint", [torch.tensor([[0.5, 1.0]]), torch.tensor([[-1, 2]]), torch.tensor([1, 2])])
def test_only_counts_have_an_adjusted_information(joint):
    with pytest.raises(ValueError, match="a table of counts is needed"):
        adjusted_mutual_information(joint)


def test_permutations_of_many_domains_cost_what_those_of_few_do_but_for_the_tables_themselves():
    loads, rows, permutations = torch.rand(3000, 2, 4), torch.arange(3000), 20
    work = {}
    for domains in (2, 64):
        work[domains] = counted_work(
            lambda m=domains: permuted_information(loads, rows % m, m, permutations=permutations, seed=0)
        )
    tables = 20 * permutations * 64 * 8  # twenty operations, at most, that make an entry for each of a table
    assert work[64] < 1.5 * work[2] + tables


def test_groups_of_one_size_are_looked_at_once_for_all_of_them(monkeypatch):
    seen = []
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *args, **kwargs: seen.append(args) or arange(*args, **kwargs))
    assert expected_mutual_information(torch.full((100,), 6), torch.full((30,), 20)) > 0
    assert len(seen) == 2  # the factorials, and the one pair of sizes
