"""End a run between two batches when a signal has come or its time is over. Logs nothing."""

import time
from collections.abc import Callable

import torch
from lightning.pytorch import Callback, Trainer

from lmoe.resume.stopping import StopSignals
from lmoe.training.ranks import over_ranks
from lmoe.training.step import finished_step

TIME_OVER = 1
"""Beside the numbers of signals, of which 1 is not listened to."""


class TakeSignals(Callback):
    """NOTE the first of the callbacks: Lightning puts its own handlers there between on_fit_start and on_train_start.

    Args:
        signals: who listens.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals

    def on_train_start(self, trainer: Trainer, pl_module) -> None:
        self.signals.listen()


class StopRequest(Callback):
    """NOTE the last of the callbacks: at the end of a step everything else is done, and the checkpoint can be written.

    With several processes all stop after the same step, whichever of them got the signal. Time that is over does not
    wait for the end of a step: what of it is done is left out, as where a signal comes.

    Args:
        signals: who listens.
        max_seconds: wall time from now, after which the run ends as if it were at its last step; None: no limit.
        say: told of the end of the time.
    """

    def __init__(self, signals: StopSignals, max_seconds: float | None, say: Callable[[str], None]) -> None:
        self.signals, self.say = signals, say
        self._end = None if max_seconds is None else time.monotonic() + max_seconds
        self.time_over = False

    def on_train_batch_end(self, trainer: Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if trainer.world_size > 1:
            if self._end is None and not finished_step(trainer, batch_idx):
                return
            agreed = int(over_ranks(trainer, torch.tensor(self._own()), "max"))
            if agreed:  # NOTE else a signal that came in the meantime waits for the next step
                self.signals.received = agreed
        elif self.signals.received is None and self._time_is_over():
            self.signals.received = TIME_OVER
        if self.signals.received != TIME_OVER:
            self.signals.check()
            return
        self.signals.received = None
        self.time_over = trainer.should_stop = True
        self.say(f"trainer.max_time is over after step {trainer.global_step} of {trainer.max_steps}")

    def _own(self) -> int:
        """Number of the signal that this process got, or TIME_OVER, or 0."""
        return self.signals.received or (TIME_OVER if self._time_is_over() else 0)

    def _time_is_over(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end
