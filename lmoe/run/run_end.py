"""How a run ends: why, what its loggers are told, and how one that was stopped goes on."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

from lmoe.report.say import say
from lmoe.report.summary import FINISHED, TIME_OVER
from lmoe.resume.stopping import Stopped
from lmoe.training.callbacks.collapse_watch import CollapseWatch
from lmoe.training.callbacks.progress_line import ProgressLine
from lmoe.training.callbacks.stop_request import StopRequest


@dataclass(slots=True, frozen=True, kw_only=True)
class RunEnd:
    """The end of a run that no signal has stopped.

    Args:
        step: optimizer steps done.
        reason: why it has ended, in words.
        can_resume: whether it goes on when it is resumed as it is.
    """

    step: int
    reason: str
    can_resume: bool


def run_end(trainer: Trainer) -> RunEnd:
    """Why a fit has ended: all steps done, time, a collapse, early stopping, or another callback."""
    step = trainer.global_step
    if step >= trainer.max_steps:
        return RunEnd(step=step, reason=FINISHED, can_resume=False)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, StopRequest) and callback.time_over for callback in callbacks):
        return RunEnd(step=step, reason=TIME_OVER, can_resume=True)
    if any(isinstance(callback, CollapseWatch) and callback.stop and callback.messages for callback in callbacks):
        return RunEnd(step=step, reason="routing collapse, with trainer.stop_on_collapse=true", can_resume=False)
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            message = (callback.stopping_reason_message or "").removesuffix(" Signaling Trainer to stop.")
            return RunEnd(step=step, reason=f"early stopping. {message}".removesuffix(". "), can_resume=False)
    return RunEnd(step=step, reason="a callback asked for it", can_resume=False)


@contextmanager
def logged_to_the_end(
    loggers: list[Logger], console: Console, line: ProgressLine, *, resume_command: str
) -> Iterator[None]:
    """Log a run to its end, however it ends.

    Args:
        line: knows the steps done.
        resume_command: with which a run that a signal ends goes on.

    Raises:
        Stopped: a signal has ended the run; Lightning's own exception, which it raises for one that comes before our
            handler is there, is turned into it.
    """
    failed = True
    try:
        yield
        failed = False
    except (Stopped, SIGTERMException) as error:
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGTERM)
        done = f"after step {line.done} of {line.max_steps}" if line.done else "before the end of the first step"
        say(console, f"{stopped} {done}; {resume_command} goes on")
        raise stopped from None
    finally:
        for logger in loggers:
            logger.finalize("failed" if failed else "success")
        _finish_wandb(exit_code=int(failed))


def _finish_wandb(*, exit_code: int) -> None:
    """End the W&B run, or the next job of a multirun would log into it."""
    if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
        wandb.finish(exit_code=exit_code)
