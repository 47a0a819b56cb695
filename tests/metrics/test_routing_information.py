"""What tokens tell about experts, importance, and all sites in one update."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmoe.metrics.routing import RoutingStats, SiteRouting
from tests.reference import dumb_metrics as dumb

FEW = settings(max_examples=20, derandomize=True, deadline=None, database=None)
STATISTICS = ("cv", "max_vio", "dead", "dead_share", "load_entropy", "information", "entropy", "effective")


class Decision(NamedTuple):
    """As a Routing, (B, T, E) each."""

    probs: Tensor
    routing_weights: Tensor
    assignment: Tensor


def decide(logits: Tensor, top_k: int) -> Decision:
    """The K largest of softmax(z), not renormalised, so that importance differs from load."""
    probs = logits.softmax(-1)
    chosen = torch.zeros_like(probs).scatter(-1, probs.topk(top_k).indices, 1.0)
    return Decision(probs, probs * chosen, chosen / top_k)


def measured(decision: Decision, valid: Tensor) -> SiteRouting:
    stats = RoutingStats({"site": decision.probs.shape[-1]}, ["all"])
    stats.update("site", *decision, valid, torch.zeros(valid.shape, dtype=torch.long))
    return stats.compute()["site"]


def everyone(tokens: int) -> Tensor:
    return torch.ones(1, tokens, dtype=torch.bool)


def test_tokens_that_all_look_alike_carry_no_information_however_certain_the_router():
    logits = torch.tensor([[[20.0, 0.0, 0.0]] * 6])
    site = measured(decide(logits, 1), everyone(6))
    assert site.information == pytest.approx(0, abs=1e-6)
    assert (site.load_entropy, site.dead, site.dead_share) == (0.0, 2, pytest.approx(2 / 3))


def test_certain_and_balanced_routing_has_information_one_and_undecided_routing_none():
    site = measured(decide(50 * torch.eye(4)[None], 1), everyone(4))
    assert site.information == pytest.approx(1.0)
    assert site.load_entropy == pytest.approx(1.0)
    assert measured(decide(torch.zeros(1, 4, 4), 2), everyone(4)).information == pytest.approx(0, abs=1e-6)


def test_two_of_four_experts_used_with_certainty_give_half_the_information():
    """H(mean p) = ln 2 and each token is certain: ln 2 / ln 4 = 1/2, for the load's entropy too."""
    site = measured(decide(50 * torch.eye(4)[None, [0, 1, 0, 1]], 1), everyone(4))
    assert site.information == pytest.approx(0.5)
    assert site.load_entropy == pytest.approx(0.5)


def test_importance_weighs_tokens_by_their_weights_where_load_counts_them():
    """Expert 0 is chosen once with weight 0.9 and expert 1 once with 0.6: loads 1/2, importance 0.6 and 0.4."""
    probs = torch.tensor([[[0.9, 0.1], [0.4, 0.6]]])
    site = measured(decide(probs.log(), 1), everyone(2))
    assert site.load == [0.5, 0.5]
    assert site.importance == pytest.approx([0.6, 0.4])


@FEW
@given(experts=st.integers(2, 6), data=st.data(), seed=st.integers(0, 99))
def test_importance_and_information_equal_the_loop_under_any_mask(experts, data, seed):
    top_k = data.draw(st.integers(1, experts))
    torch.manual_seed(seed)
    decision = decide(torch.randn(2, 5, experts) * 3, top_k)
    valid = torch.rand(2, 5) < 0.7
    valid[1, 2] = True
    site = measured(decision, valid)
    assert site.importance == pytest.approx(dumb.importance(decision.routing_weights[valid].tolist()), abs=1e-6)
    assert site.information == pytest.approx(dumb.information(decision.probs[valid].tolist()), abs=1e-6)
    assert site.load_entropy == pytest.approx(dumb.entropy(site.load) / math.log(experts))


@FEW
@given(order=st.permutations(range(5)), seed=st.integers(0, 99))
def test_experts_in_another_order_permute_the_lists_and_leave_the_statistics(order, seed):
    torch.manual_seed(seed)
    decision, valid = decide(torch.randn(1, 9, 5) * 3, 2), torch.rand(1, 9) < 0.8
    valid[0, 0] = True
    one, other = measured(decision, valid), measured(Decision(*(t[..., order] for t in decision)), valid)
    for name in ("load", "importance", "mean_probs"):
        assert getattr(other, name) == pytest.approx([getattr(one, name)[e] for e in order])
    for name in STATISTICS:
        assert getattr(other, name) == pytest.approx(getattr(one, name), abs=1e-6), name


def test_a_token_without_any_expert_counts_for_no_load():
    """As relu routing has it: of three tokens one has no expert; the other two share the load."""
    assignment = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]])
    site = measured(Decision(torch.full((1, 3, 2), 0.5), assignment, assignment), everyone(3))
    assert (site.load, site.importance) == ([0.5, 0.5], [0.5, 0.5])
    silent = measured(Decision(torch.full((1, 3, 2), 0.5), 0 * assignment, 0 * assignment), everyone(3))
    assert (silent.load, silent.dead, silent.load_entropy) == ([0.0, 0.0], 2, 0.0)


def batch(seed: int, rows: int, experts: dict[str, int]):
    generator = torch.Generator().manual_seed(seed)
    routing = {site: decide(torch.randn(rows, 7, e, generator=generator), 2) for site, e in experts.items()}
    valid = torch.rand(rows, 7, generator=generator) < 0.8
    return routing, valid, torch.randint(0, 2, (rows, 7), generator=generator)


# Neighbours of one size, and sites of one size with another between them.
SITES = {"a": 4, "b": 4, "c": 2, "d": 4, "e": 2}


def assert_same(one: RoutingStats, other: RoutingStats) -> None:
    for name, state in one.metric_state.items():
        torch.testing.assert_close(state, other.metric_state[name], msg=name)


def test_all_sites_in_one_update_equal_each_site_in_its_own():
    together, apart = (RoutingStats(SITES, ["x", "y"]) for _ in range(2))
    for seed in range(2):
        routing, valid, domains = batch(seed, 3, SITES)
        together.update_all(routing, valid, domains)
        for site, decision in routing.items():
            apart.update(site, *decision, valid, domains)
    assert_same(together, apart)
    assert together.compute().keys() == SITES.keys()
    assert together.load_by_domain().keys() == {"x", "y"}


def test_sites_that_did_not_run_are_left_out():
    stats = RoutingStats(SITES, ["x", "y"])
    routing, valid, domains = batch(0, 3, SITES)
    stats.update_all({site: routing[site] for site in ("d", "a")}, valid, domains)
    assert stats.compute().keys() == {"a", "d"}


def test_two_batches_on_two_ranks_equal_one_batch():
    routing, valid, domains = batch(0, 6, SITES)
    whole, ranks = RoutingStats(SITES, ["x", "y"]), [RoutingStats(SITES, ["x", "y"]) for _ in range(2)]
    whole.update_all(routing, valid, domains)
    for rank, half in zip(ranks, (slice(0, 2), slice(2, 6)), strict=True):
        part = {site: Decision(*(t[half] for t in decision)) for site, decision in routing.items()}
        rank.update_all(part, valid[half], domains[half])
    ranks[0].merge_state(ranks[1])
    assert_same(ranks[0], whole)


def test_routing_that_does_not_fit_the_mask_is_refused():
    stats, decision = RoutingStats({"site": 3}, ["all"]), decide(torch.randn(2, 4, 3), 1)
    with pytest.raises(ValueError, match=r"\(2, 4, 3\) does not fit 1 sites \(site, …\) and a mask of \(1, 4\)"):
        stats.update("site", *decision, everyone(4), torch.zeros(1, 4, dtype=torch.long))
