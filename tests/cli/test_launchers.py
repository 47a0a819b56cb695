"""Multiruns whose jobs run elsewhere: one run a job, failures as messages, and what a launcher lacks."""

import contextlib
import pickle
import signal
import socket
import sys
from pathlib import Path

import pytest

from lmoe.cli import launchers
from lmoe.cli.launchers import JobError, check_processes, lost_job
from lmoe.config.trainer import TrainerConfig
from lmoe.errors import ConfigError, LmoeError
from lmoe.resume.stopping import Stopped
from lmoe.run.claim import RANKS, is_first_process
from tests.micro import ROOT, Micro, finished, saved_config, start
from tests.wandb_file import records, run_files


def multirun(micro: Micro, folder: Path, *overrides: str) -> tuple[int, str]:
    """Exit code and text of a multirun in a process of its own."""
    settings = micro.changed("trainer.max_steps=2", "logger=wandb", *overrides)
    command = [sys.executable, ROOT / "train.py", "-m", *settings, f"hydra.sweep.dir={folder}"]
    ray = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    process = start(*command, cwd=folder.parent, env=ray)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, out + err


def run_id(run: Path) -> str:
    """Of the one W&B run that a job left."""
    (file,) = run_files(run / "wandb")
    return next(r.run.run_id for r in records(file) if r.WhichOneof("record_type") == "run")


def test_a_job_that_cannot_be_is_told_and_the_other_runs(micro, tmp_path):
    """Each job in a process of submitit's; the second has fewer experts than top_k."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    folder = tmp_path / "many"
    code, said = multirun(micro, folder, "hydra/launcher=submitit_local", "injection.num_experts=2,1")
    assert code == 1, said
    assert "job 1 failed (" in said
    assert said.count("config: 1 problem") == 1
    table = said[said.index("Jobs of this multirun") :]
    assert "injection.num_experts=2" in table and "done" in table
    assert "failed: injection.top_k is 2, more than the 1 experts" in table
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many"]
    assert "injection.top_k is 2, more than the 1 experts" in said
    assert "Traceback" not in said
    assert (folder / "0" / "adapter" / "adapter.safetensors").exists()
    assert run_id(folder / "0")
    assert not (folder / "1").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "settings"),
    [
        ("joblib", ["hydra.launcher.n_jobs=2"]),
        ("submitit_local", []),
        ("ray", ["+hydra.launcher.ray.init.num_cpus=1", "+hydra.launcher.ray.init.include_dashboard=false"]),
    ],
)
def test_every_job_has_a_folder_and_a_tracked_run_of_its_own(micro, tmp_path, launcher, settings):
    pytest.importorskip(f"hydra_plugins.{launchers.PLUGINS[launcher]}")
    folder = tmp_path / "many"
    code, said = multirun(micro, folder, f"hydra/launcher={launcher}", "injection.num_experts=2,4", *settings)
    assert code == 0, said
    assert [saved_config(folder / job)["injection"]["num_experts"] for job in ("0", "1")] == [2, 4]
    assert len({run_id(folder / job) for job in ("0", "1")}) == 2
    assert "compare them: lmoe compare many/0 many/1" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many"]


@pytest.mark.slow
def test_jobs_of_two_processes_one_after_the_other(micro, tmp_path):
    """The first fails before it trains, and the others have their two processes all the same."""
    folder = tmp_path / "many"
    (tmp_path / "own" / "trainer").mkdir(parents=True)
    (tmp_path / "own" / "trainer" / "two.yaml").write_text("accelerator: cpu\nstrategy: ddp\ndevices: 2\n")
    processes = ("trainer=two", f"--config-dir={tmp_path / 'own'}", "data.batch_size=2", "+phase.phases.experts.lr=0.1")
    code, said = multirun(micro, folder, *processes, "injection.num_experts=1,4,2")
    assert code == 1, said
    assert said.count("config: 1 problem") == 1
    assert "failed: injection.top_k is 2, more than the 1 experts" in said[said.index("Jobs of this multirun") :]
    assert "job 0 failed (" in said
    assert not (folder / "0").exists()
    assert [saved_config(folder / job)["injection"]["num_experts"] for job in ("1", "2")] == [4, 2]
    assert all((folder / job / "adapter" / "adapter.safetensors").exists() for job in ("1", "2"))
    assert len({run_id(folder / job) for job in ("1", "2")}) == 2
    assert saved_config(folder / "1")["phase"]["phases"]["experts"]["lr"] == 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "own"]


@pytest.mark.slow
def test_the_tasks_of_a_slurm_step_are_one_run(micro, tmp_path):
    """Two processes with the variables that srun sets for each of its tasks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    step = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    step |= {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "train", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    settings = micro.changed("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "data.batch_size=2")
    command = [sys.executable, ROOT / "train.py", *settings, f"hydra.run.dir={tmp_path / 'run'}"]
    tasks = [
        start(*command, cwd=tmp_path, env=step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in ("0", "1")
    ]
    first, second = (finished(task) for task in tasks)
    assert "validation loss" in first
    assert "validation loss" not in second
    assert (tmp_path / "run" / "adapter" / "adapter.safetensors").exists()


@pytest.mark.parametrize(
    "error", [JobError("job 1 failed"), LmoeError("a"), ConfigError("a is wrong"), ConfigError(["a", "b"])]
)
def test_an_error_arrives_from_another_process_as_it_was(error):
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_signal_arrives_from_another_process_as_it_was(at_once):
    arrived = pickle.loads(pickle.dumps(Stopped(signal.SIGTERM, at_once=at_once)))
    assert (str(arrived), arrived.exit_code, arrived.at_once) == ("stopped by SIGTERM", 143, at_once)


def test_a_launcher_that_is_not_installed_is_told_with_the_extra(train, monkeypatch):
    monkeypatch.setattr(launchers, "find_spec", lambda name: None)
    done = train("-m", "hydra/launcher=submitit_slurm")
    assert done.code == 1
    assert "hydra/launcher=submitit_slurm needs hydra-submitit-launcher" in done.text
    assert "pip install 'lmoe[launchers]'" in done.text
    assert "Could not" not in done.text


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("-m", "hydra/launcher=slurm"), "no such launcher"),
        (("-m", "hydra/launcher=ray_aws"), "did you mean ray?"),
        (("-m", "hydra/launcher=submitit_slrm"), "did you mean submitit_slurm?"),
        (("hydra/launcher=joblib",), "has no effect on a single run; add -m"),
    ],
)
def test_a_launcher_that_cannot_act_is_told(train, overrides, said):
    done = train(*overrides)
    assert done.code == 1
    assert said in done.text
    assert "Traceback" not in done.text


def test_slurm_that_is_not_there_is_told(train, monkeypatch):
    monkeypatch.setattr(launchers, "find_spec", lambda name: object())
    monkeypatch.setattr(launchers.shutil, "which", lambda name: None)
    done = train("-m", "hydra/launcher=submitit_slurm")
    assert done.code == 1
    assert "there is no srun here" in done.text


@pytest.mark.parametrize(
    ("launcher", "devices", "refused"), [("basic", 2, False), ("submitit_slurm", 2, False), ("joblib", 2, True),
                                         ("ray", 2, True), ("submitit_local", 2, True), ("joblib", 1, False)]
)  # fmt: skip
def test_a_job_elsewhere_starts_no_further_processes(launcher, devices, refused):
    trainer = TrainerConfig(devices=devices)
    if not refused:
        check_processes(launcher, trainer)
        return
    with pytest.raises(ConfigError, match="hydra.launcher.tasks_per_node=2"):
        check_processes(launcher, trainer)


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"RANK": "4", "LOCAL_RANK": "0"}, False),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "0"}, False),
        ({"SLURM_PROCID": "0"}, True),
    ],
)
def test_one_process_of_all_nodes_is_the_first(monkeypatch, variables, first):
    """On a second node the local rank is 0 again."""
    for name in (*RANKS, "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_process(2) == first
    assert is_first_process(1)


def test_a_killed_job_is_a_message_and_an_error_of_ours_is_none():
    submitit_utils = pytest.importorskip("submitit.core.utils")
    said = lost_job(submitit_utils.UncompletedJobError("Job 7 (task: 0) was killed\n\nlog: none"))
    assert said is not None
    assert "a job ended without an answer (submitit: UncompletedJobError)" in said
    assert "was killed" in said
    assert lost_job(RuntimeError("a bug")) is None


@pytest.mark.parametrize(
    ("does", "ends"),
    [
        ("os.kill(os.getppid(), signal.SIGINT); time.sleep(0.5); sys.exit(1)", Stopped),
        ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)", Stopped),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", Stopped),
        ("sys.exit(130)", Stopped),
        ("sys.exit(1)", JobError),
        ("", None),
    ],
)
def test_a_job_in_its_own_process_ends_all_by_a_signal_and_itself_by_an_error(tmp_path, does, ends):
    script = tmp_path / "job.py"
    script.write_text(f"import os, signal, sys, time\n{does}\n")
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with contextlib.nullcontext() if ends is None else pytest.raises(ends):
        launchers.in_own_process([str(script)], tmp_path)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers
