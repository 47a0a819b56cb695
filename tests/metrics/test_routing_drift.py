"""RoutingDrift compares two states of the routers as the loop does."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lmoe.layers.routing import Routing
from lmoe.metrics.routing_drift import RoutingDrift, SiteDrift
from lmoe.ops.gating import relu_gate, sigmoid_gate, top_k_gate
from lmoe.vocabulary import MixtureScale
from tests.metrics.answered_rows import MODELS, answered, kept_tokens, moved, rows_of, with_nan
from tests.reference import dumb_metrics as dumb
from tests.reference.host_sync import NoHostSync

TINY = torch.finfo(torch.float32).tiny
ONE = torch.ones(1, 1, dtype=torch.bool)


def updated(start: dict[str, Routing], now: dict[str, Routing], valid: Tensor) -> dict[str, SiteDrift]:
    metric = RoutingDrift({site: r.probs.shape[-1] for site, r in now.items()})
    metric.update(start, now, valid)
    return metric.compute()


def top_1(*logits: float) -> dict[str, Routing]:
    """One token."""
    z = torch.tensor([[logits]])
    return {"a": Routing.of(z, top_k_gate(z, top_k=1, temperature=1.0, scale=MixtureScale.raw))}


def used(assignment: Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in assignment]


@pytest.mark.parametrize("kind", MODELS)
def test_changed_sets_and_divergence_equal_the_loop_behind_every_router_and_padding_may_hold_anything(kind):
    rows, now = answered(kind), moved(kind)
    valid = rows.valid
    found = updated(with_nan(rows.routing, valid), with_nan(now, valid), valid)
    assert found.keys() == rows.num_experts.keys()
    for site, r in rows.routing.items():
        kept = kept_tokens(r, valid)
        sets = [used(state[site].assignment[kept]) for state in (rows.routing, now)]
        assert found[site].changed_sets == pytest.approx(dumb.changed_sets(*sets))
        p, q = (state[site].probs[kept].tolist() for state in (rows.routing, now))
        assert found[site].kl == pytest.approx(dumb.mean_divergence(p, q, TINY))
        assert found[site].kl > 0
    assert kind == "model" or any(value.changed_sets for value in found.values())


@pytest.mark.parametrize("kind", MODELS)
def test_a_state_has_not_moved_from_itself(kind):
    rows = answered(kind)
    for value in updated(rows.routing, rows.routing, rows.valid).values():
        assert value == SiteDrift(0, 0)


@pytest.mark.parametrize("kind", ["top_k", "sites of several sizes", "relu", "model"])
def test_rows_one_by_one_and_on_two_ranks_give_what_one_batch_gives(kind):
    rows, now = answered(kind), moved(kind)
    whole = updated(rows.routing, now, rows.valid)
    apart, rank = RoutingDrift(rows.num_experts), RoutingDrift(rows.num_experts)
    for metric, part in ((apart, [4, 0]), (rank, [1, 3, 5]), (apart, [2])):
        metric.update(rows_of(rows.routing, part), rows_of(now, part), rows.valid[part])
    apart.merge_state(rank)
    found = apart.compute()
    assert found.keys() == whole.keys()
    for site, value in whole.items():
        assert found[site] == pytest.approx(value)


def test_the_order_in_which_the_sites_come_does_not_matter():
    rows, now = answered("sites of several sizes"), moved("sites of several sizes")
    turned = dict(reversed(rows.routing.items()))
    assert updated(turned, now, rows.valid) == updated(rows.routing, now, rows.valid)


def test_a_probability_that_falls_from_three_quarters_to_a_quarter_costs_half_of_ln_3():
    """3/4 ln(3/4 : 1/4) + 1/4 ln(1/4 : 3/4) = 1/2 ln 3; the one chosen expert has changed."""
    found = updated(top_1(math.log(3), 0.0), top_1(0.0, math.log(3)), ONE)["a"]
    assert found.changed_sets == 1
    assert found.kl == pytest.approx(math.log(3) / 2)


def test_a_small_divergence_is_not_lost_in_the_rounding_of_the_probabilities():
    """Logits 0 and d against 0 and 0: KL is d^2 / 8 but for higher powers."""
    assert updated(top_1(0.0, 0.0), top_1(0.0, 1e-3), ONE)["a"].kl == pytest.approx(1e-6 / 8, rel=1e-2)


def test_the_divergence_is_finite_where_a_probability_has_become_0():
    found = updated(top_1(0.0, 0.0), top_1(0.0, -200.0), ONE)["a"]
    assert found.kl == pytest.approx(0.5 * math.log(0.5) + 0.5 * (math.log(0.5) - math.log(TINY)))
    before, after = (Routing.of(z, relu_gate(z)) for z in (torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[1.0, -1.0]]])))
    found = updated({"a": before}, {"a": after}, ONE)["a"]
    assert found.changed_sets == 1
    assert found.kl == pytest.approx(0.25 * math.log(0.25) + 0.75 * (math.log(0.75) - math.log(TINY)))


def test_scores_of_sigmoid_count_as_shares_and_a_chosen_expert_may_have_the_weight_0():
    """A score that underflows is a weight of 0; the expert was chosen all the same."""
    z = torch.tensor([[[-200.0, -200.0]]])
    gate = sigmoid_gate(z, top_k=1, temperature=1.0, scale=MixtureScale.raw)
    assert not gate.weights.any()
    now = torch.tensor([[[0.0, -200.0]]])
    later = sigmoid_gate(now, top_k=1, temperature=1.0, scale=MixtureScale.raw)
    found = updated({"a": Routing.of(z, gate)}, {"a": Routing.of(now, later)}, ONE)["a"]
    assert found.changed_sets == 0
    assert math.isfinite(found.kl)


def test_sites_that_use_every_expert_have_no_sets_to_change_also_where_a_probability_underflows():
    rows, now = answered("soft"), moved("soft")
    assert any(not r.assignment[rows.valid].all() for r in now.values())
    metric = RoutingDrift(rows.num_experts, uses_all=rows.num_experts)
    metric.update(rows.routing, now, rows.valid)
    assert all(value.changed_sets is None and value.kl > 0 for value in metric.compute().values())


def test_tokens_on_which_no_expert_acts_do_not_count():
    z = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    acting = torch.tensor([[True, False]])
    gates = [top_k_gate(sign * z, top_k=1, temperature=1.0, scale=MixtureScale.raw) for sign in (1, -1)]
    start, now = (replace(Routing.of(z, gate), acting=acting) for gate in gates)
    other = replace(now, **{name: getattr(now, name).clone() for name in ("probs", "assignment")})
    other.probs[0, 1], other.assignment[0, 1] = start.probs[0, 1], start.assignment[0, 1]
    both = [updated({"a": start}, {"a": state}, torch.ones(1, 2, dtype=torch.bool)) for state in (now, other)]
    assert both[0] == both[1]
    assert both[0]["a"].changed_sets == 1


def test_one_expert_cannot_move_and_padding_alone_gives_nothing():
    assert updated(top_1(0.0), top_1(3.0), ONE) == {"a": SiteDrift(0, 0)}
    assert updated(top_1(0.0), top_1(3.0), ~ONE) == {}


def test_other_sites_than_those_of_the_metric_are_refused():
    with pytest.raises(ValueError, match="a site without routing: a"):
        updated({}, top_1(0.0), ONE)
    with pytest.raises(ValueError, match="a site that the metric does not know: b"):
        updated(top_1(0.0) | {"b": top_1(0.0)["a"]}, top_1(0.0), ONE)


def test_autocast_changes_nothing():
    rows, now = answered("top_p"), moved("top_p")
    with torch.autocast("cpu", torch.bfloat16):
        found = updated(rows.routing, now, rows.valid)
    assert found == updated(rows.routing, now, rows.valid)


def test_an_update_reads_nothing_back():
    rows, now = answered("sites of several sizes"), moved("sites of several sizes")
    metric = RoutingDrift(rows.num_experts)
    with NoHostSync():
        metric.update(rows.routing, now, rows.valid)
