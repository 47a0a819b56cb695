"""Auxiliary losses by the switches of a phase, over the whole step where asked, and what moves after a step."""

from dataclasses import replace

import pytest
import torch

import lmoe
from lmoe.injection.record import injected, routers
from lmoe.layers.step_means import StepMeans
from lmoe.training.auxiliary import Auxiliary
from lmoe.training.phases import Phase
from lmoe.vocabulary import Role
from tests.tiny_models import randomise, tiny_model, tokens

PHASE = Phase(
    name="joint",
    start=0,
    end=10,
    trainable=frozenset({Role.router, Role.lora}),
    lr=1e-3,
    warmup=0,
    load_balance=True,
    router_z_loss=True,
    router_noise=True,
    expert_dropout=True,
    diversity=True,
)
OFF = replace(PHASE, load_balance=False, router_z_loss=False, diversity=False)


def alone(values: torch.Tensor) -> torch.Tensor:
    """One process."""
    return values


def made(moe: dict, injection: dict | None = None):
    model = tiny_model()
    lmoe.inject(model, injection={"lora_r": 2, "lora_B_std": 0.3} | (injection or {}), moe=moe)
    randomise(model)
    return model, Auxiliary(model, alone)


def traced(model, seed: int, valid: torch.Tensor | None = None):
    """Run a forward under the trace and leave it filled."""
    ids = tokens(seed=seed)
    valid = torch.ones_like(ids).bool() if valid is None else valid
    with lmoe.trace(model, attention_mask=valid):
        model(input_ids=ids)
    return valid


def test_means_of_a_step_weigh_micro_batches_by_their_valid_tokens_and_ranks_alike():
    means = StepMeans(lambda values: 2 * values)  # a second rank with the same numbers
    means.add({"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.5, 0.5, 0.0])}, torch.tensor(3))
    means.add({"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([0.0, 0.0, 1.0])}, torch.tensor(1))
    found = means.means()
    assert found["a"].tolist() == [0.75, 0.25]
    assert found["b"].tolist() == [0.375, 0.375, 0.25]
    means.reset()
    means.add({"a": torch.tensor([0.0, 1.0])}, torch.tensor(1))
    assert means.means()["a"].tolist() == [0.0, 1.0]


def test_global_batch_balance_takes_the_load_of_the_step_so_far_and_the_probabilities_of_the_micro_batch():
    model, auxiliary = made({"load_balance": {"scope": "global_batch"}})
    short = torch.ones(2, 7, dtype=torch.bool)
    short[1, 3:] = False
    first_valid = traced(model, 0, short)
    first = {site: (r.assignment.clone(), r.probs.clone()) for site, r in injected(model).trace.routing.items()}
    auxiliary.losses(PHASE, first_valid)
    second_valid = traced(model, 1)
    second = injected(model).trace.routing
    expected = []
    for site, routing in second.items():
        both = torch.cat([first[site][0][short], routing.assignment[second_valid]])
        load, probs = both.mean(0), routing.probs[second_valid].mean(0)
        expected.append(4 * (load * probs).sum())
    found = auxiliary.losses(PHASE, second_valid).values["load_balancing_loss"]
    torch.testing.assert_close(found, torch.stack(expected).mean())
    auxiliary.after_step(PHASE)
    traced(model, 1)
    alone_again = auxiliary.losses(PHASE, second_valid).values["load_balancing_loss"]
    assert not torch.isclose(alone_again, found), "a new step starts without the loads of the last"


def test_switches_of_a_phase_take_losses_out_of_the_total_but_not_out_of_the_metrics():
    model, auxiliary = made({"diversity_coef": 0.5})
    valid = traced(model, 0)
    on, off = auxiliary.losses(PHASE, valid), auxiliary.losses(OFF, valid)
    names = {"load_balancing_loss", "router_z_loss", "diversity_penalty"}
    assert on.values.keys() == off.values.keys() == names
    assert off.total is None
    expected = (
        0.01 * on.values["load_balancing_loss"]
        + 0.001 * on.values["router_z_loss"]
        + 0.5 * on.values["diversity_penalty"]
    )
    assert on.total is not None
    torch.testing.assert_close(on.total, expected)
    only_z = auxiliary.losses(replace(OFF, router_z_loss=True), valid)
    torch.testing.assert_close(only_z.total, 0.001 * on.values["router_z_loss"])


def test_the_diversity_penalty_pushes_equal_experts_apart_through_their_gradient():
    model, _ = made({"diversity_coef": 0.5})
    penalty = injected(model).trace.diversity_penalty()
    penalty.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "mlp" in name and name.endswith("lora_B")]
    assert len(gradients) == 6
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name and name.endswith(("lora_A", "lora_B")):
                parameter -= 0.5 * (parameter.grad if parameter.grad is not None else 0)
    assert injected(model).trace.diversity_penalty().item() < penalty.item()


@pytest.mark.parametrize("on", [True, False])
def test_a_selection_bias_moves_by_its_rate_towards_the_mean_load_where_the_phase_balances(on):
    rate = 0.05
    model, auxiliary = made({"router": "sigmoid", "load_balance": {"bias_update_rate": rate}})
    valid = traced(model, 0)
    activity = injected(model).trace.activity()
    phase = PHASE if on else OFF
    auxiliary.losses(phase, valid)
    auxiliary.after_step(phase)
    seen = 0
    for site, router in routers(model):
        expected = rate * torch.sign(activity[site].mean() - activity[site]) if on else torch.zeros(4)
        assert router.selection_bias is not None
        torch.testing.assert_close(router.selection_bias, expected)
        seen += 1
    assert seen == 6


@pytest.mark.parametrize("resting", [False, True])
def test_a_selection_bias_stands_still_while_the_rows_say_which_expert_they_train(resting):
    """Whatever it would be, the load stays that of the rows."""
    model, auxiliary = made({"router": "sigmoid"})
    context = injected(model).context
    for by_target in (True, False):
        context.by_target, context.routers_rest = by_target, by_target and resting
        auxiliary.losses(PHASE, traced(model, 0))
        auxiliary.after_step(replace(PHASE, by_target=by_target))
        moved = [bool(router.selection_bias.any()) for _, router in routers(model)]
        assert moved == [not by_target] * 6


def test_relu_l1_grows_at_every_site_while_too_many_experts_are_active_and_shrinks_below():
    model, auxiliary = made({"router": "relu", "l1_start": 0.5, "l1_growth": 1.5}, {"top_k": 1})
    for expected, share in ((0.75, 0.25), (0.5, 0.0)):  # all four experts active, then none
        valid = traced(model, 0)
        for routing in injected(model).trace.routing.values():
            routing.assignment.fill_(share)
        auxiliary.losses(PHASE, valid)
        auxiliary.after_step(PHASE)
        coefs = [float(router.l1_coef) for _, router in routers(model)]
        assert coefs == pytest.approx([expected] * 6)


def test_relu_l1_joins_the_loss_with_its_coefficient_and_reaches_the_routers():
    model, auxiliary = made({"router": "relu", "l1_start": 0.5})
    valid = traced(model, 0)
    found = auxiliary.losses(PHASE, valid)
    assert found.total is not None
    torch.testing.assert_close(found.total, found.values["relu_l1"])
    found.total.backward()
    assert all(router.weight.grad is not None and router.weight.grad.any() for _, router in routers(model))
