"""A run whose routers are taught domains: how the loss weighs, what moves, and what a run's rows must be like."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmoe.errors import ConfigError
from lmoe.injection.batch_info import row_targets
from lmoe.injection.record import injected
from lmoe.layers.prompt_reading import StateReader
from lmoe.ops.router_targets import NO_TARGET
from lmoe.training.callbacks.fit_router import router_of
from lmoe.training.callbacks.step_metrics import StepMetrics
from tests.resume.test_exactness import adapter, keep_as_if_killed, losses
from tests.training.test_module import JOINT, LINEAR, differ, same

OF_MODEL = ("moe=sequence", "moe.router_scope=model", "moe.router_target=domain")
TOKEN = ("moe.router_target=domain",)


@pytest.mark.parametrize(("taught", "route_by"), [(OF_MODEL, "router"), (TOKEN, "target")])
def test_micro_batches_of_uneven_lengths_add_up_to_one_big_batch(gradients, taught, route_by):
    """Gradients, task loss and router_target_loss; the balance loss is no sum over tokens, so it is off."""
    given = (*JOINT, *LINEAR, *taught, f"+phase.phases.joint.route_by={route_by}")
    whole = gradients(*given, "data.batch_size=4")
    parts = gradients(*given, "data.batch_size=2", "trainer.accumulate_grad_batches=2")
    same(whole, parts, skip=("train/load_balancing_loss",))
    assert whole["train/router_target_loss"] > 0.1 and len(whole) > 20


def test_the_coefficient_of_all_phases_or_of_one_changes_the_gradient_of_the_router(gradients):
    low, high = (gradients(*OF_MODEL, f"moe.router_target_coef={value}") for value in (0, 0.5))
    assert differ(low, high, "router.weight")
    same(gradients(*OF_MODEL, "+phase.phases.router_warmup.router_target_coef=0.5"), high)


def test_route_by_target_changes_what_the_experts_of_that_phase_learn_and_no_other_phase(gradients):
    key = "+phase.phases.experts.route_by"
    routed, taught = (gradients(*OF_MODEL, f"{key}={by}", phase=1) for by in ("router", "target"))
    assert differ(routed, taught, "lora_B")
    same(*(gradients(*OF_MODEL, f"{key}={by}") for by in ("router", "target")))


def test_each_row_trains_the_expert_of_its_own_domain_packed_or_not(gradients, micro):
    """Three domains and experts: an expert learns nothing where its domain is not in the batch."""
    own = ("injection.num_experts=3", "phase=joint", "+phase.phases.joint.route_by=target", *OF_MODEL)
    batch = next(iter(micro.parts(*own, "data.batch_size=2").datamodule.train_dataloader()))
    there = set(batch["domain_ids"][batch["valid_mask"]].tolist())
    assert len(there) < 3
    found = gradients(*own, "data.batch_size=2")
    for name in (name for name in found if "mlp" in name and "lora" in name):
        learning = found[name].flatten(1).any(1)
        assert {e for e in range(3) if learning[e]} == there, name
    alike = ("data.packing=true", "data.batch_size=1", "trainer.accumulate_grad_batches=2", "data.max_length=128")
    assert any(value.any() for name, value in gradients(*own, *alike).items() if "lora" in name)


TAUGHT = ("injection.num_experts=3", "phase=joint", "+phase.phases.joint.route_by=target", *OF_MODEL, *LINEAR)
RESTS = "+phase.phases.joint.router_every_n_steps=2"
"""The first step is none at which the router learns."""


@pytest.fixture
def read(monkeypatch) -> list[object]:
    """What was read in forwards of their own."""
    found, original = [], StateReader.read
    monkeypatch.setattr(StateReader, "read", lambda self, *args: found.append(self) or original(self, *args))
    return found


@pytest.mark.parametrize("more", [(), ("moe.decide=turn", "moe.prompt_experts=true", "moe.router_bias=true")])
@pytest.mark.parametrize("packed", [(), ("data.packing=true", "data.max_length=96", "data.batch_size=1")])
def test_experts_learn_the_same_in_a_step_in_which_the_router_rests_and_no_prompt_is_read(
    gradients, read, packed, more
):
    learning = gradients(*TAUGHT, *packed, *more)
    assert len(read) >= 1 and learning["train/router_target_loss"] > 0.1
    assert any(value.any() for name, value in learning.items() if name.endswith("router.weight"))
    read.clear()
    resting = gradients(*TAUGHT, *packed, *more, RESTS)
    assert not read
    of_router = {name for name in resting if "router." in name}
    assert of_router and not any(resting[name].any() for name in of_router), "DDP waits for them"
    apart = {*of_router, "train/router_target_loss", "train/router_z_loss"}
    same(*({name: value for name, value in found.items() if name not in apart} for found in (learning, resting)))
    assert not {"train/router_target_loss", "train/router_z_loss"} & resting.keys()


def test_prompts_are_read_where_the_target_does_not_decide_alone(gradients, read, monkeypatch):
    """Two experts of a target, and rows without one: the router chooses, and learns nothing in a step of rest."""
    gradients(*TAUGHT, RESTS, "injection.num_experts=6")
    assert read
    read.clear()

    def less_one(*args):
        known = row_targets(*args)
        assert known is not None
        return known._replace(ids=known.ids.masked_fill(known.ids == 0, NO_TARGET))

    monkeypatch.setattr("lmoe.injection.batch_info.row_targets", less_one)
    found = gradients(*TAUGHT, RESTS, "data.batch_size=8")
    assert read and "train/router_target_loss" not in found


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["moe.router_target=domain", "injection.num_experts=2"], "an expert for each of the 3 domains.*has 2; set"),
        (["moe.router_target=domain", "moe.domains=[code,math]"], "names no target for words of the data; it has"),
        (["moe.router_target=domain", "data.path={train}/code.jsonl"], "all training rows are of one: all"),
        (["moe.router_target=domain", "moe.domains=[all,code]", "data.path={train}/code.jsonl"], "are of one: all"),
        (
            ["moe.router_target=domain", "moe.domains=[code,law,math,words]"],
            "moe.domains names law, and no training row is of it: leave it out, or add rows",
        ),
        (["moe.router_target=auto", "data.clusters=2"], "data.clusters=2 has no effect: the rows name 3 domains"),
        (
            ["moe.router_target=auto", "injection.num_experts=2", "+phase.phases.experts.data.path={train}/code.jsonl"],
            "auto takes clusters here, which are of one set of rows, and not all phases learn from the same",
        ),
        (
            ["moe.router_target=auto", "moe.domains=[code,math]", "data.path={train}/code.jsonl"],
            "has no effect where clusters are the targets",
        ),
    ],
)
def test_rows_that_no_targets_can_be_made_of_are_refused(micro, restored, overrides, said):
    with pytest.raises(ConfigError, match=said):
        micro.parts(*(override.format(train=micro.train) for override in overrides))


def test_a_domain_that_only_rows_of_a_later_phase_or_of_a_stream_may_have_is_no_mistake(micro, restored):
    named = ("moe.router_target=domain", "moe.domains=[math,code,words]", f"data.path={micro.train}")
    later = (*named, "data.domains=[math,code]", f"+phase.phases.experts.data.path={micro.train}")
    for rows in (later, (*named[:1], "moe.domains=[math,code,words,law]", "data.streaming=true")):
        assert "words" in (injected(micro.parts(*rows).model).moe.domains or [])


def test_targets_are_the_domains_of_the_training_rows_or_those_that_are_named(micro, restored):
    assert injected(micro.parts("moe.router_target=auto").model).moe.domains == ["code", "math", "words"]
    named = micro.parts("moe.router_target=domain", "moe.domains=[words,math,code]")
    assert injected(named.model).moe.domains == ["words", "math", "code"]
    batch = next(iter(named.datamodule.train_dataloader()))
    from lmoe.injection.batch_info import batch_info

    record = injected(named.model)
    with batch_info(record, batch, named.module.domains):
        targets = record.context.batch_info.targets
    assert targets is not None and targets.count == 3
    number = {"code": 2, "math": 1, "words": 0}
    expected = [number[named.module.domains[d]] for d in batch["domain_ids"][:, 0].tolist()]
    assert targets.ids[:, 0].tolist() == expected
    assert torch.equal(targets.ids == -1, ~batch["valid_mask"])


# --- whole runs

EXACT = (
    *OF_MODEL,
    "moe.decide=turn",
    "phase=supervised_routing",
    "phase.phases.routed.start=3",
    "injection.lora_dropout=0.2",
    "data.packing=true",
    "data.max_length=96",
    "data.batch_size=1",
    "trainer.accumulate_grad_batches=2",
    "trainer.val_every_n_steps=2",
    "checkpoint.every_n_steps=1",
)


RESTING = ("injection.num_experts=3", "+phase.phases.supervised.router_every_n_steps=2", "checkpoint.every_n_steps=1")


def test_a_router_that_rests_keeps_its_weights_and_its_moments_and_a_killed_run_goes_on_alike(
    train, monkeypatch, tmp_path
):
    given = (*(text for text in EXACT if text != "checkpoint.every_n_steps=1"), *RESTING)
    routers: dict[int, Tensor] = {}
    logging = StepMetrics.after_step

    def log_and_keep(self, trainer, module, step) -> None:
        logging(self, trainer, module, step)
        routers[trainer.global_step] = router_of(module).weight.detach().clone()

    with monkeypatch.context() as patch:
        patch.setattr(StepMetrics, "after_step", log_and_keep)
        keep_as_if_killed(patch, tmp_path / "whole", 2)
        whole = train(*given, run="whole")
    assert whole.code == 0, whole.text
    logged = {int(row["step"]): row for row in losses(whole.run) if "train/loss" in row}
    assert {step for step in logged if "train/router_target_loss" in logged[step]} == {2, 4, 5, 6}
    assert {step for step in logged if logged[step]["grad_norm/router"] == 0} == {1, 3}
    changes = {step for step in range(2, 7) if not torch.equal(routers[step - 1], routers[step])}
    assert changes == {2, 4, 5, 6}
    run = Path(shutil.copytree(tmp_path / "killed 2", tmp_path / "run"))
    done = train(f"resume={run}", settings=False)
    assert done.code == 0, done.text
    assert adapter(run) == adapter(whole.run) and losses(run) == losses(whole.run)


def test_a_run_killed_in_either_phase_and_resumed_is_the_uninterrupted_one(train, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        keep_as_if_killed(patch, tmp_path / "whole", 2, 5)
        whole = train(*EXACT, run="whole")
    assert whole.code == 0, whole.text
    assert {"train/router_target_loss", "val/loss"} <= {name for row in losses(whole.run) for name in row}
    for step in (2, 5):
        run = Path(shutil.copytree(tmp_path / f"killed {step}", tmp_path / f"run {step}"))
        done = train(f"resume={run}", settings=False)
        assert done.code == 0, done.text
        assert adapter(run) == adapter(whole.run)
        assert losses(run) == losses(whole.run)
    kept = json.loads((whole.run / "adapter" / "lmoe_config.json").read_text())
    assert kept["moe"]["domains"] == ["code", "math", "words"]
