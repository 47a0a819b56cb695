"""RoutingTrace: what is collected, when, and how sites are averaged."""

import copy

import pytest
import torch

from lmoe.layers.routing import Choice, Routing
from lmoe.layers.trace import AuxiliaryLosses, RoutingTrace
from lmoe.ops.gating import soft_gate, top_k_gate
from lmoe.ops.top_k_weights import top_k_weights
from lmoe.vocabulary import LoadBalanceType, MixtureScale
from tests.reference.counted_work import made_bytes

VALID = torch.ones(1, 4, dtype=torch.bool)


def trace_with(aux_loss_coef: float = 1.0, router_z_loss_coef: float = 1.0) -> RoutingTrace:
    return RoutingTrace(
        AuxiliaryLosses(
            balance=LoadBalanceType.aux_loss, aux_loss_coef=aux_loss_coef, router_z_loss_coef=router_z_loss_coef
        )
    )


def top_1(logits: torch.Tensor) -> Routing:
    return Routing.of(logits, top_k_gate(logits, top_k=1, temperature=1.0, scale=MixtureScale.raw))


def collapsed_on(expert: int, *, strength: float = 60.0) -> Routing:
    """Four tokens that all choose one of four experts with probability 1."""
    logits = torch.zeros(1, 4, 4)
    logits[..., expert] = strength
    return top_1(logits)


def test_layers_collapsed_on_different_experts_give_the_collapsed_value_and_not_one():
    """E * P = 4 for each; pooled over layers the loads would look uniform, as in transformers, and give 1."""
    trace = trace_with(1.0, 0.0)
    with trace.recording(VALID):
        for expert in range(4):
            trace.record(f"layer{expert}", collapsed_on(expert))
    assert trace.load_balancing_loss().item() == pytest.approx(4.0)
    pooled = torch.stack([r.probs for r in trace.routing.values()]).mean((0, 1, 2))
    assert float(4 * (pooled * pooled).sum()) == pytest.approx(1.0)


def test_auxiliary_loss_is_the_weighted_sum_of_both_losses():
    trace = trace_with(0.5, 0.25)
    with trace.recording(VALID):
        trace.record("a", collapsed_on(0, strength=1.0))
        trace.record("b", collapsed_on(1, strength=2.0))
    torch.testing.assert_close(trace.auxiliary_loss(), 0.5 * trace.load_balancing_loss() + 0.25 * trace.router_z_loss())


def test_sites_with_different_numbers_of_experts_are_averaged():
    trace = trace_with(1.0, 0.0)
    uniform = torch.eye(2).repeat(1, 2, 1)
    with trace.recording(VALID):
        trace.record("four", collapsed_on(0))
        trace.record("two", top_1(uniform))
    assert trace.load_balancing_loss().item() == pytest.approx((4 + 1) / 2)


def test_nothing_is_collected_outside_the_block():
    trace = trace_with()
    trace.record("a", collapsed_on(0))
    assert not trace.routing
    with trace.recording(VALID):
        trace.record("a", collapsed_on(0))
    trace.record("b", collapsed_on(1))
    assert list(trace.routing) == ["a"]


def test_a_second_forward_overwrites():
    trace, second = trace_with(), collapsed_on(1)
    with trace.recording(VALID):
        trace.record("a", collapsed_on(0))
        trace.record("a", second)
    assert trace.routing == {"a": second}


def test_a_new_block_forgets_the_last_one():
    trace = trace_with()
    with trace.recording(VALID):
        trace.record("a", collapsed_on(0))
    with trace.recording(VALID):
        trace.record("b", collapsed_on(0))
    assert list(trace.routing) == ["b"]


def test_an_exception_inside_the_block_switches_the_trace_off():
    trace = trace_with()
    with pytest.raises(RuntimeError, match="inside"), trace.recording(VALID):
        raise RuntimeError("inside")
    assert not trace.on


@pytest.mark.parametrize("loss", ["load_balancing_loss", "router_z_loss", "relu_l1", "auxiliary_loss"])
def test_an_empty_trace_says_what_to_do(loss):
    trace = trace_with()
    with pytest.raises(ValueError, match="the trace is empty: run a forward inside `with lmoe.trace"):
        getattr(trace, loss)()
    with trace.recording(VALID):
        trace.record("a", collapsed_on(0))
    trace.clear()
    with pytest.raises(ValueError, match="the trace is empty"):
        getattr(trace, loss)()


def test_a_copy_keeps_the_coefficients_and_nothing_of_a_forward():
    trace = trace_with(0.5, 0.25)
    with trace.recording(VALID):
        logits = torch.zeros(1, 4, 4, requires_grad=True) * 2
        trace.record("a", top_1(logits))
        twin = copy.deepcopy(trace)
    assert (twin.losses, twin.routing, twin.valid, twin.on) == (trace.losses, {}, None, False)
    assert list(trace.routing) == ["a"]


def test_experts_are_silenced_by_row_and_token_and_the_others_keep_their_weights():
    torch.manual_seed(0)
    routing = Routing.of(logits := torch.randn(2, 3, 4), soft_gate(logits, temperature=1.0, scale=MixtureScale.unit))
    by_row = torch.zeros(2, 1, 4, dtype=torch.bool)
    by_row[1, 0, 2] = True
    weights = routing.routing_weights
    expected = weights.clone()
    expected[1, :, 2] = 0
    assert torch.equal(routing.without(by_row).routing_weights, expected)
    by_token = torch.zeros(1, 3, 4, dtype=torch.bool)
    by_token[0, 1, [0, 3]] = True
    expected = weights.clone()
    expected[:, 1, [0, 3]] = 0
    assert torch.equal(routing.without(by_token).routing_weights, expected)
    flat = Routing.of(logits.flatten(0, 1), soft_gate(logits.flatten(0, 1), temperature=1.0, scale=MixtureScale.unit))
    for mask in (by_row, by_token):
        assert torch.equal(flat.without(mask).routing_weights, routing.without(mask).routing_weights.flatten(0, 1))
    whole = torch.zeros(1, 1, 4, dtype=torch.bool)
    whole[..., 1] = True
    for one in (routing, flat):
        assert torch.equal(one.without(whole).routing_weights, one.without(1).routing_weights)


def choice(logits: torch.Tensor, noise: float = 0.0, top_k: int = 2) -> Choice:
    """What a router of top_k hands over of logits, with the same noise on each of them."""
    gate_logits = logits + noise * torch.arange(logits.shape[-1]) if noise else logits
    weights, indices = top_k_weights(gate_logits, top_k=top_k, scale=MixtureScale.sum_to_one)
    return Choice(logits, gate_logits, weights, indices)


def random_logits(experts: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, experts, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_choices_become_the_routing_of_the_whole_gate_with_its_gradients(noise):
    """Of sites with and without other numbers of experts, in the order of the forward."""
    logits = {site: random_logits(experts, seed) for seed, (site, experts) in enumerate(dict(a=4, b=3, c=4).items())}
    made, whole = trace_with(), trace_with()
    with made.recording(VALID), whole.recording(VALID):
        for site, z in logits.items():
            made.record(site, choice(z, noise))
            noisy = z + noise * torch.arange(z.shape[-1])
            gate = top_k_gate(noisy, top_k=2, temperature=1.0, scale=MixtureScale.sum_to_one)
            whole.record(site, Routing.of(z, gate))
    assert list(made.routing) == list(whole.routing) == ["a", "b", "c"]
    for site, expected in whole.routing.items():
        found = made.routing[site]
        for name in ("router_logits", "probs", "routing_weights", "assignment", "expert_indices"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))
        assert not found.assignment.requires_grad
    ours, theirs = (torch.autograd.grad(trace.auxiliary_loss(), list(logits.values())) for trace in (made, whole))
    torch.testing.assert_close(ours, theirs)


def test_a_routing_that_was_read_without_gradients_still_has_them_for_the_loss():
    trace, z = trace_with(), random_logits()
    with trace.recording(VALID):
        trace.record("a", choice(z))
    with torch.no_grad():
        assert not trace.routing["a"].probs.requires_grad
    (grad,) = torch.autograd.grad(trace.load_balancing_loss(), z)
    assert grad.any()
    assert trace.routing["a"] is trace.routing["a"]


def test_a_choice_that_is_made_again_replaces_what_was_read():
    trace = trace_with()
    with trace.recording(VALID):
        trace.record("a", choice(random_logits(seed=0)))
        first = trace.routing["a"]
        trace.record("a", choice(random_logits(seed=1)))
    assert not torch.equal(trace.routing["a"].probs, first.probs)


def test_silencing_a_choice_leaves_its_probabilities_and_shares():
    made = choice(random_logits())
    trace = trace_with()
    with trace.recording(VALID):
        trace.record("whole", made)
        trace.record("less", made.without(1))
    whole, less = trace.routing["whole"], trace.routing["less"]
    assert torch.equal(less.probs, whole.probs) and torch.equal(less.assignment, whole.assignment)
    assert torch.equal(less.routing_weights, whole.without(1).routing_weights)
    assert whole.routing_weights[..., 1].any() and not less.routing_weights[..., 1].any()


@pytest.mark.parametrize("whole", [False, True], ids=["choices", "routings"])
def test_losses_of_sites_taken_one_by_one_are_those_of_all_and_make_no_larger_tensor(whole: bool, monkeypatch) -> None:
    valid = torch.arange(64).expand(2, 64) < 60
    logits = [torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in range(6)]
    entries = logits[0].numel()

    def losses() -> list[torch.Tensor]:
        trace = trace_with()
        with trace.recording(valid):
            for number, z in enumerate(logits):
                gate = top_k_gate(z, top_k=2, temperature=1.0, scale=MixtureScale.sum_to_one)
                trace.record(f"site{number}", Routing.of(z, gate) if whole else choice(z))
        found = trace.forward_losses(trace.losses.weights)
        assert found.total is not None
        return [*found.values.values(), *torch.autograd.grad(found.total, logits)]

    together, at_once = losses(), max(made_bytes(losses))
    monkeypatch.setattr("lmoe.ops.site_groups.ELEMENTS_ON_CPU", entries)
    one_by_one = losses()
    for one, other in zip(one_by_one, together, strict=True):
        assert torch.equal(one, other)
    assert at_once == 6 * 4 * entries and max(made_bytes(losses)) == 4 * entries
