"""Activation checkpointing changes no gradient."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import lmoe
from lmoe.backbones.checkpointing import recompute_activations
from lmoe.config.moe import RouterKind
from lmoe.errors import RoutingError
from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected
from lmoe.layers.checkpoint_in_context import CHECKPOINT
from tests.injection.tiny_injected import DOMAINS, ROUTERS, gradients, randomly, tiny_injected
from tests.tiny_models import tiny_model, tokens


@pytest.mark.parametrize(
    ("router", "scope"),
    [
        *((name, "linear") for name in ROUTERS),
        *((name, "block") for name in ("top_k", "noisy_top_k", "sequence")),
        ("sequence", "model"),
    ],
)
def test_gradients_of_loss_and_auxiliary_loss_are_the_same(router, scope):
    """With expert dropout, noise and dropout drawn again as they were."""
    injection = {"lora_dropout": 0.3}
    plain = randomly(tiny_injected(router, injection=injection, moe={"router_scope": scope}))
    expected = gradients(plain)
    assert expected.keys() == {name for name, p in plain.named_parameters() if p.requires_grad}
    model = randomly(tiny_injected(router, injection=injection, moe={"router_scope": scope}))
    recompute_activations(model)
    forwards = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda *_: forwards.append(1) if torch.is_grad_enabled() else None  # not where prompts are only read
    )
    torch.testing.assert_close(gradients(model), expected)
    assert len(forwards) == 2, "the forward was not run again, so nothing was checkpointed"


def test_the_draws_matter_so_that_the_test_above_can_fail():
    model = randomly(tiny_injected("top_k"))
    first, second = gradients(model, seed=5), gradients(model, seed=6)
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("router", "scope"), [("top_k", "linear"), ("top_k", "block"), ("sequence", "model")])
def test_the_trace_holds_one_routing_a_router_after_the_forward_ran_again(router, scope):
    model = randomly(tiny_injected(router, moe={"router_scope": scope}))
    recompute_activations(model)
    gradients(model)
    assert list(injected(model).trace.routing) == list(injected(model).plan.routers)


def gradients_as_in_training(model: PreTrainedModel) -> dict[str, Tensor]:
    """As AdapterModule.training_step: the batch tells the routers its facts, and Lightning runs the backward later."""
    ids, record = tokens(1, 8), injected(model)
    prompt = torch.zeros(1, 2, 8, dtype=torch.bool)
    prompt[0, 0, :2], prompt[0, 1, 4:6] = True, True
    rows = torch.tensor([[0] * 4 + [1] * 4])
    batch = {"input_ids": ids, "domain_ids": rows, "prompt_mask": prompt, "row_ids": rows}
    batch |= {"labels": torch.where(prompt.any(1), -100, ids), "valid_mask": torch.ones_like(ids).bool()}
    torch.manual_seed(5)
    with batch_info(record, batch, DOMAINS), record.trace.recording(torch.ones_like(ids)):
        loss = model(input_ids=ids, labels=ids).loss + record.trace.auxiliary_loss()
    record.trace.clear()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("router", "moe"),
    [
        *((name, {}) for name in ("oracle", "sequence", "prompt_hash", "top_k")),
        ("sequence", {"router_scope": "model", "decide": "turn"}),
        *((name, {"router_target": "domain", "domains": DOMAINS}) for name in ("top_k", "sequence")),
    ],
)
def test_the_facts_of_a_batch_are_still_known_when_its_forward_runs_again(router, moe):
    """Those of the targets too, by which the experts may train."""
    plain, model = (randomly(tiny_injected(router, moe=moe)) for _ in range(2))
    for one in (plain, model):
        injected(one).context.by_target = "router_target" in moe
    expected = gradients_as_in_training(plain)
    recompute_activations(model)
    torch.testing.assert_close(gradients_as_in_training(model), expected)


def checkpointed(model: PreTrainedModel, *, use_reentrant: bool) -> None:
    """What users call, by the name that their Transformers has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()


def two_losses(model: PreTrainedModel) -> list[Tensor]:
    """Losses of two forwards, of other tokens, prompts and domains."""
    losses = []
    for seed, start, domains in ((1, 2, ["maths", "prose"]), (2, 5, ["prose", "prose"])):
        ids, mask = tokens(seed=seed), torch.ones(2, 7)
        labels = ids.clone()
        labels[:, :start] = -100
        told = domains if injected(model).moe.router is RouterKind.oracle else None
        with lmoe.trace(model, attention_mask=mask, domains=told) as trace:
            losses.append(model(input_ids=ids, labels=labels).loss + trace.auxiliary_loss())
    return losses


@pytest.mark.parametrize(
    "enable", [recompute_activations, partial(checkpointed, use_reentrant=False)], ids=["own", "user"]
)
@pytest.mark.parametrize(
    ("router", "scope"),
    [
        ("oracle", "linear"),
        ("sequence", "linear"),
        ("sequence", "block"),
        ("sequence", "model"),
        ("prompt_hash", "linear"),
    ],
)
def test_two_forwards_before_one_backward_pass_have_the_gradients_of_each(router, scope, enable):
    plain, model = (tiny_injected(router, moe={"router_scope": scope}).train() for _ in range(2))
    for loss in two_losses(plain):
        loss.backward()
    enable(model)
    sum(two_losses(model)).backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert expected
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)


def test_a_copy_of_a_checkpointed_model_asks_its_own_routers():
    model = tiny_injected("sequence").train()
    recompute_activations(model)
    two_losses(model)
    twin = copy.deepcopy(model)
    two_losses(twin)
    functions = [getattr(layer, CHECKPOINT) for layer in (model.model.layers[0], twin.model.layers[0])]
    assert [function.context for function in functions] == [injected(model).context, injected(twin).context]
    assert functions[0].context is not functions[1].context


def test_transformers_before_5_23_is_asked_by_its_own_name(monkeypatch):
    """There is no activation_checkpointing_enable there, and gradient_checkpointing_enable is not deprecated."""
    model = randomly(tiny_injected("top_k"))
    expected, asked = gradients(randomly(tiny_injected("top_k"))), []

    def enable(gradient_checkpointing_kwargs):
        asked.append(gradient_checkpointing_kwargs)
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = partial(checkpoint, **gradient_checkpointing_kwargs)

    monkeypatch.delattr(PreTrainedModel, "activation_checkpointing_enable", raising=False)
    monkeypatch.setattr(model, "gradient_checkpointing_enable", enable)
    recompute_activations(model)
    torch.testing.assert_close(gradients(model), expected)
    assert asked == [{"use_reentrant": False}]


@pytest.mark.parametrize("router", ["top_k", "sequence", "relu"])
@pytest.mark.parametrize("scope", ["linear", "block"])
def test_reentrant_checkpointing_is_refused_where_the_auxiliary_loss_would_train_nothing(router, scope):
    model = randomly(tiny_injected(router, moe={"router_scope": scope}))
    checkpointed(model, use_reentrant=True)
    for read in ("auxiliary_loss", "load_balancing_loss", "router_z_loss"):
        with lmoe.trace(model, attention_mask=torch.ones(2, 7)) as trace:
            model(input_ids=tokens(), use_cache=False)
            with pytest.raises(RoutingError, match="use_reentrant"):
                getattr(trace, read)()
            with torch.no_grad():
                assert torch.isfinite(getattr(trace, read)())


def test_reentrant_checkpointing_is_refused_where_the_task_would_not_train_the_router_of_the_model():
    model = randomly(tiny_injected("sequence", moe={"router_scope": "model"}))
    checkpointed(model, use_reentrant=True)
    with pytest.raises(RoutingError, match="needs use_reentrant=False"):
        model(input_ids=tokens(), labels=tokens(), use_cache=False)


def test_a_native_router_refuses_reentrant_checkpointing_too():
    model = tiny_model("qwen3_moe").train()
    lmoe.inject(model, {"strategy": "native_moe_expert_lora"}, {"load_balance": {"aux_loss_coef": 0.01}})
    checkpointed(model, use_reentrant=True)
    with lmoe.trace(model, attention_mask=torch.ones(2, 7)) as trace:
        model(input_ids=tokens(), use_cache=False)
        with pytest.raises(RoutingError, match="use_reentrant"):
            trace.auxiliary_loss()


def test_a_model_in_evaluation_mode_may_be_looked_at_without_gradients():
    model = tiny_injected("top_k")
    with lmoe.trace(model, attention_mask=torch.ones(2, 7)) as trace:
        with torch.no_grad():
            model(input_ids=tokens())
        assert torch.isfinite(trace.auxiliary_loss())
