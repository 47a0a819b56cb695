"""Lightning's Trainer from the config."""

import importlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lmoe.errors import ConfigError
from lmoe.schema.callback_rules import PREFIX
from lmoe.schema.trainer import Accelerator, TrainerConfig
from lmoe.schema.trainer import Strategy as StrategyName
from lmoe.training.checkpoint_io import DirectCheckpointIO
from lmoe.training.sharded import ShardedStrategy


def build_trainer(loop: TrainerConfig, run_dir: Path, loggers: list[Logger], callbacks: list[Callback]) -> Trainer:
    """A Trainer that leaves validation, checkpoints and progress to our callbacks, on devices that are there
    (build/devices.py)."""
    # NOTE left to itself Lightning would take Apple's MPS, which has no float64: the routing statistics need it.
    on_cpu = loop.accelerator is Accelerator.cpu or not torch.cuda.is_available()
    deterministic: Any = loop.deterministic if on_cpu or not loop.deterministic else "warn"
    return Trainer(
        accelerator="cpu" if on_cpu else "gpu",
        devices=loop.device_ids or loop.devices,
        num_nodes=loop.num_nodes,
        strategy=_strategy(loop),
        precision=loop.precision,  # type: ignore[arg-type]
        max_steps=loop.max_steps,
        accumulate_grad_batches=loop.accumulate_grad_batches,
        gradient_clip_val=loop.gradient_clip_val or None,
        deterministic=deterministic,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=loggers,
        callbacks=callbacks,
        plugins=[DirectCheckpointIO()],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=run_dir,
    )


def extra_callbacks(settings: dict[str, Any]) -> list[Callback]:
    """Lightning callbacks named in the config; only classes under lightning.pytorch.callbacks are made.

    Raises:
        ConfigError: no such class, or arguments that it does not take.
    """
    made = []
    for name, entry in settings.items():
        arguments = {key: value for key, value in entry.items() if key != "_target_"}
        class_name = entry["_target_"].removeprefix(PREFIX)
        found = vars(importlib.import_module(PREFIX.rstrip("."))).get(class_name)
        if not (isinstance(found, type) and issubclass(found, Callback)):
            raise ConfigError(f"callbacks.{name}._target_: {PREFIX}{class_name} is no callback of Lightning")
        if issubclass(found, EarlyStopping):
            arguments["check_on_train_epoch_end"] = False  # Lightning's own default here would be True
        try:
            made.append(found(**arguments))
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise ConfigError(f"callbacks.{name}: {error}") from None
    return made


def _strategy(loop: TrainerConfig) -> str | Strategy:
    match loop.strategy:
        case StrategyName.ddp:
            return DDPStrategy(gradient_as_bucket_view=True)
        case StrategyName.fsdp2:
            return ShardedStrategy(loop.devices * loop.num_nodes)
        case _:
            return "auto"
