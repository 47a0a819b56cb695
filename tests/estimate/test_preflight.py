"""dry_run=preflight builds everything, tries one step, and leaves nothing (the estimate: tests/test_end_to_end.py)."""

import pytest

from lmoe.config.phase import PhaseConfig
from lmoe.errors import ConfigError
from lmoe.estimate.preflight import MemoryEstimate, check_phases
from lmoe.run.parts import build_parts
from lmoe.vocabulary import Role, RouterKind


def test_preflight_prints_plan_phases_loss_and_estimate_and_leaves_no_folder(train):
    done = train("dry_run=preflight")
    assert done.code == 0, done.text
    for words in (
        "model.layers.{0-1}.mlp.gate_proj",
        "4 experts r=4, 2 active",
        "phase experts: steps 3 to 6 train attn_lora, lora",
        "30 rows to learn, 9 to validate, 3 domains",
        "one forward and backward: loss",
        "memory estimate",
        "preflight: ready",
    ):
        assert words in done.text
    assert not done.run.exists()


@pytest.mark.parametrize("router", RouterKind)
def test_preflight_tells_every_router_what_it_must_know_of_the_batch(train, router):
    done = train("dry_run=preflight", f"moe={router}", "phase=joint")
    assert done.code == 0, done.text
    assert "preflight: ready" in done.text
    assert "got no gradient" not in done.text


def test_preflight_reports_a_role_that_trains_in_no_phase(train):
    done = train("dry_run=preflight", "phase=joint", "phase.phases.joint.trainable=[lora,attn_lora]")
    assert done.code == 0, done.text
    assert "role router trains in no phase" in done.text


def test_a_phase_whose_roles_have_no_parameters_is_refused(micro, restored):
    config = micro.config("injection.attn_lora.enabled=false")
    config.phase.phases = {
        "a": PhaseConfig(start="0", trainable=[Role.lora]),
        "b": PhaseConfig(start="3", trainable=[Role.attn_lora]),
    }
    with pytest.raises(ConfigError, match="phase.phases.b trains nothing"):
        check_phases(build_parts(config))


def test_the_estimate_is_the_sum_of_its_parts():
    estimate = MemoryEstimate(runtime=1, weights=2, gradients=3, optimizer=4, activations=5, logits=6, working=7)
    assert estimate.total == 28
    assert estimate.lines()[-1].split() == ["total", "28", "MB"]


def test_a_sharded_base_is_estimated_and_not_tried(train):
    done = train(
        "trainer=fsdp2", "trainer.devices=4", "trainer.accelerator=gpu", "data.batch_size=1", "dry_run=preflight"
    )
    assert done.code == 0, done.text
    assert "fsdp2 shards the base over 4 devices: one process cannot try it" in done.text
    assert "4 devices" in done.text and "gathered" in done.text
    assert "one forward and backward" not in done.text
