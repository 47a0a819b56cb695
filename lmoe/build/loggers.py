"""metrics.csv always, and a W&B run that never asks for anything."""

import netrc
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers.logger import Logger
from omegaconf import OmegaConf

from lmoe.checkpoint.run_files import Found
from lmoe.errors import ConfigError
from lmoe.schema.logger import LoggerConfig, LoggerKind, WandbMode
from lmoe.schema.pretrain import PretrainConfig
from lmoe.schema.run import RunConfig
from lmoe.training.metrics_csv import MetricsCsv

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

METRICS_FILE, WANDB_ID_FILE = "metrics.csv", "wandb/run_id"


def build_loggers(config: RunConfig | PretrainConfig, run_dir: Path, found: Found | None) -> list[Logger]:
    """The loggers of a run.

    Args:
        config: of the run; recorded by W&B.
        run_dir: holds metrics.csv and wandb/.
        found: the checkpoint that the run continues from; None for a new run.
    """
    loggers: list[Logger] = [MetricsCsv(run_dir / METRICS_FILE, None if found is None else found.step)]
    if config.logger.kind is LoggerKind.wandb:
        loggers.append(_wandb(config, run_dir, found))
    return loggers


def wandb_run_id(run_dir: Path) -> str | None:
    """Id of the W&B run that a run began with; what goes on offline has others, linked to it."""
    file = run_dir / WANDB_ID_FILE
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def plain_values(config: Any) -> dict[str, Any]:
    """A config dataclass as plain nested dicts, for W&B."""
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def wandb_mode(mode: WandbMode) -> str:
    """online, offline or disabled.

    auto is online only where an API key is stored or WANDB_MODE asks for it, so that W&B never prompts.

    Raises:
        ConfigError: online without a key.
    """
    asked = os.environ.get("WANDB_MODE", "")
    if mode is WandbMode.auto and asked in ("online", "offline", "disabled"):
        mode_name = asked
    elif mode is WandbMode.auto:
        mode_name = "online" if _has_api_key() else "offline"
    else:
        mode_name = mode.value
    if mode_name == "online" and not _has_api_key():
        raise ConfigError(
            "logger.mode=online, but no W&B API key is stored; run `wandb login`, or use logger.mode=offline"
        )
    return mode_name


def check_logger(logger: LoggerConfig) -> None:
    """Before anything takes time.

    Raises:
        ConfigError: W&B is to be online, without a key.
    """
    if logger.kind is LoggerKind.wandb:
        wandb_mode(logger.mode)


def _has_api_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb(config: RunConfig | PretrainConfig, run_dir: Path, found: Found | None) -> "WandbLogger":
    import wandb  # slow to import, and only this kind needs it
    from lightning.pytorch.loggers import WandbLogger

    logger, id_file = config.logger, run_dir / WANDB_ID_FILE
    mode = wandb_mode(logger.mode)
    first_id = None if found is None else wandb_run_id(run_dir) or found.wandb_id
    # NOTE wandb ignores an offline resume with the same id: an offline continuation is a run of its own, linked by id.
    continued = {"continues_run": first_id} if first_id and mode != "online" else {}
    run = wandb.init(
        project=logger.project,
        entity=logger.entity,
        group=logger.group or first_id,
        name=f"{config.name}/{run_dir.name}",
        tags=logger.tags,
        dir=str(run_dir),
        config={**plain_values(config), **continued},
        mode=mode,  # type: ignore[arg-type]
        id=first_id if mode == "online" else None,
        resume="allow" if first_id and mode == "online" else None,
        settings=wandb.Settings(silent=True, console="off"),
        reinit="finish_previous",
    )
    # Lightning does this only for runs that it starts itself: without it the x-axis counts log calls, not steps.
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    if mode != "disabled":
        id_file.parent.mkdir(parents=True, exist_ok=True)
        id_file.write_text((first_id or run.id) + "\n", encoding="utf-8")
    return WandbLogger(experiment=run)


def sync_command(run_dir: Path) -> str | None:
    """How to upload an offline run, or None if there is nothing to upload."""
    folders = sorted((run_dir / "wandb").glob("offline-run-*"))
    return shlex.join(["wandb", "sync", *map(str, folders)]) if folders else None
