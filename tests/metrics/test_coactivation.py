"""Coactivation counts pairs as the loop does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmoe.metrics.coactivation import Coactivation
from tests.reference import dumb_metrics as dumb
from tests.reference.counted_work import counted_calls, counted_work

FEW = settings(max_examples=20, derandomize=True, deadline=None, database=None)
SITES = {"a": 4, "b": 3, "c": 4}


def chosen(rows: int, experts: int, top_k: int, seed: int) -> Tensor:
    scores = torch.rand(rows, 5, experts, generator=torch.Generator().manual_seed(seed))
    return torch.zeros_like(scores).scatter(-1, scores.topk(top_k).indices, 1 / top_k)


def used(assignment: Tensor, valid: Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in assignment[valid]]


@FEW
@given(experts=st.integers(1, 6), data=st.data(), seed=st.integers(0, 99))
def test_shares_and_conditionals_equal_the_loop_under_any_mask(experts, data, seed):
    assignment = chosen(2, experts, data.draw(st.integers(1, experts)), seed)
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=10, max_size=10).filter(any))).view(2, 5)
    metric = Coactivation({"site": experts})
    metric.update({"site": assignment}, valid)
    site = metric.compute()["site"]
    share, conditional = dumb.coactivation(used(assignment, valid), experts)
    assert site.share == [pytest.approx(row) for row in share]
    assert site.conditional == [pytest.approx(row) for row in conditional]


def test_a_planted_pair_is_found_and_an_unused_expert_has_a_row_of_zeros():
    """Three tokens use 0 and 1, one uses 1 and 2; 3 is unused: P(1 | 0) = 1, P(0 | 1) = 3/4."""
    assignment = torch.tensor([[[0.5, 0.5, 0.0, 0.0]] * 3 + [[0.0, 0.5, 0.5, 0.0]]])
    metric = Coactivation({"site": 4})
    metric.update({"site": assignment}, torch.ones(1, 4, dtype=torch.bool))
    site = metric.compute()["site"]
    assert site.share == [[0.75, 0.75, 0, 0], [0.75, 1, 0.25, 0], [0, 0.25, 0.25, 0], [0, 0, 0, 0]]
    assert site.conditional == [[1, 1, 0, 0], [0.75, 1, 0.25, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


def test_with_one_choice_nothing_goes_together_and_soft_routing_uses_every_pair():
    valid = torch.ones(2, 5, dtype=torch.bool)
    metric = Coactivation({"hard": 4, "soft": 4})
    metric.update({"hard": chosen(2, 4, 1, seed=0), "soft": torch.rand(2, 5, 4).softmax(-1)}, valid)
    found = metric.compute()
    assert sum(found["hard"].share[i][i] for i in range(4)) == pytest.approx(1)
    assert not any(found["hard"].share[i][j] for i in range(4) for j in range(4) if i != j)
    assert found["soft"].share == [[1.0] * 4] * 4


@FEW
@given(order=st.permutations(range(4)), seed=st.integers(0, 99))
def test_experts_in_another_order_permute_rows_and_columns(order, seed):
    assignment, valid = chosen(2, 4, 2, seed), torch.ones(2, 5, dtype=torch.bool)
    metrics = [Coactivation({"site": 4}) for _ in range(2)]
    metrics[0].update({"site": assignment}, valid)
    metrics[1].update({"site": assignment[..., order]}, valid)
    one, other = (metric.compute()["site"].share for metric in metrics)
    assert other == [[one[i][j] for j in order] for i in order]


def test_batches_and_ranks_add_up_to_one_batch_with_sites_of_several_sizes():
    assignment = {site: chosen(6, experts, 2, seed) for seed, (site, experts) in enumerate(SITES.items())}
    valid = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    whole, apart, rank = (Coactivation(SITES) for _ in range(3))
    whole.update(assignment, valid)
    for metric, rows in ((apart, slice(0, 2)), (apart, slice(2, 3)), (rank, slice(3, 6))):
        metric.update({site: a[rows] for site, a in assignment.items()}, valid[rows])
    apart.merge_state(rank)
    assert apart.compute() == whole.compute()
    assert [len(site.share) for site in whole.compute().values()] == [4, 3, 4]


def test_padding_alone_gives_nothing():
    metric = Coactivation({"site": 3})
    metric.update({"site": chosen(1, 3, 2, seed=0)}, torch.zeros(1, 5, dtype=torch.bool))
    assert metric.compute() == {}


@pytest.mark.parametrize("experts", [8, 20, 40])
def test_few_of_many_experts_are_counted_as_the_loop_does(experts):
    assignment = chosen(3, experts, 2, seed=1)
    assignment[0, 0] = 0.0  # a token that no expert acts on
    assignment[1, 1] = torch.nn.functional.one_hot(torch.tensor(3), experts)
    valid = torch.ones(3, 5, dtype=torch.bool)
    valid[2, 3:] = False
    metric = Coactivation({"site": experts})
    metric.update({"site": assignment}, valid)
    share, _ = dumb.coactivation(used(assignment, valid), experts)
    assert metric.compute()["site"].share == [pytest.approx(row) for row in share]


def test_with_four_times_the_experts_two_chosen_ones_cost_four_times_as_much_at_most():
    work = {}
    for experts in (64, 256):
        metric, valid = Coactivation({"site": experts}), torch.ones(400, 5, dtype=torch.bool)
        assignment = chosen(400, experts, 2, seed=0)
        work[experts] = counted_work(lambda m=metric, a=assignment, v=valid: m.update({"site": a}, v))
    assert work[256] < 4.2 * work[64]


def test_a_result_is_made_row_by_row_and_not_looked_through_number_by_number():
    metric, valid = Coactivation({"site": 64}), torch.ones(2, 5, dtype=torch.bool)
    metric.update({"site": chosen(2, 64, 2, seed=0)}, valid)
    assert counted_calls(metric.compute) < 3 * 64
