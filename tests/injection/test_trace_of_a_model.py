"""The trace of a whole model: padding, other models, copies, activation checkpointing, autocast."""

import copy
import threading

import pytest
import torch
from torch import Tensor

import lmoe
from lmoe.backbones.checkpointing import recompute_activations
from lmoe.errors import InjectionError, RoutingError
from lmoe.injection.record import injected, routers
from lmoe.injection.tracing import adapters_off
from lmoe.metrics.routing import RoutingStats
from tests.tiny_models import randomise, tiny_model, tokens

INJECTION = {"lora_r": 4, "lora_dropout": 0.0}
MIXTURES = 6  # two layers of gate, up and down


def injected_model(**injection):
    model = tiny_model()
    lmoe.inject(model, injection=INJECTION | injection)
    randomise(model)
    return model


def losses_and_gradients(model, ids: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], dict]:
    """Auxiliary losses, their gradients, and the routing statistics of one forward."""
    model.zero_grad()
    stats = RoutingStats(injected(model).plan.routers, ["all"])
    with lmoe.trace(model, attention_mask=mask) as trace:
        model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        balance, z_loss = trace.load_balancing_loss(), trace.router_z_loss()
        for site, r in trace.routing.items():
            stats.update(site, r.probs, r.routing_weights, r.assignment, mask.bool(), torch.zeros_like(ids))
    (balance + z_loss).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"balance": balance, "z_loss": z_loss} | gradients, stats.compute()


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_neither_losses_nor_gradients_nor_statistics(side):
    model, ids = injected_model(), tokens(2, 5)
    padding, ones, zeros = torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids), torch.zeros(2, 3).long()
    pair = (lambda a, b: [a, b]) if side == "right" else (lambda a, b: [b, a])
    plain, statistics = losses_and_gradients(model, ids, ones)
    plain = {name: value.detach().clone() for name, value in plain.items()}
    padded, padded_statistics = losses_and_gradients(
        model, torch.cat(pair(ids, padding), 1), torch.cat(pair(ones, zeros), 1)
    )
    assert plain.keys() == padded.keys()
    for name, value in plain.items():
        scale = value.abs().max().clamp(min=1)  # gradients are in the thousands here
        torch.testing.assert_close(padded[name] / scale, value / scale, atol=1e-5, rtol=1e-4, msg=name)
    for site, value in statistics.items():
        assert padded_statistics[site].load == pytest.approx(value.load)
        assert padded_statistics[site].entropy == pytest.approx(value.entropy, abs=1e-5)
        assert padded_statistics[site].effective == pytest.approx(value.effective, abs=1e-5)


def test_the_auxiliary_loss_alone_reaches_the_routers_and_through_hidden_states_the_experts():
    model, ids = injected_model(), tokens()
    with lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace:
        model(ids)
        trace.auxiliary_loss().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if name.endswith("router.weight")}
    assert len(gradients) == MIXTURES
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())


def test_a_forward_outside_the_block_leaves_no_tensors_behind():
    model = injected_model()
    model(tokens())
    assert not injected(model).trace.routing


def test_two_models_do_not_share_a_trace():
    one, two, ids = injected_model(), injected_model(), tokens()
    with lmoe.trace(one, attention_mask=torch.ones_like(ids)) as trace:
        two(ids)
        assert not trace.routing
        one(ids)
    assert len(trace.routing) == MIXTURES
    assert not injected(two).trace.routing


def test_a_copy_made_after_a_traced_forward_has_its_own_trace():
    model, ids = injected_model(), tokens()
    with lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace:
        model(ids)
    twin = copy.deepcopy(model)
    assert injected(twin).trace is not trace
    own_routers = [router for _, router in routers(twin)]
    assert len(own_routers) == MIXTURES
    assert all(router.trace is injected(twin).trace for router in own_routers)
    assert injected(twin).context is not injected(model).context
    assert all(router.context is injected(twin).context for router in own_routers)
    with lmoe.trace(twin, attention_mask=torch.ones_like(ids)) as own:
        twin(ids)
    assert len(own.routing) == MIXTURES
    assert torch.equal(twin(ids).logits, model(ids).logits)


def test_an_exception_inside_the_block_switches_it_off():
    model, ids = injected_model(), tokens()
    with pytest.raises(RuntimeError, match="inside"), lmoe.trace(model, attention_mask=torch.ones_like(ids)):
        raise RuntimeError("inside")
    model(ids)
    assert not injected(model).trace.routing


def test_activation_checkpointing_counts_every_token_once():
    model, ids = injected_model().train(), tokens()
    recompute_activations(model)
    stats = RoutingStats(injected(model).plan.routers, ["all"])
    with lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace:
        (model(input_ids=ids, labels=ids, use_cache=False).loss + trace.auxiliary_loss()).backward()
        assert len(trace.routing) == MIXTURES
        for site, r in trace.routing.items():
            stats.update(
                site, r.probs, r.routing_weights, r.assignment, torch.ones_like(ids).bool(), torch.zeros_like(ids)
            )
    assert stats.tokens.tolist() == [ids.numel()] * MIXTURES


def test_activation_checkpointing_repeats_the_same_dropout():
    def gradients(checkpointing: bool):
        model = injected_model(lora_dropout=0.4).train()
        if checkpointing:
            recompute_activations(model)
        torch.manual_seed(7)
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_under_autocast_routers_stay_float32_and_adapters_get_float32_gradients(base):
    model = tiny_model().to(base)
    lmoe.inject(model, injection=INJECTION)
    randomise(model, std=0.1)
    ids = tokens()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace,
    ):
        loss = model(input_ids=ids, labels=ids).loss
        auxiliary = trace.auxiliary_loss()
        (loss + auxiliary).backward()
    assert auxiliary.dtype == torch.float32
    assert {r.router_logits.dtype for r in trace.routing.values()} == {torch.float32}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.dtype == torch.float32 and g.any() for g in gradients.values())


def test_a_bfloat16_base_without_autocast_gives_bfloat16_logits():
    model = tiny_model().to(torch.bfloat16)
    lmoe.inject(model, injection=INJECTION)
    randomise(model, std=0.1)
    assert model(tokens()).logits.dtype == torch.bfloat16


def test_adapters_off_restores_after_an_exception_and_when_nested():
    model, ids = injected_model(), tokens()
    before = model(ids).logits
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
        raise RuntimeError("inside")
    assert torch.equal(model(ids).logits, before)
    with adapters_off(model):
        base = model(ids).logits
        with adapters_off(model):
            pass
        assert torch.equal(model(ids).logits, base)
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(base, tiny_model()(ids).logits)


def test_a_mask_that_does_not_fit_the_forward_is_refused():
    model, ids = injected_model(), tokens(2, 4)
    with lmoe.trace(model, attention_mask=torch.ones(2, 8)) as trace:
        model(ids)
        with pytest.raises(ValueError, match="routing of 8 tokens, but the mask of valid tokens has 16"):
            trace.auxiliary_loss()


def test_a_trace_keeps_the_forwards_of_its_own_thread_and_one_thread_traces_at_a_time():
    model, ids, other = injected_model(), tokens(2, 4), tokens(2, 4, seed=9)
    refused: list[str] = []

    def elsewhere() -> None:
        model(other)
        try:
            with lmoe.trace(model, attention_mask=torch.ones_like(other)):
                pass
        except RoutingError as error:
            refused.append(str(error))

    with lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace:
        model(ids)
        before = {site: routing.probs.clone() for site, routing in trace.routing.items()}
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert all(torch.equal(routing.probs, before[site]) for site, routing in trace.routing.items())
    assert len(before) == MIXTURES and "another thread traces this model" in refused[0]


def test_blocks_of_two_threads_that_overlap_leave_the_model_as_it_was():
    model, ids = injected_model(), tokens()
    before, opened, closed = model(ids).logits, threading.Event(), threading.Event()

    def elsewhere() -> None:
        with adapters_off(model):
            opened.set()
            closed.wait(20)

    thread = threading.Thread(target=elsewhere)
    with adapters_off(model):
        thread.start()
        opened.wait(20)
    closed.set()
    thread.join()
    assert torch.equal(model(ids).logits, before)
    with (
        lmoe.masked_experts(model, [3]),
        pytest.raises(InjectionError, match="masked already"),
        lmoe.masked_experts(model, [2]),
    ):
        pass
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("given", [3, "3"])
def test_masked_experts_that_are_no_list_are_refused(given):
    model = tiny_model()
    lmoe.inject(model)
    said = f"`experts={given!r}` must be a list of numbers"
    with pytest.raises(InjectionError, match=said), lmoe.masked_experts(model, given):
        pass
