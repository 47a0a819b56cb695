"""A training loop of one's own balances as a run does: one sum of losses, and what moves after each step."""

import copy
import warnings

import pytest
import torch

import lmoe
from lmoe.errors import RoutingError
from lmoe.injection.record import injected, routers
from tests.injection.tiny_injected import tiny_injected
from tests.tiny_models import tiny_model, tokens

RATE = {"router": "sigmoid", "load_balance": {"bias_update_rate": 0.01}}


def loop(model, steps: int = 5, *, accumulate: int = 1, balance: bool = True) -> list[float]:
    """The README's loop, with an optimizer; the auxiliary loss of each forward."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    seen = []
    for step in range(steps):
        for micro_batch in range(accumulate):
            ids = tokens(seed=accumulate * step + micro_batch)
            with lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace:
                loss = model(input_ids=ids, labels=ids).loss
                auxiliary = trace.auxiliary_loss()
                loss = loss + auxiliary
            loss.backward()
            seen.append(auxiliary.item())
        optimizer.step()
        optimizer.zero_grad()
        if balance:
            lmoe.balance(model)
    return seen


def biases(model) -> torch.Tensor:
    """(S, E) of all sites."""
    return torch.stack([router.selection_bias for _, router in routers(model)])


def test_selection_biases_move_by_their_rate_in_a_loop_of_ones_own():
    model = tiny_model()
    lmoe.inject(model, {"lora_r": 4}, RATE)
    loop(model, 5)
    moved = biases(model)
    assert moved.any(dim=1).all(), "of every site"
    torch.testing.assert_close(moved / 0.01, (moved / 0.01).round())
    assert moved.abs().max() <= 0.05 + 1e-6


def test_each_step_moves_biases_by_the_tokens_of_all_its_micro_batches():
    model = tiny_injected("sigmoid", moe={"load_balance": {"bias_update_rate": 0.01}})
    before, shares = biases(model).clone(), []
    model.train()
    for seed, length in ((0, 3), (1, 9)):
        ids = tokens(length=length, seed=seed)
        with lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace:
            model(input_ids=ids)
            trace.auxiliary_loss()
            trace.auxiliary_loss()  # taken twice, and counted once
        shares.append((ids.numel(), torch.stack(list(trace.activity().values()))))
    both = sum(count * share for count, share in shares) / sum(count for count, _ in shares)
    lmoe.balance(model)
    expected = before + 0.01 * torch.sign(both.mean(1, keepdim=True) - both)
    torch.testing.assert_close(biases(model), expected)


def test_the_l1_of_relu_moves_in_a_loop_of_ones_own():
    model = tiny_model()
    lmoe.inject(model, {"lora_r": 4, "top_k": 1}, {"router": "relu", "l1_start": 1e-3, "l1_growth": 1.5})
    before = [float(router.l1_coef) for _, router in routers(model)]
    losses = loop(model, 2)
    assert [float(router.l1_coef) for _, router in routers(model)] == pytest.approx([b * 1.5**2 for b in before])
    assert losses[0] > 0


def test_the_diversity_penalty_is_part_of_the_auxiliary_loss_with_its_coefficient():
    model = tiny_injected("top_k", moe={"diversity_coef": 0.5})
    with lmoe.trace(model, attention_mask=torch.ones(2, 7)) as trace:
        model(input_ids=tokens())
        found = trace.auxiliary_loss()
    others = 0.01 * trace.load_balancing_loss() + 0.001 * trace.router_z_loss()
    torch.testing.assert_close(found, others + 0.5 * trace.diversity_penalty())
    found.backward()
    experts = [p for name, p in model.named_parameters() if "mlp" in name and name.endswith("lora_B")]
    assert experts and all(p.grad is not None and p.grad.any() for p in experts)


def test_a_copy_compares_its_own_experts():
    model = tiny_injected("top_k", moe={"diversity_coef": 0.5})
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.dim() == 3 and name.endswith(("lora_A", "lora_B")):
                parameter[1:] = parameter[:1]
        assert float(injected(twin).trace.diversity_penalty()) == pytest.approx(1)
        assert float(injected(model).trace.diversity_penalty()) < 0.5


def test_a_step_without_balance_is_warned_of_where_biases_would_move():
    model = tiny_injected("sigmoid")
    with pytest.warns(UserWarning, match=r"lmoe\.balance\(model\) was not called after it"):
        loop(model, 2, balance=False)


@pytest.mark.parametrize("balance", [True, False])
def test_a_router_balanced_by_its_loss_needs_no_call_and_takes_one(balance):
    model = tiny_injected("top_k")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(model, 2, balance=balance)


def test_micro_batches_of_one_step_are_not_warned_of():
    model = tiny_injected("sigmoid")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(model, 2, accumulate=3)


def test_balance_without_a_forward_to_go_by_is_refused():
    model = tiny_injected("sigmoid")
    with torch.no_grad(), lmoe.trace(model, attention_mask=torch.ones(2, 7)) as trace:
        model(input_ids=tokens())
        trace.auxiliary_loss()  # a validation is no training step
    with pytest.raises(RoutingError, match=r"add trace\.auxiliary_loss\(\) to the loss"):
        lmoe.balance(model)
