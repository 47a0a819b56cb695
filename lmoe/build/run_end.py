"""How a run ends: its loggers are told, and one that a signal has stopped says how it goes on."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

from lmoe.report.say import say
from lmoe.schema.run_folder import resume_setting
from lmoe.training.stopping import Stopped


@contextmanager
def logged_to_the_end(loggers: list[Logger], run_dir: Path, console: Console) -> Iterator[None]:
    """Around all that a run logs.

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
        say(console, f"{stopped}; {resume_setting(run_dir)} goes on")
        raise stopped from None
    finally:
        for logger in loggers:
            logger.finalize("failed" if failed else "success")
        _finish_wandb(exit_code=int(failed))


def _finish_wandb(*, exit_code: int) -> None:
    """End the W&B run, or the next job of a multirun would log into it."""
    if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
        wandb.finish(exit_code=exit_code)
