"""A router that the backbone brings along: it trains as a float32 copy, is seen by the trace, and can be silenced."""

import copy
import math

import pytest
import torch
from torch import Tensor

import lmoe
from lmoe.injection.record import injected
from lmoe.injection.roles import parameter_roles
from lmoe.injection.tracing import adapters_off
from lmoe.layers.native_experts import NativeExpertsLoRA
from lmoe.layers.native_router import NativeRouter
from lmoe.vocabulary import Role
from tests.reference import dumb, dumb_layer
from tests.reference.dumb_gates import Choice
from tests.tiny_models import randomise, tiny_model, tokens

FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "gemma4_moe")
"""Two of softmax, one of sigmoid, one that returns probabilities."""
B, T, E, K = 2, 7, 4, 2


def native(family: str, *, moe: dict | None = None, dtype: torch.dtype = torch.float32, **settings):
    """An injected model away from its start, in evaluation mode."""
    model = tiny_model(family).to(dtype)
    lmoe.inject(model, {"strategy": "native_moe_expert_lora", "lora_r": 4, **settings}, moe)
    randomise(model, std=0.3)
    return model


def native_routers(model) -> dict[str, NativeRouter]:
    found = {path: module for path, module in model.named_modules() if isinstance(module, NativeRouter)}
    assert found
    return found


def seen_outputs(model, ids: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """What each router returned in one forward."""
    outputs, hooks = {}, []
    for path, module in native_routers(model).items():
        hooks.append(module.register_forward_hook(lambda _m, _a, out, path=path: outputs.__setitem__(path, out)))
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return outputs


def probabilities(family: str, output: list[Tensor]) -> list[Tensor]:
    """E scores of one token that sum to 1, from what the router returns first."""
    if family == "gemma4_moe":
        return output
    raw = [1 / (1 + torch.exp(-z)) if family == "deepseek_v3" else torch.exp(z) for z in output]
    return [value / sum(raw) for value in raw]


def loop_choices(family: str, output: Tensor, weights: Tensor, indices: Tensor) -> list[Choice]:
    """Token by token, from what a router returned."""
    found = []
    for n, chosen in enumerate(indices.tolist()):
        by_expert = [weights[n, chosen.index(e)] if e in chosen else output.new_zeros(()) for e in range(E)]
        shares = [1 / K if e in chosen else 0.0 for e in range(E)]
        found.append(Choice(probabilities(family, list(output[n])), by_expert, shares, chosen))
    return found


@pytest.mark.parametrize("balance", ["aux_loss", "importance_cv"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_trace_holds_routing_by_row_and_token_and_its_losses_equal_the_loop(family, balance):
    """Losses, and their gradients on the routers; the last two tokens of the second row are padding."""
    model, ids = native(family, moe={"load_balance": {"type": balance}}), tokens(B, T)
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[1, -2:] = False
    with lmoe.trace(model, attention_mask=valid) as trace:
        outputs = seen_outputs(model, ids)
        assert trace.routing.keys() == outputs.keys() == injected(model).plan.routers.keys()
        ours, z_loss = trace.load_balancing_loss(), trace.router_z_loss()
    flags, balances, z_losses = valid.flatten().tolist(), [], []
    loop_loss = dumb_layer.importance_cv if balance == "importance_cv" else dumb_layer.balance_loss
    for path, (output, weights, indices) in outputs.items():
        routing, choices = trace.routing[path], loop_choices(family, output, weights, indices)
        for values in (routing.router_logits, routing.probs, routing.routing_weights, routing.assignment):
            assert values.shape == (B, T, E) and values.dtype == torch.float32
        assert torch.equal(routing.expert_indices, indices.view(B, T, K))
        for name in ("probs", "weights"):
            wanted = torch.stack([torch.stack(getattr(choice, name)) for choice in choices]).view(B, T, E)
            torch.testing.assert_close(routing.probs if name == "probs" else routing.routing_weights, wanted)
        balances.append(loop_loss(choices, flags))
        logits = output.log() if family == "gemma4_moe" else output
        z_losses.append(dumb.router_z_loss(logits, flags))
    expected, expected_z = sum(balances) / len(balances), sum(z_losses) / len(z_losses)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(z_loss, expected_z, atol=1e-5, rtol=1e-4)
    leaves = [p for name, p in model.named_parameters() if parameter_roles(model)[name] is Role.router]
    grads, loops = (
        torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in (ours + z_loss, expected + expected_z)
    )
    assert any(gradient.any() for gradient in grads)
    torch.testing.assert_close(grads, loops, atol=1e-5, rtol=1e-3)


def test_uniform_routing_has_a_balance_loss_of_one():
    model = native("qwen3_moe")
    with torch.no_grad():
        for module in native_routers(model).values():
            module.router.weight.zero_()
    with lmoe.trace(model, attention_mask=torch.ones(B, T)) as trace:
        with torch.no_grad():
            model(tokens(B, T))
        assert float(trace.load_balancing_loss()) == pytest.approx(1)
        assert float(trace.router_z_loss()) == pytest.approx(math.log(E) ** 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_trains_and_the_backbones_router_stays_and_comes_back_when_adapters_are_off(family):
    base, ids = tiny_model(family), tokens(B, T)
    with torch.no_grad():
        before = base(ids).logits
    model = copy.deepcopy(base)
    lmoe.inject(model, {"strategy": "native_moe_expert_lora"})
    routers = native_routers(model)
    kept = {path: copy.deepcopy(module.base_layer.state_dict()) for path, module in routers.items()}
    own = [p for name, p in model.named_parameters() if parameter_roles(model)[name] is Role.router]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)  # lora_B is zero, and the copies are still what they copy
    optimizer = torch.optim.SGD(own, lr=1.0)
    with lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace:
        loss = model(input_ids=ids, labels=ids).loss + trace.auxiliary_loss()
    loss.backward()
    trained = [parameter for parameter in own if parameter.grad is not None and parameter.grad.any()]
    assert len(trained) >= len(routers)
    optimizer.step()
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, before, atol=1e-3)
        with adapters_off(model):
            assert torch.equal(model(ids).logits, before)
    for path, module in routers.items():
        for name, values in module.base_layer.state_dict().items():
            assert torch.equal(values, kept[path][name])
        assert all(parameter.grad is None for parameter in module.base_layer.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_silenced_expert_gets_no_weight_and_the_others_keep_theirs(family):
    model, ids = native(family), tokens(B, T)
    first, *others = native_routers(model)
    with torch.no_grad():
        before = seen_outputs(model, ids)
        with injected(model).context.silence({first: 1}):
            after = seen_outputs(model, ids)
        again = seen_outputs(model, ids)
    chosen = before[first][2] == 1
    assert chosen.any()
    assert torch.equal(after[first][2], before[first][2])
    assert not after[first][1][chosen].any()
    assert torch.equal(after[first][1][~chosen], before[first][1][~chosen])
    for path in others:  # nobody is silenced there; what they read has changed
        assert (after[path][1] > 0).all()
    for path, (_, weights, indices) in again.items():
        assert torch.equal(weights, before[path][1]) and torch.equal(indices, before[path][2])


@pytest.mark.parametrize("family", FAMILIES)
def test_silencing_an_expert_is_what_taking_out_its_weights_does(family):
    """The experts get no biases here; gpt_oss has some, and its last ones are set to zero with the rest."""
    model, ids = native(family), tokens(B, T)
    site = next(module for module in model.modules() if isinstance(module, NativeExpertsLoRA))
    with torch.no_grad():
        before = model(ids).logits
        with injected(model).context.silence({next(iter(native_routers(model))): 2}):
            silenced = model(ids).logits
        site.base_layer.get_parameter("down_proj")[2] = 0
        if site.base_layer.has_bias:
            site.base_layer.get_parameter("down_proj_bias")[2] = 0
        site.get_submodule("down_proj").lora_B[2] = 0
        removed = model(ids).logits
    torch.testing.assert_close(silenced, removed, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(silenced, before, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_of_a_bfloat16_backbone_keep_what_bfloat16_would_round_away(family):
    """They compute what the backbone's own would, and their numbers are float32."""
    base, ids = tiny_model(family).bfloat16(), tokens(B, T)
    with torch.no_grad():
        before = base(ids).logits
    model = copy.deepcopy(base)
    lmoe.inject(model, {"strategy": "native_moe_expert_lora"})
    own = {name: p for name, p in model.named_parameters() if parameter_roles(model)[name] is Role.router}
    assert {parameter.dtype for parameter in own.values()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, atol=0.05, rtol=0.05)
        for module in native_routers(model).values():
            args = (torch.randn(5, 32).bfloat16(),)
            for mine, theirs in zip(module(*args), module.base_layer(*args), strict=True):
                assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    start = {name: parameter.detach().clone() for name, parameter in own.items()}
    model(input_ids=ids, labels=ids).loss.backward()
    assert {p.grad.dtype for p in own.values() if p.grad is not None} == {torch.float32}
    with torch.no_grad():
        for parameter in own.values():
            parameter.mul_(1 + 2**-12)  # less than bfloat16 can tell
    for name, parameter in own.items():
        assert torch.equal(start[name].bfloat16(), parameter.bfloat16())
        assert not torch.equal(start[name], parameter)


def test_a_forward_of_another_shape_than_the_mask_keeps_flat_tokens():
    """As native routers return them, with the tokens of all rows one after the other."""
    model = native("qwen3_moe")
    with lmoe.trace(model, attention_mask=torch.ones(1, 3)) as trace:
        model(tokens(2, 4))
        assert {routing.probs.shape for routing in trace.routing.values()} == {(8, E)}
