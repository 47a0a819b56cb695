"""Settings of the router of the whole model, and of what routers are taught: what cannot act is refused by name."""

import re
from dataclasses import replace

import pytest

from lmoe.config.defaults import injection_section, moe_section
from lmoe.config.phase import PhaseConfig
from lmoe.config.run import RunConfig
from lmoe.errors import ConfigError
from lmoe.rules.phases import phase_warnings, reading_steps
from lmoe.rules.validate import run_problems, validate
from lmoe.training.phases import PhaseSchedule
from lmoe.vocabulary import Role, RouteBy

ALL = [Role.router, Role.lora, Role.attn_lora]
OF_MODEL = {"router": "sequence", "router_scope": "model"}
CLUSTER, DOMAIN, AUTO = ({"router_target": target} for target in ("cluster", "domain", "auto"))
BASELINE = {"router_z_loss_coef": 0.0, "load_balance": {"type": "none", "aux_loss_coef": None}}


def config(moe: dict, injection: dict | None = None, data: dict | None = None, **phases: PhaseConfig) -> RunConfig:
    """A run with one phase that trains everything, unless others are named."""
    made = RunConfig(moe=moe_section(moe), injection=injection_section(injection or {}))
    made.phase.phases = phases or {"joint": PhaseConfig(trainable=ALL)}
    made.data = replace(made.data, **(data or {}))
    return made


def phase(*roles: Role, start: str = "0", **settings) -> PhaseConfig:
    return PhaseConfig(start=start, trainable=list(roles), **settings)


VALID = [
    (OF_MODEL | {"router_layer": "25%", "prompt_experts": True, "decide": "turn"}, {}),
    (OF_MODEL, {"strategy": "moe_expert_lora"}),
    (AUTO, {}),
    (DOMAIN | {"domains": ["a", "b"]}, {}),
    (CLUSTER | {"router_target_coef": 0.0}, {}),
    (OF_MODEL | CLUSTER | {"router_fit_prompts": 64}, {}),
    ({"router": "relu"} | CLUSTER, {}),
]


@pytest.mark.parametrize(("moe", "injection"), VALID)
def test_what_can_act_is_valid(moe, injection):
    validate(config(moe, injection))


MOE = [
    ({"router_layer": "3"}, {}, "router_layer has no effect .*=linear; use moe=sequence moe.router_scope=model; leave"),
    ({"prompt_experts": True, "router_scope": "block"}, {}, "moe.prompt_experts has no effect .*router_scope=block"),
    ({"router": "sequence", "decide": "turn"}, {}, "moe.decide has no effect .*=linear; use moe.router_scope=model; "),
    ({"router_scope": "model"}, {}, "is for moe=sequence.*with moe.router=top_k use router_scope=linear or block"),
    (
        {"router": "prompt_hash", "router_scope": "model"} | BASELINE,
        {},
        "use .*=linear, or moe=prompt_hash",
    ),
    (OF_MODEL, {"num_experts_by_layer": [2, 4]}, "num_experts_by_layer cannot give them different numbers of experts"),
    ({"router_scope": "model"}, {"strategy": "dense_lora"}, "moe.router_scope has no effect with injection=dense_lora"),
    (
        {"router_scope": "model"},
        {"strategy": "native_moe_expert_lora"},
        "moe.router_scope has no effect with injection=native_moe_expert_lora",
    ),
    (DOMAIN, {"strategy": "native_moe_expert_lora"}, "moe.router_target has no effect with injection=native_moe"),
    ({"router_target_coef": 0.5}, {}, "coef has no effect with moe.router_target=none; set moe.router_target; leave"),
    ({"router_target_coef": 2.0, "router": "random"} | BASELINE, {}, "coef has no effect .*=random, which learns noth"),
    ({"scale": "sum_to_one"}, {"top_k": 1}, "top_k=1 and moe.router_target=none makes every weight 1"),
    (CLUSTER | {"router_target_coef": -0.5}, {}, "moe.router_target_coef is -0.5, must be at least 0"),
    (CLUSTER | {"router_fit_prompts": 64}, {}, "moe.router_fit_prompts has no effect with moe.router_scope=linear"),
    (
        OF_MODEL | {"router_fit_prompts": 64},
        {},
        "moe.router_fit_prompts has no effect with moe.router_target=none; set moe.router_target or, where "
        "moe=supervised has set it, take moe=sequence; leave it out",
    ),
    (
        OF_MODEL | CLUSTER | {"router_fit_prompts": -1},
        {},
        "moe.router_fit_prompts is -1, must be 0, or at least the 4 ",
    ),
    (OF_MODEL | CLUSTER | {"router_fit_prompts": 3}, {}, "moe.router_fit_prompts is 3, must be 0, or at least the 4 "),
    (CLUSTER | {"router": "random"} | BASELINE, {}, "moe.router_target has no effect with moe.router=random.*learns"),
    (CLUSTER | {"router": "oracle"} | BASELINE, {}, "moe.router_target has no effect with moe.router=oracle"),
    (DOMAIN | {"domains": list("abcde")}, {}, "has 5 names, and a site has 4 experts; set .*num_experts=5 or more"),
    (DOMAIN | {"domains": list("abc")}, {"num_experts_by_layer": [2, 8]}, "has 3 names, and a site has 2 experts"),
    (DOMAIN | {"domains": ["a", "a"]}, {}, "moe.domains is .*must be null or a list of different names"),
    (CLUSTER | {"domains": ["a", "b"]}, {}, "moe.domains has no effect with moe.router_target=cluster"),
    ({"domains": ["a", "b"]}, {}, "moe.domains has no effect with moe.router=top_k"),
]


@pytest.mark.parametrize(("moe", "injection", "said"), MOE)
def test_a_setting_of_the_routers_that_cannot_act_is_named(moe, injection, said):
    with pytest.raises(ConfigError) as caught:
        validate(config(moe, injection))
    (problem,) = caught.value.problems
    assert re.search(said, problem), problem


DATA = [
    ({}, {"clusters": 3}, "data.clusters has no effect with moe.router_target=none; use router_target=cluster or auto"),
    (DOMAIN, {"clusters": 3}, "data.clusters has no effect with moe.router_target=domain"),
    (CLUSTER, {"clusters": 1}, "data.clusters is 1, must be at least 2"),
]


@pytest.mark.parametrize(("moe", "data", "said"), DATA)
def test_a_setting_of_the_clusters_that_cannot_act_is_named(moe, data, said):
    with pytest.raises(ConfigError) as caught:
        validate(config(moe, data=data))
    assert [problem for problem in caught.value.problems if said in problem], caught.value.problems


BY_TARGET = {"route_by": RouteBy.target}
PHASES = [
    ({}, {"only": phase(*ALL, **BY_TARGET)}, "only.route_by=target has no effect with moe.router_target=none"),
    ({}, {"only": phase(*ALL, router_target_coef=1.0)}, "router_target_coef has no effect with moe.router_target=none"),
    (
        OF_MODEL | CLUSTER | {"router_fit_prompts": 64},
        {"only": phase(Role.lora, **BY_TARGET)},
        "moe.router_fit_prompts has no effect where no phase trains routers; add router to a trainable",
    ),
    (CLUSTER, {"only": phase(*ALL, router_target_coef=-1.0)}, "router_target_coef is -1.0, must be at least 0"),
    (
        CLUSTER,
        {"a": phase(*ALL), "b": phase(Role.lora, start="50%", router_target_coef=0.5)},
        "phase.phases.b.router_target_coef has no effect in a phase that trains no routers; add router to trainable",
    ),
    (
        CLUSTER | {"router": "relu"},
        {"only": phase(*ALL, **BY_TARGET)},
        "only.route_by=target cannot act on moe.router=relu, whose logits are weights that may be 0",
    ),
    (
        CLUSTER,
        {"only": phase(Role.lora, Role.attn_lora)},
        "moe.router_target=cluster has no effect where no phase trains routers and none has route_by=target; add",
    ),
    (
        CLUSTER | {"router_target_coef": 0.5},
        {"only": phase(*ALL, router_target_coef=0.2)},
        "moe.router_target_coef has no effect where each phase that trains routers sets its own",
    ),
    (
        CLUSTER | {"router_target_coef": 0.5},
        {"only": phase(Role.lora, **BY_TARGET)},
        "moe.router_target_coef has no effect where no phase trains routers; add router to a trainable",
    ),
    (
        CLUSTER | {"expert_dropout": 0.3},
        {"a": phase(*ALL, **BY_TARGET), "b": phase(*ALL, start="50%", **BY_TARGET)},
        "moe.expert_dropout has no effect where every phase has route_by=target, where no expert is dropped",
    ),
    (
        CLUSTER | {"expert_dropout": 0.3},
        {"a": phase(*ALL, expert_dropout=True, **BY_TARGET), "b": phase(*ALL, start="50%")},
        "phase.phases.a.expert_dropout=true has no effect with phase.phases.a.route_by=target",
    ),
    (
        OF_MODEL | CLUSTER,
        {"only": phase(*ALL, router_every_n_steps=4)},
        "phase.phases.only.router_every_n_steps has no effect with route_by=router, by whose decision experts train",
    ),
    (
        CLUSTER,
        {"only": phase(*ALL, router_every_n_steps=4, **BY_TARGET)},
        "router_every_n_steps has no effect with moe.router=top_k and moe.router_scope=linear, which read no prompts",
    ),
    (
        OF_MODEL | CLUSTER,
        {"a": phase(Role.lora, router_every_n_steps=4, **BY_TARGET), "b": phase(*ALL, start="50%")},
        "phase.phases.a.router_every_n_steps has no effect in a phase that trains no routers",
    ),
    (OF_MODEL | CLUSTER, {"only": phase(*ALL, router_every_n_steps=0, **BY_TARGET)}, "is 0, must be at least 1"),
]


@pytest.mark.parametrize(("moe", "phases", "said"), PHASES)
def test_a_setting_of_a_phase_that_cannot_act_is_named(moe, phases, said):
    with pytest.raises(ConfigError) as caught:
        validate(config(moe, **phases))
    (problem,) = caught.value.problems
    assert said in problem, problem


def test_all_that_routers_would_be_taught_with_is_named_at_once_where_none_trains():
    made = config(
        OF_MODEL | CLUSTER | {"router_fit_prompts": 64, "router_target_coef": 0.5}, only=phase(Role.lora, **BY_TARGET)
    )
    with pytest.raises(ConfigError) as caught:
        validate(made)
    keys = [problem.split(" has no effect where no phase trains routers; add")[0] for problem in caught.value.problems]
    assert keys == ["moe.router_fit_prompts", "moe.router_target_coef"]


def test_neither_dropout_of_experts_nor_an_end_at_a_collapse_is_refused_where_some_phase_goes_by_the_router():
    for routed in (True, False):
        later = {"b": phase(*ALL, start="50%")} if routed else {}
        made = config(CLUSTER | {"expert_dropout": 0.3}, a=phase(*ALL, **BY_TARGET), **later)
        made.trainer.stop_on_collapse = True
        problems = run_problems(made)
        keys = [problem.split(" has no effect where every phase has route_by=target")[0] for problem in problems]
        assert keys == ([] if routed else ["moe.expert_dropout", "trainer.stop_on_collapse"])


FREE = {"load_balance": {"type": "aux_loss_free", "bias_update_rate": 0.01}}
STRONG = {"load_balance": {"aux_loss_coef": 0.5}}
IMPORTANCE = {"load_balance": {"type": "importance_cv", "aux_loss_coef": 0.1}}
SEVERAL = {"num_experts_by_layer": [4, 6]}
"""Some targets have two experts at some sites."""
BALANCES = [
    (CLUSTER | FREE, {}, {}, "moe.load_balance.type=aux_loss_free"),
    (CLUSTER | FREE, SEVERAL, {}, "moe.load_balance.type=aux_loss_free"),
    (AUTO | FREE, {}, {}, "moe.load_balance.type=aux_loss_free"),
    (CLUSTER | STRONG, {}, {}, "moe.load_balance.type=aux_loss"),
    (CLUSTER | STRONG, {"num_experts": 6}, {"clusters": 6}, "moe.load_balance.type=aux_loss"),
    (DOMAIN | STRONG | {"domains": list("abcd")}, {}, {}, "moe.load_balance.type=aux_loss"),
    (CLUSTER | IMPORTANCE, {}, {}, "moe.load_balance.type=importance_cv"),
    (CLUSTER | STRONG, SEVERAL, {}, None),
    (CLUSTER | STRONG, {}, {"clusters": 2}, None),
    (AUTO | STRONG, {}, {}, None),  # the rows will say how many targets there are
    (
        {"router": "sigmoid", "scale": "raw", "load_balance": IMPORTANCE["load_balance"] | {"bias_update_rate": None}}
        | CLUSTER,
        {},
        {},
        None,
    ),
    (CLUSTER, {}, {}, None),  # what conf/moe/top_k.yaml and conf/moe/sigmoid.yaml have, nobody has asked for
    (CLUSTER | {"router": "sigmoid"}, {}, {}, None),
    (CLUSTER | {"load_balance": {"type": "none"}}, {}, {}, None),
]


@pytest.mark.parametrize(("moe", "injection", "data", "named"), BALANCES)
def test_a_balance_that_rows_leave_nothing_to_is_refused_in_new_runs(moe, injection, data, named):
    made = config(moe, injection, data, a=phase(*ALL, **BY_TARGET))
    why = " has no effect where every phase has route_by=target, and the rows say how much each expert gets; leave"
    assert [problem.split(why)[0] for problem in run_problems(made)] == ([] if named is None else [named])
    later = config(moe, injection, data, a=phase(*ALL, **BY_TARGET), b=phase(*ALL, start="80%"))
    assert run_problems(later) == []


def test_a_phase_by_target_can_neither_balance_nor_weigh_it():
    made = config(CLUSTER, a=phase(*ALL, load_balance=True, aux_loss_coef=0.5, **BY_TARGET), b=phase(*ALL, start="9%"))
    assert [
        problem.split(" has no effect with phase.phases.a.route_by=target")[0] for problem in run_problems(made)
    ] == [
        "phase.phases.a.load_balance=true",
        "phase.phases.a.aux_loss_coef",
    ]


def test_a_run_goes_on_whose_settings_were_taken_when_it_began(tmp_path):
    for moe in (CLUSTER | FREE, CLUSTER | STRONG, CLUSTER | {"expert_dropout": 0.3}):
        made = config(moe, a=phase(*ALL, load_balance=True, **BY_TARGET))
        made.resume = str(tmp_path)
        assert not [problem for problem in run_problems(made) if "has no effect" in problem]


def test_routers_that_came_with_a_bias_keep_it(tmp_path):
    made = config(CLUSTER | FREE, {"experts_from": str(tmp_path)}, a=phase(*ALL, **BY_TARGET))
    assert not [problem for problem in run_problems(made) if "aux_loss_free" in problem]


FEW = [
    (AUTO, {"num_experts": 1}, {}, "router_target=auto needs two experts at least, and a site has 1; raise"),
    (DOMAIN, {"num_experts": 1}, {}, "router_target=domain needs two experts at least, and a site has 1; raise"),
    (CLUSTER, {"num_experts": 1}, {}, "router_target=cluster needs two experts at least, and a site has 1; raise"),
    (AUTO, {}, {"clusters": 5}, "data.clusters=5 needs an expert for each cluster, and a site has 4; set"),
    (CLUSTER, {"num_experts_by_layer": [2, 8]}, {"clusters": 3}, "data.clusters=3 needs .*, and a site has 2; set"),
]


@pytest.mark.parametrize(("moe", "injection", "data", "said"), FEW)
def test_fewer_experts_than_any_rows_have_targets_are_refused_before_rows_are_read(moe, injection, data, said):
    (problem,) = run_problems(config(moe, {"top_k": 1} | injection, data))
    assert re.search(said, problem), problem


def test_one_expert_may_go_on_from_a_run_whose_experts_are_for_other_rows(tmp_path):
    """Its targets are decided once the rows are known, and may be none."""
    given = {"num_experts": 1, "top_k": 1, "experts_from": str(tmp_path)}
    assert not [problem for problem in run_problems(config(AUTO, given)) if "needs two experts" in problem]
    assert [problem for problem in run_problems(config(CLUSTER, given)) if "needs two experts" in problem]


def test_experts_that_train_on_targets_which_no_router_learns_are_warned_of():
    words = "phase.phases.a.route_by=target trains experts on targets that no router learns to choose"
    lists = {
        True: [
            {"a": phase(Role.lora, **BY_TARGET)},
            {"a": phase(*ALL, router_target_coef=0.0, **BY_TARGET)},
        ],
        False: [
            {"a": phase(*ALL, **BY_TARGET)},
            {"a": phase(Role.lora, **BY_TARGET), "b": phase(Role.router, start="50%")},
            {"a": phase(Role.lora, **BY_TARGET), "b": phase(Role.router, start="50%", router_target_coef=0.1)},
        ],
    }
    for warned, several in lists.items():
        for phases in several:
            made = config(CLUSTER, **phases)
            validate(made)
            assert any(words in warning for warning in phase_warnings(made)) == warned


def test_the_coefficient_of_a_phase_is_its_own_or_the_general_one_where_routers_train():
    """Roles count that a phase adds to those before it."""
    made = config(
        CLUSTER | {"router_target_coef": 0.5},
        a=phase(Role.lora, **BY_TARGET),
        b=phase(Role.router, start="20%", mode="add"),
        c=phase(*ALL, start="40%", router_target_coef=0.0, **BY_TARGET),
        d=phase(*ALL, start="60%", router_target_coef=2.0),
    )
    phases = PhaseSchedule.of(made).phases
    assert [one.router_target_coef for one in phases] == [0.0, 0.5, 0.0, 2.0]
    assert [one.by_target for one in phases] == [True, False, True, False]
    without = config({}, a=phase(*ALL))
    assert [one.router_target_coef for one in PhaseSchedule.of(without).phases] == [0.0]


def test_the_share_of_steps_that_read_prompts_follows_the_phases():
    rests = phase(*ALL, router_every_n_steps=4, **BY_TARGET)
    made = config(OF_MODEL | CLUSTER, a=rests, b=phase(*ALL, start="80%"))
    validate(made)
    assert reading_steps(made) == pytest.approx(0.8 / 4 + 0.2)
    assert reading_steps(config(OF_MODEL | CLUSTER, a=rests)) == 1 / 4
    assert reading_steps(config(OF_MODEL)) == 1
