"""Runs of `lmoe train` as processes that can be killed: fresh ones, and forks of this one.

A fork has the imports done, which take longer than a run of the micro backbone. NOTE this process must have started no
threads: it imports torch, and computes nothing.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.torture.slow_writes import slow_down

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 3600.0
"""Seconds after which a run counts as hanging."""
POLL = 0.002


@dataclass(slots=True, frozen=True, kw_only=True)
class Ended:
    """A process that is over.

    Args:
        code: its exit code, or minus the signal.
        seconds: of its life.
        text: what it wrote, in one line.
    """

    code: int
    seconds: float
    text: str

    @property
    def killed(self) -> bool:
        """Whether the kill came in time."""
        return self.code == -signal.SIGKILL


@dataclass(slots=True, frozen=True, kw_only=True)
class Kill:
    """When SIGKILL comes.

    Args:
        after: so many seconds after the start at the earliest.
        once: and then as soon as this holds.
    """

    after: float
    once: Callable[[], bool] = lambda: True


@dataclass(slots=True, frozen=True, kw_only=True)
class Way:
    """How a process is started.

    Args:
        fresh: with an interpreter of its own; otherwise a fork.
        slow: with writes slowed down.
    """

    fresh: bool = False
    slow: bool = False


def run(way: Way, arguments: list[str], folder: Path, kill: Kill | None = None) -> Ended:
    """`python -m lmoe.cli.train` with arguments, in a working directory; killed with SIGKILL, or left to end."""
    if way.fresh:
        return _run_fresh(way, arguments, folder, kill)

    def train() -> int:
        from lmoe.cli.train import main

        if way.slow:
            slow_down()
        sys.argv = ["train"]
        return main(arguments)

    return forked(train, folder, kill)


def forked(job: Callable[[], int | None], folder: Path, kill: Kill | None = None) -> Ended:
    """A function in a fork of this process."""
    log, started = folder / f"log-{random.getrandbits(32):08x}", time.monotonic()
    log.touch()  # a kill may come before the child has done anything
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _as_child(job, folder, log)
    end = _wait(lambda: _waited(child), lambda: os.kill(child, signal.SIGKILL), started, kill)
    return _ended(end, started, log)


def _as_child(job: Callable[[], int | None], folder: Path, log: Path) -> None:
    code = 70
    try:
        os.chdir(folder)
        with open(log, "wb") as out, open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.environ.clear()
        os.environ.update(environment())
        code = job() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _run_fresh(way: Way, arguments: list[str], folder: Path, kill: Kill | None) -> Ended:
    module = "benchmarks.torture.slow_writes" if way.slow else "lmoe.cli.train"
    log, started = folder / f"log-{random.getrandbits(32):08x}", time.monotonic()
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    return _ended(_wait(process.poll, process.kill, started, kill), started, log)


def environment() -> dict[str, str]:
    """The environment of this process without W&B settings or an account, offline for the hub, one thread."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "HYDRA", "PL_"))}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "NETRC": os.devnull,
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
    }


def _waited(child: int) -> int | None:
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def _wait(poll: Callable[[], int | None], end: Callable[[], None], started: float, kill: Kill | None) -> int:
    while (code := poll()) is None:
        age = time.monotonic() - started
        if age > LIMIT or (kill is not None and age > kill.after and kill.once()):
            end()
        time.sleep(POLL)
    return code


def _ended(code: int, started: float, log: Path) -> Ended:
    text = " ".join(log.read_text(encoding="utf-8", errors="replace").split())
    log.unlink()
    return Ended(code=code, seconds=time.monotonic() - started, text=text)
