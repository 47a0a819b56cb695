"""metrics.csv always, and a W&B run that never asks for anything."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers.logger import Logger
from omegaconf import OmegaConf

from lmoe.config.logger import LoggerConfig
from lmoe.config.pretrain import PretrainConfig
from lmoe.config.run import RunConfig
from lmoe.files.run_folder import METRICS_FILE
from lmoe.files.small_file import Reader, make_way
from lmoe.resume.run_files import FoundCheckpoint
from lmoe.run.wandb_run import LONGEST_NAME, check_environment, start_wandb, wandb_mode
from lmoe.training.metrics_csv import MetricsCsv
from lmoe.vocabulary import LoggerKind

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

WANDB_ID_FILE = "wandb/run_id"
WANDB_ID = Reader(cure="put it back, or remove it to go on as a new run of W&B", what="it")


def build_loggers(
    config: RunConfig | PretrainConfig, run_dir: Path, found: FoundCheckpoint | None, say: Callable[[str], object]
) -> list[Logger]:
    """The loggers of a run.

    Args:
        config: of the run; recorded by W&B.
        run_dir: holds metrics.csv and wandb/.
        found: the checkpoint that the run continues from; None for a new run.
        say: told where W&B is not what it was to be.
    """
    loggers: list[Logger] = [MetricsCsv(run_dir / METRICS_FILE, None if found is None else found.step)]
    if config.logger.kind is LoggerKind.wandb:
        loggers.append(_wandb(config, run_dir, found, say))
    return loggers


def wandb_run_id(run_dir: Path) -> str | None:
    """Id of the W&B run that a run began with; what goes on offline has others, linked to it.

    Raises:
        CheckpointError: the file that keeps it is damaged.
    """
    file = run_dir / WANDB_ID_FILE
    return WANDB_ID.word(file) if file.exists() else None


def plain_values(config: Any) -> dict[str, Any]:
    """A config dataclass as plain nested dicts, for W&B."""
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def check_logger(logger: LoggerConfig) -> None:
    """Check the settings and the environment of W&B before anything takes time.

    Raises:
        ConfigError: W&B is to be online, without a key; or an environment that W&B refuses.
    """
    if logger.kind is LoggerKind.wandb:
        wandb_mode(logger.mode)
        check_environment()


def _wandb(
    config: RunConfig | PretrainConfig, run_dir: Path, found: FoundCheckpoint | None, say: Callable[[str], object]
) -> "WandbLogger":
    from lightning.pytorch.loggers import WandbLogger

    logger, id_file = config.logger, run_dir / WANDB_ID_FILE
    first_id = None if found is None else wandb_run_id(run_dir) or found.wandb_id

    def arguments(mode: str) -> dict[str, Any]:
        """NOTE wandb ignores an offline resume with the same id: an offline continuation is a run of its own, linked by
        id."""
        online = first_id is not None and mode == "online"
        continued = {"continues_run": first_id} if first_id and not online else {}
        return {
            "project": logger.project,
            "entity": logger.entity,
            "group": logger.group or first_id,
            "name": f"{config.name}/{run_dir.name}"[:LONGEST_NAME],
            "tags": logger.tags,
            "job_type": logger.job_type or ("pretrain" if isinstance(config, PretrainConfig) else "train"),
            "notes": logger.notes,
            "config": {**plain_values(config), **continued},
            "id": first_id if online else None,
            "resume": "allow" if online else None,
        }

    run, mode = start_wandb(wandb_mode(logger.mode), arguments, run_dir, say)
    # Lightning does this only for runs that it starts itself: without it the x-axis counts log calls, not steps.
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    if mode != "disabled":
        id_file.parent.mkdir(parents=True, exist_ok=True)
        make_way(id_file)
        id_file.write_text((first_id or run.id) + "\n", encoding="utf-8")
    return WandbLogger(experiment=run)


def sync_command(run_dir: Path) -> str | None:
    """How to upload an offline run, or None if there is nothing to upload."""
    folders = sorted((run_dir / "wandb").glob("offline-run-*"))
    return shlex.join(["wandb", "sync", *map(str, folders)]) if folders else None
