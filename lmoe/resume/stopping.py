"""Signals that end a run: at once while nothing is under way, at the next safe place while it trains.

SIGINT (Ctrl-C) and SIGTERM always; under SLURM also SIGUSR1 and SIGUSR2, which it sends before it preempts a job or
its time is over (`#SBATCH --signal=USR1@120`).
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

AT_ONCE_AFTER = 3
"""So many signals end a run wherever it is; what checkpoints/ holds is whole all the same."""


class Stopped(BaseException):
    """A signal ended the run. NOTE no Exception: Hydra, Lightning and our own handlers of errors let it pass.

    Args:
        signum: number of the signal.
        at_once: it came wherever the run was, so what is in memory is between two states and must not be saved.
    """

    def __init__(self, signum: int, *, at_once: bool = False) -> None:
        self.signum, self.at_once = signum, at_once
        super().__init__(f"stopped by {signal.Signals(signum).name}")

    def __reduce__(self) -> tuple[Any, ...]:
        """What a launcher makes it of again where the run was in another process."""
        return partial(type(self), at_once=self.at_once), (self.signum,)

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells have it: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum


class StopSignals:
    """Listens inside `with`; raises Stopped where `check` is called, or at once outside `deferred`."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._times, self._deferring = 0, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self.listen()
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    def listen(self) -> None:
        """Take the signals, also from whoever has taken them since (Lightning does when a fit starts)."""
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may; a launcher that runs jobs in threads keeps its own handlers
        for signum in _signals():
            before = signal.signal(signum, self._handle)
            if before != self._handle:
                self._before.setdefault(signum, before)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let a signal that comes inside the block wait for `check`."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def check(self) -> None:
        """Stop here if a signal has come.

        Raises:
            Stopped: a signal has come.
        """
        if self.received is not None:
            raise Stopped(self.received)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.received, self._times = signum, self._times + 1
        if not self._deferring or self._times >= AT_ONCE_AFTER:
            raise Stopped(signum, at_once=True)


def _signals() -> list[int]:
    names = ["SIGINT", "SIGTERM", *(["SIGUSR1", "SIGUSR2"] if "SLURM_JOB_ID" in os.environ else [])]
    return [getattr(signal, name) for name in names if hasattr(signal, name)]
