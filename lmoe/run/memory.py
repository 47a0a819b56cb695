"""How much memory this process uses."""

import re
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from lmoe.backbones.placement import lack_of_memory
from lmoe.config.run import RunConfig
from lmoe.errors import TrainingError
from lmoe.rules.lessons import lesson_batch_sizes
from lmoe.vocabulary import Role

MB = 1e6


@contextmanager
def memory_advice(config: RunConfig) -> Iterator[None]:
    """Let a block that runs out of memory end with the settings to lower.

    Raises:
        TrainingError: the block ran out of memory; with the settings to lower.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (reason := lack_of_memory(error)) is None:
            raise
        cure = f"{_less_memory(config)}; dry_run=preflight estimates it"
        raise TrainingError(f"out of memory: {reason}. {cure}") from None


def _less_memory(config: RunConfig) -> str:
    """The settings to lower; of a run that goes on those that may change."""
    sizes = {"data.batch_size": config.data.batch_size} | lesson_batch_sizes(config)
    lower = ") and ".join(f"{key} (now {size}" for key, size in sizes.items())
    lower += "; raise trainer.accumulate_grad_batches to keep the step's size)"
    if config.resume is not None:
        return f"Lower {lower}, or set trainer.gradient_checkpointing=true"
    return (
        f"Lower {lower} or data.max_length ({config.data.max_length}), set trainer.gradient_checkpointing=true or "
        "backbone.precision=bfloat16"
    )


def peak_memory_mb() -> float:
    """Peak memory of the process in MB (10^6 bytes): of the GPUs that it uses, together, else resident.

    NOTE on Linux getrusage counts what the process that started this one had in memory at that time.
    """
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count())) / MB
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found.group(1)) * 1024 / MB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB


def resident_mb() -> float:
    """Resident memory of the process now, in MB (10^6 bytes); its peak where the system does not tell."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return peak_memory_mb()
    return int(status.read_text().split()[1]) * resource.getpagesize() / MB


def trained_bytes(model: nn.Module, role_of: Mapping[str, Role], roles: frozenset[Role]) -> int:
    """Bytes of the parameters with one of the roles."""
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if role_of[name] in roles)


def used_mb(device: torch.device) -> float:
    """What is in use now, in MB (10^6 bytes): allocated on the GPUs, together, or resident in this process."""
    if device.type != "cuda":
        return resident_mb()
    return sum(torch.cuda.memory_allocated(number) for number in range(torch.cuda.device_count())) / MB
