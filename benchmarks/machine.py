"""What a figure was measured on: nothing that tells whose machine it is."""

import datetime
import importlib.metadata
import platform
from collections.abc import Iterable

import torch

from lmoe.cli.threads import own_cores
from lmoe.run.machine import cpu_model

PACKAGES = ("torch", "transformers", "peft", "eulerforge", "mixlora", "lmoe")


def facts(device: torch.device) -> dict[str, str | int]:
    """Processor, cores, threads, versions and the day."""
    found: dict[str, str | int] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu_model(),
        "cores": own_cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    found |= versions(PACKAGES)
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
        found["float32_matmul"] = torch.get_float32_matmul_precision()
    return found


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions by package; "none" where it is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found
