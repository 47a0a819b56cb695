"""What the optimizer holds in each phase, and what a switch keeps and drops."""

from itertools import pairwise

import pytest
import torch

from lmoe.config.phase import PhaseConfig
from lmoe.run.announce import quiet_libraries
from lmoe.run.parts import build_parts
from lmoe.run.trainer import build_trainer
from lmoe.training.callbacks.phase_switch import PhaseSwitch
from lmoe.training.optimizers import build_optimizer, carry_state, trainable_groups
from lmoe.vocabulary import Role
from tests.conftest import process_state
from tests.training.conftest import Watched

THREE = {
    "first": PhaseConfig(start="0", trainable=[Role.router, Role.lora]),
    "second": PhaseConfig(start="2", trainable=[Role.lora]),
    "third": PhaseConfig(start="4", trainable=[Role.attn_lora, Role.lora]),
}


@pytest.fixture(scope="module")
def watched(micro, tmp_path_factory):
    """Six steps in three phases, watched once for all tests here."""
    folder = tmp_path_factory.mktemp("fit")
    with process_state(folder):
        quiet_libraries()
        config = micro.config("optim.weight_decay=0.1", "optim.warmup_steps=2")
        config.phase.phases = THREE
        parts, watched = build_parts(config), Watched()
        trainer = build_trainer(config.trainer, folder, [], [PhaseSwitch(), watched])
        trainer.fit(parts.module, datamodule=parts.datamodule)
    return parts, watched


ROLES_OF = {"first": ["router", "lora"], "second": ["lora"], "third": ["lora", "attn_lora"]}


def test_each_phase_holds_exactly_the_parameters_of_its_roles_under_their_names(watched):
    parts, seen = watched
    assert [step.phase for step in seen.steps] == ["first"] * 2 + ["second"] * 2 + ["third"] * 2
    for step in seen.steps:
        assert sorted(step.groups) == sorted(ROLES_OF[step.phase])
        for role, names in step.groups.items():
            assert names == [n for n, r in parts.module.roles.items() if r == role]
            assert names


def test_frozen_parameters_do_not_move_and_trained_ones_do(watched):
    _, seen = watched
    for (before, after), step in zip(pairwise(seen.weights), seen.steps, strict=True):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        trained = {name for names in step.groups.values() for name in names}
        assert moved == trained


def test_no_frozen_parameter_keeps_a_stale_gradient(watched):
    _, seen = watched
    assert [step.stale for step in seen.steps] == [[]] * 6


def test_the_moments_of_parameters_that_stay_are_kept_and_the_others_are_gone(watched):
    parts, seen = watched
    lora = {n for n, r in parts.module.roles.items() if r is Role.lora}
    router = {n for n, r in parts.module.roles.items() if r is Role.router}
    assert seen.steps[1].moments == dict.fromkeys(lora | router, 2)
    assert seen.steps[2].moments == dict.fromkeys(lora, 3)  # first step of the second phase
    attention = {n for n, r in parts.module.roles.items() if r is Role.attn_lora}
    assert seen.steps[4].moments == {**dict.fromkeys(lora, 5), **dict.fromkeys(attention, 1)}


def test_each_phase_warms_up_and_decays_on_its_own(watched):
    parts, seen = watched
    peak = parts.config.optim.lr
    assert [step.settings["lora"][0] for step in seen.steps] == pytest.approx([peak / 2, peak] * 3)


def test_roles_have_their_own_learning_rate_and_decay(micro, restored):
    parts = micro.parts(
        "phase=joint", "++optim.roles.router.lr=0.5", "++optim.roles.lora.weight_decay=0.25", "optim.weight_decay=0.1"
    )
    module = parts.module
    optim = parts.config.optim
    groups = trainable_groups(dict(parts.model.named_parameters()), module.roles, optim)
    optimizer = build_optimizer(groups, module.current, optim)
    lr = optim.lr
    assert {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups} == {
        "router": (0.5, 0.1),
        "lora": (lr, 0.25),
        "attn_lora": (lr, 0.1),
    }
    assert carry_state(optimizer, optimizer) == 0


def test_lora_plus_gives_every_lora_B_its_own_group_with_the_ratio_times_the_rate_of_its_role(micro, restored):
    parts = micro.parts("phase=joint", "optim.lora_plus_ratio=8", "++optim.roles.lora.lr=0.5")
    module, optim = parts.module, parts.config.optim
    optimizer = module.configure_optimizers()["optimizer"]
    assert {g["name"]: g["initial_lr"] for g in optimizer.param_groups} == {
        "router": optim.lr,
        "lora": 0.5,
        "lora_B": 8 * 0.5,
        "attn_lora": optim.lr,
        "attn_lora_B": 8 * optim.lr,
    }
    held = {g["name"]: g["param_names"] for g in optimizer.param_groups}
    for group, names in held.items():
        assert names
        assert {name.endswith(".lora_B") for name in names} == {group.endswith("_B")}
    trained = [name for name, role in module.roles.items() if role in module.current.trainable]
    assert sorted(name for names in held.values() for name in names) == sorted(trained)


def test_the_optimizer_settings_reach_adamw(micro, restored):
    parts = micro.parts("optim.betas=[0.8,0.7]", "optim.eps=1e-5")
    made = parts.module.configure_optimizers()["optimizer"]
    assert isinstance(made, torch.optim.AdamW)
    assert (made.defaults["betas"], made.defaults["eps"]) == ((0.8, 0.7), 1e-5)


def test_clipping_bounds_the_norm_of_all_gradients_together(fit):
    _, free = fit("trainer.gradient_clip_val=0", "trainer.max_steps=2")
    _, clipped = fit("trainer.gradient_clip_val=0.001", "trainer.max_steps=2")
    assert free.steps[0].norm > 0.01
    assert clipped.steps[0].norm == pytest.approx(0.001, rel=1e-3)


def test_biases_and_magnitudes_do_not_decay(micro, restored):
    parts = micro.parts("phase=joint", "moe.router_bias=true", "injection.attn_lora.use_dora=true")
    groups = {g["name"]: g for g in parts.module.configure_optimizers()["optimizer"].param_groups}
    assert sorted(groups) == ["attn_lora", "attn_lora_vectors", "lora", "router", "router_vectors"]
    assert {name: group["weight_decay"] for name, group in groups.items() if name.endswith("_vectors")} == {
        "attn_lora_vectors": 0.0,
        "router_vectors": 0.0,
    }
    assert groups["router"]["weight_decay"] == parts.config.optim.weight_decay > 0
    vectors = {name for name, p in parts.model.named_parameters() if p.requires_grad and p.dim() < 2}
    held = [name for group in ("router_vectors", "attn_lora_vectors") for name in groups[group]["param_names"]]
    assert sorted(vectors) == sorted(held)
