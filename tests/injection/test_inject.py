"""inject: what is refused, what is warned of, what is frozen, and what the plan says."""

import re

import pytest
import torch
from torch import nn

import lmoe
from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import LoadBalanceConfig, MoeConfig
from lmoe.errors import ConfigError, InjectionError
from lmoe.injection.choose import spread
from lmoe.injection.plan import SiteKind, spans
from lmoe.injection.record import injected, sites
from lmoe.injection.roles import ADAPTER_ROLES, adapter_parameters, parameter_roles, role_table
from lmoe.layers.lora_linear import LoRALinear
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear
from lmoe.vocabulary import LoadBalanceType, Role, RouterKind
from tests.tiny_models import tiny_model, tokens


def untouched(model: nn.Module) -> bool:
    """Whether an injection that failed left the model as it was."""
    wrapped = any(isinstance(m, LoRALinear | MixtureLoRALinear) for m in model.modules())
    return not wrapped and all(p.requires_grad for p in model.parameters()) and not hasattr(model, "lmoe_injected")


# --- roles and freezing


@pytest.mark.parametrize("tied", [False, True])
def test_roles_partition_the_parameters(tied):
    model = tiny_model(tie_word_embeddings=tied)
    plan = lmoe.inject(model)
    roles = parameter_roles(model)
    assert list(roles) == [name for name, _ in model.named_parameters()]
    table = role_table(model)
    assert len({role for role, _, _ in table}) == len(table)
    assert sum(total for _, total, _ in table) == sum(p.numel() for p in model.parameters())
    assert plan.total_parameters == sum(total for role, total, _ in table if role in ADAPTER_ROLES)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.embed_tokens.weight", Role.backbone),
        ("model.norm.weight", Role.backbone),
        ("model.layers.0.self_attn.k_proj.weight", Role.backbone),
        ("model.layers.0.self_attn.q_proj.base_layer.weight", Role.backbone),
        ("model.layers.0.self_attn.q_proj.lora_A", Role.attn_lora),
        ("model.layers.0.self_attn.v_proj.lora_B", Role.attn_lora),
        ("model.layers.1.mlp.gate_proj.base_layer.weight", Role.base_ffn),
        ("model.layers.1.mlp.gate_proj.router.weight", Role.router),
        ("model.layers.1.mlp.up_proj.lora_A", Role.lora),
        ("model.layers.1.mlp.down_proj.lora_B", Role.lora),
        ("lm_head.weight", Role.head),
    ],
)
def test_role_of_each_kind_of_parameter(name, role):
    model = tiny_model()
    lmoe.inject(model)
    assert parameter_roles(model)[name] is role


def test_the_output_layer_has_its_role_whatever_it_is_called(monkeypatch):
    model = tiny_model()
    output = model.get_output_embeddings()
    model.add_module("output", output)
    del model.lm_head
    monkeypatch.setattr(model, "get_output_embeddings", lambda: output)
    lmoe.inject(model, trained_base=["head"])
    assert parameter_roles(model)["output.weight"] is Role.head
    assert "output.weight" in adapter_parameters(model)


def test_a_mixture_on_attention_has_the_role_lora():
    model = tiny_model()
    lmoe.inject(model, injection={"target_keywords": ["q_proj"], "attn_lora": {"enabled": False}})
    assert parameter_roles(model)["model.layers.0.self_attn.q_proj.lora_A"] is Role.lora


def test_the_backbone_is_frozen_and_adapters_and_routers_are_float32_and_trainable():
    model = tiny_model().to(torch.bfloat16)
    lmoe.inject(model)
    adapters = adapter_parameters(model)
    assert len(adapters) == 2 * (3 * 3 + 2 * 2)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is (name in adapters), name
        assert parameter.dtype is (torch.float32 if name in adapters else torch.bfloat16), name


@pytest.mark.parametrize("training", [True, False])
def test_wrappers_take_the_mode_of_the_model_so_that_evaluation_never_drops_out(training):
    model = tiny_model().train(training)
    lmoe.inject(model, injection={"lora_dropout": 0.5})
    assert {module.training for module in model.modules()} == {training}


def test_a_coefficient_reaches_the_trace_and_type_none_switches_it_off():
    moe = {"router_z_loss_coef": 0.5, "load_balance": {"aux_loss_coef": 0.25}}
    for kind, coefficient in (("aux_loss", 0.25), ("none", 0.0)):
        model = tiny_model()
        given = moe | {"load_balance": {"type": kind} | ({"aux_loss_coef": 0.25} if kind == "aux_loss" else {})}
        lmoe.inject(model, moe=given)
        trace = injected(model).trace
        assert (trace.losses.balance, trace.losses.aux_loss_coef) == (kind, coefficient)
        assert trace.losses.router_z_loss_coef == 0.5


# --- the plan


def test_the_plan_counts_what_is_put_in():
    """D 32, O 48: a branch of rank 16 has 16 * (32 + 48) = 1280, four of them and a router of 4 * 32 make 5248."""
    model = tiny_model()
    plan = lmoe.inject(model)
    site = next(site for site in plan.sites if site.path == "model.layers.0.mlp.gate_proj")
    assert (site.total_parameters, site.active_parameters) == (5248, 2 * 1280 + 128)
    assert plan.total_parameters == sum(p.numel() for p in adapter_parameters(model).values())
    assert [path for path, _ in sites(model)] == [site.path for site in plan.sites]


def test_the_printed_plan_puts_equal_layers_in_one_row():
    text = str(lmoe.inject(tiny_model()))
    assert "model.layers.{0-1}.mlp.gate_proj" in text
    assert "4 experts r=16, 2 active" in text and "LoRA r=16" in text
    assert text.splitlines()[-1].startswith("total")


def test_spans_of_layers():
    assert spans([0, 1, 2, 5]) == "{0-2,5}"
    assert spans([3]) == "3"


def test_short_lists_spread_evenly_over_the_layers():
    assert [spread([2, 4], i, 6) for i in range(6)] == [2, 2, 2, 4, 4, 4]
    assert [spread([2, 4, 6, 8], i, 8) for i in range(8)] == [2, 2, 4, 4, 6, 6, 8, 8]
    assert spread(None, 0, 4) is None


def test_by_layer_lists_start_at_the_first_chosen_layer():
    model = tiny_model(num_hidden_layers=4)
    plan = lmoe.inject(
        model,
        injection={
            "start_layer": 1,
            "num_layers": 2,
            "num_experts_by_layer": [2, 3],
            "lora_r_by_layer": [4, 8],
            "attn_lora": {"enabled": False},
        },
    )
    assert {(s.layer, s.num_experts, s.lora_r) for s in plan.sites} == {(1, 2, 4), (2, 3, 8)}
    assert {s.scaling for s in plan.sites} == {32 / 4, 32 / 8}


@pytest.mark.parametrize(("start", "count", "layers"), [(0, 0, {0, 1, 2}), (1, 0, {1, 2}), (0, 1, {0}), (2, 1, {2})])
def test_start_layer_and_num_layers_choose_layers(start, count, layers):
    plan = lmoe.inject(tiny_model(num_hidden_layers=3), injection={"start_layer": start, "num_layers": count})
    assert {site.layer for site in plan.sites} == layers


def test_attention_takes_rank_and_alpha_of_the_injection_unless_set():
    plan = lmoe.inject(tiny_model(), injection={"lora_r": 4, "lora_alpha": 12})
    assert {(s.lora_r, s.scaling) for s in plan.sites} == {(4, 3.0)}
    own = {"lora_r": 4, "lora_alpha": 12, "attn_lora": {"lora_r": 2, "lora_alpha": 10}}
    plan = lmoe.inject(tiny_model(), injection=own)
    assert {(s.lora_r, s.scaling) for s in plan.sites if s.role is Role.attn_lora} == {(2, 5.0)}


def test_a_longer_dotted_keyword_tells_layers_apart():
    plan = lmoe.inject(
        tiny_model(), injection={"target_keywords": ["layers.1.mlp.up_proj"], "attn_lora": {"enabled": False}}
    )
    assert [site.path for site in plan.sites] == ["model.layers.1.mlp.up_proj"]


def test_dataclasses_and_dicts_give_the_same_plan():
    moe = MoeConfig(
        router=RouterKind.top_k,
        router_z_loss_coef=0.001,
        load_balance=LoadBalanceConfig(type=LoadBalanceType.aux_loss, aux_loss_coef=0.01),
    )
    assert lmoe.inject(tiny_model(), InjectionConfig(), moe) == lmoe.inject(tiny_model())


# --- warnings


def test_a_default_keyword_that_is_in_some_layers_only_warns_with_the_share():
    plan = lmoe.inject(tiny_model("qwen3_5_text"))
    assert [w for w in plan.warnings if "'q_proj' is in 1 of 4 layers (25%); layers [0, 1, 2] stay without" in w]
    assert "warning: injection.attn_lora.keywords: 'v_proj' is in 1 of 4 layers" in str(plan)


def test_dense_layers_among_native_experts_get_mixtures_and_the_others_one_beside_the_block():
    plan = lmoe.inject(tiny_model("qwen3_moe", mlp_only_layers=[1]))
    assert [w for w in plan.warnings if "the experts of 1 layers are fused, first model.layers.0.mlp" in w]
    assert [site.path for site in plan.sites if site.kind is SiteKind.beside] == ["model.layers.0.mlp"]


@pytest.mark.parametrize(("coefficient", "warned"), [(0.01, True), (0.0, False)])
def test_a_balance_loss_that_cannot_change_is_reported(coefficient, warned):
    plan = lmoe.inject(tiny_model(), injection={"num_experts": 2}, moe={"load_balance": {"aux_loss_coef": coefficient}})
    assert any("aux_loss_coef has no effect at 6 sites" in w for w in plan.warnings) is warned


FREE = {"load_balance": {"type": "aux_loss_free", "bias_update_rate": 0.001}}
IMPORTANCE = {"load_balance": {"type": "importance_cv", "aux_loss_coef": 0.1}}
ALL_CHOSEN = [
    ({"router": "sigmoid"}, 2, "type=aux_loss_free", "every load is equal"),
    (FREE, 2, "type=aux_loss_free", "every load is equal"),
    (FREE, 3, "", ""),
    (IMPORTANCE | {"scale": "unit"}, 2, "aux_loss_coef", "every weight is equal"),
    (IMPORTANCE, 2, "", ""),
    (IMPORTANCE | {"scale": "unit"}, 3, "", ""),
]


@pytest.mark.parametrize(("moe", "experts", "key", "why"), ALL_CHOSEN)
def test_no_balance_is_taken_silently_where_every_expert_is_chosen(moe, experts, key, why):
    plan = lmoe.inject(tiny_model(), injection={"num_experts": experts, "top_k": 2}, moe=moe)
    said = (
        f"moe.load_balance.{key} has no effect at 6 sites, first model.layers.0.mlp.gate_proj: top_k is the number of "
        f"experts, so {why}"
    )
    assert list(plan.warnings) == ([said] if key else [])


def test_the_default_injection_of_a_plain_model_has_no_warnings():
    assert lmoe.inject(tiny_model()).warnings == ()


# --- refusals: each leaves the model as it was


def refused(error: type[Exception], text: str, *, model: nn.Module | None = None, **sections) -> None:
    model = model or tiny_model()
    with pytest.raises(error, match=re.escape(text)):
        lmoe.inject(model, **sections)
    assert untouched(model)


def test_injecting_twice_is_refused():
    model = tiny_model()
    lmoe.inject(model)
    with pytest.raises(InjectionError, match="already carries experts"):
        lmoe.inject(model)


def test_unknown_keys_of_both_sections_are_listed_at_once_with_the_near_ones():
    with pytest.raises(ConfigError) as caught:
        lmoe.inject(
            tiny_model(),
            injection={"num_expert": 3, "attn_lora": {"enable": True}},
            moe={"load_balance": {"aux_loss_coeff": 1}},
        )
    assert caught.value.problems == [
        "injection.num_expert: no such key; did you mean num_experts?",
        "injection.attn_lora.enable: no such key; did you mean enabled?",
        "moe.load_balance.aux_loss_coeff: no such key; did you mean aux_loss_coef?",
    ]


def test_a_value_of_the_wrong_type_names_its_key():
    refused(ConfigError, "injection.num_experts is many", injection={"num_experts": "many"})


@pytest.mark.parametrize("section", ["injection", "moe"])
@pytest.mark.parametrize("given", ["top_k", "", ["top_k"]])
@pytest.mark.parametrize("call", [lmoe.plan, lmoe.inject])
def test_a_section_that_is_no_mapping_is_refused(call, section, given):
    with pytest.raises(ConfigError, match=rf"{section} is .*, must be a mapping with keys such as") as caught:
        call(tiny_model(), **{section: given})
    assert len(caught.value.problems) == 1


def test_roles_of_the_backbone_are_not_read_letter_by_letter():
    refused(ConfigError, "`trained_base='base_ffn'` must be a list of base_ffn and head", trained_base="base_ffn")


def test_several_values_that_cannot_be_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        lmoe.inject(tiny_model(), injection={"top_k": 9, "lora_r": 0}, moe={"temperature": 0})
    assert len(caught.value.problems) == 3


def test_top_1_with_renormalisation_is_refused():
    refused(ConfigError, "gives the router no gradient", injection={"top_k": 1}, moe={"norm_topk_prob": True})


def test_a_missing_coefficient_is_refused():
    refused(ConfigError, "router_z_loss_coef is required", moe={"router_z_loss_coef": None})


@pytest.mark.parametrize("key", ["target_keywords", "attn_lora.keywords"])
def test_a_keyword_that_matches_nothing_lists_what_exists(key):
    section, _, leaf = key.rpartition(".")
    given = {section: {leaf: ["nope"]}} if section else {leaf: ["nope"]}
    text = f"injection.{key}: 'nope' matches nothing; Linears in the chosen layers: down_proj, gate_proj, k_proj, "
    refused(InjectionError, text + "o_proj, q_proj, up_proj, v_proj", injection=given)


def test_a_keyword_is_a_whole_name_and_not_a_part_of_one():
    refused(InjectionError, "'proj' matches nothing", injection={"target_keywords": ["proj"]})


def test_a_linear_named_by_both_keys_is_refused():
    refused(InjectionError, "is named by both", injection={"target_keywords": ["q_proj"]})


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"layer_indices": [0, 2]}, "injection.layer_indices names [2], but the backbone has layers 0 to 1"),
        ({"start_layer": 2}, "injection.start_layer=2, but the backbone has layers 0 to 1"),
        ({"start_layer": 1, "num_layers": 2}, "reach beyond the last layer, 1"),
        ({"num_experts_by_layer": [2, 3, 4]}, "injection.num_experts_by_layer has 3 values for 2 layers"),
        ({"lora_r_by_layer": [2, 3, 4]}, "injection.lora_r_by_layer has 3 values for 2 layers"),
    ],
)
def test_layers_that_do_not_exist_are_refused(given, text):
    refused(InjectionError, text, injection=given)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_native_mixtures_take_a_mixture_on_attention(family):
    model = tiny_model(family)
    ids = tokens()
    before = model(ids).logits
    plan = lmoe.inject(model, injection={"target_keywords": ["q_proj", "v_proj"], "attn_lora": {"enabled": False}})
    assert len(plan.sites) == 4
    assert torch.equal(model(ids).logits, before)


def test_layers_that_share_their_weights_are_refused():
    model = tiny_model()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    refused(
        InjectionError, "model.layers.0.mlp.gate_proj and model.layers.1.mlp.gate_proj are one and the", model=model
    )


def test_a_model_without_experts_says_so():
    with (
        pytest.raises(InjectionError, match="carries no experts"),
        lmoe.trace(tiny_model(), attention_mask=torch.ones(1, 2)),
    ):
        pass
