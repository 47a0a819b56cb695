"""The gate whose gradient is by hand against the loop over experts: every scale, ties, bias, dropped experts, types."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmoe.ops.gating import shares, top_k_gate, weights_of_top_k
from lmoe.ops.routing_losses import load_balancing_loss, router_z_loss
from lmoe.ops.top_k_weights import top_k_weights
from lmoe.vocabulary import MixtureScale
from tests.reference import dumb_gates
from tests.reference.host_sync import NoHostSync

FEW = settings(max_examples=25, derandomize=True, deadline=None, database=None)
SCALES = list(MixtureScale)
TOLERANCE = {torch.float32: {"atol": 2e-6, "rtol": 2e-5}, torch.float64: {"atol": 1e-12, "rtol": 1e-12}}


def loop(z: Tensor, *, k: int, scale: MixtureScale, bias: Tensor | None = None) -> tuple[Tensor, Tensor, list]:
    """Weights and probabilities of (N, E) logits, and the chosen experts."""
    rows = [dumb_gates.top_k(token, k=k, temperature=1.0, scale=scale.value, bias=bias) for token in z]
    weights, probs = (torch.stack([torch.stack(getattr(row, name)) for row in rows]) for name in ("weights", "probs"))
    return weights, probs, [row.chosen for row in rows]


@pytest.mark.parametrize("scale", SCALES)
@FEW
@given(
    experts=st.integers(1, 6),
    data=st.data(),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_weights_choice_and_gradient_equal_the_loop_also_at_one_and_at_all_experts(
    scale, experts, data, biased, dtype, seed
):
    torch.manual_seed(seed)
    k = data.draw(st.integers(1, experts))
    bias = torch.randn(experts, dtype=dtype) if biased else None
    z = torch.randn(7, experts, dtype=dtype, requires_grad=True)
    weights, indices = weights_of_top_k(z, top_k=k, scale=scale, selection_bias=bias)
    expected, _, chosen = loop(z, k=k, scale=scale, bias=bias)
    torch.testing.assert_close(weights, expected, **TOLERANCE[dtype])
    assert indices.tolist() == chosen and not indices.requires_grad
    along = torch.randn_like(weights)
    ours, theirs = (torch.autograd.grad(w, z, along)[0] for w in (weights, expected))
    torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])


@pytest.mark.parametrize("scale", SCALES)
def test_logits_that_losses_read_too_get_the_sum_of_all_gradients(scale):
    """Weights, balance and z-loss at once, where the last token is padding."""
    torch.manual_seed(0)
    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    valid, along = torch.arange(6) < 5, torch.randn(6, 5, dtype=torch.float64)
    gate = top_k_gate(z, top_k=2, temperature=1.0, scale=scale)
    weights, probs, chosen = loop(z, k=2, scale=scale)
    share = torch.tensor([[0.5 * (e in row) for e in range(5)] for row in chosen], dtype=torch.float64)
    values = [
        (w * along).sum() + load_balancing_loss(a, p, valid) + router_z_loss(z, valid)
        for w, a, p in ((gate.weights, gate.assignment, gate.probs), (weights, share, probs))
    ]
    torch.testing.assert_close(values[0], values[1])
    ours, theirs = (torch.autograd.grad(value, z)[0] for value in values)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("scale", [MixtureScale.sum_to_one, MixtureScale.raw])
def test_gradcheck_away_from_ties(scale, k):
    z = torch.tensor([[0.0, 1.0, 2.1, -1.0], [3.0, -2.0, 0.5, 1.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda leaf: top_k_weights(leaf, top_k=k, scale=scale)[0], (z,))


@pytest.mark.parametrize("scale", SCALES)
def test_among_equal_logits_exactly_k_are_chosen_and_weigh_alike(scale):
    z = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)  # as a router sees padding of zeros
    weights, indices = top_k_weights(z, top_k=2, scale=scale)
    each = {MixtureScale.sum_to_one: 0.5, MixtureScale.raw: 0.2, MixtureScale.unit: 1.0}[scale]
    assert [len(set(row)) for row in indices.tolist()] == [2, 2, 2]
    torch.testing.assert_close(weights, torch.zeros(3, 5).double().scatter(-1, indices, each))
    (grad,) = torch.autograd.grad(weights, z, torch.ones_like(weights))
    kept = 0.2 * (weights > 0).double()
    wanted = torch.zeros_like(kept) if scale is MixtureScale.sum_to_one else kept - 0.2 * kept.sum(-1, keepdim=True)
    torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("scale", SCALES)
def test_experts_that_were_dropped_get_neither_weight_nor_gradient_and_the_rest_stays_finite(scale):
    leaf = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    out = torch.tensor([True, False, False, True, False])
    weights, _ = top_k_weights(leaf.masked_fill(out, -torch.inf), top_k=3, scale=scale)
    (grad,) = torch.autograd.grad(weights, leaf, torch.randn_like(weights))
    assert not weights[:, out].any() and not grad[:, out].any()
    assert torch.isfinite(weights).all() and torch.isfinite(grad).all()
    alone, _ = top_k_weights(leaf[:, ~out], top_k=3, scale=scale)
    torch.testing.assert_close(weights[:, ~out], alone)


@pytest.mark.parametrize("scale", SCALES)
def test_bfloat16_logits_give_bfloat16_weights_near_those_of_float64(scale):
    torch.manual_seed(0)
    z = torch.randn(50, 6).bfloat16().requires_grad_()
    exact = z.detach().double().requires_grad_()
    along = torch.randn(50, 6).bfloat16()
    weights, _ = top_k_weights(z, top_k=2, scale=scale)
    expected, _ = top_k_weights(exact, top_k=2, scale=scale)
    alike = ((weights > 0) == (expected > 0)).all(-1)  # rounded logits may tie
    assert weights.dtype == torch.bfloat16 and int(alike.sum()) > 45
    torch.testing.assert_close(weights.double()[alike], expected[alike], atol=4e-3, rtol=8e-3)
    ours, theirs = torch.autograd.grad(weights, z, along)[0], torch.autograd.grad(expected, exact, along.double())[0]
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double()[alike], theirs[alike], atol=1e-2, rtol=2e-2)


def test_weights_far_apart_stay_finite_where_probabilities_underflow():
    z = torch.tensor([[0.0, -300.0, -400.0, -500.0]], requires_grad=True)
    weights, indices = top_k_weights(z, top_k=2, scale=MixtureScale.sum_to_one)
    assert indices.tolist() == [[0, 1]] and weights.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    (grad,) = torch.autograd.grad(weights, z, torch.randn_like(weights))
    assert not grad.any()


def test_where_nobody_asks_for_the_weights_the_router_gets_no_gradient_of_them():
    z = torch.randn(3, 4, requires_grad=True)
    weights, _ = top_k_weights(z, top_k=2, scale=MixtureScale.raw)
    (grad,) = torch.autograd.grad((z * 2).sum() + 0 * weights.detach().sum(), z)
    assert torch.equal(grad, torch.full_like(z, 2.0))


def test_a_gradient_of_the_gradient_is_refused_and_not_wrong():
    z = torch.randn(3, 4, requires_grad=True)
    weights, _ = top_k_weights(z, top_k=2, scale=MixtureScale.raw)
    (first,) = torch.autograd.grad(weights.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("scale", SCALES)
def test_the_gate_reads_no_value_back_to_the_host(scale):
    z = torch.randn(3, 4, requires_grad=True)
    with NoHostSync():
        weights, indices = top_k_weights(z, top_k=2, scale=scale)
        (weights.sum() + shares(indices, weights).sum()).backward()
