"""How much memory this process uses."""

import resource
import sys
from pathlib import Path

import torch

MB = 1e6


def peak_memory_mb() -> float:
    """Peak memory of the process in MB (10^6 bytes): of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB


def resident_mb() -> float:
    """Resident memory of the process now, in MB (10^6 bytes); its peak where the system does not tell."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return peak_memory_mb()
    return int(status.read_text().split()[1]) * resource.getpagesize() / MB
