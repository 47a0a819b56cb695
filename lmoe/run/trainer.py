"""Lightning's Trainer from the config."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lmoe.config.trainer import TrainerConfig
from lmoe.errors import ConfigError
from lmoe.resume.checkpoint_io import DirectCheckpointIO
from lmoe.rules.callbacks import PREFIX, REFUSED, own_class, own_module
from lmoe.run.devices import own_gpus
from lmoe.training.replicated import ReplicatedStrategy
from lmoe.training.sharded import ShardedStrategy
from lmoe.training.spread import SpreadStrategy
from lmoe.vocabulary import Accelerator
from lmoe.vocabulary import Strategy as StrategyName


def build_trainer(loop: TrainerConfig, run_dir: Path, loggers: list[Logger], callbacks: list[Callback]) -> Trainer:
    """A Trainer that leaves validation, checkpoints and progress to our callbacks, on devices that are there
    (run/devices.py)."""
    # NOTE left to itself Lightning would take Apple's MPS, which has no float64: the routing statistics need it.
    on_cpu = loop.accelerator is Accelerator.cpu or not torch.cuda.is_available()
    deterministic: Any = loop.deterministic if on_cpu or not loop.deterministic else "warn"
    devices: Any = loop.device_ids or loop.devices
    if loop.strategy is StrategyName.device_map:
        devices = 1 if on_cpu else own_gpus(loop)[:1]  # one process, whose batches go to the first
    return Trainer(
        accelerator="cpu" if on_cpu else "gpu",
        devices=devices,
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


def extra_callbacks(settings: dict[str, Any], callbacks_from: str | None = None) -> list[Callback]:
    """Callbacks named in the config; only classes under lightning.pytorch.callbacks and of one module of the user are
    made.

    Args:
        settings: by name, each with a _target_.
        callbacks_from: the user's module or file, which is run.

    Raises:
        ConfigError: no such module or class, one that cannot work in a run, or arguments that it does not take.
    """
    made = []
    for name, entry in settings.items():
        arguments = {key: value for key, value in entry.items() if key != "_target_"}
        target = entry["_target_"]
        if callbacks_from is not None and (own := own_class(target, callbacks_from)) is not None:
            found = getattr(_imported(callbacks_from), own, None)
        else:
            found = vars(importlib.import_module(PREFIX.rstrip("."))).get(target.removeprefix(PREFIX))
        if not (isinstance(found, type) and issubclass(found, Callback)):
            raise ConfigError(f"callbacks.{name}._target_: {target} is no callback of Lightning")
        if refused := next((base.__name__ for base in found.__mro__ if base.__name__ in REFUSED), None):
            raise ConfigError(f"callbacks.{name}: {target} {REFUSED[refused]}; leave it out")
        if issubclass(found, EarlyStopping):
            arguments["check_on_train_epoch_end"] = False  # Lightning's own default here would be True
        try:
            made.append(found(**arguments))
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise ConfigError(f"callbacks.{name}: {error}") from None
    return made


def _imported(callbacks_from: str) -> ModuleType:
    """The user's module, run once; what goes wrong inside it is shown as it is.

    Raises:
        ConfigError: there is none.
    """
    name = own_module(callbacks_from)
    if not callbacks_from.endswith(".py"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # of a module that it imports itself
            raise ConfigError(
                f"callbacks_from={callbacks_from}: no such module; install it, set PYTHONPATH to its folder, or name "
                "its file, as in callbacks_from=./my_callbacks.py"
            ) from None
    file = Path(callbacks_from).expanduser().resolve()
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(file):
        return known
    spec = importlib.util.spec_from_file_location(name, file)
    if known is not None or spec is None or spec.loader is None or not file.is_file():
        why = "a module of this name is there already; give it another" if known is not None else "no such file"
        raise ConfigError(f"callbacks_from={callbacks_from}: {why}")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _strategy(loop: TrainerConfig) -> str | Strategy:
    match loop.strategy:
        case StrategyName.ddp:
            return ReplicatedStrategy()
        case StrategyName.fsdp2:
            return ShardedStrategy(loop.processes)
        case StrategyName.device_map:
            return SpreadStrategy(own_gpus(loop))
        case _:
            return "auto"
