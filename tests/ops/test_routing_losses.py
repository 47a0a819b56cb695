"""Auxiliary losses of one site: identities first, then the loop, then numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lmoe.ops.gating import soft_gate, top_k_gate
from lmoe.ops.routing_losses import importance_cv_loss, load_balancing_loss, masked_mean, relu_l1, router_z_loss
from lmoe.vocabulary import MixtureScale
from tests.reference import dumb

FEW = settings(max_examples=25, derandomize=True, deadline=None, database=None)


def balance(logits, valid, *, top_k):
    gate = top_k_gate(logits, top_k=top_k, temperature=1.0, scale=MixtureScale.sum_to_one)
    return load_balancing_loss(gate.assignment, gate.probs, valid)


@FEW
@given(
    experts=st.integers(2, 5),
    data=st.data(),
    soft=st.booleans(),
    mask=st.lists(st.booleans(), min_size=6, max_size=6).filter(any),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_both_losses_and_their_gradients_equal_the_loop_under_any_mask(experts, data, soft, mask, dtype, seed):
    top_k = data.draw(st.integers(1, experts))
    torch.manual_seed(seed)
    logits = torch.randn(2, 3, experts, dtype=dtype, requires_grad=True)
    valid = torch.tensor(mask).view(2, 3)
    gate = (
        soft_gate(logits, temperature=1.0)
        if soft
        else top_k_gate(logits, top_k=top_k, temperature=1.0, scale=MixtureScale.sum_to_one)
    )
    flat = logits.view(6, experts)
    pairs = (
        (
            load_balancing_loss(gate.assignment, gate.probs, valid),
            dumb.load_balancing_loss(flat, mask, top_k=experts if soft else top_k, soft=soft),
        ),
        (router_z_loss(logits, valid), dumb.router_z_loss(flat, mask)),
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)
        (a,) = torch.autograd.grad(ours, logits, retain_graph=True)
        (b,) = torch.autograd.grad(theirs, logits, retain_graph=True)
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_uniform_routing_gives_one_whatever_top_k(top_k):
    """Every expert chosen equally often, each with probability 1/3 on average: 3 * 3 * (1/3 * 1/3) = 1."""
    logits = torch.stack([torch.roll(torch.tensor([3.0, 2.0, 1.0]), shift) for shift in range(3)])
    assert balance(logits, torch.ones(3, dtype=torch.bool), top_k=top_k).item() == pytest.approx(1.0, abs=1e-6)


def test_soft_routing_gives_experts_times_the_sum_of_squared_mean_probabilities():
    torch.manual_seed(0)
    gate = soft_gate(torch.randn(7, 4, dtype=torch.float64), temperature=1.0)
    expected = 4 * gate.probs.mean(0).square().sum()
    torch.testing.assert_close(
        load_balancing_loss(gate.assignment, gate.probs, torch.ones(7, dtype=torch.bool)), expected
    )


def test_choosing_every_expert_makes_the_balance_loss_constant_one_without_gradient():
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    loss = balance(logits, torch.ones(5, dtype=torch.bool), top_k=3)
    assert loss.item() == pytest.approx(1.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert float(gradient.abs().max()) < 1e-15


def test_a_collapsed_top_1_site_gives_experts_times_the_probability_of_its_expert():
    logits = torch.tensor([[2.0, 0.0, 0.0, 0.0], [1.0, 0.5, 0.0, 0.0]], dtype=torch.float64)
    expected = 4 * torch.softmax(logits, -1)[:, 0].mean()
    torch.testing.assert_close(balance(logits, torch.ones(2, dtype=torch.bool), top_k=1), expected)


def test_balance_loss_of_the_example_worked_out_by_hand():
    """Three tokens, two experts, top-1; the third token is padding.

    p = [[3/4, 1/4], [2/3, 1/3]], both tokens choose expert 0, so f = [1, 0], P = [17/24, 7/24], and
    2 * (1 * 17/24 + 0 * 7/24) = 17/12. Worked out by hand.
    """
    logits = torch.tensor([[math.log(3), 0.0], [math.log(2), 0.0], [-9.0, 9.0]], dtype=torch.float64)
    valid = torch.tensor([True, True, False])
    assert balance(logits, valid, top_k=1).item() == pytest.approx(17 / 12)


def test_z_loss_of_the_example_worked_out_by_hand():
    """logsumexp(0, 0) = ln 2 and logsumexp(ln 3, 0) = ln 4 = 2 ln 2: the mean of ln2^2 and 4 ln2^2 is 2.5 ln2^2."""
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [100.0, 0.0]], dtype=torch.float64)
    valid = torch.tensor([True, True, False])
    assert router_z_loss(logits, valid).item() == pytest.approx(2.5 * math.log(2) ** 2)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_transformers_loss_of_one_layer_is_ours_times_top_k(top_k, masked):
    """transformers does not divide the counts by K."""
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 4)
    valid = torch.ones(2, 5, dtype=torch.bool)
    if masked:
        valid[1, 3:] = False
    theirs = load_balancing_loss_func((logits.view(10, 4),), 4, top_k, valid.long() if masked else None)
    torch.testing.assert_close(balance(logits, valid, top_k=top_k) * top_k, theirs)


def test_padding_changes_neither_losses_nor_gradients():
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 3, dtype=torch.float64)
    padded = torch.cat([logits, 50 * torch.randn(1, 3, 3, dtype=torch.float64)], dim=1)
    valid = torch.tensor([[True] * 4 + [False] * 3])
    results = []
    for z, mask in ((logits, valid[:, :4]), (padded, valid)):
        z = z.clone().requires_grad_()
        losses = (balance(z, mask, top_k=2), router_z_loss(z, mask))
        (gradient,) = torch.autograd.grad(losses[0] + losses[1], z)
        assert not gradient[:, 4:].any()
        results.append((*losses, gradient[:, :4]))
    for plain, with_padding in zip(*results, strict=True):
        torch.testing.assert_close(plain, with_padding)


def test_no_valid_token_gives_zero_and_not_nan():
    valid = torch.zeros(3, dtype=torch.bool)
    assert balance(torch.randn(3, 2), valid, top_k=1).item() == 0
    assert router_z_loss(torch.randn(3, 2), valid).item() == 0


def test_losses_stay_float32_under_autocast():
    torch.manual_seed(0)
    logits, valid = torch.randn(1, 999, 4), torch.ones(1, 999, dtype=torch.bool)
    outside = (balance(logits, valid, top_k=1), router_z_loss(logits, valid))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = (balance(logits, valid, top_k=1), router_z_loss(logits, valid))
    for a, b in zip(outside, inside, strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b)


def test_logits_of_a_bfloat16_router_are_averaged_in_float32():
    logits = torch.randn(1, 999, 4).bfloat16()
    valid = torch.ones(1, 999, dtype=torch.bool)
    torch.testing.assert_close(router_z_loss(logits, valid), router_z_loss(logits.float(), valid))


def test_flattened_tokens_meet_a_mask_of_rows_and_columns():
    torch.manual_seed(0)
    logits, valid = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    assert torch.equal(balance(logits, valid, top_k=2), balance(logits.view(6, 4), valid, top_k=2))
    assert torch.equal(router_z_loss(logits, valid), router_z_loss(logits.view(6, 4), valid))


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match="routing of 4 tokens, but the mask of valid tokens has 8"):
        masked_mean(torch.zeros(1, 4, 4), torch.ones(1, 8, dtype=torch.bool))


@pytest.mark.parametrize("loss", ["balance", "z", "cv", "l1"])
def test_padding_that_holds_nan_reaches_no_loss_and_no_gradient_of_a_valid_token(loss):
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 3)
    valid = torch.ones(2, 4, dtype=torch.bool)
    valid[1, 2:] = False
    logits[1, 2:] = torch.nan
    logits.requires_grad_()
    gate = top_k_gate(logits, top_k=2, temperature=1.0, scale=MixtureScale.sum_to_one)
    value = {
        "balance": lambda: load_balancing_loss(gate.assignment, gate.probs, valid),
        "z": lambda: router_z_loss(logits, valid),
        "cv": lambda: importance_cv_loss(gate.weights, valid),
        "l1": lambda: relu_l1(torch.relu(logits), gate.assignment, valid, 2),
    }[loss]()
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite()
    assert gradient[valid].isfinite().all()


def test_the_importance_loss_does_not_depend_on_the_size_of_the_weights():
    weights, valid = torch.rand(5, 3, generator=torch.Generator().manual_seed(0)), torch.ones(5, dtype=torch.bool)
    torch.testing.assert_close(importance_cv_loss(weights * 1e-12, valid), importance_cv_loss(weights, valid))
    assert importance_cv_loss(weights * 0, valid) == 0
