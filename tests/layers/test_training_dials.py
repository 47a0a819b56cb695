"""Expert dropout, noise and temperature: when they act, and on what."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmoe.layers.context import PromptRows
from lmoe.rules.routers import ExpertsPerToken
from tests.layers.loop_routing import CAN_BIAS, WITH_LOGITS, WITH_TEMPERATURE
from tests.layers.small_site import D, Site


def routed(router, x, *, seed=3):
    """Its routing of rows whose tokens are all prompt."""
    torch.manual_seed(seed)
    every = torch.ones(x.shape[:2], dtype=torch.bool)
    with router.context.with_batch_info(rows=PromptRows.single(every)), router.trace.recording(every):
        router(x)
    return router.trace.routing[router.site]


def seen_by_the_gate(router) -> list[torch.Tensor]:
    """Gets the logits that the gate is given, of each forward to come."""
    seen = []
    router.perturbed = lambda logits, x, own=router.perturbed: (seen.append(own(logits, x)), seen[-1])[1]
    return seen


@pytest.mark.parametrize("router", WITH_LOGITS)
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(
    experts=st.integers(1, 6),
    data=st.data(),
    dropout=st.sampled_from([0.1, 0.5, 0.99]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_expert_dropout_leaves_at_least_top_k_experts_to_every_row(router, experts, data, dropout, bias, seed):
    """The same ones to all tokens of a row; those that sit out have probability, weight and load 0."""
    top_k = data.draw(st.integers(1, experts))
    has_bias = bias and router in CAN_BIAS
    site = Site(router=router, experts=experts, top_k=top_k, bias=has_bias, seed=seed)
    made = site.make_router().train()
    made.context.expert_dropout = dropout
    if has_bias:
        made.selection_bias.normal_()  # as after many steps of aux_loss_free
    seen = seen_by_the_gate(made)
    routing = routed(made, torch.randn(2, 3, D), seed=seed)
    out = torch.isinf(seen[0])
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert int((~out).sum(-1).min()) >= top_k
    dropped = out[:, :1].expand_as(routing.probs)
    for name in ("routing_weights", "assignment"):
        assert not getattr(routing, name)[dropped].any(), name
    if site.declared.experts_per_token is not ExpertsPerToken.about_top_k:  # where none is on, all have probs alike
        assert not routing.probs[dropped].any()
        assert torch.isfinite(routing.probs).all()
    assert torch.isfinite(routing.router_logits).all(), "the trace keeps the clean logits"
    if routing.expert_indices is not None:
        assert routing.expert_indices.shape[-1] == top_k


def test_rows_draw_their_own_dropout_and_the_share_is_the_probability():
    made = Site(router="soft", experts=8, top_k=2).make_router().train()
    made.context.expert_dropout = 0.3
    out = routed(made, torch.randn(2000, 2, D)).routing_weights[:, 0] == 0
    assert len({tuple(row.tolist()) for row in out[:50]}) > 10
    assert float(out.float().mean()) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("setting", ["expert_dropout", "router_noise"])
@pytest.mark.parametrize("router", WITH_LOGITS)
def test_dropout_and_noise_act_in_training_only_and_leave_the_clean_logits(router, setting):
    made, x = Site(router=router, experts=4).make_router().eval(), torch.randn(4, 3, D)
    quiet = routed(made, x)
    setattr(made.context, setting, 0.6)
    still = routed(made, x)
    torch.testing.assert_close(still.routing_weights, quiet.routing_weights, atol=0, rtol=0)
    first, again, other = (routed(made.train(), x, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.routing_weights, again.routing_weights)
    assert not torch.allclose(first.routing_weights, other.routing_weights)
    assert not torch.allclose(first.probs, quiet.probs)
    torch.testing.assert_close(first.router_logits, quiet.router_logits, atol=0, rtol=0)


def test_router_noise_has_the_standard_deviation_it_says():
    made = Site(router="relu", experts=4).make_router().train()
    made.context.router_noise = 0.7
    seen = seen_by_the_gate(made)
    routing = routed(made, torch.randn(500, 10, D))
    noise = seen[0] - routing.router_logits
    assert (float(noise.mean().detach()), float(noise.std().detach())) == pytest.approx((0.0, 0.7), abs=0.02)


def test_learnt_noise_acts_in_training_only_and_starts_at_ln_2():
    made, x = Site(router="noisy_top_k").make_router(), torch.randn(2, 3, D)
    assert torch.equal(routed(made.eval(), x, seed=1).probs, routed(made, x, seed=2).probs)
    assert not torch.equal(routed(made.train(), x, seed=1).probs, routed(made, x, seed=2).probs)
    torch.nn.init.zeros_(made.noise_weight)
    seen = seen_by_the_gate(made)
    clean = routed(made, torch.randn(900, 4, D)).router_logits
    noise = seen[0] - clean
    assert float(noise.std().detach()) == pytest.approx(0.6931, abs=0.02)


@pytest.mark.parametrize("router", WITH_TEMPERATURE)
def test_temperature_flattens_the_choice_and_not_the_traced_logits(router):
    made, x = Site(router=router, experts=4).make_router().eval(), torch.randn(2, 3, D)
    sharp = routed(made, x)
    made.context.temperature = 1e4
    flat = routed(made, x)
    torch.testing.assert_close(flat.probs, torch.full_like(flat.probs, 0.25), atol=1e-3, rtol=0)
    assert float((sharp.probs - 0.25).detach().abs().max()) > 0.05
    torch.testing.assert_close(flat.router_logits, sharp.router_logits, atol=0, rtol=0)
