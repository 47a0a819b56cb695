"""What processes tell one another reaches a process group that knows the run's device only, as nccl does."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.testing._internal.distributed.fake_pg import FakeProcessGroup

import lmoe
from lmoe.resume.stopping import StopSignals
from lmoe.training.callbacks.finite_steps import FiniteSteps
from lmoe.training.callbacks.read_step import ReadStep
from lmoe.training.callbacks.stop_request import StopRequest
from lmoe.training.module import AdapterModule
from lmoe.training.ranks import any_rank, over_ranks
from lmoe.training.step import StepRecord, WindowLosses

ELSEWHERE = "meta"
"""Stands for cuda: a device other than the CPU that every machine has."""


class StrategyElsewhere(DDPStrategy):
    """On a device whose numbers cannot be read: in their place ones come back."""

    root_device = torch.device(ELSEWHERE)

    def reduce(self, tensor, group=None, reduce_op="mean"):
        assert super().reduce(tensor, group, reduce_op).device == self.root_device
        return torch.ones(tensor.shape)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return bool(self.reduce(torch.tensor(decision, device=self.root_device), reduce_op="sum"))


def fake_group(common, options) -> FakeProcessGroup:
    """Sends nothing, and is asked only for the devices that it is registered for."""
    return FakeProcessGroup._create_internal(common.group_rank, common.group_size, options)


@pytest.fixture
def trainer(monkeypatch) -> Iterator[SimpleNamespace]:
    """What callbacks ask of a Trainer after an optimizer step, as one of two processes of a group without the CPU."""
    if "elsewhere" not in dist.Backend.backend_list:
        dist.Backend.register_backend("elsewhere", fake_group, extended_api=True, devices=[ELSEWHERE])
    if dist.is_initialized():  # a run before this one, in this process
        dist.destroy_process_group()
    dist.init_process_group("elsewhere", rank=0, world_size=2, store=dist.HashStore())
    monkeypatch.setattr(dist, "barrier", lambda *_, **__: None)  # nccl's needs no tensor of ours
    yield SimpleNamespace(
        strategy=StrategyElsewhere(), world_size=2, global_step=2, max_steps=9, accumulate_grad_batches=1, loggers=[]
    )
    dist.destroy_process_group()


def test_the_group_of_these_tests_refuses_a_tensor_of_the_cpu(trainer):
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        trainer.strategy.reduce(torch.ones(2), reduce_op="sum")


def test_values_of_the_cpu_are_reduced_on_the_device_of_the_run(trainer):
    assert over_ranks(trainer, torch.zeros(2)).tolist() == [1, 1]
    assert over_ranks(trainer, torch.tensor(0), "max") == 1
    assert any_rank(trainer, False)


def test_what_a_step_has_come_to_is_reduced_on_the_device_of_the_run_in_one_message(trainer, monkeypatch):
    sums = []
    plain = trainer.strategy.reduce
    monkeypatch.setattr(trainer.strategy, "reduce", lambda values, **how: sums.append(values) or plain(values, **how))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda values: [1.0] * len(values))  # there is nothing to be read
    window = WindowLosses()
    window.add({"train/loss": torch.tensor(7.0), "train/router_z_loss": torch.tensor(8.0)})
    step = StepRecord(window=window, tokens=torch.tensor(9))
    trainer.precision = "32-true"
    ReadStep().before_step(trainer, SimpleNamespace(), step, SimpleNamespace(param_groups=[]))  # type: ignore[arg-type]
    assert [tuple(values.shape) for values in sums] == [(4,)] and sums[0].device.type == ELSEWHERE
    assert step.losses == {"train/loss": 1.0, "train/router_z_loss": 1.0} and step.tokens_of_all == 1


def test_losses_of_two_processes_add_up_as_in_float32_and_one_that_is_no_number_stops_both():
    """And tokens to a whole number, however many they are."""
    losses, norms = ((0.1, 0.7), (float("inf"), 0.7), (0.1, 0.7)), (1.0, 1.0, float("nan"))
    for (mine, other), norm in zip(losses, norms, strict=True):
        of_other = torch.tensor([other, 3.0, 2**24 + 1, 0], dtype=torch.float64)
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        strategy.reduce = lambda values, reduce_op, more=of_other: values + more * torch.tensor([1, 1, 1, 1])
        window = WindowLosses()
        window.add({"train/loss": torch.tensor(mine), "train/router_z_loss": torch.tensor(1.0)})
        step = StepRecord(window=window, tokens=torch.tensor(4))
        weight = torch.nn.Parameter(torch.zeros(1))
        weight.grad = torch.tensor([norm])
        group = SimpleNamespace(param_groups=[{"name": "lora", "params": [weight]}])
        run = SimpleNamespace(strategy=strategy, precision="32-true")
        ReadStep().before_step(run, SimpleNamespace(), step, group)  # type: ignore[arg-type]
        assert step.losses["train/loss"] == float(torch.tensor(mine) + torch.tensor(other))
        assert step.tokens_of_all == 2**24 + 5 and step.losses["train/router_z_loss"] == 4.0
        assert step.finite == (math.isfinite(mine) and math.isfinite(norm))
    assert not step.finite and math.isnan(step.gradient_norms["lora"])


def test_a_request_to_stop_is_reduced_on_the_device_of_the_run(trainer):
    request = StopRequest(StopSignals(), None, lambda text: None)
    request.on_train_batch_end(trainer, None, None, None, 0)
    assert trainer.should_stop, "the other process asked for the end of the time"


def test_loads_activity_and_the_routing_in_a_checkpoint_are_reduced_on_the_device_of_the_run(trainer):
    """All three pass through AdapterModule.over_ranks."""
    assert AdapterModule.over_ranks(SimpleNamespace(trainer=trainer), torch.zeros(3)).tolist() == [1] * 3  # type: ignore[arg-type]


def test_a_step_that_is_not_finite_elsewhere_is_agreed_upon_on_the_device_of_the_run(trainer, monkeypatch):
    skipped, step, optimizer = [], StepRecord(), SimpleNamespace(param_groups=[])
    trainer.precision = "32-true"
    monkeypatch.setattr(torch.Tensor, "tolist", lambda values: [1.0] * len(values))  # one process found a fault
    for callback in (ReadStep(), FiniteSteps("skip", skipped.append)):  # type: ignore[arg-type]
        callback.before_step(trainer, SimpleNamespace(), step, optimizer)  # type: ignore[arg-type]
    assert step.skipped and "not finite on another rank" in skipped[0]


def test_no_other_file_talks_to_other_processes():
    """Runs do it in lmoe/training/ranks.py; what is on the model's device anyway is summed in lmoe/ops/processes.py."""
    talks = re.compile(
        r"strategy\.(reduce|broadcast|barrier|all_gather)|all_(reduce|gather)|dist(ributed)?\.\w*(reduce|gather|broadcast|barrier)"
    )
    root = Path(lmoe.__file__).parent
    files = sorted(root.rglob("*.py"))
    assert len(files) > 150
    found = {str(file.relative_to(root)) for file in files if talks.search(file.read_text(encoding="utf-8"))}
    assert found == {"training/ranks.py", "ops/processes.py"}
