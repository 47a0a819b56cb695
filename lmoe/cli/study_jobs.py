"""Jobs of a study through Hydra's launchers: each in a process of its own, wherever the launcher runs it."""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from lmoe.cli.compose import store_defaults
from lmoe.cli.launchers import ALL_AT_ONCE, BESIDE, HERE, SLURM, ended_by, exit_code_of, lost_job
from lmoe.cli.threads import share_cores, usable_cores
from lmoe.config.run import RunConfig
from lmoe.errors import ConfigError, LmoeError, StudyError
from lmoe.files.resources import resource_dir
from lmoe.files.run_folder import hydra_quoted
from lmoe.report.files import write_bytes
from lmoe.report.wording import duration
from lmoe.rules.study import by_key
from lmoe.run.machine import cpu_model, gpu_models
from lmoe.study.jobs import (
    DIVERGED,
    DIVERGED_CODE,
    FAILURE_FILE,
    LOG_FILE,
    PRUNED_FILE,
    SECONDS_FILE,
    Job,
    read_job,
    write_job,
)

LAST_LINES = 40
"""Of the log of a job that has failed, for its message."""
PROBLEM = "- "
"""With which each problem of a list begins."""
MOST_PROBLEMS = 4
"""Of such a list, in the reason of a failure."""
PARALLEL = {BESIDE: "n_jobs", SLURM: "array_parallelism"}
"""Setting of a launcher that says how many jobs run beside one another; of others one does, as far as is known."""
ON_THIS_MACHINE = (HERE, BESIDE, ALL_AT_ONCE)
"""Launchers whose jobs share its cores."""
GOES_ON = "What is done is kept; the same command goes on"


@dataclass(slots=True, frozen=True)
class JobTask:
    """What a launcher calls for each job; pickled where it runs elsewhere.

    Args:
        total: jobs of this launch.
        parallel: how many run at a time.
        sharing: how many of these share the cores of a machine.
        machine: on which they run.
    """

    total: int
    parallel: int
    sharing: int
    machine: str

    def __call__(self, config: DictConfig) -> int:
        runtime = HydraConfig.get()
        place, number = Path(runtime.runtime.output_dir), int(runtime.job.num) + 1
        started, job = time.monotonic(), read_job(place)
        first = not (place / LOG_FILE).exists()
        environment = dict(os.environ)
        if self.sharing > 1:
            share_cores(environment, self.sharing)
        with (place / LOG_FILE).open("ab") as log:
            code = exit_code_of([sys.executable, "-m", "lmoe.cli.study_job", str(place)], environment, log)
        seconds = time.monotonic() - started
        pruned = (place / PRUNED_FILE).exists()
        if code:
            again = {DIVERGED: True} if code == DIVERGED_CODE else {}
            _note(place / FAILURE_FILE, {"exit_code": code, "reason": reason(place, code)} | again)
        elif first and not pruned:  # it has ended before its time
            where = {"machine": self.machine, "parallel": self.parallel}
            _note(place / SECONDS_FILE, {"seconds": seconds} | where)
        done = "pruned" if pruned else "done"
        state = f"failed (exit code {code}, see {place / LOG_FILE})" if code else done
        sys.stdout.write(f"[{number}/{self.total}] {job.label}: {state}, {duration(seconds)}\n")
        sys.stdout.flush()
        return code


def _note(file: Path, what: dict[str, Any]) -> None:
    write_bytes(file, (json.dumps(what) + "\n").encode())


def reason(place: Path, code: int) -> str:
    """The last thing that a job has said, in a line: of a list of problems the first ones, and how many more."""
    lines = (place / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    said = [line.strip() for line in lines if line.strip()]
    if code in (-9, 137):
        return "it was killed, perhaps for want of memory"
    if (signum := ended_by(code)) is not None:
        return f"it was stopped by {signal.Signals(signum).name}, which the study was not sent"
    problems = list(takewhile(lambda line: line.startswith(PROBLEM), reversed(said)))[::-1]
    if problems:
        more = f"; and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        return "; ".join(line.removeprefix(PROBLEM) for line in problems[:MOST_PROBLEMS]) + more
    return said[-1] if said else f"exit code {code}"


class JobLauncher:
    """Does jobs with a launcher of Hydra.

    Args:
        settings: `hydra/launcher=…` and `hydra.launcher.…=…`.
        folder: of the study.
    """

    def __init__(self, settings: Sequence[str], folder: Path) -> None:
        self.settings, self.folder = list(settings), folder

    @property
    def name(self) -> str:
        """What the settings call the launcher; without one that of Hydra, which does one job at a time."""
        return by_key(self.settings).get("hydra/launcher", HERE).strip("'\"")

    @property
    def parallel(self) -> int:
        """Jobs that run beside one another, of as many as there are."""
        hydra = _hydra()
        try:
            return self._parallel(hydra.compose_config("train", self.settings, RunMode.MULTIRUN))
        finally:
            GlobalHydra.instance().clear()

    @property
    def machine(self) -> str:
        """What jobs run on: its processor, the cores that they may use, its GPUs; or the launcher that sends them
        elsewhere. NOTE no name of the machine, which containers change at each start."""
        if self.name not in ON_THIS_MACHINE:
            return self.name
        return ", ".join([cpu_model(), f"{usable_cores()} cores", *gpu_models()])

    def check_limit(self, max_time: str | None) -> None:
        """Refuse a limit of time with a launcher that decides itself when jobs run.

        Raises:
            ConfigError: says which launchers keep one.
        """
        if max_time is not None and self.name not in (HERE, BESIDE):
            when = "begins all of them at once" if self.name == ALL_AT_ONCE else "may let them wait in a queue"
            raise ConfigError(
                f"study.max_time={max_time}: what fits into it is planned job by job, and hydra/launcher={self.name} "
                f"{when}; use hydra/launcher={BESIDE} with hydra.launcher.n_jobs, or study.max_time=null"
            )

    def alone(self, settings: Sequence[str], folder: Path) -> int:
        """Train into a folder, in a process of its own, and return its exit code.

        Raises:
            Stopped: a signal has ended the study.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG_FILE).open("ab") as log:
            return exit_code_of(
                [sys.executable, "-m", "lmoe.cli.train", *settings, f"hydra.run.dir={hydra_quoted(folder)}"], None, log
            )

    def __call__(self, jobs: Sequence[Job]) -> None:
        """Write the jobs and do them; what a job leaves says how it went.

        Raises:
            StudyError: the launcher has lost a job, the files of one cannot be read or written, or another study's job
                is in its folder.
            Stopped: a signal has ended the study.
        """
        for job in jobs:
            write_job(job, self.folder)
        hydra = _hydra()
        try:
            config = hydra.compose_config(
                "train", [*self.settings, f"hydra.sweep.dir={hydra_quoted(self.folder)}"], RunMode.MULTIRUN
            )
            parallel = self._parallel(config, len(jobs))
            sharing = parallel if self.name in ON_THIS_MACHINE else 1
            launcher: Any = Plugins.instance().instantiate_launcher(
                hydra_context=HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config)),
                task_function=JobTask(len(jobs), parallel, sharing, self.machine),
                config=config,
            )
            returns = launcher.launch([[f"hydra.sweep.subdir={hydra_quoted(job.place)}"] for job in jobs], 0)
        except Exception as error:
            if (lost := lost_job(error)) is None:
                raise
            raise StudyError(f"{lost}\n{GOES_ON}") from None
        finally:
            GlobalHydra.instance().clear()
        _check_each(jobs, returns)

    def _parallel(self, config: DictConfig, jobs: int | None = None) -> int:
        """Jobs that run beside one another: below 0 it leaves cores free, as joblib has it, -1 none.

        Args:
            config: composed with the settings.
            jobs: of this launch; None: not known yet, and as many as there are cores.
        """
        if self.name == ALL_AT_ONCE:
            return usable_cores() if jobs is None else jobs
        key = PARALLEL.get(self.name)
        count = 1 if key is None else int(config.hydra.launcher[key] or 1)
        return max(1, usable_cores() + 1 + count) if count < 0 else count


def _check_each(jobs: Sequence[Job], returns: Sequence[JobReturn]) -> None:
    """Refuse what went wrong around the process of a job, of which the launcher raises nothing; how the process itself
    went is what the job has left.

    Raises:
        StudyError: names the first of such jobs, and why.
    """
    for job, found in zip(jobs, returns, strict=True):
        if found.status is JobStatus.FAILED:
            error = found._return_value
            why = str(error) if isinstance(error, LmoeError) else f"{type(error).__name__}: {error}"
            raise StudyError(f"{job.label} could not be done: {why}\n{GOES_ON}")


def _hydra() -> Hydra:
    store_defaults("train", RunConfig)
    GlobalHydra.instance().clear()
    return Hydra.create_main_hydra2("study", create_config_search_path(str(resource_dir("conf").resolve())))
