"""Compose a run with Hydra, and show users messages instead of tracebacks."""

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lmoe.cli.launchers import (
    HERE,
    JobError,
    check_processes,
    hand_on,
    in_own_process,
    launcher_problem,
    lost_job,
    several_processes_here,
)
from lmoe.cli.new_phases import store_empty_phase, typed, with_empty_phases
from lmoe.cli.resume import AUTO, merge_saved, run_to_resume
from lmoe.cli.threads import prepare_threads
from lmoe.errors import ConfigError, LmoeError
from lmoe.schema.keys import near, unknown_key
from lmoe.schema.resources import resource_dir
from lmoe.schema.run_folder import CONFIG_FILE, hydra_quoted
from lmoe.training.stopping import Stopped

Job = Callable[[Any, Path, list[str]], None]
CONFIG_DIR, SEARCHPATH = ("--config-dir", "-cd"), "hydra.searchpath="
"""How a command names folders with more choices for a group."""


def hydra_main(config_name: str, schema: type, job: Job, argv: list[str], *, entry: str) -> int:
    """Compose `conf/<config_name>.yaml` with overrides and run the job, once or as a multirun.

    Args:
        config_name: without .yaml.
        schema: dataclass that the config must fit.
        job: gets the config as an object of the schema, the run directory and the overrides.
        argv: arguments of the command.
        entry: file that runs the verb; Lightning starts it again for each further process of a run.

    Returns:
        The exit code: 0, 1 after a message on stderr, or 128 + the signal that ended it.
    """
    prepare_threads()
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)
    store_empty_phase()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors to us instead of printing a traceback
    failures: list[LmoeError] = []

    def task(composed: DictConfig) -> None:  # NOTE it is pickled for a job in another process: so is what it refers to
        runtime = HydraConfig.get()
        overrides, folder = typed(runtime.overrides.task), Path(runtime.runtime.output_dir)
        launcher = str(runtime.runtime.choices["hydra/launcher"])
        multirun = runtime.mode is not None and runtime.mode.name == "MULTIRUN"
        try:
            if composed.get("resume") == AUTO:
                composed.resume = str(folder) if (folder / CONFIG_FILE).exists() else None
            config = to_object(composed, schema, overrides)
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
            sys.stderr.write(f"{failed}\n")
            if launcher == HERE:
                failures.append(failed)
            raise failed from None

    try:
        arguments = checked_arguments(argv, schema)
        sys.argv = [entry, *arguments]
        hydra.main(version_base="1.3", config_path=str(resource_dir("conf")), config_name=config_name)(task)()
    except JobError as error:
        return 1 if failures else _say(str(error))  # a job in another process may have written to a log
    except LmoeError as error:
        return _say(str(error))
    except Stopped as stopped:
        return stopped.exit_code
    except (HydraException, OmegaConfBaseException) as error:
        return _say(f"config: {_hydra_message(error)}")
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f"{error.filename}: " if error.filename else ""
        return _say(f"{place}{error.strerror}; choose another folder with hydra.run.dir=…, or free space")
    except Exception as error:
        if (lost := lost_job(error)) is None:
            raise
        return _say(lost)
    return _say(str(failures[0])) if failures else 0


def drop_empty(run_dir: Path) -> None:
    """Hydra made a folder for a run that leaves nothing: it goes, with empty parents inside the working directory."""
    folder, here = run_dir, Path.cwd()
    with suppress(OSError):  # somebody else put something there just now
        while folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent
            if here not in folder.parents:
                break


def checked_arguments(argv: list[str], schema: type) -> list[str]:
    """The arguments for Hydra: options in front, as they may not stand between overrides; a resumed run's own folder.

    Raises:
        ConfigError: every override whose key or group choice does not exist, with the nearest that does.
    """
    argv = typed(argv)  # Lightning starts further processes with what was made of it here
    texts = [arg for arg in argv if "=" in arg and not arg.startswith("-")]
    overrides = [o for text in texts if (o := _parsed(text)) is not None]
    multirun = "-m" in argv or "--multirun" in argv
    all_known = not own_folders(argv)
    problems = [p for o in overrides if (p := _override_problem(o, schema, all_known=all_known)) is not None]
    problems += [p for o in overrides if (p := launcher_problem(o, multirun=multirun)) is not None]
    if problems:
        raise ConfigError(problems)
    run = run_to_resume(overrides)
    arguments = with_empty_phases(options_first(argv), resumes=run is not None)
    if run is None:  # a new run, or resume=auto
        return arguments
    if multirun:
        raise ConfigError("resume continues one run, so it cannot be part of a multirun; leave out -m")
    return [*arguments, f"hydra.run.dir={hydra_quoted(run)}"]


def options_first(argv: list[str]) -> list[str]:
    """The same arguments, with -m and folders of choices in front."""
    first = [*(arg for arg in argv if arg in ("-m", "--multirun")), *own_folders(argv)]
    rest = list(argv)
    for arg in first:
        rest.remove(arg)
    return first + rest


def own_folders(argv: list[str]) -> list[str]:
    """The arguments that name folders with more choices for a group."""
    found = []
    for number, arg in enumerate(argv):
        if arg in CONFIG_DIR:
            found += argv[number : number + 2]
        elif arg.startswith(f"{CONFIG_DIR[0]}=") or arg.lstrip("+").startswith(SEARCHPATH):
            found.append(arg)
    return found


def to_object(composed: DictConfig, schema: type, overrides: list[str]) -> Any:
    """The composed config, or on resume the saved one with the overrides, as an object of the schema.

    Raises:
        ConfigError: values that are required and missing, or changes that a resumed run cannot take.
    """
    if composed.get("resume"):
        composed = merge_saved(composed, schema, overrides)
    if missing := sorted(OmegaConf.missing_keys(composed)):
        raise ConfigError([f"{key} is required" for key in missing])
    return OmegaConf.to_object(composed)


def _parsed(text: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None  # Hydra says it itself, with a pointer to the place


def _override_problem(override: Override, schema: type, *, all_known: bool) -> str | None:
    """Of one override; of a choice only where all choices are those of conf/."""
    key = override.key_or_group
    if key.split(".")[0] == "hydra" or key.startswith("hydra/"):
        return None
    group = resource_dir("conf") / key
    if "." not in key and group.is_dir():
        choices = sorted(file.stem for file in group.glob("*.yaml"))
        values = str(override.value()).split(",") if isinstance(override.value(), str) else []
        unknown = [value for value in values if value not in choices and all_known]
        return f"{key}={unknown[0]}: no such choice; {near(unknown[0], choices)}" if unknown else None
    return unknown_key(schema, key.split("."))


def _hydra_message(error: Exception) -> str:
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    if error.__cause__ is not None and str(error.__cause__).splitlines()[:1] not in ([], lines[:1]):
        lines += [line.rstrip() for line in str(error.__cause__).splitlines()]
    kept = [line for line in lines if "full_key" not in line and "object_type" not in line and "HYDRA_FULL" not in line]
    return "\n  ".join(dict.fromkeys(kept))


def _say(message: str) -> int:
    sys.stderr.write(f"{message}\n")
    return 1
