"""Sites that get the tokens of all rows in one dimension, as the shared expert of Qwen's mixtures does."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import lmoe
from lmoe.injection.record import injected
from tests.injection.tiny_injected import DOMAINS, tiny_injected
from tests.tiny_models import tokens

B, T, E = 2, 7, 4
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "top_k": ("top_k", {}),
    "importance": ("top_k", {"load_balance": {"type": "importance_cv", "aux_loss_coef": 0.1}}),
    "by target": ("top_k", {"router_target": "domain", "domains": DOMAINS}),
    "relu": ("relu", {}),
    "oracle": ("oracle", {}),
    "one decision for all sites": ("sequence", {"router_scope": "model", "prompt_experts": True}),
}


def with_rows(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose shared experts get their tokens by row, and give them back in one dimension."""

    def by_row(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].unflatten(0, (B, T)),)

    def flat(_module: nn.Module, _args: tuple[Tensor], output: Tensor) -> Tensor:
        return output.flatten(0, 1)

    other = copy.deepcopy(model)
    for layer in other.model.layers:
        layer.mlp.shared_expert.register_forward_pre_hook(by_row)
        layer.mlp.shared_expert.register_forward_hook(flat)
    return other


def step(model: PreTrainedModel, *, silenced: dict[str, int]) -> dict[str, Tensor]:
    """Gradients, losses and statistics of a step of two rows with padding."""
    ids, mask, record = tokens(B, T), torch.ones(B, T, dtype=torch.long), injected(model)
    mask[1, -2:] = 0
    moe = record.moe
    names = DOMAINS if moe.domains else None
    by_target = moe.router_target.value != "none"
    record.context.by_target = by_target
    with lmoe.trace(model.train(), attention_mask=mask, domains=names) as trace, record.context.silence(silenced):
        loss = model(input_ids=ids, labels=ids.masked_fill(mask == 0, -100)).loss
        auxiliary = trace.auxiliary_loss()
        (loss + auxiliary).backward()
        found = {"loss": loss, "auxiliary loss": auxiliary}
        found |= {f"load of {name}": load for name, load in trace.loads().items()}
        for name, routing in trace.routing.items():
            assert routing.probs.shape == routing.routing_weights.shape == (B, T, E)
            found[f"weights of {name}"] = routing.routing_weights
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in (found | gradients).items()}


@pytest.mark.parametrize("case", CASES)
def test_they_are_routed_balanced_and_counted_as_by_row(case):
    router, moe = CASES[case]
    injection = {"target_keywords": ["shared_expert.up_proj"], "attn_lora": {"enabled": False}}
    model = tiny_injected(router, family="qwen2_moe", injection=injection, moe=moe)
    expected = step(with_rows(model), silenced={})
    found = step(model, silenced={})
    assert any(name.endswith("up_proj.lora_B") and value.any() for name, value in found.items())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_experts_of_them_are_silenced_as_by_row():
    injection = {"target_keywords": ["shared_expert.up_proj"], "attn_lora": {"enabled": False}}
    model = tiny_injected("top_k", family="qwen2_moe", injection=injection)
    site = next(iter(injected(model).plan.routers))
    expected = step(with_rows(model), silenced={site: 1})
    found = step(model, silenced={site: 1})
    assert not found[f"weights of {site}"][..., 1].any()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
