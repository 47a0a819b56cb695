"""Run one training from its config to the last table."""

import time
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import OmegaConf
from rich.console import Console

from lmoe.build.announce import describe, quiet_libraries
from lmoe.build.finish import finish
from lmoe.build.loggers import build_loggers, check_logger, plain_values
from lmoe.build.memory import memory_advice
from lmoe.build.parts import Parts, build_parts
from lmoe.build.provenance import provenance, write_provenance
from lmoe.build.trainer import build_trainer, checkpoint_step, extra_callbacks
from lmoe.errors import TrainingError
from lmoe.injection.apply import injected
from lmoe.schema.analysis import KnockOut
from lmoe.schema.phase import Role
from lmoe.schema.phase_rules import present_roles
from lmoe.schema.run import RunConfig
from lmoe.schema.run_folder import CONFIG_FILE
from lmoe.training.callbacks.balance_step import BalanceStep
from lmoe.training.callbacks.collapse_watch import CollapseWatch
from lmoe.training.callbacks.phase_switch import PhaseSwitch
from lmoe.training.callbacks.progress_line import ProgressLine
from lmoe.training.callbacks.rng_state import RngState
from lmoe.training.callbacks.run_checkpoint import LAST, RunCheckpoint
from lmoe.training.callbacks.step_metrics import StepMetrics
from lmoe.training.callbacks.validation import Validation

PROVENANCE_FILE, CHECKPOINTS = "provenance.json", "checkpoints"
LOOK_EVERY_N_STEPS = 10


def train(config: RunConfig, run_dir: Path, overrides: list[str], console: Console) -> None:
    """Train, write the adapter and the report, print the table.

    Args:
        config: validated.
        run_dir: the run's folder; with config.resume it holds the run to continue.
        overrides: as given on the command line, for the provenance.
        console: for messages and the live line.

    Raises:
        LmoeError: anything that the user can mend.
    """
    quiet_libraries()
    check_logger(config.logger)
    more_callbacks = extra_callbacks(config.callbacks)
    started = time.monotonic()
    last = run_dir / CHECKPOINTS / LAST
    resume_step = checkpoint_step(last) if config.resume and last.exists() else None
    parts = build_parts(config)
    loggers: list[Logger] = []
    if rank_zero_only.rank == 0:  # of several processes, one writes
        write_records(parts, run_dir, overrides)
        describe(parts, run_dir, console)
        name = f"{config.name}/{run_dir.name}"
        loggers = build_loggers(config.logger, run_dir, name=name, config=plain_values(config), resume_step=resume_step)
    failed = True
    try:
        with ProgressLine(config.trainer.max_steps, console, enabled=config.trainer.enable_progress_bar) as line:
            validation = Validation(config.trainer.val_every_n_steps, line.say, config.analysis.permutations)
            watch = collapse_watch(parts, line, loggers)
            learns = Role.router in present_roles(config.injection, config.moe)
            callbacks = [
                PhaseSwitch(),
                RngState(),
                BalanceStep(),
                StepMetrics(config.trainer.log_every_n_steps, line.step),
                *([watch] if learns else []),
                validation,
                *more_callbacks,
                RunCheckpoint(run_dir / CHECKPOINTS, config.checkpoint.every_n_steps),
            ]
            trainer = build_trainer(config.trainer, run_dir, loggers, callbacks)
            with memory_advice(config):
                checkpoint = last if resume_step is not None else None
                trainer.fit(parts.module, datamodule=parts.datamodule, ckpt_path=checkpoint, weights_only=True)
            parts.module.to(trainer.strategy.root_device)  # NOTE Lightning has moved it to the CPU
            if validation.results.step != trainer.global_step:  # stopped early, or resumed after the last step
                validation.run(trainer, parts.module)
            if config.analysis.knock_out is not KnockOut.none:
                line.say(f"silencing {config.analysis.knock_out} one at a time")
                validation.knock_out(trainer, parts.module, config.analysis.knock_out)
        finish(parts, run_dir, trainer, validation.results, watch.messages, time.monotonic() - started, console)
        failed = False
    except SystemExit:  # Lightning's answer to Ctrl-C
        console.print(f"stopped; resume={run_dir} goes on from the last checkpoint", markup=False, soft_wrap=True)
        raise
    finally:
        for logger in loggers:
            logger.finalize("failed" if failed else "success")
        finish_wandb(exit_code=int(failed))


def collapse_watch(parts: Parts, line: ProgressLine, loggers: list[Logger]) -> CollapseWatch:
    """The watch over routers that learn; it warns in the terminal, and by a W&B alert."""

    def warn(message: str) -> None:
        line.say(f"warning: {message}")
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.alert(title="routing collapse", text=message)

    return CollapseWatch(
        LOOK_EVERY_N_STEPS,
        warn,
        aux_loss_coef=injected(parts.model).trace.losses.aux_loss_coef,
        stop=parts.config.trainer.stop_on_collapse,
    )


def write_records(parts: Parts, run_dir: Path, overrides: list[str]) -> None:
    """config.yaml and provenance.json.

    Raises:
        TrainingError: the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        text = OmegaConf.to_yaml(OmegaConf.structured(parts.config))
        (run_dir / CONFIG_FILE).write_text(text, encoding="utf-8")
        record = provenance(
            seed=parts.config.seed,
            overrides=overrides,
            data=parts.prepared.report.data_hashes,
            backbone=parts.base_model,
        )
        write_provenance(run_dir / PROVENANCE_FILE, record)
    except OSError as error:
        raise TrainingError(f"{run_dir} cannot be written: {error.strerror or error}") from None


def finish_wandb(*, exit_code: int) -> None:
    """End the W&B run, or the next job of a multirun would log into it."""
    import sys

    if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
        wandb.finish(exit_code=exit_code)
