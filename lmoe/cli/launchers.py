"""Where the jobs of a multirun run: `hydra/launcher=…`, what each needs, and what is said when a job is lost."""

from importlib.util import find_spec
from typing import Any

from hydra.core.override_parser.types import Override

from lmoe.errors import ConfigError, LmoeError
from lmoe.schema.keys import near

HERE = "basic"
"""Hydra's own launcher: one job after the other, in this process."""
PLUGINS = {
    "joblib": "hydra_joblib_launcher",
    "submitit_local": "hydra_submitit_launcher",
    "submitit_slurm": "hydra_submitit_launcher",
    "ray": "hydra_ray_launcher",
    "ray_aws": "hydra_ray_launcher",
}
"""Module under hydra_plugins by the name of the launcher."""
LIBRARIES = ("joblib", "ray", "submitit")
"""Whose errors mean that a job ended without an answer."""


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
    if name == HERE or _installed(PLUGINS[name]):
        return None
    plugin = PLUGINS[name].replace("_", "-")
    return f"hydra/launcher={name} needs {plugin}, which is not installed: pip install 'lmoe[launchers]'"


def check_processes(launcher: str, trainer: Any) -> None:
    """
    Args:
        launcher: name of the launcher of this job.
        trainer: the section of the config.

    Raises:
        ConfigError: a job would have to start the further processes of its run, which Lightning can only do where the
            command itself runs; SLURM starts them, one a task.
    """
    if launcher in (HERE, "submitit_slurm") or trainer.devices * trainer.num_nodes == 1:
        return
    raise ConfigError(
        f"trainer.devices={trainer.devices} and trainer.num_nodes={trainer.num_nodes}, but a job of "
        f"hydra/launcher={launcher} is one process on one device; leave them at 1, or use "
        f"hydra/launcher=submitit_slurm with hydra.launcher.tasks_per_node={trainer.devices}"
    )


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
