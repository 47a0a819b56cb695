"""Where the jobs of a multirun run: `hydra/launcher=…`, what each needs, and what is said when a job is lost."""

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from hydra.core.override_parser.types import Override

from lmoe.config.keys import near
from lmoe.errors import ConfigError, LmoeError
from lmoe.files.run_folder import hydra_quoted
from lmoe.resume.stopping import Stopped
from lmoe.run.claim import started_by_others

HERE, SLURM = "basic", "submitit_slurm"
"""Hydra's own launcher: one job after the other, in this process; the one whose jobs may be of several processes."""
BESIDE, ALL_AT_ONCE = "joblib", "submitit_local"
"""Launchers of this machine: as many jobs at a time as they are told, or all of them."""
PLUGINS = {
    "joblib": "hydra_joblib_launcher",
    "submitit_local": "hydra_submitit_launcher",
    "submitit_slurm": "hydra_submitit_launcher",
    "ray": "hydra_ray_launcher",
}
"""Module under hydra_plugins by the name of the launcher."""
LIBRARIES = ("joblib", "ray", "submitit")
"""Whose errors mean that a job ended without an answer."""
STOPS = (signal.SIGINT, signal.SIGTERM)
"""Signals that ask a process to stop."""


class JobError(LmoeError):
    """A job of a multirun failed; the message says which and why, wherever it ran."""


def launcher_problem(override: Override, *, multirun: bool) -> str | None:
    """What is wrong with `hydra/launcher=<name>`, or None; other overrides have no such problem.

    Args:
        override: of the command line.
        multirun: whether -m is given.
    """
    if override.key_or_group != "hydra/launcher":
        return None
    name = str(override.value())
    if name != HERE and name not in PLUGINS:
        return f"hydra/launcher={name}: no such launcher; {near(name, [HERE, *PLUGINS])}"
    if not multirun:
        return f"hydra/launcher={name} has no effect on a single run; add -m for a multirun, or leave it out"
    if name != HERE and not _installed(PLUGINS[name]):
        plugin = PLUGINS[name].replace("_", "-")
        return f"hydra/launcher={name} needs {plugin}, which is not installed: pip install 'lmoe[launchers]'"
    if name == SLURM and shutil.which("srun") is None:
        return f"hydra/launcher={name}: there is no srun here; start it where SLURM is, or try submitit_local"
    return None


def check_processes(launcher: str, trainer: Any) -> None:
    """Refuse a launcher and a trainer that cannot go together.

    Args:
        launcher: name of the launcher of this job.
        trainer: the section of the config.

    Raises:
        ConfigError: a job would have to start the further processes of its run, which Lightning can only do where the
            command itself runs; SLURM starts them, one a task.
    """
    if launcher in (HERE, SLURM) or trainer.processes == 1:
        return
    raise ConfigError(
        f"trainer.devices={trainer.devices} and trainer.num_nodes={trainer.num_nodes}, but a job of "
        f"hydra/launcher={launcher} is one process on one device; leave them at 1, or use "
        f"hydra/launcher=submitit_slurm with hydra.launcher.tasks_per_node={trainer.devices}"
    )


def several_processes_here(launcher: str, trainer: Any) -> bool:
    """Whether Lightning starts the further processes of a job; torchrun and SLURM have started them already."""
    return launcher == HERE and trainer.processes > 1 and not started_by_others()


def in_own_process(command: list[str], folder: Path) -> None:
    """One job of a multirun as a run of its own: Lightning can start the processes of one run in a process, not of two.

    Args:
        command: file that runs the verb, and arguments.
        folder: of the run.

    Raises:
        Stopped: a signal has ended it, and all jobs.
        JobError: it failed, and has said why.
    """
    code = exit_code_of([sys.executable, *command, f"hydra.run.dir={hydra_quoted(folder)}"])
    if (signum := ended_by(code)) is not None:
        raise Stopped(signum)
    if code:
        raise JobError(f"its run ended with exit code {code}")


def exit_code_of(command: list[str], environment: Mapping[str, str] | None = None, log: BinaryIO | None = None) -> int:
    """The exit code of a process, to which signals are passed on.

    Args:
        environment: None: that of this process.
        log: gets what it writes; None: the terminal of this process.

    Raises:
        Stopped: this process was sent a signal; one that its process alone was sent shows in the exit code.
    """
    job: subprocess.Popen[Any] | None = None
    received: list[int] = []
    early: list[int] = []

    def passed_on(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        if signum == signal.SIGINT:
            return  # Ctrl-C reaches all processes of a terminal by itself
        if job is None:
            early.append(signum)
        else:
            job.send_signal(signum)

    said = {} if log is None else {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    # Only the main thread may take signals; NOTE before the process is there, which would outlive one that comes first.
    takes_signals = threading.current_thread() is threading.main_thread()
    before = {signum: signal.signal(signum, passed_on) for signum in STOPS} if takes_signals else {}
    try:
        started = job = subprocess.Popen(command, env=environment, **said)
        while early:
            started.send_signal(early.pop(0))
        code = started.wait()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if received:
        raise Stopped(received[0])
    return code


def ended_by(code: int) -> int | None:
    """The signal to stop that has ended a process with this exit code; None: it ended otherwise."""
    return next((signum for signum in STOPS if code in (128 + signum, -signum)), None)


def hand_on(signum: int) -> None:
    """Call what listened to a signal before the run, which it has ended and which is saved: submitit puts the job into
    the queue again."""
    handler = signal.getsignal(signum)
    if callable(handler) and handler is not signal.default_int_handler:
        handler(signum, None)


def lost_job(error: Exception) -> str | None:
    """What to say of a job that was killed, ran out of time or could not be sent; None: an error of another kind."""
    library = type(error).__module__.split(".")[0]
    if library not in LIBRARIES:
        return None
    where = "; its log is in .submitit/ of the sweep's folder" if library == "submitit" else ""
    lines = "\n  ".join(line for line in str(error).splitlines() if line.strip())
    return f"a job ended without an answer ({library}: {type(error).__name__}){where}\n  {lines}"


def _installed(plugin: str) -> bool:
    try:
        return find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:  # there are no plugins at all
        return False
