"""A plan needs no numbers: a model on the meta device is planned and injected like the model itself."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lmoe
from lmoe.rules.strategies import STRATEGIES
from lmoe.vocabulary import InjectionStrategy
from tests.injection.pairs import EVERY_FAMILY, EXAMPLES, WORKING
from tests.tiny_models import tiny_model


def on_meta(family: str, **changes):
    """A tiny model without numbers."""
    with torch.device("meta"):
        return tiny_model(family, **changes)


def state(model) -> tuple[list, list]:
    """Modules and what trains."""
    return [(n, id(m)) for n, m in model.named_modules()], [(n, p.requires_grad) for n, p in model.named_parameters()]


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_the_plan_of_a_model_without_numbers_is_that_of_the_model_and_injection_carries_it_out(family):
    """Planning leaves a model as it was; injecting on meta makes no numbers either."""
    strategies = [strategy for name, strategy in WORKING if name == family]
    assert len(strategies) >= 3
    whole = tiny_model(family)
    for strategy in strategies:
        given, bare = {"strategy": strategy.value, "lora_r": 4}, on_meta(family)
        before = state(bare)
        planned = lmoe.plan(bare, given)
        assert planned == lmoe.plan(whole, given)
        assert state(bare) == before
        assert lmoe.inject(bare, given) == planned
        assert state(bare) != before
        assert {parameter.device.type for parameter in bare.parameters()} == {"meta"}


SPECIAL = {
    "copies": ("qwen3", {"strategy": "moe_expert_lora", "share_base": False}, {}),
    "a router for the block": ("qwen3", {"strategy": "mixture_lora"}, {"router_scope": "block"}),
    "selection bias": (
        "qwen3",
        {"strategy": "moe_expert_lora"},
        {"router": "sigmoid", "load_balance": {"type": "aux_loss_free", "bias_update_rate": 0.01}},
    ),
    "DoRA": ("qwen3", {"strategy": "dense_lora", "attn_lora": {"use_dora": True}}, {}),
    "a shared expert": ("qwen3", {"strategy": "mixture_lora", "shared_lora_r": 2}, {}),
    "one fused weight": ("gpt_oss", {"strategy": "native_moe_expert_lora", "target_keywords": ["down_proj"]}, {}),
    "unequal layers": (
        "qwen3",
        {"strategy": "moe_expert_lora", "num_experts_by_layer": [2, 3], "lora_r_by_layer": [2, 4]},
        {},
    ),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_special_settings_are_planned_and_injected_without_numbers(case):
    family, injection, moe = SPECIAL[case]
    bare = on_meta(family)
    planned = lmoe.plan(bare, injection, moe)
    assert planned == lmoe.plan(tiny_model(family), injection, moe) == lmoe.inject(bare, injection, moe)
    assert {parameter.device.type for parameter in bare.parameters()} == {"meta"}


@pytest.mark.parametrize("strategy", InjectionStrategy)
def test_a_model_of_more_memory_than_there_is_can_be_planned_and_injected(strategy):
    """At least a hundred gigabytes of weights, and as many again where each expert has a copy."""
    settings = {"vocab_size": 1000, "hidden_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 64}
    if EXAMPLES[strategy] == "qwen3":
        config = AutoConfig.for_model("qwen3", **settings, intermediate_size=262144)
    else:
        config = AutoConfig.for_model("qwen3_moe", **settings, num_experts=128, moe_intermediate_size=4096)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) * 4 > 100e9
    share = {"share_base": False} if STRATEGIES[strategy].whole_ffn else {}
    plan = lmoe.inject(model, {"strategy": strategy.value, **share})
    assert plan.total_parameters == sum(s.total_parameters for s in plan.sites) > 1e6
    if share:
        assert plan.total_parameters * 4 > 300e9
