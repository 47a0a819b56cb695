"""The phase of a step is a pure function, and every step has exactly one phase."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmoe.config.phase import PhaseConfig
from lmoe.config.run import RunConfig
from lmoe.training.phases import PhaseSchedule
from lmoe.vocabulary import Role

ROLES = [Role.router, Role.lora, Role.attn_lora]


@st.composite
def configs(draw) -> RunConfig:
    steps = draw(st.integers(3, 400))
    starts = [0, *sorted(draw(st.sets(st.integers(1, steps - 1), max_size=3)))]
    config = RunConfig()
    config.trainer.max_steps = steps
    config.optim.warmup_steps = draw(st.integers(0, 500))
    config.phase.phases = {
        f"p{i}": PhaseConfig(start=str(start), trainable=draw(st.lists(st.sampled_from(ROLES), min_size=1, max_size=3)))
        for i, start in enumerate(starts)
    }
    return config


@settings(deadline=None, max_examples=50)  # a slow machine is no failure
@given(configs())
def test_every_step_has_exactly_one_phase_and_phases_come_in_order(config):
    schedule, steps = PhaseSchedule.of(config), config.trainer.max_steps
    at = [schedule.phase_at(step) for step in range(steps)]
    assert at == sorted(at)
    assert set(at) == set(range(len(config.phase.phases)))
    for step, index in enumerate(at):
        assert schedule[index].start <= step < schedule[index].end
    assert at == [schedule.phase_at(step) for step in range(steps)]  # asked again, the same answer
    assert sum(phase.steps for phase in schedule.phases) == steps
    assert schedule.phase_at(steps) == len(config.phase.phases) - 1
    assert list(schedule.starts().values()) == [phase.start for phase in schedule.phases]


@settings(deadline=None, max_examples=50)  # a slow machine is no failure
@given(configs())
def test_warm_up_is_clipped_to_the_phase(config):
    for phase in PhaseSchedule.of(config).phases:
        assert phase.warmup_steps == min(config.optim.warmup_steps, phase.steps)


def test_a_phase_takes_the_optimizer_settings_unless_it_has_its_own():
    config = RunConfig()
    config.optim.lr, config.optim.warmup_steps = 3e-3, 10
    config.phase.phases = {
        "a": PhaseConfig(start="0", trainable=[Role.router]),
        "b": PhaseConfig(start="50%", trainable=[Role.lora], lr=1e-4, warmup_steps=2, auxiliary_loss=True),
    }
    a, b = PhaseSchedule.of(config).phases
    assert (a.lr, a.warmup_steps, b.lr, b.warmup_steps) == (3e-3, 10, 1e-4, 2)
    assert (a.start, a.end, b.start, b.end) == (0, 75, 75, 150)


def test_auxiliary_losses_and_noise_act_by_default_only_where_routers_train():
    config = RunConfig()
    config.phase.phases = {
        "a": PhaseConfig(start="0", trainable=[Role.router]),
        "b": PhaseConfig(start="10", trainable=[Role.lora]),
        "c": PhaseConfig(start="20", trainable=[Role.lora], auxiliary_loss=True),
        "d": PhaseConfig(start="30", trainable=[Role.router], auxiliary_loss=False),
    }
    phases = PhaseSchedule.of(config).phases
    assert [phase.load_balance for phase in phases] == [True, False, True, False]
    assert [phase.router_z_loss for phase in phases] == [True, False, True, False]
    assert [phase.router_noise for phase in phases] == [True, False, False, True]  # auxiliary_loss is not about noise


def test_expert_dropout_and_diversity_act_by_default_only_where_experts_train():
    config = RunConfig()
    config.phase.phases = {
        "a": PhaseConfig(start="0", trainable=[Role.router, Role.attn_lora]),
        "b": PhaseConfig(start="10", trainable=[Role.lora]),
    }
    phases = PhaseSchedule.of(config).phases
    assert [(phase.expert_dropout, phase.diversity) for phase in phases] == [(False, False), (True, True)]


@pytest.mark.parametrize("switch", ["load_balance", "router_z_loss", "router_noise", "expert_dropout", "diversity"])
@pytest.mark.parametrize("on", [False, True])
def test_each_switch_of_a_phase_overrides_its_default_alone(switch, on):
    config, usual = RunConfig(), RunConfig()
    trainable = [Role.attn_lora] if on else [Role.router, Role.lora]
    config.phase.phases = {"a": PhaseConfig(trainable=trainable, **{switch: on})}
    usual.phase.phases = {"a": PhaseConfig(trainable=trainable)}
    (phase,), (default,) = PhaseSchedule.of(config).phases, PhaseSchedule.of(usual).phases
    assert getattr(default, switch) is not on
    assert phase == replace(default, **{switch: on})
