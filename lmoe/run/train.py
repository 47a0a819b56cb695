"""Run one training from its config to the last table."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from rich.console import Console

from lmoe.config.run import RunConfig
from lmoe.config.trainer import max_seconds
from lmoe.data.stream import RowStream
from lmoe.errors import CheckpointError
from lmoe.files.run_folder import REPORT
from lmoe.injection.record import injected
from lmoe.objectives.objective import Objective
from lmoe.report.say import say
from lmoe.resume.run_files import FOLDER, FoundCheckpoint, found_in, set_aside, whole_checkpoint
from lmoe.resume.stopping import StopSignals
from lmoe.rules.phases import present_roles
from lmoe.run.announce import describe, quiet_libraries
from lmoe.run.claim import store_id, stored_id
from lmoe.run.clustered_rows import fitted_by_the_run
from lmoe.run.devices import check_devices
from lmoe.run.finish import finish, refuse_spoilt
from lmoe.run.fit_clusters import FitClusters
from lmoe.run.loggers import build_loggers, check_logger, wandb_run_id
from lmoe.run.memory import memory_advice
from lmoe.run.parts import Parts, build_parts
from lmoe.run.past_records import check_records
from lmoe.run.provenance import check_unchanged, provenance
from lmoe.run.records import write_records
from lmoe.run.run_end import logged_to_the_end, run_end
from lmoe.run.trainer import build_trainer, extra_callbacks
from lmoe.run.verb_call import Wording, resuming
from lmoe.run.wandb_record import WandbRecord
from lmoe.training.callbacks.collapse_watch import CollapseWatch
from lmoe.training.callbacks.ended_early import EndedEarly
from lmoe.training.callbacks.finite_steps import FiniteSteps
from lmoe.training.callbacks.fit_router import FitRouter
from lmoe.training.callbacks.keep_routing import KeepRouting
from lmoe.training.callbacks.kept_experts import KeptExperts
from lmoe.training.callbacks.known_reference import KnownReference
from lmoe.training.callbacks.phase_switch import PhaseSwitch
from lmoe.training.callbacks.plateau_start import PlateauStart
from lmoe.training.callbacks.progress_line import ProgressLine
from lmoe.training.callbacks.read_step import ReadStep
from lmoe.training.callbacks.rng_state import RngState
from lmoe.training.callbacks.run_checkpoint import RunCheckpoint
from lmoe.training.callbacks.same_clusters import SameClusters
from lmoe.training.callbacks.step_metrics import StepMetrics
from lmoe.training.callbacks.stop_request import StopRequest, TakeSignals
from lmoe.training.callbacks.validation import Validation
from lmoe.training.callbacks.window import GradientAverage, RestingRouters, WindowEnd
from lmoe.training.spread import put_in_place
from lmoe.training.step import in_stages
from lmoe.vocabulary import KnockOut, Role, RouterTarget

LOOK_EVERY_N_STEPS = 10


def train(
    config: RunConfig,
    run_dir: Path,
    overrides: list[str],
    console: Console,
    signals: StopSignals,
    *,
    writes: bool,
    objective: Objective | None = None,
    wording: Wording = str,
    steps_done: Callable[[], None] = lambda: None,
) -> None:
    """Train, write the adapter and the report, print the table.

    Args:
        config: validated.
        run_dir: the run's folder; with config.resume it holds the run to continue.
        overrides: as given on the command line, for the provenance.
        console: for messages and the live line.
        signals: those that end the run; they wait for a safe place while it trains.
        writes: whether this process writes for all of the run, and has claimed its folder.
        objective: in place of the one that task.name chooses.
        wording: how commands are said that go on from here or use what was trained.
        steps_done: called behind the last step, while signals still wait: what comes then is done to its end.

    Raises:
        LmoeError: anything that the user can mend.
        Stopped: a signal ended the run, and its checkpoint is written.
    """
    quiet_libraries()
    check_logger(config.logger)
    check_devices(config.trainer)
    more_callbacks = extra_callbacks(config.callbacks, config.callbacks_from)
    if config.resume:
        check_records(run_dir)
    started, folder, run_id = time.monotonic(), run_dir / FOLDER, stored_id(run_dir)
    found = found_in(folder, run_id, wanted=config.checkpoint.resume_from) if config.resume else None
    said = partial(say, console)
    with memory_advice(config):
        parts = build_parts(config, run_dir=run_dir, fill_experts=found is None, objective=objective, say=said)
    config = parts.config
    if found is not None:
        check_fit(parts, found, folder, run_id)  # before anything of the run is touched
    loggers: list[Logger] = []
    if writes:
        run_id = begin(parts, run_dir, overrides, found, console)
        loggers = build_loggers(config, run_dir, found, said)
    line = ProgressLine(config.trainer.max_steps, console, enabled=config.trainer.enable_progress_bar)
    line.done = 0 if found is None else found.step
    if isinstance(parts.prepared.train, RowStream):
        parts.prepared.train.say = line.say
    with logged_to_the_end(loggers, console, line, resume_command=wording(resuming("train", run_dir))):
        with line:
            watch = collapse_watch(parts, line, loggers)
            learns = Role.router in present_roles(config.injection, config.moe)
            report = run_dir / REPORT if writes else None
            kept = KeepRouting(report, config.checkpoint.every_n_steps, parts.tokenizer, judged=learns)
            validation = Validation(
                config.trainer.val_every_n_steps, line.say, config.analysis.permutations, signals, kept
            )
            fits = fitted_router(parts, line.say, signals)
            names = dict.fromkeys(name for phase in parts.learnt for name in phase.metric_names())
            each_step = [
                WindowEnd(),
                KeptExperts(),
                GradientAverage(),
                RestingRouters(),
                ReadStep(),
                FiniteSteps(config.trainer.nonfinite, line.say),
                StepMetrics(config.trainer.log_every_n_steps, line.step),
                kept,
                WandbRecord(loggers, list(names), kept if config.logger.samples else None),
                *([watch] if learns else []),
                PlateauStart(line.say),
                *fits,
                validation,
                EndedEarly(ending_rules(config), line.say),
                RunCheckpoint(folder, run_id or "", config.checkpoint, wandb_run_id(run_dir)),
            ]
            callbacks = [
                TakeSignals(signals),
                *clusters_of_run(parts, run_dir, writes, line.say, signals),
                PhaseSwitch(),
                KnownReference(line.say, signals.check),
                RngState(),
                *in_stages(each_step, more_callbacks),
                StopRequest(signals, max_seconds(config.trainer.max_time), line.say),
            ]
            trainer = build_trainer(config.trainer, run_dir, loggers, callbacks)
            with memory_advice(config), signals.deferred():
                path = None if found is None else found.path
                trainer.fit(parts.module, datamodule=parts.datamodule, ckpt_path=path, weights_only=True)
                steps_done()
            signals.check()  # one that came after the last step
            put_in_place(parts.module, trainer.strategy)  # NOTE Lightning has moved it to the CPU
            for fit in fits:
                fit.at_the_end(trainer, parts.module)
            validation.at_the_end(trainer, parts.module)
            if config.analysis.knock_out is not KnockOut.none:
                line.say(f"silencing {config.analysis.knock_out} one at a time")
                validation.knock_out(trainer, parts.module, config.analysis.knock_out)
        seconds, ended = time.monotonic() - started, run_end(trainer)
        results, collapsed = validation.results, watch.messages
        refuse_spoilt(results)
        routing = kept.history(parts.module)
        finish(parts, run_dir, trainer, results, collapsed, seconds, console, routing, ended=ended, wording=wording)


def begin(parts: Parts, run_dir: Path, overrides: list[str], found: FoundCheckpoint | None, console: Console) -> str:
    """Write what a run leaves at its start, and say what is about to happen.

    Returns:
        The run's identity: its own, else that of the checkpoint it goes on from, else a new one.

    Raises:
        ConfigError: data or a backbone that are no longer those of the run.
    """
    data = parts.data_hashes()
    rows = [source.key for phase in parts.row_sets() for source in phase.prepared.report.sources]
    if found is not None:
        check_unchanged(run_dir, data, rows, parts.base_model)
        if behind := set_aside(run_dir / FOLDER, found):
            say(console, f"set aside: {', '.join(behind)}")
    run_id = store_id(run_dir, stored_id(run_dir) or (None if found is None else found.run_id))
    record = provenance(seed=parts.config.seed, overrides=overrides, data=data, rows=rows, backbone=parts.base_model)
    write_records(parts.config, run_dir, record)
    if parts.clustered is not None:
        parts.clustered.write(run_dir)
    describe(parts, run_dir, console)
    return run_id


def check_fit(parts: Parts, found: FoundCheckpoint, folder: Path, run_id: str | None) -> None:
    """Refuse a checkpoint that does not fit the run that goes on from it.

    Raises:
        CheckpointError: the checkpoint is of another model or another configuration; names one that is whole.
    """
    try:
        parts.module.restore_phase(torch.load(found.path, weights_only=True, mmap=True, map_location="cpu"))
    except CheckpointError as error:
        raise CheckpointError(
            f"{found.path}: {error}. {whole_checkpoint(folder, run_id, without=found.path.name)}"
        ) from None


def ending_rules(config: RunConfig) -> str:
    """What may end a run before its last step by what it has seen, as text."""
    rules = {"callbacks": config.callbacks, "stop_on_collapse": config.trainer.stop_on_collapse}
    return json.dumps(rules, sort_keys=True, default=str)


def fitted_router(parts: Parts, say: Callable[[str], None], signals: StopSignals) -> list[FitRouter]:
    """What fits the router of the model, where the config wants it."""
    prompts = injected(parts.model).moe.router_fit_prompts
    return [FitRouter(prompts, parts.config.seed, say, signals.check)] if prompts else []


def clusters_of_run(
    parts: Parts, run_dir: Path, writes: bool, say: Callable[[str], None], signals: StopSignals
) -> list[Callback]:
    """What lets every process have the clusters of the rows, where routers are taught them."""
    if injected(parts.model).moe.router_target is not RouterTarget.cluster:
        return []
    if fitted_by_the_run(parts.config, parts.prepared):
        return [FitClusters(parts, run_dir, writes, say, signals.check)]
    return [SameClusters()]


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
