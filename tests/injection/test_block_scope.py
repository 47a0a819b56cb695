"""moe.router_scope=block: one decision for all Linears of a block."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import lmoe
from lmoe.errors import RoutingError
from lmoe.injection.record import injected, mixtures, routers
from tests.injection.tiny_injected import WITH_LOGITS, gradients, tiny_injected
from tests.reference import dumb_gates
from tests.tiny_models import tiny_model, tokens

BLOCK = {"router_scope": "block"}
ATTENTION = {"target_keywords": ["q_proj", "k_proj", "v_proj"], "attn_lora": {"enabled": False}}


def trace_of(model, ids):
    with lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace:
        logits = model(input_ids=ids).logits
    return logits, trace


@pytest.mark.parametrize("router", WITH_LOGITS)
def test_each_block_has_one_routing_by_its_path_and_each_mixture_uses_it(router):
    """gate, up and down: their three outputs are those of the loop with the block's weights and their own experts."""
    model, ids, seen = tiny_injected(router, moe=BLOCK), tokens(), {}
    for path, site in mixtures(model):
        site.register_forward_hook(lambda _, args, y, path=path: seen.update({path: (args[0], y)}))
    _, trace = trace_of(model, ids)
    assert list(trace.routing) == ["model.layers.0.mlp", "model.layers.1.mlp"] == [name for name, _ in routers(model)]
    assert len(seen) == 6
    for path, (x, y) in seen.items():
        site, weights = model.get_submodule(path), trace.routing[path.rpartition(".")[0]].routing_weights
        expected = site.base_layer(x)
        for e in range(4):
            expert = x @ site.lora_A[e].T @ site.lora_B[e].T
            expected = expected + site.settings.scaling * weights[..., e : e + 1] * expert
        torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def test_the_decision_is_the_gate_of_the_blocks_input():
    model, ids, seen = tiny_injected(moe=BLOCK), tokens(1, 4), []
    block = model.model.layers[1].mlp
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    _, trace = trace_of(model, ids)
    for t, x in enumerate(seen[0][0]):
        z = torch.stack([row @ x for row in block.router.weight])
        choice = dumb_gates.top_k(z, k=2, temperature=1.0, scale="sum_to_one")
        weights = trace.routing["model.layers.1.mlp"].routing_weights[0, t]
        torch.testing.assert_close(weights, torch.stack(choice.weights))


def test_no_linear_of_the_block_has_a_router_of_its_own():
    model = tiny_injected(moe=BLOCK)
    names = {name for name, _ in model.named_parameters() if ".router." in name}
    assert names == {f"model.layers.{layer}.mlp.router.weight" for layer in (0, 1)}
    assert injected(model).plan.total_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("router", ["top_k", "relu"])
def test_the_routers_gradient_is_the_sum_of_what_gate_up_and_down_send(router):
    """Each alone, by detaching the weights on the way to the other two."""
    model = tiny_injected(router, moe=BLOCK)
    block = model.model.layers[1].mlp
    linears = [block.gate_proj, block.up_proj, block.down_proj]
    x = torch.randn(2, 3, 32)

    def gradient(through: list[nn.Module]) -> torch.Tensor:
        hooks = [one.block_route for one in linears]
        try:
            for one, route in zip(linears, hooks, strict=True):
                one.block_route = route if one in through else Detached(route)
            (grad,) = torch.autograd.grad(block(x).square().sum(), block.router.weight)
            return grad
        finally:
            for one, route in zip(linears, hooks, strict=True):
                one.block_route = route

    alone = [gradient([one]) for one in linears]
    assert all(bool(grad.any()) for grad in alone)
    together = gradient(linears)
    assert (together - sum(alone)).norm() < 1e-4 * together.norm()


class Detached:
    """The block's decision without its gradient."""

    def __init__(self, route) -> None:
        self.route, self.router = route, route.router

    def decision(self):
        decision = self.route.decision()
        return replace(decision, routing_weights=decision.routing_weights.detach())


@pytest.mark.parametrize("keywords", [["q_proj", "k_proj", "v_proj"], ["q_proj", "v_proj"]])
def test_attention_which_gets_its_input_as_a_keyword_has_one_router_for_q_k_and_v(keywords):
    model, ids = tiny_injected(moe=BLOCK, injection=ATTENTION | {"target_keywords": keywords}), tokens()
    called = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: called.append((args, "hidden_states" in kwargs)), with_kwargs=True
    )
    logits, trace = trace_of(model, ids)
    assert called == [((), True)]
    assert list(trace.routing) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert not torch.allclose(logits, tiny_model()(input_ids=ids).logits)
    grads = gradients(model)
    assert all(grads[f"model.layers.{layer}.self_attn.router.weight"].any() for layer in (0, 1))


def test_ffn_and_attention_together_have_a_router_a_block():
    model = tiny_injected(moe=BLOCK, injection=ATTENTION | {"target_keywords": ["q_proj", "v_proj", "up_proj"]})
    blocks = [f"model.layers.{layer}.{block}" for layer in (0, 1) for block in ("self_attn", "mlp")]
    assert list(trace_of(model, tokens())[1].routing) == blocks


@pytest.mark.parametrize("scope", ["linear", "block"])
def test_a_deep_copy_works_and_is_independent(scope):
    model, ids = tiny_injected(moe={"router_scope": scope}), tokens()
    before, _ = trace_of(model, ids)
    twin = copy.deepcopy(model)
    after, trace = trace_of(twin, ids)
    torch.testing.assert_close(after, before)
    assert trace is injected(twin).trace is not injected(model).trace
    assert trace.routing.keys() == injected(model).plan.routers.keys()
    with torch.no_grad():
        for _, router in routers(twin):
            router.weight.zero_()
    assert not torch.allclose(trace_of(twin, ids)[0], before)
    torch.testing.assert_close(trace_of(model, ids)[0], before)


def test_the_dials_of_a_copy_turn_its_own_routers_only():
    model, ids = tiny_injected("soft", moe=BLOCK), tokens()
    twin, before = copy.deepcopy(model), trace_of(model, ids)[0]
    injected(twin).context.temperature = 50.0
    assert not torch.allclose(trace_of(twin, ids)[0], before)
    torch.testing.assert_close(trace_of(model, ids)[0], before)


def test_a_copy_made_in_the_middle_of_training_does_not_carry_a_graph():
    model, ids = tiny_injected(moe=BLOCK).train(), tokens()
    with lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace:
        loss = model(input_ids=ids, labels=ids).loss + trace.auxiliary_loss()
        twin = copy.deepcopy(model)
    loss.backward()
    assert not injected(twin).trace.routing
    assert all(p.grad is None for p in twin.parameters())


def test_a_linear_called_without_its_block_says_so():
    model = tiny_injected(moe=BLOCK)
    with pytest.raises(RoutingError, match=r"model.layers.0.mlp: a Linear of the block was called without the block"):
        model.model.layers[0].mlp.up_proj(torch.randn(1, 2, 32))


def test_a_forward_that_fails_inside_the_block_leaves_no_decision_behind():
    model, ids = tiny_injected(moe=BLOCK), tokens()
    block = model.model.layers[0].mlp

    def fail(*_):
        raise RuntimeError("inside")

    hook = block.down_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        model(input_ids=ids)
    hook.remove()
    with pytest.raises(RoutingError, match="without the block"):
        block.up_proj(torch.randn(1, 2, 32))
    assert torch.isfinite(model(input_ids=ids).logits).all()
