"""Gates: what sums to one, what is chosen, where gradients are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmoe.ops.gating import soft_gate, top_k_gate
from lmoe.vocabulary import MixtureScale
from tests.reference import dumb

FEW = settings(max_examples=25, derandomize=True, deadline=None, database=None)
SUM_TO_ONE, RAW = MixtureScale.sum_to_one, MixtureScale.raw


@FEW
@given(
    experts=st.integers(1, 6),
    data=st.data(),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    scale=st.sampled_from([SUM_TO_ONE, RAW]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_top_k_gate_and_its_gradient_equal_the_loop(experts, data, temperature, scale, dtype, seed):
    top_k = data.draw(st.integers(1, experts))
    torch.manual_seed(seed)
    logits = torch.randn(2, 3, experts, dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, 3, experts, dtype=dtype)
    gate = top_k_gate(logits, top_k=top_k, temperature=temperature, scale=scale)
    rows = [
        dumb.gate(z, top_k=top_k, temperature=temperature, renormalise=scale is SUM_TO_ONE)
        for z in logits.reshape(-1, experts)
    ]
    weights = torch.stack([torch.stack(weights) for _, weights, _ in rows]).view_as(logits)
    probs = torch.stack([torch.stack(probs) for probs, _, _ in rows]).view_as(logits)
    assigned = torch.tensor([[(e in chosen) / top_k for e in range(experts)] for _, _, chosen in rows], dtype=dtype)
    torch.testing.assert_close(gate.weights, weights)
    torch.testing.assert_close(gate.probs, probs)
    torch.testing.assert_close(gate.assignment, assigned.view_as(logits))
    (ours,) = torch.autograd.grad((gate.weights * upstream).sum(), logits)
    (theirs,) = torch.autograd.grad((weights * upstream).sum(), logits)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


@FEW
@given(experts=st.integers(1, 6), temperature=st.sampled_from([0.5, 1.0, 2.0]), seed=st.integers(0, 99))
def test_soft_gate_is_top_k_gate_of_all_experts_and_equals_the_loop(experts, temperature, seed):
    torch.manual_seed(seed)
    logits = torch.randn(5, experts, dtype=torch.float64)
    gate = soft_gate(logits, temperature=temperature)
    loop = torch.stack(
        [torch.stack(dumb.gate(z, top_k=experts, temperature=temperature, renormalise=False)[1]) for z in logits]
    )
    torch.testing.assert_close(gate.weights, loop)
    torch.testing.assert_close(
        gate.weights, top_k_gate(logits, top_k=experts, temperature=temperature, scale=RAW).weights
    )
    assert torch.equal(gate.assignment, gate.probs)


def test_assignments_carry_no_gradient():
    logits = torch.randn(4, 3, requires_grad=True)
    assert not soft_gate(logits, temperature=1.0).assignment.requires_grad
    assert not top_k_gate(logits, top_k=2, temperature=1.0, scale=SUM_TO_ONE).assignment.requires_grad


def test_renormalising_one_choice_would_give_the_router_exactly_no_gradient():
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(4, 3, dtype=torch.float64)
    for scale, dead in ((SUM_TO_ONE, True), (RAW, False)):
        gate = top_k_gate(logits, top_k=1, temperature=1.0, scale=scale)
        (gradient,) = torch.autograd.grad((gate.weights * upstream).sum(), logits)
        assert bool((gradient.abs() < 1e-15).all()) is dead


def test_one_expert_has_weight_exactly_one():
    logits = torch.randn(50, 1) * 30
    for gate in (
        top_k_gate(logits, top_k=1, temperature=0.3, scale=RAW),
        top_k_gate(logits, top_k=1, temperature=0.3, scale=SUM_TO_ONE),
        soft_gate(logits, temperature=0.3),
    ):
        assert torch.equal(gate.weights, torch.ones(50, 1))


@pytest.mark.parametrize("top_k", [0, 4])
def test_top_k_outside_the_experts_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k}, must be from 1 to the number of experts, 3"):
        top_k_gate(torch.zeros(2, 3), top_k=top_k, temperature=1.0, scale=SUM_TO_ONE)


@pytest.mark.parametrize("scale", [SUM_TO_ONE, RAW])
def test_gradcheck_of_top_k_gate_away_from_ties(scale):
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0], [3.0, -2.0, 0.5, 1.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: top_k_gate(z, top_k=2, temperature=0.7, scale=scale)[:2], (logits,))


def test_gradcheck_of_soft_gate():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: soft_gate(z, temperature=1.3)[:2], (logits,))
