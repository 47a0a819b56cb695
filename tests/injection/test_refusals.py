"""Settings that cannot be, or cannot act, are refused with one clear line each."""

from typing import Any

import pytest

import lmoe
from lmoe.errors import ConfigError
from lmoe.vocabulary import RouterKind
from tests.tiny_models import tiny_model

NO_BALANCE = {"type": "none"}
FREE = {"type": "aux_loss_free", "bias_update_rate": 0.01}
# (injection, moe, what the one line must say)
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "k above E": ({"num_experts": 2, "top_k": 3}, {}, "injection.top_k is 3, more than the 2 experts of a site"),
    "k above the smallest site": (
        {"num_experts_by_layer": [2, 4], "top_k": 3},
        {},
        "injection.top_k is 3, more than the 2 experts",
    ),
    "k of 0": ({"top_k": 0}, {}, "injection.top_k is 0, must be at least 1"),
    "k with top_p": (
        {"top_k": 3},
        {"router": "top_p"},
        "injection.top_k has no effect with moe.router=top_p, which chooses by",
    ),
    "k with soft": ({"top_k": 3}, {"router": "soft"}, "injection.top_k has no effect with moe.router=soft"),
    "k with oracle": ({"top_k": 3}, {"router": "oracle"}, "which chooses one expert"),
    "k with uniform": ({"top_k": 3}, {"router": "uniform"}, "which uses every expert"),
    "rank of 0": ({"lora_r": 0}, {}, "injection.lora_r is 0, must be at least 1"),
    "dropout of 1": ({"lora_dropout": 1.0}, {}, "injection.lora_dropout is 1.0, must be from 0 to below 1"),
    "shared rank of 0": ({"shared_lora_r": 0}, {}, "injection.shared_lora_r is 0, must be null or at least 1"),
    "svd with a B": (
        {"init_lora": "svd", "lora_B_std": 0.1},
        {},
        "injection.lora_B_std has no effect with injection.init_lora=svd",
    ),
    "svd with one A": ({"init_lora": "svd", "shared_lora_A": True}, {}, "each expert its own singular directions"),
    "experts twice": (
        {"num_experts": 3, "num_experts_by_layer": [4]},
        {},
        "injection.num_experts has no effect beside",
    ),
    "ranks twice": (
        {"lora_r": 3, "lora_r_by_layer": [4], "attn_lora": {"enabled": False}},
        {},
        "injection.lora_r has no effect beside injection.lora_r_by_layer",
    ),
    "no keywords": ({"target_keywords": []}, {}, "injection.target_keywords is empty"),
    "DoRA without attention": (
        {"attn_lora": {"enabled": False, "use_dora": True}},
        {},
        "injection.attn_lora.use_dora has no effect with injection.attn_lora.enabled=false",
    ),
    "k = 1 and sum_to_one": (
        {"top_k": 1},
        {"scale": "sum_to_one"},
        "moe.scale=sum_to_one with injection.top_k=1 and moe.router_target=none makes every weight 1",
    ),
    "k = 1 and norm_topk_prob": (
        {"top_k": 1},
        {"norm_topk_prob": True},
        "moe.norm_topk_prob=true with injection.top_k=1",
    ),
    "top_p without p": ({}, {"router": "top_p", "top_p": None}, "moe.top_p is required with moe.router=top_p"),
    "top_p above 1": ({}, {"router": "top_p", "top_p": 1.5}, "moe.top_p is 1.5, must be above 0 and at most 1"),
    "p with top_k": ({}, {"top_p": 0.5}, "moe.top_p has no effect with moe.router=top_k"),
    "raw with soft": (
        {},
        {"router": "soft", "scale": "raw"},
        "moe.scale=raw has no effect with moe.router=soft; allowed: sum_to_one, unit",
    ),
    "raw with uniform": ({}, {"router": "uniform", "scale": "raw"}, "allowed: sum_to_one, unit"),
    "a scale with oracle": ({}, {"router": "oracle", "scale": "unit"}, "allowed: none, its one weight is 1"),
    "scale twice": (
        {},
        {"scale": "unit", "norm_topk_prob": False},
        "moe.norm_topk_prob and moe.scale say the same thing",
    ),
    "norm_topk_prob with soft": (
        {},
        {"router": "soft", "norm_topk_prob": True},
        "moe.norm_topk_prob has no effect with moe.router=soft",
    ),
    "temperature of 0": ({}, {"temperature": 0.0}, "moe.temperature is 0.0, must be above 0"),
    "temperature with relu": (
        {},
        {"router": "relu", "temperature": 2.0},
        "moe.temperature has no effect with moe.router=relu",
    ),
    "temperature_end with oracle": (
        {},
        {"router": "oracle", "temperature_end": 2.0},
        "moe.temperature_end has no effect",
    ),
    "negative noise": ({}, {"router_noise": -1.0}, "moe.router_noise is -1.0, must be at least 0"),
    "noise with uniform": (
        {},
        {"router": "uniform", "router_noise": 0.1},
        "moe.router_noise has no effect with moe.router=uniform",
    ),
    "dropout with oracle": (
        {},
        {"router": "oracle", "expert_dropout": 0.1},
        "moe.expert_dropout has no effect with moe.router=oracle",
    ),
    "expert dropout of 1": ({}, {"expert_dropout": 1.0}, "moe.expert_dropout is 1.0, must be from 0 to below 1"),
    "dtype with uniform": ({}, {"router": "uniform", "router_dtype": "bfloat16"}, "moe.router_dtype has no effect"),
    "block with oracle": ({}, {"router": "oracle", "router_scope": "block"}, "moe.router_scope has no effect"),
    "anneal without ends": (
        {},
        {"anneal_steps": "50%"},
        "moe.anneal_steps has no effect without moe.temperature_end or moe.router_noise_end",
    ),
    "anneal in words": ({}, {"anneal_steps": "half", "temperature_end": 2.0}, "moe.anneal_steps: got 'half'"),
    "l1_growth of 1": ({}, {"router": "relu", "l1_growth": 1.0}, "moe.l1_growth is 1.0, must be above 1"),
    "l1 with top_k": ({}, {"l1_start": 0.1}, "moe.l1_start has no effect with moe.router=top_k"),
    "l1_growth with top_k": ({}, {"l1_growth": 1.5}, "moe.l1_growth has no effect with moe.router=top_k"),
    "domains with top_k": ({}, {"domains": ["a", "b"]}, "moe.domains has no effect with moe.router=top_k"),
    "a domain twice": ({}, {"router": "oracle", "domains": ["a", "a"]}, "must be null or a list of different names"),
    "factors with oracle": (
        {},
        {"router": "oracle", "mixing": "factors"},
        "moe.mixing has no effect with moe.router=oracle",
    ),
    "grouped with soft": (
        {},
        {"router": "soft", "backend": "grouped"},
        "moe.backend=grouped needs a fixed number of experts a token",
    ),
    "grouped with relu": ({}, {"router": "relu", "backend": "grouped"}, "moe.backend=grouped needs a fixed number"),
    "grouped with factors": (
        {},
        {"backend": "grouped", "mixing": "factors"},
        "moe.backend=grouped cannot compute moe.mixing=factors",
    ),
    "grouped with one A": ({"shared_lora_A": True}, {"backend": "grouped"}, "moe.backend=grouped"),
    "z-loss with oracle": ({}, {"router": "oracle", "router_z_loss_coef": 0.5}, "moe.router_z_loss_coef has no effect"),
    "z-loss with random": ({}, {"router": "random", "router_z_loss_coef": 0.5}, "moe.router_z_loss_coef has no effect"),
    "no z-loss": ({}, {"router_z_loss_coef": None}, "moe.router_z_loss_coef is required"),
    "coef with none": (
        {},
        {"load_balance": NO_BALANCE | {"aux_loss_coef": 0.5}},
        "moe.load_balance.aux_loss_coef has no effect with type=none",
    ),
    "no coef": (
        {},
        {"load_balance": {"aux_loss_coef": None}},
        "moe.load_balance.aux_loss_coef is required with type=aux_loss",
    ),
    "no rate": ({}, {"load_balance": {"type": "aux_loss_free"}}, "moe.load_balance.bias_update_rate is required"),
    "a rate with aux_loss": (
        {},
        {"load_balance": {"bias_update_rate": 0.1}},
        "moe.load_balance.bias_update_rate has no effect with type=aux_loss",
    ),
    "a scope with importance_cv": (
        {},
        {"load_balance": {"type": "importance_cv", "scope": "global_batch"}},
        "moe.load_balance.scope has no effect with type=importance_cv",
    ),
    "a bias with soft": (
        {},
        {"router": "soft", "load_balance": FREE},
        "moe.load_balance.type=aux_loss_free cannot act on moe.router=soft",
    ),
    "a bias with relu": (
        {},
        {"router": "relu", "load_balance": FREE},
        "cannot act on moe.router=relu; allowed: aux_loss, importance_cv, none",
    ),
    "a loss with random": (
        {},
        {"router": "random", "load_balance": {"type": "aux_loss", "aux_loss_coef": 0.1}},
        "cannot act on moe.router=random",
    ),
    "a bias and one expert": (
        {"num_experts": 1, "top_k": 1},
        {"load_balance": FREE},
        "moe.load_balance.type=aux_loss_free has nothing to balance with one expert",
    ),
    "a negative diversity": ({}, {"diversity_coef": -0.1}, "moe.diversity_coef is -0.1, must be at least 0"),
    "diversity of one expert": (
        {"num_experts": 1, "top_k": 1},
        {"diversity_coef": 0.1},
        "moe.diversity_coef has no effect",
    ),
    "oracle with too few experts": (
        {"num_experts": 2},
        {"router": "oracle", "domains": ["a", "b", "c"]},
        "moe.domains has 3 names, and a site has 2 experts",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_with_one_line_and_the_model_stays_as_it_was(case):
    injection, moe, line = REFUSED[case]
    model = tiny_model()
    with pytest.raises(ConfigError) as caught:
        lmoe.inject(model, injection, moe)
    assert len(caught.value.problems) == 1, caught.value.problems
    assert line in caught.value.problems[0]
    assert "\n" not in caught.value.problems[0]
    assert not hasattr(model, "lmoe_injected")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_unknown_router_is_refused_with_the_names_of_all():
    with pytest.raises(ConfigError) as caught:
        lmoe.inject(tiny_model(), moe={"router": "topk"})
    assert len(caught.value.problems) == 1
    assert "moe.router" in caught.value.problems[0] and "topk" in caught.value.problems[0]
    assert all(kind.value in caught.value.problems[0] for kind in RouterKind)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        lmoe.inject(tiny_model(), {"top_k": 9}, {"temperature": -1.0, "l1_start": 0.1})
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("router", RouterKind)
def test_every_router_with_its_shipped_values_is_allowed(router):
    lmoe.inject(tiny_model(), moe={"router": router.value})
