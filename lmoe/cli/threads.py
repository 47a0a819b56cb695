"""How the threads of a run wait for one another, decided before torch is loaded; imports nothing heavy.

torch for Linux ships libgomp, which reads its environment once, when it is loaded. Left alone it lets a thread that
waits spin for milliseconds: beside another busy process it spins in the time of the thread that it waits for.
"""

import math
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Any of these means that the user has decided how threads wait."""
SPINS = "2500"
"""Turns that a waiting thread spins before it sleeps: beside another run a third of the cost, alone nearly none."""
THREADS = "OMP_NUM_THREADS"
OWN_THREADS = "LMOE_OMP_NUM_THREADS"
"""What this program has set THREADS to: another value there is the user's."""
CGROUP = Path("/sys/fs/cgroup")


def prepare_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting threads sleep soon, and start no more of them than a container's quota of cores can run.

    Processes that this one starts inherit it. What the user has set stays, and where torch is loaded already it is too
    late.
    """
    if "torch" in sys.modules:
        return
    if not any(name in environment for name in WAITING):
        environment["GOMP_SPINCOUNT"] = SPINS
    if THREADS not in environment and usable_cores() < own_cores():
        environment[THREADS] = environment[OWN_THREADS] = str(usable_cores())


def share_cores(environment: MutableMapping[str, str], parallel: int) -> None:
    """Let a process that is started with this environment take its share of the cores, unless the user has said how
    many threads it has.

    Args:
        parallel: processes that run beside one another, itself included.
    """
    if environment.get(THREADS) == environment.get(OWN_THREADS):
        environment[THREADS] = environment[OWN_THREADS] = str(max(1, usable_cores() // parallel))


def usable_cores() -> int:
    """Cores that processes started from here can keep busy: those they may run on, as far as a container's quota of
    their time goes."""
    quota = core_quota()
    return own_cores() if quota is None else min(quota, own_cores())


def own_cores() -> int:
    """Cores that this process may run on, of which a container may have the time of fewer."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def core_quota(cgroup: Path = CGROUP) -> int | None:
    """Cores whose time a container may use, rounded up; None: no limit, or none that can be read.

    Version 2 of cgroups writes `<microseconds or max> <period>` into cpu.max, version 1 a file for each.
    """
    try:
        if (file := cgroup / "cpu.max").is_file():
            quota, period = file.read_text(encoding="ascii").split()
        else:
            quota, period = (
                (cgroup / "cpu" / name).read_text(encoding="ascii").strip()
                for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            )
        if quota == "max" or int(quota) <= 0:
            return None
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return None
