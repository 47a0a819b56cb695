"""The loss that teaches routers what a row is about, and the experts that are dealt to it."""

from itertools import product

import pytest
import torch

from lmoe.ops.router_targets import (
    NO_TARGET,
    RowTargets,
    dealt_head,
    experts_of_targets,
    restricted,
    router_target_loss,
    target_log_probs,
    target_of_expert,
    targets_of_rows,
)
from tests.ops.test_every_gate import Drawn, gated, scales
from tests.reference import dumb_targets

SIZES = pytest.mark.parametrize(("experts", "count"), [(4, 4), (5, 2), (7, 3), (3, 1), (2, 2)])


def drawn(experts: int, count: int, *shape: int, seed: int = 0, dtype=torch.float64):
    """Logits with a gradient, targets (some of them none) and valid tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, experts, generator=generator, dtype=dtype) * 3
    ids = torch.randint(-1, count, shape, generator=generator)
    return logits.requires_grad_(), ids, torch.rand(shape, generator=generator) < 0.7


@SIZES
@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_value_and_gradient_are_those_of_the_loop(experts, count, shape):
    logits, ids, valid = drawn(experts, count, *shape)
    loss = router_target_loss(logits, RowTargets(ids, count), valid)
    loop = dumb_targets.loss(logits.reshape(-1, experts), ids.flatten().tolist(), valid.flatten().tolist(), count)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, loop)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, loop)))


def test_sites_in_front_have_the_loss_of_each_alone():
    logits, ids, valid = drawn(5, 2, 2, 3, 4)
    targets, valid = RowTargets(ids[0], 2), valid[0]
    apart = torch.stack([router_target_loss(site, targets, valid) for site in logits])
    torch.testing.assert_close(router_target_loss(logits, targets, valid), apart)


@SIZES
def test_the_targets_share_all_probability(experts, count):
    logits, _, _ = drawn(experts, count, 6)
    torch.testing.assert_close(target_log_probs(logits, count).exp().sum(-1), torch.ones(6, dtype=torch.float64))
    even = target_log_probs(torch.zeros(1, experts), count).exp()[0]
    hands = [len(dumb_targets.experts_of(c, experts, count)) for c in range(count)]
    torch.testing.assert_close(even, torch.tensor(hands) / experts)
    assert max(hands) - min(hands) <= 1 and target_of_expert(experts, count).bincount().tolist() == hands


def test_one_target_is_no_task():
    logits, _, valid = drawn(3, 1, 8)
    loss = router_target_loss(logits, RowTargets(torch.zeros(8, dtype=torch.long), 1), valid)
    assert float(loss.detach()) == pytest.approx(0) and torch.autograd.grad(loss, logits)[0].abs().max() < 1e-12


@pytest.mark.parametrize("filler", [float("nan"), float("inf")])
def test_what_padding_holds_reaches_neither_loss_nor_gradient(filler):
    logits, ids, valid = drawn(5, 2, 3, 4)
    clean = router_target_loss(logits, RowTargets(ids, 2), valid)
    spoilt = logits.detach().masked_fill(~valid.unsqueeze(-1), filler).requires_grad_()
    loss = router_target_loss(spoilt, RowTargets(ids, 2), valid)
    torch.testing.assert_close(loss, clean)
    gradient = torch.autograd.grad(loss, spoilt)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(clean, logits)[0])
    assert not gradient[~valid | (ids == NO_TARGET)].any()


def test_no_valid_token_and_no_target_are_a_loss_of_0():
    logits, ids, valid = drawn(4, 2, 6)
    for targets, counted in ((ids, torch.zeros_like(valid)), (torch.full_like(ids, NO_TARGET), valid)):
        loss = router_target_loss(logits, RowTargets(targets, 2), counted)
        assert float(loss.detach()) == 0 and not torch.autograd.grad(loss, logits)[0].any()


def test_parts_of_a_batch_add_up_by_their_shares_of_the_valid_tokens():
    logits, ids, valid = drawn(5, 3, 6, 4)
    whole = router_target_loss(logits, RowTargets(ids, 3), valid)
    parts = [
        router_target_loss(logits[half], RowTargets(ids[half], 3), valid[half]) * valid[half].sum() / valid.sum()
        for half in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_bfloat16_logits_have_a_float32_loss_of_any_size():
    logits = torch.tensor([[200.0, -200.0]], dtype=torch.bfloat16, requires_grad=True)
    loss = router_target_loss(logits, RowTargets(torch.tensor([1]), 2), torch.tensor([True]))
    assert loss.dtype == torch.float32 and float(loss.detach()) == 400
    assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


@SIZES
def test_the_experts_of_a_target_are_those_that_the_loop_deals(experts, count):
    ids = torch.arange(-1, count)
    allowed = experts_of_targets(ids, count, experts)
    for c, row in zip(ids.tolist(), allowed, strict=True):
        assert row.nonzero().flatten().tolist() == dumb_targets.experts_of(c, experts, count)


def test_the_target_of_a_row_is_that_of_its_tokens():
    ids = torch.tensor([[2, 2, 0, 0, -1], [-1, -1, 1, 1, 1]])
    row_ids = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]])
    assert targets_of_rows(ids, row_ids, 3).tolist() == [[2, 0, -1], [1, -1, -1]]


@pytest.mark.parametrize("router", ["top_k", "soft", "top_p", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_restricted_gate_is_the_gate_of_the_allowed_experts_alone(router, k):
    """Where there are enough of them; else those that there are, and nothing else."""
    logits, ids, _ = drawn(5, 2, 8, dtype=torch.float32)
    allowed = experts_of_targets(ids, 2, 5)
    biases = (None, torch.tensor([9.0, -9.0, 0.0, 5.0, 1.0])) if router in ("top_k", "sigmoid") else (None,)
    for scale, bias in product(scales(router), biases):
        settings = Drawn(k, 0.8, 1.5, scale, bias)
        found = restricted(gated(router, logits.masked_fill(~allowed, -torch.inf), settings), allowed)
        assert not found.weights[~allowed].any() and not found.assignment[~allowed].any()
        torch.testing.assert_close(found.assignment.sum(-1), torch.ones(8))
        for t, own in enumerate(allowed):
            fewer = Drawn(min(k, int(own.sum())), 0.8, 1.5, scale, None if bias is None else bias[own])
            alone = gated(router, logits[t, own], fewer)
            torch.testing.assert_close(found.weights[t, own], alone.weights)
            torch.testing.assert_close(found.assignment[t, own], alone.assignment)
        gradient = torch.autograd.grad((found.weights * torch.arange(5)).sum(), logits, allow_unused=True)[0]
        assert gradient is None or (torch.isfinite(gradient).all() and not gradient[~allowed].any())


def test_a_dealt_head_tells_targets_apart_as_the_classifier_and_experts_of_one_target_as_before():
    torch.manual_seed(0)
    head, of_targets = torch.randn(7, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    found = dealt_head(head, of_targets)
    for target in range(3):
        own = list(range(target, 7, 3))
        torch.testing.assert_close(found[own].mean(0), of_targets[target])
        torch.testing.assert_close(found[own] - found[own[0]], head[own] - head[own[0]])
    assert torch.equal(
        dealt_head(head[:3, 0], of_targets[:, 0]).round(decimals=12), of_targets[:, 0].round(decimals=12)
    )
