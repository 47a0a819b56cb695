"""Run one training from its config to the last table."""

import time
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from rich.console import Console

from lmoe.build.announce import describe, quiet_libraries
from lmoe.build.finish import finish
from lmoe.build.loggers import build_loggers, check_logger, wandb_run_id
from lmoe.build.memory import memory_advice
from lmoe.build.parts import Parts, build_parts
from lmoe.build.provenance import add_provenance, provenance
from lmoe.build.records import write_config
from lmoe.build.trainer import build_trainer, extra_callbacks
from lmoe.checkpoint.run_files import FOLDER, found_in, offer, set_aside
from lmoe.errors import CheckpointError
from lmoe.injection.record import injected
from lmoe.schema.analysis import KnockOut
from lmoe.schema.phase import Role
from lmoe.schema.phase_rules import present_roles
from lmoe.schema.run import RunConfig
from lmoe.schema.trainer import max_seconds
from lmoe.training.callbacks.collapse_watch import CollapseWatch
from lmoe.training.callbacks.finite_steps import FiniteSteps
from lmoe.training.callbacks.gradient_average import GradientAverage
from lmoe.training.callbacks.kept_experts import KeptExperts
from lmoe.training.callbacks.phase_switch import PhaseSwitch
from lmoe.training.callbacks.plateau_start import PlateauStart
from lmoe.training.callbacks.progress_line import ProgressLine
from lmoe.training.callbacks.rng_state import RngState
from lmoe.training.callbacks.run_checkpoint import RunCheckpoint
from lmoe.training.callbacks.step_metrics import StepMetrics
from lmoe.training.callbacks.stop_request import StopRequest
from lmoe.training.callbacks.validation import Validation
from lmoe.training.callbacks.window_end import WindowEnd
from lmoe.training.stopping import Stopped, StopSignals

LOOK_EVERY_N_STEPS = 10


def train(
    config: RunConfig,
    run_dir: Path,
    overrides: list[str],
    console: Console,
    signals: StopSignals,
    run_id: str | None = None,
) -> None:
    """Train, write the adapter and the report, print the table.

    Args:
        config: validated.
        run_dir: the run's folder; with config.resume it holds the run to continue.
        overrides: as given on the command line, for the provenance.
        console: for messages and the live line.
        signals: those that end the run; they wait for a safe place while it trains.
        run_id: of the run; None: this process writes nothing.

    Raises:
        LmoeError: anything that the user can mend.
        Stopped: a signal ended the run, and its checkpoint is written.
    """
    quiet_libraries()
    check_logger(config.logger)
    more_callbacks = extra_callbacks(config.callbacks)
    started, folder = time.monotonic(), run_dir / FOLDER
    found = found_in(folder, run_id, wanted=config.checkpoint.resume_from) if config.resume else None
    parts = build_parts(config, fill_experts=found is None)
    loggers: list[Logger] = []
    wandb_id = None
    if run_id is not None:
        if found is not None and (behind := set_aside(folder, found)):
            console.print(f"set aside: {', '.join(behind)}", highlight=False)
        write_records(parts, run_dir, overrides)
        describe(parts, run_dir, console)
        loggers = build_loggers(config, run_dir, found)
        wandb_id = wandb_run_id(loggers)
    failed = True
    try:
        with ProgressLine(config.trainer.max_steps, console, enabled=config.trainer.enable_progress_bar) as line:
            validation = Validation(config.trainer.val_every_n_steps, line.say, config.analysis.permutations, signals)
            watch = collapse_watch(parts, line, loggers)
            learns = Role.router in present_roles(config.injection, config.moe)
            callbacks = [
                PhaseSwitch(),
                RngState(),
                WindowEnd(),
                KeptExperts(),
                GradientAverage(),
                FiniteSteps(config.trainer.nonfinite, line.say),
                StepMetrics(config.trainer.log_every_n_steps, line.step),
                *([watch] if learns else []),
                PlateauStart(line.say),
                validation,
                *more_callbacks,
                RunCheckpoint(folder, run_id or "", config.checkpoint, wandb_id),
                StopRequest(signals, max_seconds(config.trainer.max_time), line.say),
            ]
            trainer = build_trainer(config.trainer, run_dir, loggers, callbacks)
            with memory_advice(config), signals.deferred():
                path = None if found is None else found.path
                trainer.fit(parts.module, datamodule=parts.datamodule, ckpt_path=path, weights_only=True)
            parts.module.to(trainer.strategy.root_device)  # NOTE Lightning has moved it to the CPU
            if validation.results.step != trainer.global_step:  # stopped early, or resumed after the last step
                validation.run(trainer, parts.module)
            if config.analysis.knock_out is not KnockOut.none:
                line.say(f"silencing {config.analysis.knock_out} one at a time")
                validation.knock_out(trainer, parts.module, config.analysis.knock_out)
        finish(parts, run_dir, trainer, validation.results, watch.messages, time.monotonic() - started, console)
        failed = False
    except CheckpointError as error:
        if found is None or run_id is None:
            raise
        raise CheckpointError(f"{found.path}: {error}. {offer(folder, run_id, without=found.path.name)}") from None
    except Stopped as stopped:
        console.print(f"{stopped}; resume={run_dir} goes on", markup=False, highlight=False, soft_wrap=True)
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
    """config.yaml, with what a continuation changed, and one more record in provenance.json."""
    write_config(parts.config, run_dir)
    record = provenance(
        seed=parts.config.seed,
        overrides=overrides,
        data=parts.prepared.report.data_hashes,
        backbone=parts.base_model,
    )
    add_provenance(run_dir, record)


def finish_wandb(*, exit_code: int) -> None:
    """End the W&B run, or the next job of a multirun would log into it."""
    import sys

    if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
        wandb.finish(exit_code=exit_code)
