"""RoutingStats recovers what was planted, and adds up."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmoe.layers.routing import Routing
from lmoe.metrics.routing import RoutingStats, SiteRouting, routing_rows, routing_summary
from lmoe.ops.gating import top_k_gate
from lmoe.vocabulary import MixtureScale
from tests.reference import dumb
from tests.reference.counted_work import counted_calls, counted_work, made_bytes


def feed(stats: RoutingStats, site: str, logits, valid, domains, *, top_k: int) -> None:
    gate = top_k_gate(logits, top_k=top_k, temperature=1.0, scale=MixtureScale.sum_to_one)
    stats.update(site, gate.probs, gate.weights, gate.assignment, valid, domains)


def planted(choices: list[int], experts: int) -> torch.Tensor:
    """(1, T, E) logits that choose the given experts with near certainty."""
    return 50.0 * torch.nn.functional.one_hot(torch.tensor([choices]), experts).float()


def test_planted_loads_and_dead_experts_and_loads_by_domain_are_recovered():
    """Expert 0 takes all of code; 1 and 2 share chat; 3 gets nothing: loads 1/2, 1/4, 1/4, 0."""
    stats = RoutingStats({"site": 4}, ["code", "chat", "empty"])
    domains = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    valid = torch.ones(1, 8, dtype=torch.bool)
    feed(stats, "site", planted([0, 0, 0, 0, 1, 2, 1, 2], 4), valid, domains, top_k=1)
    site = stats.compute()["site"]
    assert site.load == [0.5, 0.25, 0.25, 0.0]
    assert site.dead == 1
    assert site.max_vio == pytest.approx(1.0)
    assert site.cv == pytest.approx(math.sqrt(2) / 2)  # deviations 1/4, 0, 0, -1/4 over a mean of 1/4
    assert site.entropy == pytest.approx(0.0, abs=1e-6)
    assert site.effective == pytest.approx(1.0)
    assert stats.load_by_domain() == {"code": {"site": [1.0, 0, 0, 0]}, "chat": {"site": [0, 0.5, 0.5, 0]}}


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1.0, 1e30])
def test_effective_experts_do_not_depend_on_the_size_of_the_weights(size):
    stats = RoutingStats({"site": 3}, None)
    probs = torch.full((1, 4, 3), 1 / 3)
    weights = torch.tensor([[[1.0, 1.0, 0.0]]]).expand(1, 4, 3) * size
    valid, domains = torch.tensor([[True, True, True, False]]), torch.zeros(1, 4, dtype=torch.long)
    stats.update("site", probs, weights, probs, valid, domains)
    assert stats.compute()["site"].effective == pytest.approx(2.0)


@pytest.mark.parametrize("experts", [2, 8])
def test_undecided_routers_have_entropy_one_and_as_many_effective_experts_as_share_a_token(experts):
    stats = RoutingStats({"site": experts}, ["all"])
    valid, domains = torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 5, dtype=torch.long)
    feed(stats, "site", torch.zeros(1, 5, experts), valid, domains, top_k=2)
    site = stats.compute()["site"]
    assert site.entropy == pytest.approx(1.0)
    assert site.effective == pytest.approx(2.0)


@settings(max_examples=20, derandomize=True, deadline=None, database=None)
@given(experts=st.integers(2, 6), data=st.data(), seed=st.integers(0, 99))
def test_every_statistic_equals_the_loop(experts, data, seed):
    top_k = data.draw(st.integers(1, experts))
    torch.manual_seed(seed)
    logits = torch.randn(2, 5, experts) * 2
    valid = torch.rand(2, 5) < 0.7
    valid[0, 0] = True
    stats = RoutingStats({"site": experts}, ["all"])
    feed(stats, "site", logits, valid, torch.zeros(2, 5, dtype=torch.long), top_k=top_k)
    rows = [dumb.gate(z, top_k=top_k, temperature=1.0, renormalise=True) for z in logits[valid]]
    expected = dumb.statistics(
        [[float(p) for p in probs] for probs, _, _ in rows],
        [[float(w) for w in weights] for _, weights, _ in rows],
        [chosen for _, _, chosen in rows],
    )
    site = stats.compute()["site"]
    for name, value in expected.items():
        assert getattr(site, name) == pytest.approx(value, abs=1e-5), name


def test_batches_add_up_to_one_batch_and_padding_is_ignored():
    torch.manual_seed(0)
    logits, domains = torch.randn(2, 6, 3), torch.randint(0, 2, (2, 6))
    valid = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    apart, together, trimmed = (RoutingStats({"site": 3}, ["a", "b"]) for _ in range(3))
    feed(together, "site", logits, valid, domains, top_k=2)
    for row in range(2):
        feed(apart, "site", logits[row : row + 1], valid[row : row + 1], domains[row : row + 1], top_k=2)
        kept = valid[row]
        feed(trimmed, "site", logits[row, kept][None], valid[row, kept][None], domains[row, kept][None], top_k=2)
    for other in (apart, trimmed):
        assert other.tokens.tolist() == [9.0]
        assert other.compute()["site"].load == pytest.approx(together.compute()["site"].load)
        assert other.compute()["site"].entropy == pytest.approx(together.compute()["site"].entropy)
        for domain, sites in together.load_by_domain().items():
            assert other.load_by_domain()[domain]["site"] == pytest.approx(sites["site"])


@pytest.mark.parametrize("domains", [None, ["a", "b"]])
def test_padding_may_hold_nan(domains):
    logits, domain_ids = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([[0, 1, 1, 0]])
    gate = top_k_gate(logits, top_k=2, temperature=1.0, scale=MixtureScale.sum_to_one)
    whole, trimmed = RoutingStats({"site": 3}, domains), RoutingStats({"site": 3}, domains)
    every = (gate.probs, gate.weights, gate.assignment)
    valid = torch.tensor([[True, True, False, False]])
    whole.update("site", *(values.masked_fill(~valid[..., None], math.nan) for values in every), valid, domain_ids)
    trimmed.update("site", *(values[:, :2] for values in every), valid[:, :2], domain_ids[:, :2])
    assert whole.compute() == trimmed.compute()
    if domains is not None:
        assert whole.load_by_domain() == trimmed.load_by_domain()


def test_sites_with_different_numbers_of_experts_keep_their_own():
    stats = RoutingStats({"two": 2, "three": 3, "silent": 4}, ["all"])
    valid, domains = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.long)
    feed(stats, "two", planted([0, 1], 2), valid, domains, top_k=1)
    feed(stats, "three", planted([2, 2], 3), valid, domains, top_k=1)
    found = stats.compute()
    assert {site: value.load for site, value in found.items()} == {"two": [0.5, 0.5], "three": [0.0, 0.0, 1.0]}


def test_one_expert_has_entropy_zero_and_not_nan():
    stats = RoutingStats({"site": 1}, ["all"])
    valid, domains = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.long)
    feed(stats, "site", torch.randn(1, 2, 1), valid, domains, top_k=1)
    site = stats.compute()["site"]
    assert site == SiteRouting(load=[1.0], entropy=0.0, effective=1.0, importance=[1.0], mean_probs=[1.0])
    assert (site.information, site.load_entropy) == (0.0, 1.0)


def test_statistics_under_autocast_are_those_without():
    torch.manual_seed(0)
    logits, valid = torch.randn(1, 999, 4), torch.ones(1, 999, dtype=torch.bool)
    plain, autocast = RoutingStats({"site": 4}, ["all"]), RoutingStats({"site": 4}, ["all"])
    feed(plain, "site", logits, valid, torch.zeros(1, 999, dtype=torch.long), top_k=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        feed(autocast, "site", logits, valid, torch.zeros(1, 999, dtype=torch.long), top_k=2)
    assert autocast.compute() == plain.compute()


def test_reset_forgets_everything():
    stats, fresh = RoutingStats({"site": 2}, ["a", "b"]), RoutingStats({"site": 2}, ["a", "b"])
    valid = torch.ones(1, 2, dtype=torch.bool)
    feed(stats, "site", planted([0, 1], 2), valid, torch.zeros(1, 2, dtype=torch.long), top_k=1)
    stats.reset()
    for metric in (stats, fresh):
        feed(metric, "site", planted([1, 1], 2), valid, torch.ones(1, 2, dtype=torch.long), top_k=1)
    assert stats.compute() == fresh.compute()
    assert stats.load_by_domain() == {"b": {"site": [0.0, 1.0]}}


def test_nothing_to_summarise_is_no_error():
    assert routing_summary({}) == {} and routing_rows({}) == {}


def test_statistics_hold_no_graph():
    stats = RoutingStats({"site": 2}, ["all"])
    logits = torch.randn(1, 2, 2, requires_grad=True)
    feed(stats, "site", logits, torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.long), top_k=1)
    assert not any(t.requires_grad for t in stats.metric_state.values())


def test_the_summary_takes_means_over_sites_and_the_sum_of_dead_experts():
    sites = {
        "a": SiteRouting([1.0, 0.0], entropy=0.2, effective=1.0, importance=[0.9, 0.1], mean_probs=[0.5, 0.5]),
        "b": SiteRouting([0.5, 0.5], entropy=0.4, effective=2.0, importance=[0.5, 0.5], mean_probs=[1.0, 0.0]),
    }
    assert routing_summary(sites) == pytest.approx(
        {
            "routing/entropy": 0.3,
            "routing/cv": 0.5,
            "routing/max_vio": 0.5,
            "routing/dead": 1.0,
            "routing/dead_share": 0.25,
            "routing/effective": 1.5,
            "routing/load_entropy": 0.5,
            "routing/information": 0.4,
        }
    )
    assert routing_rows(sites)["routing/a/load/0"] == 1.0
    assert routing_rows(sites)["routing/a/importance/1"] == 0.1
    names = ("load/0", "load/1", "importance/0", "importance/1", "entropy", "cv", "max_vio", "effective")
    assert set(routing_rows(sites)) == {
        f"routing/{site}/{name}" for site in sites for name in (*names, "load_entropy", "information")
    }


def test_probabilities_that_do_not_sum_to_one_are_refused_by_the_name_of_their_site():
    stats = RoutingStats({"site": 3}, ["all"])
    scores = torch.full((1, 4, 3), 0.5)
    stats.update("site", scores, scores, scores, torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4).long())
    with pytest.raises(ValueError, match=r"site: the probabilities of a token sum to 1\.5 .*must sum to 1; give the"):
        stats.compute()


@pytest.mark.parametrize("at_once", [1, 120, 10**6])
def test_statistics_are_the_same_bits_however_many_sites_are_taken_together(at_once: int, monkeypatch) -> None:
    generator, routing = torch.Generator().manual_seed(0), {}
    for number in range(5):
        logits = torch.randn(2, 7, 4, generator=generator)
        gate = top_k_gate(logits, top_k=2, temperature=1.0, scale=MixtureScale.sum_to_one)
        routing[f"site{number}"] = Routing.of(logits, gate)
    valid, domain_ids = torch.arange(7).expand(2, -1) < 6, torch.zeros(2, 7, dtype=torch.long)
    one_by_one, together = (RoutingStats(dict.fromkeys(routing, 4), ["all"]) for _ in range(2))
    for site, r in routing.items():
        one_by_one.update(site, r.probs, r.routing_weights, r.assignment, valid, domain_ids)
    monkeypatch.setattr("lmoe.ops.site_groups.ELEMENTS_ON_CPU", at_once)
    calls = []
    plain = together.update
    monkeypatch.setattr(together, "update", lambda sites, *rest: calls.append(len(sites)) or plain(sites, *rest))
    together.update_all(routing, valid, domain_ids)
    assert calls == {1: [1] * 5, 120: [2, 2, 1], 10**6: [5]}[at_once]
    assert together.compute() == one_by_one.compute()


def test_of_many_experts_no_stack_is_made_and_beside_copies_in_float64_one_of_probabilities_and_one_of_weights():
    sites, experts, tokens = [f"site{number}" for number in range(4)], 256, 1024  # each site alone is as many as fit
    logits = torch.randn(4, 1, tokens, experts, generator=torch.Generator().manual_seed(0))
    gate = top_k_gate(logits, top_k=2, temperature=1.0, scale=MixtureScale.sum_to_one)
    routing = {
        site: Routing(logits[n], gate.probs[n], gate.weights[n], gate.assignment[n]) for n, site in enumerate(sites)
    }
    stats = RoutingStats(dict.fromkeys(sites, experts), None)
    valid, domain_ids = torch.ones(1, tokens, dtype=torch.bool), torch.zeros(1, tokens, dtype=torch.long)
    made = made_bytes(lambda: stats.update_all(routing, valid, domain_ids))
    assert max(made) == 8 * tokens * experts, "a copy of one site, not of all"
    assert sum(made) < (4 * 8 + 2 * 4) * 1.05 * logits.numel()


def test_what_is_computed_of_sums_calls_nothing_for_each_expert():
    calls = {}
    for experts in (8, 256):
        stats, probs = RoutingStats({"a": experts, "b": experts}, None), torch.full((2, 1, 3, experts), 1 / experts)
        stats.update(["a", "b"], probs, probs, probs, torch.ones(1, 3).bool(), torch.zeros(1, 3).long())
        calls[experts] = counted_calls(stats.compute)
    assert calls[8] == calls[256]


def batch_of_two_domains(domains: list[str] | None) -> tuple[RoutingStats, tuple[torch.Tensor, ...]]:
    stats = RoutingStats({"a": 8, "b": 8}, domains)
    assignment = torch.rand(2, 4, 64, 8, generator=torch.Generator().manual_seed(0))
    assignment /= assignment.sum(-1, keepdim=True)
    domain_ids = torch.tensor([0, 1, 1, 0])[:, None].expand(4, 64)
    return stats, (assignment, torch.ones(4, 64, dtype=torch.bool), domain_ids)


def add_batch(stats: RoutingStats, assignment, valid, domain_ids) -> None:
    stats.update(["a", "b"], assignment, assignment, assignment, valid, domain_ids)


def test_a_batch_costs_the_same_however_many_domains_the_data_has():
    work = {}
    for count in (2, 200):
        stats, batch = batch_of_two_domains([str(number) for number in range(count)])
        work[count] = counted_work(lambda stats=stats, batch=batch: add_batch(stats, *batch))
        assert list(stats.load_by_domain()) == ["0", "1"]
    assert work[200] - work[2] <= 200 * 2 * 8  # entries of the table itself, which is written into


def test_without_domains_the_loads_are_the_same_and_take_no_place_for_each_of_them():
    without, batch = batch_of_two_domains(None)
    told_apart, _ = batch_of_two_domains(["x", "y", "z"])
    for stats in (without, told_apart):
        add_batch(stats, *batch)
    assert without.load_sum.shape == (1, 2, 8)
    for site, value in told_apart.compute().items():
        assert without.compute()[site].load == pytest.approx(value.load, rel=1e-12)


def test_saved_loads_by_domain_are_summed_where_loads_are_not_told_apart():
    told_apart, batch = batch_of_two_domains(["x", "y", "z"])
    without, _ = batch_of_two_domains(None)
    add_batch(told_apart, *batch)
    without.merge_state(told_apart.metric_state)
    assert without.compute() == told_apart.compute()
