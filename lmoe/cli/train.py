"""`lmoe train`, the same as `python train.py`: compose, validate, build, run."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from lmoe.cli.commands import shell_command
from lmoe.cli.hydra_run import drop_empty, hydra_main
from lmoe.cli.resume import refuse_existing
from lmoe.config.run import RunConfig
from lmoe.errors import DivergedError
from lmoe.resume.stopping import StopSignals
from lmoe.rules.data import data_warnings
from lmoe.rules.phases import phase_warnings
from lmoe.rules.validate import hub_names, run_problems
from lmoe.run.claim import claimed, is_first_process
from lmoe.run.records import started_run
from lmoe.vocabulary import DryRun


def main(
    argv: list[str] | None = None,
    *,
    steps_done: Callable[[], None] | None = None,
    diverged: Callable[[], None] | None = None,
) -> int:
    """Returns the exit code.

    Args:
        steps_done: called when the run has done its steps, of a single run; see `lmoe.run.train`.
        diverged: called when a loss or a gradient that is no number has ended it, of a single run.
    """
    job = partial(run, steps_done=steps_done or _nothing, diverged=diverged or _nothing)
    return hydra_main("train", RunConfig, run_problems, job, sys.argv[1:] if argv is None else argv, entry=__file__)


def run(
    config: RunConfig,
    run_dir: Path,
    overrides: list[str],
    *,
    steps_done: Callable[[], None],
    diverged: Callable[[], None],
) -> None:
    """One job: a dry run, a training or a continued one."""
    if config.dry_run is DryRun.config:
        for note in hub_names(config):
            sys.stdout.write(f"{note}\n")
        for warning in phase_warnings(config) + data_warnings(config.data, config.moe):
            sys.stdout.write(f"warning: {warning}\n")
        sys.stdout.write("config: no problems\n")
        drop_empty(run_dir)
        return
    if config.dry_run is DryRun.estimate:
        from rich.console import Console

        from lmoe.estimate.announce import announce_estimate

        announce_estimate(config, Console())
        drop_empty(run_dir)
        return
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        first = is_first_process(config.trainer.processes)  # the others write nothing
        if first and config.dry_run is DryRun.none:
            stack.enter_context(claimed(run_dir))
            if not config.resume:
                refuse_existing(run_dir)
            stack.enter_context(started_run(config, run_dir))
        # Heavy imports wait until the config is known to be good.
        from rich.console import Console

        console = Console(quiet=not first)
        if config.dry_run is DryRun.preflight:
            from lmoe.estimate.preflight import preflight

            preflight(config, console)
            drop_empty(run_dir)
            return
        from lmoe.run.train import train

        try:
            train(
                config, run_dir, overrides, console, signals, writes=first, wording=shell_command, steps_done=steps_done
            )
        except DivergedError:
            diverged()
            raise


def _nothing() -> None:
    """What is called where nobody listens."""


if __name__ == "__main__":  # how Lightning starts the further processes of a run
    sys.exit(main())
