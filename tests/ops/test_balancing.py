"""Balance without a loss: what moves after each step does what it is for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmoe.ops.gating import relu_gate, sigmoid_gate, top_k_gate
from lmoe.ops.routing_losses import moved_bias, moved_l1, relu_l1
from lmoe.vocabulary import MixtureScale


@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    rate=st.sampled_from([0.001, 0.1]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_bias_moves_by_the_rate_towards_experts_with_less_than_the_mean(counts, rate, dtype):
    bias = torch.arange(len(counts), dtype=dtype)
    moved, mean = moved_bias(bias, torch.tensor(counts, dtype=torch.float64), rate), sum(counts) / len(counts)
    expected = [e + rate * ((c < mean) - (c > mean)) for e, c in enumerate(counts)]
    torch.testing.assert_close(moved, torch.tensor(expected, dtype=dtype))
    assert torch.equal(bias, torch.arange(len(counts), dtype=dtype)), "the bias was edited in place"


@pytest.mark.parametrize("gate", [top_k_gate, sigmoid_gate])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_bias_brings_a_skewed_stream_to_balance_within_2000_steps(gate, top_k):
    """MaxVio = max load / mean load - 1 (2408.15664, equation 4), over the last 200 of 2,000 steps of 256 tokens."""
    torch.manual_seed(0)
    experts, offset = 8, torch.linspace(-2, 2, 8)
    bias, start, late = torch.zeros(experts), torch.zeros(experts), torch.zeros(experts)
    for step in range(2000):
        logits = torch.randn(256, experts) + offset
        routed = gate(logits, top_k=top_k, temperature=1.0, scale=MixtureScale.raw, selection_bias=bias)
        load = routed.assignment.mean(0)
        start, late = start + load * (step < 20), late + load * (step >= 1800)
        bias = moved_bias(bias, load, 0.001)
    before, after = (float(load.max() / load.mean() - 1) for load in (start, late))
    assert before > 1.0
    assert after < 0.1


@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(active=st.floats(0, 8), target=st.integers(1, 4), coef=st.floats(1e-8, 1.0))
def test_the_l1_grows_while_too_many_experts_are_active_and_shrinks_while_too_few_are(active, target, coef):
    moved = float(moved_l1(torch.tensor(coef), torch.tensor(active), target, 1.2))
    off = float(torch.tensor(active)) - target
    assert moved == pytest.approx(coef * (1.2 if off > 0 else 1 / 1.2 if off < 0 else 1.0), rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_l1_drives_the_mean_number_of_active_experts_to_top_k(top_k):
    """A relu router of 8 experts whose task pulls every weight up, with plain gradient descent on task and L1."""
    torch.manual_seed(0)
    router, coef = torch.randn(8, 16).mul(0.3).requires_grad_(), torch.tensor(1e-8)
    optimizer, valid, history = torch.optim.Adam([router], lr=0.005), torch.ones(128, dtype=torch.bool), []
    wanted = torch.randn(8, 16) * 0.3
    for _ in range(700):
        x = torch.cat([torch.randn(128, 15), torch.ones(128, 1)], 1)  # with a constant, or half would stay active
        gate = relu_gate(x @ router.t())
        task = (gate.weights - torch.relu(x @ wanted.t() + 1.0)).square().mean()
        optimizer.zero_grad()
        (task + coef * relu_l1(gate.weights, gate.assignment, valid, top_k)).backward()
        optimizer.step()
        active = (gate.assignment > 0).float().sum(-1).mean()
        coef = moved_l1(coef, active, top_k, 1.05)
        history.append(float(active))
    assert sum(history[:20]) / 20 > 3
    assert sum(history[-200:]) / 200 == pytest.approx(top_k, rel=0.15)


def test_the_weight_of_the_l1_stays_where_it_can_find_its_way_back():
    coef = torch.tensor(1e-8)
    for _ in range(1000):
        coef = moved_l1(coef, torch.tensor(1.0), 2.0, 1.2)
    assert 0 < float(coef) == pytest.approx(1e-12)
    for _ in range(1000):
        coef = moved_l1(coef, torch.tensor(3.0), 2.0, 1.2)
    assert float(coef) == pytest.approx(1e4)
    assert float(moved_l1(coef, torch.tensor(1.0), 2.0, 1.2)) < 1e4
