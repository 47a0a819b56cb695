"""What a run asks of the machine, before anything of it is written."""

import pytest
import torch

from lmoe.config.trainer import TrainerConfig
from lmoe.errors import ConfigError
from lmoe.run.devices import check_devices
from lmoe.run.trainer import build_trainer
from lmoe.vocabulary import Accelerator, Strategy

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4"}
LAUNCHED = (*TORCHRUN, "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_JOB_NAME")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher around the tests."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


def asked(**settings) -> TrainerConfig:
    settings = {"accelerator": Accelerator.cpu, "precision": "32-true", "strategy": Strategy.ddp} | settings
    return TrainerConfig(**settings)


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_devices(asked(accelerator=Accelerator.gpu, devices=1))
    for accelerator in (Accelerator.gpu, Accelerator.auto):
        with pytest.raises(ConfigError, match="trainer.devices=4, but torch sees 1 GPU"):
            check_devices(asked(accelerator=accelerator, devices=4))


def test_half_precision_without_a_gpu_that_was_found_by_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="16-mixed needs a GPU"):
        check_devices(asked(accelerator=Accelerator.auto, precision="16-mixed"))


@pytest.mark.parametrize(
    ("environment", "settings", "said"),
    [
        ({"SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8"}, {"devices": 8, "num_nodes": 2}, None),
        ({"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}, {"devices": 4}, "SLURM has started 2 tasks"),
        ({"SLURM_NTASKS": "2"}, {"devices": 2}, "--ntasks-per-node=2, without --ntasks"),
        ({"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}, {"devices": 8}, "--nodes=1 --ntasks-per-node=8"),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash"}, {"devices": 2}, None),
        ({"SLURM_NTASKS": "2"}, {"devices": 1}, None),
        (
            TORCHRUN | {"LOCAL_WORLD_SIZE": "2"},
            {"devices": 2, "num_nodes": 2},
            None,
        ),
        (
            TORCHRUN | {"LOCAL_WORLD_SIZE": "4"},
            {"devices": 2},
            "torchrun has started 4 processes on each of 1 machines; use torchrun --nnodes 1 --nproc-per-node 2",
        ),
    ],
)
def test_another_number_of_processes_than_were_started(monkeypatch, environment, settings, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if said is None:
        check_devices(asked(**settings))
        return
    with pytest.raises(ConfigError) as caught:
        check_devices(asked(**settings))
    assert said in str(caught.value)


def test_a_wrong_number_leaves_no_run_behind(train, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    done = train("trainer=ddp", "trainer.devices=4", "trainer.accelerator=cpu", "data.batch_size=1")
    assert done.code == 1
    assert "but SLURM has started 2 tasks" in done.text
    assert not done.run.exists()


def test_a_mac_computes_on_its_cpu_because_its_gpu_has_no_float64(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("lightning.pytorch.accelerators.mps.MPSAccelerator.is_available", staticmethod(lambda: True))
    trainer = build_trainer(asked(accelerator=Accelerator.auto, strategy=Strategy.auto), tmp_path, [], [])
    assert trainer.strategy.root_device == torch.device("cpu")


def test_one_card_is_chosen_by_its_number(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("lmoe.run.trainer.Trainer", lambda **settings: made.append(settings))
    loop = asked(accelerator=Accelerator.auto, strategy=Strategy.auto, device_ids=[1])
    check_devices(loop)
    build_trainer(loop, tmp_path, [], [])
    assert (made[0]["accelerator"], made[0]["devices"]) == ("gpu", [1])
    with pytest.raises(ConfigError, match=r"device_ids=\[2\], but torch sees GPUs 0 to 1: no 2"):
        check_devices(asked(accelerator=Accelerator.auto, strategy=Strategy.auto, device_ids=[2]))


def test_the_number_of_a_card_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device_ids=\[0\] names GPUs, and torch sees none"):
        check_devices(asked(accelerator=Accelerator.auto, strategy=Strategy.auto, device_ids=[0]))
