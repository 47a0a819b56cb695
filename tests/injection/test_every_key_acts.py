"""Changing any key of `injection` or `moe` changes the plan, the output or a gradient of a tiny model."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import lmoe
from lmoe.errors import ConfigError
from lmoe.schema.injection import InjectionConfig
from lmoe.schema.keys import leaf_keys
from lmoe.schema.moe import MoeConfig
from tests.tiny_models import tiny_model, tokens


@dataclass(frozen=True)
class Case:
    """One changed key.

    Args:
        value: another value than the default of `observe`.
        changes: what must differ: plan, logits, gradients.
    """

    value: Any
    changes: set[str]


CASES = {
    "injection.lora_r": Case(2, {"plan", "logits", "gradients"}),
    "injection.lora_alpha": Case(3.0, {"logits", "gradients"}),
    "injection.lora_dropout": Case(0.5, {"logits", "gradients"}),
    "injection.num_experts": Case(3, {"plan", "logits", "gradients"}),
    "injection.top_k": Case(1, {"plan", "logits", "gradients"}),
    "injection.target_keywords": Case(["up_proj"], {"plan", "logits", "gradients"}),
    "injection.start_layer": Case(1, {"plan", "logits", "gradients"}),
    "injection.num_layers": Case(1, {"plan", "logits", "gradients"}),
    "injection.num_experts_by_layer": Case([2, 5], {"plan", "logits", "gradients"}),
    "injection.lora_r_by_layer": Case([2, 5], {"plan", "logits", "gradients"}),
    "injection.lora_B_std": Case(0.6, {"logits", "gradients"}),
    "injection.attn_lora.enabled": Case(False, {"plan", "gradients"}),
    "injection.attn_lora.keywords": Case(["k_proj"], {"plan", "gradients"}),
    "injection.attn_lora.lora_r": Case(2, {"plan", "gradients"}),
    "injection.attn_lora.lora_alpha": Case(3.0, {"gradients"}),
    "moe.router": Case("soft", {"plan", "logits", "gradients"}),
    "moe.router_dtype": Case("bfloat16", {"logits", "gradients"}),
    "moe.temperature": Case(3.0, {"logits", "gradients"}),
    "moe.norm_topk_prob": Case(False, {"logits", "gradients"}),
    "moe.router_z_loss_coef": Case(0.7, {"gradients"}),
    "moe.load_balance.type": Case("none", {"gradients"}),
    "moe.load_balance.aux_loss_coef": Case(0.7, {"gradients"}),
}
ONE_VALUE = {"injection.strategy"}  # another value is refused, see below


def nested(dotted: dict[str, Any]) -> dict[str, Any]:
    sections: dict[str, Any] = {"injection": {}, "moe": {}}
    for key, value in dotted.items():
        *path, leaf = key.split(".")
        place = sections
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = value
    return sections


def observe(changes: dict[str, Any]) -> dict[str, Any]:
    """Plan, logits in training mode, and gradients of loss and auxiliary loss, all seeded."""
    usual = {"injection.lora_r": 4, "injection.lora_B_std": 0.3, "injection.lora_dropout": 0.0}
    model = tiny_model()
    torch.manual_seed(3)
    plan = lmoe.inject(model, **nested(usual | changes))
    model.train()
    torch.manual_seed(4)
    ids = tokens()
    with lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace:
        out = model(input_ids=ids, labels=ids)
        (out.loss + trace.auxiliary_loss()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"plan": str(plan), "logits": out.logits.detach(), "gradients": gradients}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and a.shape == b.shape else a is b or str(a) == str(b)


@pytest.fixture(scope="module")
def unchanged() -> dict[str, Any]:
    return observe({})


def test_the_table_covers_exactly_the_keys_of_injection_and_moe():
    keys = {f"injection.{key}" for key, _ in leaf_keys(InjectionConfig)}
    keys |= {f"moe.{key}" for key, _ in leaf_keys(MoeConfig)}
    assert CASES.keys() | ONE_VALUE == keys
    assert not CASES.keys() & ONE_VALUE


def test_observing_twice_gives_the_same_bits(unchanged):
    assert same(observe({}), unchanged)


@pytest.mark.parametrize("key", CASES)
def test_every_key_acts(key, unchanged):
    changed = observe({key: CASES[key].value})
    assert {what for what in unchanged if not same(changed[what], unchanged[what])} >= CASES[key].changes


def test_a_strategy_that_does_not_exist_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"injection\.strategy.*'mixture'"):
        lmoe.inject(tiny_model(), injection={"strategy": "mixture"})


@pytest.mark.parametrize("key", ["moe.router_z_loss_coef", "moe.load_balance.aux_loss_coef"])
def test_a_loss_coefficient_changes_a_router_gradient_and_no_output(key, unchanged):
    changed = observe({key: 0.7})
    assert same(changed["logits"], unchanged["logits"])
    routers = [name for name in unchanged["gradients"] if name.endswith("router.weight")]
    assert len(routers) == 6
    assert all(not same(changed["gradients"][name], unchanged["gradients"][name]) for name in routers)
