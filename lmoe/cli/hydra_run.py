"""Compose a run with Hydra, and show users messages instead of tracebacks."""

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lmoe.cli.compose import Check, compose_config, problems_of, problems_of_choices, store_defaults
from lmoe.cli.errors import with_keys
from lmoe.cli.launchers import (
    HERE,
    JobError,
    check_processes,
    hand_on,
    in_own_process,
    lost_job,
    several_processes_here,
)
from lmoe.cli.multirun_table import JobNotes, job_notes
from lmoe.cli.overrides import MULTIRUN, Command, first_point, own_folders, read_command
from lmoe.cli.resume import AUTO, merge_saved
from lmoe.cli.threads import prepare_threads
from lmoe.config.keys import near
from lmoe.config.problems import raise_problems
from lmoe.config.read import read_section
from lmoe.errors import ConfigError, LmoeError
from lmoe.files.resources import resource_dir
from lmoe.files.run_folder import CONFIG_FILE
from lmoe.resume.stopping import Stopped
from lmoe.rules.trust import trust_problems

Job = Callable[[Any, Path, list[str]], None]


def hydra_main(config_name: str, schema: type, check: Check, job: Job, argv: list[str], *, entry: str) -> int:
    """Compose `conf/<config_name>.yaml` with overrides and run the job, once or as a multirun.

    Args:
        config_name: without .yaml.
        schema: dataclass that the config must fit.
        check: gives the problems of such a config.
        job: gets a config without problems, the run directory and the overrides.
        argv: arguments of the command.
        entry: file that runs the verb; Lightning starts it again for each further process of a run.

    Returns:
        The exit code: 0, 1 after a message on stderr, or 128 + the signal that ended it.
    """
    with job_notes(any(flag in argv for flag in MULTIRUN), argv) as notes:
        return _compose_and_run(config_name, schema, check, job, argv, entry=entry, notes=notes)


def _compose_and_run(
    config_name: str, schema: type, check: Check, job: Job, argv: list[str], *, entry: str, notes: JobNotes
) -> int:
    """Do what `hydra_main` says, and leave notes of the jobs of a multirun; return the exit code."""
    prepare_threads()
    store_defaults(config_name, schema)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors to us instead of printing a traceback
    failures: list[LmoeError] = []
    composed_once: list[bool] = []
    named: list[str] = []  # keys that this command line sets; not those that a sweep's file adds

    def task(composed: DictConfig) -> None:  # NOTE it is pickled for a job in another process: so is what it refers to
        with notes.job(composed):
            do(composed)

    def do(composed: DictConfig) -> None:
        composed_once.append(True)
        runtime = HydraConfig.get()
        overrides, folder = list(runtime.overrides.task), Path(runtime.runtime.output_dir)
        launcher = str(runtime.runtime.choices["hydra/launcher"])
        multirun = runtime.mode is not None and runtime.mode.name == "MULTIRUN"
        try:
            if composed.get("resume") == AUTO:
                composed.resume = str(folder) if (folder / CONFIG_FILE).exists() else None
            config = to_object(composed, schema, overrides, check)
            raise_problems(trust_problems(config, named))
            check_processes(launcher, config.trainer)
            if multirun and several_processes_here(launcher, config.trainer):
                in_own_process([entry, *own_folders(sys.argv), *overrides], folder)
            else:
                job(config, folder, overrides)
        except Stopped as stopped:
            drop_empty(folder)
            hand_on(stopped.signum)
            raise
        except LmoeError as error:
            drop_empty(folder)
            if not multirun:
                failures.append(error)  # raised, it would come with a line of Hydra's above it
                return
            # Hydra raises only the first, once all have ended.
            failed = JobError(f"job {runtime.job.num} failed ({' '.join(overrides)})\n{error}")
            _say(str(failed))
            if launcher == HERE:
                failures.append(failed)
            raise failed from None

    command = None
    try:
        command = read_command(argv, config_name, schema)
        named += [setting.key for setting in command.settings]
        notes.settings += [setting.text for setting in command.settings if not setting.of_hydra]
        if command.problems:
            raise ConfigError(command.problems + _problems_beside(command, config_name, schema, check))
        if command.places:
            raise_problems(problems_of_choices(config_name, first_point(command), named))
        sys.argv = [entry, *command.arguments]
        store_defaults(config_name, schema)
        hydra.main(version_base="1.3", config_path=str(resource_dir("conf")), config_name=config_name)(task)()
    except JobError as error:
        return 1 if failures else _say(str(error))  # a job in another process may have written to a log
    except LmoeError as error:
        return _say(str(error))
    except Stopped as stopped:
        return stopped.exit_code
    except Exception as error:
        if (lost := lost_job(error)) is not None:
            return _say(lost)
        of_hydra = isinstance(error, HydraException | OmegaConfBaseException)  # NOTE one of them is an OSError too
        if isinstance(error, OSError) and not of_hydra:
            return _say(_place_problem(error))
        if command is None or (composed_once and not of_hydra):
            raise  # one of ours
        found = _problems_beside(command, config_name, schema, check)
        return _say(str(ConfigError(found or [composition_problem(error)])))
    return _say(str(failures[0])) if failures else 0


def _place_problem(error: OSError) -> str:
    """What to say of a run directory that cannot be had.

    Raises:
        OSError: it is about something else.
    """
    if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise error
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror}; choose another folder with hydra.run.dir=…, or free space"


def _problems_beside(command: Command, config_name: str, schema: type, check: Check) -> list[str]:
    """What else is wrong with a command that has a problem already, as far as the rest of it can be composed."""
    try:
        config = compose_config(config_name, schema, first_point(command))
    except Exception as error:  # whatever stops Hydra is said as a problem of the config, like all others
        return [composition_problem(error)]
    if config.get("resume"):
        return read_section(schema, config)[1].problems  # what else is set is in the run's own folder
    return problems_of(config, schema, check)[1]


def drop_empty(run_dir: Path) -> None:
    """Hydra made a folder for a run that leaves nothing: it goes, with empty parents inside the working directory."""
    folder, here = run_dir, Path.cwd()
    with suppress(OSError):  # somebody else put something there just now
        while folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent
            if here not in folder.parents:
                break


def to_object(composed: DictConfig, schema: type, overrides: list[str], check: Check) -> Any:
    """The composed config, or on resume the saved one with the overrides, as an object of the schema.

    Raises:
        ConfigError: every problem of it, or changes that a resumed run cannot take.
    """
    if composed.get("resume"):
        typed, reading = read_section(schema, composed)
        raise_problems(reading.problems)
        composed = merge_saved(OmegaConf.structured(typed), schema, overrides)
    config, problems = problems_of(composed, schema, check)
    raise_problems(problems)
    return config


def composition_problem(error: Exception) -> str:
    """What Hydra could not compose, in our words where it is a choice that a file names."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={name}: no such choice; {near(name, list(error.options))}"
    kind = "" if isinstance(error, HydraException | OmegaConfBaseException) else f"{type(error).__name__}: "
    return kind + _hydra_message(error)


def _hydra_message(error: Exception) -> str:
    """What Hydra says in an error, in one line, with the key that it is about."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if error.__cause__ is not None and str(error.__cause__).splitlines()[:1] not in ([], lines[:1]):
        lines += [line.strip() for line in str(error.__cause__).splitlines()]
    noise = ("full_key", "object_type", "reference_type", "HYDRA_FULL", "provider=", "Config search path")
    kept = [line for line in lines if not any(part in line for part in noise)]
    key = getattr(error, "full_key", None)
    return (f"{key}: " if key else "") + " ".join(dict.fromkeys(kept))


def _say(message: str) -> int:
    sys.stderr.write(f"{with_keys(message)}\n")
    return 1
