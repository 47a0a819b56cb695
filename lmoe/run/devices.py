"""Whether a run finds the devices, processes and compiler that it asks for, before anything of it is written."""

import os

import torch

from lmoe.config.trainer import TrainerConfig
from lmoe.errors import ConfigError
from lmoe.run.compiler import check_compiler
from lmoe.vocabulary import Accelerator, Strategy

SHELLS = ("bash", "interactive")
"""Names of SLURM jobs in which a command is typed, and SLURM starts no tasks of it; as in Lightning."""

LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "JSM_NAMESPACE_LOCAL_RANK")
"""Where launchers tell a process which one on its machine it is; the first that is set counts, as in Lightning."""


def own_device(loop: TrainerConfig) -> torch.device | None:
    """The GPU that Lightning will choose for this process of a run; None: it computes on the CPU."""
    if loop.accelerator is Accelerator.cpu or not torch.cuda.is_available():
        return None
    rank = next((os.environ[name] for name in LOCAL_RANKS if name in os.environ), "0")
    return torch.device("cuda", (loop.device_ids or range(loop.devices))[int(rank) if loop.processes > 1 else 0])


def own_gpus(loop: TrainerConfig) -> list[int]:
    """Numbers of the GPUs over which a run of one process spreads its base, in order; none: it computes on the CPU."""
    if loop.accelerator is Accelerator.cpu or not torch.cuda.is_available():
        return []
    return sorted(loop.device_ids or range(loop.devices))


def seed_apart(loop: TrainerConfig, seed: int) -> None:
    """Have each further GPU of a run with device_map draw numbers of its own: seeded alike, its layers would start as
    those of the first GPU."""
    if loop.strategy is Strategy.device_map:
        for number in own_gpus(loop)[1:]:
            with torch.cuda.device(number):
                torch.cuda.manual_seed(seed + number)


def check_devices(loop: TrainerConfig) -> None:
    """Refuse a run whose devices, processes or compiler are not there.

    Raises:
        ConfigError: fewer devices than asked for, a precision that they do not have, nothing that compiles for them, or
            another number of processes than torchrun or SLURM has started.
    """
    cuda = torch.cuda.is_available()
    if loop.accelerator is Accelerator.gpu and not cuda:
        raise ConfigError("trainer.accelerator=gpu, but torch sees no GPU; use trainer=cpu")
    on_gpu = cuda and loop.accelerator is not Accelerator.cpu
    there = torch.cuda.device_count() if on_gpu else 0
    if not on_gpu and loop.strategy is Strategy.device_map and loop.devices > 1:
        raise ConfigError(f"trainer=device_map trainer.devices={loop.devices} takes GPUs, and torch sees none")
    if on_gpu and there < loop.devices:
        raise ConfigError(f"trainer.devices={loop.devices}, but torch sees {there} GPU{'s' * (there > 1)}")
    if loop.device_ids is not None and not on_gpu:
        raise ConfigError(f"trainer.device_ids={loop.device_ids} names GPUs, and torch sees none; leave it out")
    if on_gpu and (beyond := [number for number in loop.device_ids or () if number >= there]):
        raise ConfigError(f"trainer.device_ids={loop.device_ids}, but torch sees GPUs 0 to {there - 1}: no {beyond[0]}")
    if not on_gpu and loop.precision == "16-mixed":
        raise ConfigError("trainer.precision=16-mixed needs a GPU, and torch sees none; use bf16-mixed or 32-true")
    if loop.compile:
        check_compiler(on_gpu=on_gpu)
    if loop.processes > 1:
        check_started(loop)


def check_started(loop: TrainerConfig) -> None:
    """Compare the processes of a run of several with those that were started.

    Raises:
        ConfigError: another number of them than torchrun or SLURM has started.
    """
    asked = f"trainer.devices={loop.devices} and trainer.num_nodes={loop.num_nodes}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        nodes = int(os.environ["WORLD_SIZE"]) / int(os.environ["LOCAL_WORLD_SIZE"])
        if (int(os.environ["LOCAL_WORLD_SIZE"]), nodes) != (loop.devices, loop.num_nodes):
            raise ConfigError(
                f"{asked}, but torchrun has started {os.environ['LOCAL_WORLD_SIZE']} processes on each of {nodes:g} "
                f"machines; use torchrun --nnodes {loop.num_nodes} --nproc-per-node {loop.devices}"
            )
    elif "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in SHELLS:
        found = {name: os.environ.get(name, "1") for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")}
        wanted = {"SLURM_NTASKS": str(loop.processes), "SLURM_NTASKS_PER_NODE": str(loop.devices)}
        if found != wanted:
            raise ConfigError(
                f"{asked}, but SLURM has started {found['SLURM_NTASKS']} tasks with --ntasks-per-node="
                f"{os.environ.get('SLURM_NTASKS_PER_NODE', '(not given)')}; use --nodes={loop.num_nodes} "
                f"--ntasks-per-node={loop.devices}, without --ntasks"
            )
