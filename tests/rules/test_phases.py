"""Starts of phases, what is merely reported, and the default size of lora_B."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmoe.config.optim import RoleOptimConfig
from lmoe.config.phase import HandoffConfig, PhaseConfig, start_step
from lmoe.config.run import RunConfig
from lmoe.rules.phases import lora_B_std, ordered_phases, phase_problems, phase_warnings, trained_base
from lmoe.training.phases import PhaseSchedule
from lmoe.vocabulary import InjectionStrategy, PhaseMode, Role, RouterKind


def with_phases(**phases: PhaseConfig) -> RunConfig:
    config = RunConfig()
    config.phase.phases = phases
    return config


@pytest.mark.parametrize(
    ("start", "steps", "first"),
    [
        ("0", 150, 0),
        ("500", 150, 500),
        (" 7 ", 150, 7),
        ("20%", 150, 30),
        ("20%", 151, 31),  # 30.2 is rounded up
        ("10%", 3, 1),
        ("0.1%", 10, 1),
        ("0.0000000001%", 10, 1),  # a later phase leaves at least one step to the one before
        ("0%", 10, 0),
        ("100%", 10, 10),
        ("7%", 100, 7),  # 0.07 * 100 is 7.000000000000001, and yet not 8
    ],
)
def test_a_start_is_a_step_or_a_share_rounded_up(start, steps, first):
    assert start_step(start, steps) == first


@settings(deadline=None)  # a slow machine is no failure
@given(st.integers(1, 10_000), st.integers(1, 100))
def test_whole_percentages_round_up_exactly(steps, percent):
    assert start_step(f"{percent}%", steps) == max(math.ceil(percent * steps / 100 - 1e-9), 1)


@pytest.mark.parametrize("start", ["", "soon", "-1", "-5%", "101%", "nan%", "inf%", "0.2", "1e2", "%", "10 percent"])
def test_a_start_that_is_neither_says_what_is_allowed(start):
    with pytest.raises(ValueError, match=r"500.*20%"):
        start_step(start, 100)


def test_phases_are_ordered_by_their_start():
    config = with_phases(
        late=PhaseConfig(start="50%", trainable=[Role.lora]), first=PhaseConfig(start="0", trainable=[Role.router])
    )
    assert [(name, start) for name, start, _ in ordered_phases(config)] == [("first", 0), ("late", 75)]


def test_a_role_in_no_phase_is_a_warning():
    config = with_phases(only=PhaseConfig(trainable=[Role.lora, Role.attn_lora]))
    (warning,) = phase_warnings(config)
    assert "router" in warning
    assert "no phase" in warning


def test_a_role_without_parameters_beside_others_is_a_warning():
    config = with_phases(only=PhaseConfig(trainable=[Role.router, Role.lora, Role.attn_lora]))
    assert phase_warnings(config) == []
    config.injection.attn_lora.enabled = False
    (warning,) = phase_warnings(config)
    assert "phase.phases.only" in warning
    assert "attn_lora" in warning


ROUTER_FIRST = {
    "router_warmup": PhaseConfig(start="0", trainable=[Role.router]),
    "experts": PhaseConfig(start="20%", trainable=[Role.lora]),
}


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        (ROUTER_FIRST, 0.01),
        ({"a": PhaseConfig(trainable=[Role.router, Role.attn_lora]), "b": ROUTER_FIRST["experts"]}, 0.01),
        ({"joint": PhaseConfig(trainable=[Role.router, Role.lora])}, 0.0),
        ({"experts": PhaseConfig(trainable=[Role.lora])}, 0.0),
    ],
)
def test_lora_B_starts_away_from_zero_only_where_routers_train_first(phases, expected):
    assert lora_B_std(with_phases(**phases)) == expected


@pytest.mark.parametrize("chosen", [0.0, 0.3])
def test_a_chosen_lora_B_std_is_kept(chosen):
    config = with_phases(**ROUTER_FIRST)
    config.injection.lora_B_std = chosen
    assert lora_B_std(config) == chosen


def test_lora_B_starts_random_wherever_routers_train_alone_before_experts():
    attention = PhaseConfig(start="0", trainable=[Role.attn_lora])
    router = PhaseConfig(start="5", trainable=[Role.router])
    experts = PhaseConfig(start="9", trainable=[Role.lora])
    assert lora_B_std(with_phases(a=attention, b=router, c=experts)) == 0.01
    both = PhaseConfig(start="5", trainable=[Role.router, Role.lora])
    assert lora_B_std(with_phases(a=attention, b=both)) == 0.0


# --- mode


def trainable(**phases: PhaseConfig) -> dict[str, list[Role]]:
    """Resolved roles by phase, in order."""
    return {name: phase.trainable for name, _, phase in ordered_phases(with_phases(**phases))}


ADD = PhaseMode.add


def test_a_phase_that_adds_trains_what_the_phase_before_trained_too():
    """The one before by its start, and not by its place in the config."""
    assert trainable(
        last=PhaseConfig(start="50%", trainable=[Role.attn_lora], mode=ADD),
        first=PhaseConfig(start="0", trainable=[Role.router]),
        second=PhaseConfig(start="10%", trainable=[Role.lora], mode=ADD),
    ) == {
        "first": [Role.router],
        "second": [Role.router, Role.lora],
        "last": [Role.router, Role.lora, Role.attn_lora],
    }


def test_a_phase_that_replaces_forgets_what_was_added_before():
    assert trainable(
        a=PhaseConfig(start="0", trainable=[Role.router]),
        b=PhaseConfig(start="1", trainable=[Role.lora], mode=ADD),
        c=PhaseConfig(start="2", trainable=[Role.attn_lora]),
        d=PhaseConfig(start="3", trainable=[Role.head], mode=ADD),
    ) == {
        "a": [Role.router],
        "b": [Role.router, Role.lora],
        "c": [Role.attn_lora],
        "d": [Role.attn_lora, Role.head],
    }


def test_adding_what_trains_already_or_nothing_names_each_role_once():
    phases = {"a": PhaseConfig(start="0", trainable=[Role.router, Role.lora])}
    for added in ([], [Role.lora], [Role.lora, Role.router]):
        found = trainable(**phases, b=PhaseConfig(start="1", trainable=added, mode=ADD))
        assert found["b"] == [Role.router, Role.lora]


def test_resolving_leaves_the_config_as_it_was_and_says_replace():
    config = with_phases(
        a=PhaseConfig(start="0", trainable=[Role.router]), b=PhaseConfig(start="1", trainable=[Role.lora], mode=ADD)
    )
    assert ordered_phases(config) == ordered_phases(config)
    assert [phase.mode for _, _, phase in ordered_phases(config)] == [PhaseMode.replace] * 2
    assert config.phase.phases["b"] == PhaseConfig(start="1", trainable=[Role.lora], mode=ADD)


def test_the_schedule_of_a_run_trains_the_resolved_roles_and_warms_lora_B_up_for_them():
    config = with_phases(
        a=PhaseConfig(start="0", trainable=[Role.router]), b=PhaseConfig(start="1", trainable=[Role.lora], mode=ADD)
    )
    first, second = PhaseSchedule.of(config).phases
    assert (first.trainable, second.trainable) == ({Role.router}, {Role.router, Role.lora})
    assert second.load_balance and second.router_noise  # because routers still train
    assert lora_B_std(config) == 0.01
    assert phase_warnings(config) == [
        "role attn_lora trains in no phase: it stays at its random start; add it to a phase.phases.<name>.trainable"
    ]


def test_coefficients_act_in_a_phase_that_adds_to_one_with_routers():
    config = with_phases(
        first=PhaseConfig(start="0", trainable=[Role.router]),
        second=PhaseConfig(start="50%", trainable=[Role.lora], mode=PhaseMode.add, router_z_loss_coef=0.5),
    )
    config.moe.router = RouterKind.top_k
    assert phase_problems(config) == []
    config.phase.phases["second"].mode = PhaseMode.replace
    assert "router_z_loss_coef has no effect in a phase that trains no routers" in phase_problems(config)[0]


def test_a_learning_rate_that_no_role_of_the_phase_takes_is_a_problem():
    config = with_phases(
        first=PhaseConfig(start="0", trainable=[Role.router]),
        second=PhaseConfig(start="50%", trainable=[Role.lora, Role.attn_lora], lr=0.5),
    )
    config.optim.roles["lora"] = RoleOptimConfig(lr=0.1)
    assert phase_problems(config) == []
    config.optim.roles["attn_lora"] = RoleOptimConfig(lr=0.1)
    assert "phase.phases.second.lr has no effect" in phase_problems(config)[0]


def handing_over(*handoffs: HandoffConfig) -> list[str]:
    """Problems of phases of 50 steps, each with a handoff."""
    roles, starts = [Role.lora, Role.base_ffn], ["0", "50", "100"]
    phases = {
        f"p{number}": PhaseConfig(start=starts[number], trainable=roles, lora_handoff=handoff)
        for number, handoff in enumerate(handoffs)
    }
    config = with_phases(**phases)
    config.injection.strategy = InjectionStrategy.moe_expert_lora
    config.injection.share_base = False
    return [problem for problem in phase_problems(config) if "lora_handoff" in problem]


def test_a_handoff_that_the_phase_is_too_short_for_is_a_problem():
    last = HandoffConfig()
    assert handing_over(HandoffConfig(role=Role.lora, steps="50"), last) == []
    assert "steps is 51, beyond the 50 steps" in handing_over(HandoffConfig(role=Role.lora, steps="51"), last)[0]


@pytest.mark.parametrize(
    ("first", "second", "wrong"), [(None, None, True), ([0], None, True), ([0, 1], [1], True), ([0], [1], False)]
)
def test_what_has_faded_cannot_fade_again(first, second, wrong):
    found = handing_over(
        HandoffConfig(role=Role.lora, experts=first, end_scale=0.5), HandoffConfig(role=Role.lora, experts=second)
    )
    assert bool(found) is wrong
    if wrong:
        assert "phase.phases.p1.lora_handoff fades lora, which phase.phases.p0" in found[0]


def test_adding_in_the_first_phase_has_no_effect():
    """Whichever place it has in the config."""
    config = with_phases(
        b=PhaseConfig(start="1", trainable=[Role.lora]), a=PhaseConfig(start="0", trainable=[Role.router], mode=ADD)
    )
    assert phase_problems(config) == ["phase.phases.a.mode=add has no effect in the first phase; leave it out"]


def test_parts_of_the_backbone_that_some_phase_trains_are_found_whatever_its_mode():
    config = with_phases(a=PhaseConfig(trainable=[Role.lora]))
    assert trained_base(config) == frozenset()
    config.phase.phases["b"] = PhaseConfig(start="1", trainable=[Role.base_ffn], mode=ADD)
    config.phase.phases["c"] = PhaseConfig(start="2", trainable=[Role.head, Role.lora])
    assert trained_base(config) == {Role.base_ffn, Role.head}
