"""What a strategy has no use for is refused by key and strategy; what acts on it is accepted."""

from typing import Any

import pytest

from lmoe.config.defaults import injection_section, moe_section
from lmoe.config.injection import InjectionConfig
from lmoe.config.keys import leaf_keys
from lmoe.config.moe import MoeConfig
from lmoe.config.phase import PhaseConfig
from lmoe.config.run import RunConfig
from lmoe.errors import ConfigError
from lmoe.rules.injection import injection_problems
from lmoe.rules.moe import moe_problems
from lmoe.rules.phases import SWITCHES, lora_B_std, phase_problems, present_roles
from lmoe.rules.routers import ROUTERS, mixture_scale
from lmoe.rules.strategies import STRATEGIES
from lmoe.rules.validate import validate
from lmoe.vocabulary import (
    Backend,
    BalanceScope,
    Decide,
    InitLora,
    InjectionStrategy,
    KnockOut,
    LoadBalanceType,
    Mixing,
    MixtureScale,
    PhaseMode,
    Role,
    RouterDtype,
    RouterKind,
    RouterScope,
    RouterTarget,
)
from tests.injection.pairs import adapts_native

DENSE, MIXTURE = InjectionStrategy.dense_lora, InjectionStrategy.mixture_lora
FFN, NATIVE = InjectionStrategy.moe_expert_lora, InjectionStrategy.native_moe_expert_lora
INJECTION: dict[str, Any] = {
    "num_experts": 8,
    "top_k": 1,
    "num_experts_by_layer": [2, 4],
    "shared_lora_r": 2,
    "shared_lora_A": True,
    "init_lora": InitLora.svd,
    "lora_B_std": 0.1,
    "share_base": False,
}
"""Another value than the default for every key that some strategy has no use for."""
ACTING = {DENSE: 0, MIXTURE: 7, FFN: 5, NATIVE: 1}
"""How many of these act."""
MOE: dict[str, Any] = {
    "router": RouterKind.soft,
    "router_scope": RouterScope.block,
    "router_layer": "1",
    "prompt_experts": True,
    "decide": Decide.turn,
    "router_target": RouterTarget.cluster,
    "router_target_coef": 0.5,
    "router_fit_prompts": 64,
    "router_dtype": RouterDtype.bfloat16,
    "router_bias": True,
    "temperature": 2.0,
    "temperature_end": 2.0,
    "router_noise": 0.5,
    "router_noise_end": 0.1,
    "anneal_steps": "50%",
    "top_p": 0.5,
    "scale": MixtureScale.unit,
    "norm_topk_prob": False,
    "mixing": Mixing.factors,
    "expert_dropout": 0.1,
    "router_z_loss_coef": 0.5,
    "diversity_coef": 0.1,
    "l1_start": 0.1,
    "l1_growth": 1.5,
    "domains": ["a", "b"],
    "backend": Backend.stacked,
    "load_balance.type": LoadBalanceType.importance_cv,
    "load_balance.aux_loss_coef": 0.5,
    "load_balance.scope": BalanceScope.global_batch,
    "load_balance.bias_update_rate": 0.1,
}
"""Another value than that of conf/moe/top_k.yaml for every key of moe."""
ON_NATIVE = {
    "router_z_loss_coef",
    "diversity_coef",
    "load_balance.type",
    "load_balance.aux_loss_coef",
    "load_balance.scope",
    "load_balance.bias_update_rate",
}


def injection(strategy: InjectionStrategy, **changes: Any) -> InjectionConfig:
    section = injection_section({"strategy": strategy.value})
    for key, value in changes.items():
        setattr(section, key, value)
    return section


def moe(key: str | None = None) -> MoeConfig:
    """The shipped section, with one key changed."""
    section = moe_section({})
    if key is not None:
        owner = section.load_balance if key.startswith("load_balance.") else section
        setattr(owner, key.rpartition(".")[2], MOE[key])
    return section


def run_of(strategy: InjectionStrategy, *phases: PhaseConfig, **changes: Any) -> RunConfig:
    """A valid run, in which all that the strategy has trains; or with these phases, called a, b, ..."""
    config = RunConfig()
    config.injection, config.moe = injection(strategy, **changes), moe()
    roles = [Role.lora, Role.attn_lora]
    if STRATEGIES[strategy].any_routers:
        roles = [Role.router, *roles]
    given = phases or (PhaseConfig(trainable=roles),)
    config.phase.phases = dict(zip("abcd", given, strict=False))
    return config


def problems(config: RunConfig) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(config)
    return caught.value.problems


def test_every_strategy_is_valid_as_it_ships():
    for strategy in InjectionStrategy:
        validate(run_of(strategy))


# --- injection


def test_the_tables_here_change_every_key_and_no_key_is_idle_that_does_not_exist():
    usual, shipped = InjectionConfig(), moe()
    assert {key for traits in STRATEGIES.values() for key in traits.idle} == set(INJECTION)
    assert all(getattr(usual, key) != value for key, value in INJECTION.items())
    keys = {key for key, _ in leaf_keys(MoeConfig)}
    assert set(MOE) == keys and len(keys) == 30
    for key, value in MOE.items():
        owner = shipped.load_balance if key.startswith("load_balance.") else shipped
        assert getattr(owner, key.rpartition(".")[2]) != value, key


@pytest.mark.parametrize("key", INJECTION)
@pytest.mark.parametrize("strategy", InjectionStrategy)
def test_a_key_of_injection_acts_or_is_refused_with_key_and_strategy(strategy, key):
    found = injection_problems(injection(strategy, **{key: INJECTION[key]}), moe())
    if key in STRATEGIES[strategy].idle:
        assert found == [f"injection.{key} has no effect with injection={strategy}; leave it out"]
    else:
        assert found == []


@pytest.mark.parametrize(("strategy", "acting"), ACTING.items())
def test_how_many_keys_of_injection_act(strategy, acting):
    assert len(set(INJECTION) - set(STRATEGIES[strategy].idle)) == acting


@pytest.mark.parametrize("strategy", InjectionStrategy)
def test_keys_that_every_strategy_uses_are_accepted(strategy):
    given = {
        "lora_r": 4,
        "lora_alpha": 8.0,
        "lora_dropout": 0.1,
        "use_rslora": True,
        "stride": 2,
        "start_layer": 1,
        "num_layers": 3,
        "target_keywords": ["down_proj"],
    }
    assert injection_problems(injection(strategy, **given), moe()) == []
    assert injection_problems(injection(strategy, lora_r_by_layer=[2, 4], layer_indices=[0, 1]), moe()) == []


def test_no_target_keywords_are_for_dense_lora_with_attention_alone():
    for strategy in InjectionStrategy:
        found = injection_problems(injection(strategy, target_keywords=[]), moe())
        assert bool(found) is not STRATEGIES[strategy].attention_alone
    alone = injection(DENSE, target_keywords=[], lora_r_by_layer=[2, 4])
    assert injection_problems(alone, moe()) == [
        "injection.lora_r_by_layer has no effect with injection.target_keywords=[]; leave it out"
    ]
    nothing = injection(DENSE, target_keywords=[])
    nothing.attn_lora.enabled = False
    (line,) = injection_problems(nothing, moe())
    assert line.startswith("injection.target_keywords=[] and injection.attn_lora.enabled=false leave nothing to adapt")


def test_how_experts_are_chosen_is_checked_only_where_the_strategy_makes_routers():
    """top_k beyond num_experts is told as such, or as what has no effect."""
    for strategy in InjectionStrategy:
        lines = injection_problems(injection(strategy, top_k=9), moe())
        wanted = (
            "more than the 4 experts of a site" if STRATEGIES[strategy].own_routers else "injection.top_k has no effect"
        )
        assert len(lines) == 1 and wanted in lines[0]


# --- moe


@pytest.mark.parametrize("key", MOE)
def test_dense_lora_has_no_use_for_any_key_of_moe(key):
    lines = moe_problems(moe(key), injection(DENSE))
    assert lines == [f"moe.{key} has no effect with injection=dense_lora; leave it out"]


@pytest.mark.parametrize("key", MOE)
def test_native_moe_expert_lora_uses_what_acts_on_routers_that_it_has_not_made(key):
    lines = moe_problems(moe(key), injection(NATIVE))
    if key not in ON_NATIVE:
        assert lines == [f"moe.{key} has no effect with injection=native_moe_expert_lora; leave it out"]
    else:  # a rate alone has nothing to set a pace for
        assert len(lines) == (key == "load_balance.bias_update_rate")
        assert all("with type=aux_loss;" in line for line in lines)


@pytest.mark.parametrize("strategy", InjectionStrategy)
def test_triton_acts_wherever_there_are_experts(strategy):
    section = moe()
    section.backend = Backend.triton
    lines = moe_problems(section, injection(strategy))
    if strategy is InjectionStrategy.dense_lora:
        assert lines == ["moe.backend has no effect with injection=dense_lora; leave it out"]
    else:
        assert lines == []


def test_whole_experts_need_no_fixed_number_of_experts_for_triton():
    soft = moe_section({"router": "soft", "backend": "triton"})
    assert moe_problems(soft, injection(FFN)) == []
    assert "fixed number" in moe_problems(soft, injection(MIXTURE))[0]


@pytest.mark.parametrize("key", ["router_scope", "mixing", "backend"])
def test_moe_expert_lora_has_no_use_for_how_linears_are_mixed(key):
    lines = moe_problems(moe(key), injection(FFN))
    assert lines == [f"moe.{key} has no effect with injection=moe_expert_lora; leave it out"]
    assert moe_problems(moe(key), injection(MIXTURE)) == []


@pytest.mark.parametrize(
    "router", [k for k, router in ROUTERS.items() if router.usual_scale is MixtureScale.sum_to_one]
)
def test_moe_expert_lora_takes_every_router_as_it_ships_whose_weights_sum_to_1(router):
    given = moe_section({"router": router.value})
    assert injection_problems(injection(FFN), given) + moe_problems(given, injection(FFN)) == []


SOFT_UNIT = {"router": "soft", "scale": "unit"}


@pytest.mark.parametrize(
    "given",
    [{"router": "relu"}, {"scale": "unit"}, {"scale": "raw"}, {"norm_topk_prob": False}, SOFT_UNIT],
    ids=str,
)
def test_weights_that_would_scale_the_frozen_ffn_are_refused_for_moe_expert_lora_alone(given):
    section = moe_section(given)
    (line,) = [line for line in injection_problems(injection(FFN), section) if "sum to 1" in line]
    assert "they would scale the frozen FFN" in line
    assert injection_problems(injection(MIXTURE), section) == []


def test_one_expert_of_full_weight_is_the_default_of_moe_expert_lora_with_top_k_1():
    one = injection(FFN)
    one.top_k = 1
    assert mixture_scale(moe_section({}), one) is MixtureScale.unit
    assert injection_problems(one, moe_section({})) == []


def test_a_selection_bias_needs_routers_of_ours():
    given = moe()
    given.load_balance.type, given.load_balance.bias_update_rate = LoadBalanceType.aux_loss_free, 0.01
    (line,) = moe_problems(given, injection(NATIVE))
    assert "aux_loss_free cannot act with injection=native_moe_expert_lora" in line
    assert "allowed: aux_loss, importance_cv, none" in line
    assert moe_problems(given, injection(FFN)) == []


def test_all_idle_keys_are_told_at_once():
    given = moe("temperature")
    given.top_p = 0.5
    config = run_of(DENSE, num_experts=8, share_base=False)
    config.moe = given
    said = ("injection.num_experts", "injection.share_base", "moe.temperature", "moe.top_p")
    assert sorted(line.split(" ")[0] for line in problems(config)) == sorted(said)


# --- sections of the run


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("trainer", "stop_on_collapse", True),
        ("analysis", "knock_out", KnockOut.experts),
        ("analysis", "permutations", 50),
    ],
)
def test_what_looks_at_routers_has_no_effect_without_any(section, key, value):
    for strategy in InjectionStrategy:
        config = run_of(strategy)
        setattr(getattr(config, section), key, value)
        if not STRATEGIES[strategy].any_routers:
            why = f"with injection={strategy}, which has no routers"
            assert problems(config) == [f"{section}.{key} has no effect {why}; leave it out"]
        else:
            validate(config)


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_phase_of_dense_lora_has_nothing_to_switch_on_and_may_switch_it_off(switch):
    config = run_of(DENSE, PhaseConfig(trainable=[Role.lora], **{switch: True}))
    why = "with injection=dense_lora, which has no routers"
    assert problems(config) == [f"phase.phases.a.{switch}=true has no effect {why}; leave it out"]
    validate(run_of(DENSE, PhaseConfig(trainable=[Role.lora], **{switch: False})))


# --- roles


@pytest.mark.parametrize(
    ("strategy", "changes", "missing"),
    [
        (DENSE, {}, {Role.router}),
        (DENSE, {"target_keywords": []}, {Role.router, Role.lora}),
        (MIXTURE, {}, set()),
        (FFN, {}, set()),
        (FFN, {"share_base": False}, set()),
        (NATIVE, {}, set()),
    ],
)
def test_the_roles_that_have_parameters(strategy, changes, missing):
    everything = {Role.router, Role.lora, Role.attn_lora, Role.base_ffn, Role.head}
    section = injection(strategy, **changes)
    assert set(present_roles(section, moe())) == everything - missing
    section.attn_lora.enabled = False
    assert set(present_roles(section, moe())) == everything - missing - {Role.attn_lora}


@pytest.mark.parametrize("strategy", InjectionStrategy)
def test_routers_without_parameters_are_missing_only_where_the_strategy_makes_them(strategy):
    """Those of a native mixture train whatever moe.router says."""
    uniform = moe_section({"router": "uniform"})
    assert (Role.router in present_roles(injection(strategy), uniform)) is adapts_native(strategy)


@pytest.mark.parametrize("strategy", InjectionStrategy)
def test_base_ffn_trains_with_every_strategy_but_where_all_experts_share_it(strategy):
    phase = PhaseConfig(trainable=[Role.lora, Role.base_ffn])
    config = run_of(strategy, phase)
    if not STRATEGIES[strategy].whole_ffn:
        validate(config)
        return
    assert problems(config) == [
        "phase.phases.a.trainable: base_ffn cannot train with injection.share_base=true, where all experts share one "
        "FFN; set injection.share_base=false"
    ]
    validate(run_of(FFN, phase, share_base=False))


def test_base_ffn_on_a_shared_base_is_refused_in_a_phase_that_adds_it_too():
    first = PhaseConfig(trainable=[Role.lora])
    second = PhaseConfig(start="50%", trainable=[Role.base_ffn], mode=PhaseMode.add)
    (line,) = problems(run_of(FFN, first, second))
    assert line.startswith("phase.phases.b.trainable: base_ffn cannot train with injection.share_base=true")
    validate(run_of(FFN, first, second, share_base=False))


def test_a_phase_of_routers_alone_trains_nothing_without_routers_and_says_why():
    (line,) = phase_problems(run_of(DENSE, PhaseConfig(trainable=[Role.router])))
    assert line == "phase.phases.a trains nothing: injection=dense_lora has no routers; use phase=joint"
    attention_alone = run_of(DENSE, PhaseConfig(trainable=[Role.lora]), target_keywords=[])
    (line,) = phase_problems(attention_alone)
    assert line == "phase.phases.a trains nothing: injection.target_keywords=[] leaves lora without parameters"


@pytest.mark.parametrize(("strategy", "expected"), [(DENSE, None), (MIXTURE, 0.01), (FFN, 0.01), (NATIVE, 0.0)])
def test_lora_B_starts_away_from_zero_where_routers_of_ours_train_before_experts(strategy, expected):
    """Native routers choose between experts that differ already."""
    phases = PhaseConfig(trainable=[Role.router, Role.attn_lora]), PhaseConfig(start="50%", trainable=[Role.lora])
    assert lora_B_std(run_of(strategy, *phases)) == expected
