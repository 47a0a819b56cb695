"""native_moe_expert_lora: what keywords name, what is refused and warned of."""

import pytest

import lmoe
from lmoe.injection.roles import parameter_roles
from lmoe.vocabulary import Role
from tests.injection.refusal import NO_ATTENTION, refused
from tests.tiny_models import tiny_model, tokens


def branches(model, keywords: list[str] | None) -> dict[str, list[str]]:
    """What carries branches in layer 0, by site."""
    given = {"strategy": "native_moe_expert_lora", "target_keywords": keywords, **NO_ATTENTION}
    plan = lmoe.plan(model, given)
    return {
        site.path.removeprefix("model.layers.0."): list(site.branches or []) for site in plan.sites if site.layer == 0
    }


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        (None, {"mlp.experts": ["gate_up_proj", "down_proj"]}),
        (["gate_up_proj"], {"mlp.experts": ["gate_up_proj"]}),
        (["experts.down_proj"], {"mlp.experts": ["down_proj"]}),
        (["down_proj"], {"mlp.shared_expert.down_proj": [], "mlp.experts": ["down_proj"]}),
        (["shared_expert.up_proj"], {"mlp.shared_expert.up_proj": [], "mlp.experts": []}),
        (["q_proj", "experts.down_proj"], {"self_attn.q_proj": [], "mlp.experts": ["down_proj"]}),
    ],
)
def test_native_keywords_name_fused_weights_and_linears(keywords, expected):
    """A Linear gets a single LoRA; the experts stay a site, because their router trains."""
    assert branches(tiny_model("qwen2_moe"), keywords) == expected


def test_a_named_linear_beside_native_experts_is_a_single_lora_with_the_role_lora():
    model = tiny_model("qwen2_moe")
    plan = lmoe.inject(
        model, {"strategy": "native_moe_expert_lora", "target_keywords": ["shared_expert.up_proj"], **NO_ATTENTION}
    )
    roles, prefix = parameter_roles(model), "model.layers.0.mlp.shared_expert.up_proj"
    assert roles[f"{prefix}.lora_A"] is Role.lora and roles[f"{prefix}.base_layer.weight"] is Role.base_ffn
    assert roles["model.layers.0.mlp.gate.router.weight"] is Role.router
    assert "4 native experts r=16 on nothing, 2 active" in str(plan)
    model(tokens())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_native_keyword_that_matches_nothing_lists_what_exists_fused_weights_included(family):
    there = "down_proj, gate_up_proj, k_proj, o_proj, q_proj, v_proj"
    said = f"injection.target_keywords: 'nope' matches nothing; Linears in the chosen layers: {there}"
    refused(tiny_model(family), {"strategy": "native_moe_expert_lora", "target_keywords": ["nope"]}, said)


def test_native_experts_that_are_spread_over_devices_are_refused():
    model = tiny_model("qwen3_moe")
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    refused(
        model, {"strategy": "native_moe_expert_lora"}, "model.layers.1.mlp.experts is spread over devices by expert"
    )


def test_diversity_without_branches_of_several_experts_is_refused():
    given = {"strategy": "native_moe_expert_lora", "target_keywords": ["q_proj"], **NO_ATTENTION}
    refused(tiny_model("qwen3_moe"), given, "moe.diversity_coef has no effect", {"diversity_coef": 0.1})
    lmoe.plan(tiny_model("qwen3_moe"), {"strategy": "native_moe_expert_lora"}, {"diversity_coef": 0.1})


def test_native_moe_expert_lora_warns_of_dense_layers_and_of_half_matched_keywords():
    model = tiny_model("qwen3_moe", mlp_only_layers=[1])
    plan = lmoe.plan(model, {"strategy": "native_moe_expert_lora"})
    assert plan.warnings == ("layers [1] are dense and get no experts",)
    assert {site.layer for site in plan.sites if site.role is Role.lora} == {0}
    for keyword, without in (("gate_up_proj", 1), ("up_proj", 0)):
        plan = lmoe.plan(model, {"strategy": "native_moe_expert_lora", "target_keywords": [keyword]})
        half = f"injection.target_keywords: {keyword!r} is in 1 of 2 layers (50%); layers [{without}] stay without"
        assert half in plan.warnings
