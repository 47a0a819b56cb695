"""What this machine has: its processor, memory and free disk. Imports no torch: it can be asked where torch fails."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Limit, use, and the entry of memory.stat that the kernel gives back when asked; of versions 2 and 1 of cgroups."""
BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")
"""Processor flags of instructions that compute in bfloat16."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Memory:
    """Memory of the machine, in bytes.

    Args:
        total: all of it.
        free: what this process can still take; None: the system does not tell.
        limit: what the cgroup of this process may use, where that is less than all.
    """

    total: int
    free: int | None
    limit: int | None


@dataclass(slots=True, frozen=True, kw_only=True)
class Disk:
    """Free space where a folder is, or would be made.

    Args:
        free: bytes.
        writable: whether this process may write there.
    """

    free: int
    writable: bool


def cpu_model() -> str:
    """Name of the processor, or of its family where the system does not tell."""
    if (name := _cpu_line("model name")) is not None:
        return name
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def gpu_models(proc: Path = PROC) -> list[str]:
    """Names of the GPUs, as far as NVIDIA's driver tells them without being loaded into this process."""
    files = sorted((proc / "driver" / "nvidia" / "gpus").glob("*/information"))
    found = [re.search(r"^Model:\s*(.+)$", file.read_text(encoding="utf-8"), re.MULTILINE) for file in files]
    return [model[1].strip() for model in found if model is not None]


def bfloat16_flags() -> list[str] | None:
    """Flags of the processor for arithmetic in bfloat16; None where the system does not tell."""
    flags = _cpu_line("flags") or _cpu_line("Features")
    return None if flags is None else [flag for flag in BFLOAT16 if flag in flags.split()]


def memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> Memory:
    """Memory that is there and free, as far as the cgroups of this process allow it."""
    file = proc / "meminfo"
    if not file.is_file():
        return Memory(total=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), free=None, limit=None)
    sizes = {name: int(kilobytes) * 1024 for name, kilobytes in re.findall(r"(\w+):\s+(\d+) kB", file.read_text())}
    total, free, limit = sizes["MemTotal"], sizes["MemAvailable"], None
    for most, used in _cgroup_limits(proc, cgroups):
        if most < total:
            limit = min(most, limit or most)
            free = min(free, max(most - used, 0))
    return Memory(total=total, free=free, limit=limit)


def disk(folder: Path) -> Disk:
    """Free space of the disk that a folder is on; of one that is not there yet, where its nearest parent is."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return Disk(free=shutil.disk_usage(place).free, writable=place.is_dir() and os.access(place, os.W_OK))


def _cpu_line(name: str) -> str | None:
    """The first value of a name in /proc/cpuinfo."""
    info = PROC / "cpuinfo"
    if not info.is_file():
        return None
    found = re.search(rf"^{name}\s*:(.*)$", info.read_text(encoding="utf-8"), re.MULTILINE)
    return found and found[1].strip()


def _cgroup_limits(proc: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """(limit, use) in bytes of each cgroup that this process is in, from its own up to the root."""
    lines = (proc / "self" / "cgroup").read_text().splitlines() if (proc / "self" / "cgroup").is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root = cgroups / "memory"
        elif not controllers:
            root = cgroups
        else:
            continue
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            yield from _limit_of(folder)
            if folder == root:
                break


def _limit_of(folder: Path) -> Iterator[tuple[int, int]]:
    """(limit, use) of one cgroup, where it has a limit that can be read."""
    for limit_file, use_file, given_back in CGROUP_FILES:
        try:
            limit, used = (folder / limit_file).read_text().strip(), int((folder / use_file).read_text())
            spare = re.search(rf"^{given_back} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
        except (OSError, ValueError):
            continue
        if limit.isdecimal():
            yield int(limit), used - (int(spare[1]) if spare else 0)
