"""What each strategy chooses, refuses and warns of."""

import pytest
import torch

import lmoe
from lmoe.errors import ConfigError, InjectionError
from lmoe.injection.plan import SiteKind
from lmoe.injection.roles import parameter_roles
from lmoe.rules.strategies import STRATEGIES
from lmoe.vocabulary import InjectionStrategy, Role
from tests.injection.pairs import EXAMPLES
from tests.injection.refusal import NO_ATTENTION, refused
from tests.tiny_models import tiny_model, tokens

DENSE, MIXTURE = InjectionStrategy.dense_lora, InjectionStrategy.mixture_lora
FFN = InjectionStrategy.moe_expert_lora


def sites(model, injection: dict, moe: dict | None = None) -> dict[str, SiteKind]:
    """Kind of each site by path."""
    return {site.path.removeprefix("model.layers."): site.kind for site in lmoe.plan(model, injection, moe).sites}


# --- what every strategy has in common


@pytest.mark.parametrize("strategy", InjectionStrategy)
def test_adapters_and_routers_train_and_the_backbone_is_frozen(strategy):
    model = tiny_model(EXAMPLES[strategy])
    lmoe.inject(model, {"strategy": strategy.value})
    by_training: dict[bool, set[Role]] = {True: set(), False: set()}
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        by_training[parameter.requires_grad].add(roles[name])
    routers = {Role.router} if STRATEGIES[strategy].any_routers else set()
    assert by_training[True] == {Role.lora, Role.attn_lora} | routers
    assert by_training[False] >= {Role.backbone, Role.base_ffn, Role.head}
    assert not by_training[True] & by_training[False]


def test_copies_of_the_ffn_are_part_of_the_backbone_and_frozen_until_a_phase_trains_them():
    model = tiny_model()
    lmoe.inject(model, {"strategy": "moe_expert_lora", "share_base": False})
    roles = parameter_roles(model)
    copies = {name: p for name, p in model.named_parameters() if ".base_copies." in name}
    assert len(copies) == 6
    assert {roles[name] for name in copies} == {Role.base_ffn}
    assert not any(parameter.requires_grad for parameter in copies.values())
    assert {roles[name] for name in roles if ".mlp.base_layer." in name} == {Role.backbone}


@pytest.mark.parametrize("second", InjectionStrategy)
@pytest.mark.parametrize("first", InjectionStrategy)
def test_injecting_twice_is_refused_whatever_the_strategies(first, second):
    model = tiny_model("qwen3_moe", mlp_only_layers=[1])
    layers = {"layer_indices": [1]} if STRATEGIES[first].whole_ffn else {}
    lmoe.inject(model, {"strategy": first.value, **layers})
    before = [name for name, _ in model.named_modules()]
    for call in (lmoe.inject, lmoe.plan):
        with pytest.raises(InjectionError, match="already carries experts"):
            call(model, {"strategy": second.value})
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize("strategy", InjectionStrategy)
@pytest.mark.parametrize("part", ["mlp", "self_attn"])
def test_layers_that_share_a_module_are_refused(strategy, part):
    model = tiny_model(EXAMPLES[strategy])
    setattr(model.model.layers[1], part, getattr(model.model.layers[0], part))
    refused(model, {"strategy": strategy.value}, "are one and the same module")
    lmoe.inject(model, {"strategy": strategy.value, "layer_indices": [0]})  # alone, one of them will do


def test_native_blocks_that_layers_share_are_refused_a_mixture_beside_them():
    model = tiny_model("qwen3_moe")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    refused(
        model, {"strategy": "mixture_lora"}, "model.layers.0.mlp and model.layers.1.mlp are one and the same module"
    )


@pytest.mark.parametrize("strategy", InjectionStrategy)
@pytest.mark.parametrize(
    ("given", "layers"),
    [
        ({"layer_indices": [3, 1]}, [1, 3]),
        ({"stride": 2}, [0, 2, 4]),
        ({"start_layer": 1, "stride": 3}, [1, 4]),
        ({"start_layer": 1, "num_layers": 3, "stride": 2}, [1, 3]),
    ],
)
def test_layer_indices_and_stride_choose_the_layers_of_every_strategy(strategy, given, layers):
    model = tiny_model(EXAMPLES[strategy], num_hidden_layers=5)
    plan = lmoe.plan(model, {"strategy": strategy.value, **given})
    assert sorted({site.layer for site in plan.sites}) == layers
    assert sorted({site.layer for site in plan.sites if site.role is Role.lora}) == layers


@pytest.mark.parametrize("strategy", [FFN, MIXTURE])
def test_values_by_layer_are_spread_over_the_chosen_layers(strategy):
    model = tiny_model(num_hidden_layers=5)
    given = {"layer_indices": [0, 2, 4], "num_experts_by_layer": [2, 5], "lora_r_by_layer": [2, 4, 8], **NO_ATTENTION}
    plan = lmoe.plan(model, {"strategy": strategy.value, **given})
    assert {(s.layer, s.num_experts, s.lora_r) for s in plan.sites} == {(0, 2, 2), (2, 2, 4), (4, 5, 8)}


@pytest.mark.parametrize("strategy", InjectionStrategy)
def test_the_plan_counts_what_is_put_in(strategy):
    for share_base in (True, False) if STRATEGIES[strategy].whole_ffn else (True,):
        for family in ("phi", "gpt2", "qwen3") if STRATEGIES[strategy].whole_ffn else (EXAMPLES[strategy],):
            model = tiny_model(family)
            before = {id(parameter) for parameter in model.parameters()}
            plan = lmoe.inject(model, {"strategy": strategy.value, "share_base": share_base})
            added = sum(p.numel() for p in model.parameters() if id(p) not in before)
            assert plan.total_parameters == added, (family, share_base)
            assert 0 < plan.active_parameters <= added


# --- keywords that only some layers have


HALF = "injection.target_keywords: 'up_proj' is in 1 of 2 layers (50%); layers [0] stay without"


@pytest.mark.parametrize("strategy", [DENSE, MIXTURE])
def test_a_keyword_that_half_of_the_layers_have_warns_with_the_share(strategy):
    """Layer 0 has fused experts, so no Linear of this name."""
    model = tiny_model("qwen3_moe", mlp_only_layers=[1])
    plan = lmoe.plan(model, {"strategy": strategy.value, "target_keywords": ["up_proj"]})
    assert HALF in plan.warnings and f"warning: {HALF}" in str(plan)
    assert [site.path for site in plan.sites if site.role is Role.lora] == ["model.layers.1.mlp.up_proj"]


def test_dense_lora_warns_of_layers_without_ffn_linears_and_of_a_backbone_without_any():
    some = lmoe.plan(tiny_model("qwen3_moe", mlp_only_layers=[1]), {"strategy": "dense_lora"})
    assert "injection.target_keywords: 1 of 2 layers have such Linears; layers [0] stay without" in some.warnings
    none = lmoe.plan(tiny_model("qwen3_moe"), {"strategy": "dense_lora"})
    (warning,) = none.warnings
    assert warning.startswith("the FFN carries no LoRA: its experts are fused in model.layers.0.mlp.experts")
    assert "injection=native_moe_expert_lora adapts them" in warning
    assert {site.role for site in none.sites} == {Role.attn_lora}
    refused(tiny_model("qwen3_moe"), {"strategy": "dense_lora", **NO_ATTENTION}, "FFN Linear matches nothing")


def test_moe_expert_lora_names_the_dense_layers_of_a_native_mixture():
    model = tiny_model("qwen3_moe", mlp_only_layers=[1])
    said = "choose its dense layers (1) with injection.layer_indices"
    refused(model, {"strategy": "moe_expert_lora"}, said)
    assert sites(model, {"strategy": "moe_expert_lora", "layer_indices": [1], **NO_ATTENTION}) == {
        "1.mlp": SiteKind.expert_ffn
    }
    refused(tiny_model("qwen3_moe"), {"strategy": "moe_expert_lora"}, "choose its dense layers (it has none)")


# --- dense_lora


def test_dense_lora_without_target_keywords_adapts_attention_alone():
    plan = lmoe.plan(tiny_model(), {"strategy": "dense_lora", "target_keywords": []})
    assert [site.path for site in plan.sites] == [
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"
    ]
    assert {site.role for site in plan.sites} == {Role.attn_lora} and plan.warnings == ()
    with pytest.raises(ConfigError, match="leave nothing to adapt"):
        lmoe.plan(tiny_model(), {"strategy": "dense_lora", "target_keywords": [], **NO_ATTENTION})


def test_dense_lora_adapts_named_linears_anywhere_with_a_rank_by_layer_and_no_router():
    given = {"strategy": "dense_lora", "target_keywords": ["o_proj", "layers.1.mlp.up_proj"], "lora_r_by_layer": [2, 4]}
    plan = lmoe.plan(tiny_model(), {**given, **NO_ATTENTION})
    assert {(site.path.removeprefix("model.layers."), site.lora_r, site.role) for site in plan.sites} == {
        ("0.self_attn.o_proj", 2, Role.lora),
        ("1.self_attn.o_proj", 4, Role.lora),
        ("1.mlp.up_proj", 4, Role.lora),
    }
    assert plan.routers == {} and {site.num_experts for site in plan.sites} == {0}


def test_the_trace_of_a_model_without_routers_holds_nothing_and_has_no_loss():
    model, ids = tiny_model(), tokens()
    lmoe.inject(model, {"strategy": "dense_lora"})
    with lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace:
        model(ids)
        assert trace.routing == {} and float(trace.auxiliary_loss()) == 0


# --- moe_expert_lora


def test_moe_expert_lora_puts_branches_on_the_named_linears_of_the_block():
    plan = lmoe.plan(tiny_model(), {"strategy": "moe_expert_lora", "target_keywords": ["down_proj", "up_proj"]})
    assert [list(site.branches or {}) for site in plan.sites if site.kind is SiteKind.expert_ffn] == [
        ["up_proj", "down_proj"]
    ] * 2


def test_moe_expert_lora_says_what_the_blocks_have_where_a_keyword_matches_nothing():
    said = "injection.target_keywords: 'q_proj' is no Linear of the feed-forward blocks; they have down_proj, gate_proj"
    refused(tiny_model(), {"strategy": "moe_expert_lora", "target_keywords": ["up_proj", "q_proj"]}, said)
    refused(tiny_model("gpt2"), {"strategy": "moe_expert_lora", "target_keywords": ["fc1"]}, "they have c_fc, c_proj")


@pytest.mark.parametrize(
    ("family", "strategy", "keyword"),
    [
        ("qwen3", "moe_expert_lora", "up_proj"),
        ("qwen2_moe", "mixture_lora", "shared_expert.up_proj"),
    ],
)
def test_a_linear_inside_what_becomes_experts_as_a_whole_gets_no_lora_of_its_own(family, strategy, keyword):
    given = {"strategy": strategy, "attn_lora": {"keywords": ["q_proj", keyword]}}
    said = f"injection.attn_lora.keywords names model.layers.0.mlp.{keyword}, and model.layers.0.mlp becomes experts"
    refused(tiny_model(family), given, said)


def test_widths_that_grouped_matmuls_cannot_take_are_refused_before_the_first_forward():
    said = "model.layers.0.mlp.gate_proj is 32 -> 50, and grouped matmuls need multiples of 8"
    refused(tiny_model(intermediate_size=50), {"strategy": "moe_expert_lora"}, said)
    said = "model.layers.0.mlp.experts: rows of the fused weights must be multiples of 16 bytes"
    refused(tiny_model("qwen3_moe", moe_intermediate_size=10), {"strategy": "native_moe_expert_lora"}, said)


def test_a_block_of_unknown_parts_is_refused():
    model = tiny_model()
    del model.model.layers[1].mlp.act_fn
    refused(
        model, {"strategy": "moe_expert_lora"}, "layer 1: moe_expert_lora needs a feed-forward block of known parts"
    )


# --- mixture_lora on native backbones


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_mixture_sits_beside_native_blocks_and_in_the_linears_of_dense_layers(family):
    dense = {f"0.mlp.{name}": SiteKind.mixture for name in ("gate_proj", "up_proj", "down_proj")}
    expected = (dense if family == "deepseek_v3" else {"0.mlp": SiteKind.beside}) | {"1.mlp": SiteKind.beside}
    assert sites(tiny_model(family), {"strategy": "mixture_lora", **NO_ATTENTION}) == expected


def test_svd_needs_a_linear_and_a_refusal_in_the_middle_leaves_the_model_as_it_was():
    """Layer 0 of this model is dense and would take it."""
    given = {"strategy": "mixture_lora", "init_lora": "svd", "lora_r": 2}
    said = "injection.init_lora=svd needs the weight of a Linear, and model.layers.1.mlp is a block"
    refused(tiny_model("deepseek_v3"), given, said)


@pytest.mark.parametrize("scope", ["linear", "block"])
def test_too_few_singular_directions_leave_the_model_as_it_was(scope):
    model, given = tiny_model(), {"strategy": "mixture_lora", "init_lora": "svd", "lora_r": 9}
    refused(model, given, "4 experts of rank 9 need 36 singular directions", {"router_scope": scope})
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_base_role_that_does_not_exist_is_refused_before_the_model_is_touched():
    model = tiny_model()
    before = dict(model.named_modules())
    with pytest.raises(ConfigError, match="trained_base names 'ffn'; allowed: base_ffn, head"):
        lmoe.inject(model, trained_base=["ffn"])
    assert dict(model.named_modules()) == before


def test_choices_that_leave_nothing_to_adapt_are_refused():
    given = {"strategy": "dense_lora", "target_keywords": [], "layer_indices": [0]}
    with pytest.raises(InjectionError, match="nothing of the chosen layers is adapted"):
        lmoe.inject(tiny_model("qwen3_5_text"), given)


@pytest.mark.parametrize("strategy", ["mixture_lora", "moe_expert_lora"])
def test_loads_that_cannot_differ_are_reported_for_every_strategy(strategy):
    plan = lmoe.plan(tiny_model(), {"strategy": strategy, "num_experts": 2})
    assert [warning for warning in plan.warnings if "aux_loss_coef has no effect" in warning]


def test_experts_with_a_forward_of_their_own_are_refused_and_take_a_mixture_beside_them():
    model = tiny_model("mixtral")
    del model.model.layers[0].mlp.experts.has_gate
    with pytest.raises(InjectionError, match=r"MixtralExperts\) has a forward of its own.* injection=mixture_lora"):
        lmoe.inject(model, {"strategy": "native_moe_expert_lora"})
    assert lmoe.inject(model).routers
