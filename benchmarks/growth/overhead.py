"""What of a training step is neither forward, backward nor optimizer, in the project's own Trainer with its callbacks.

Forward is the objective's losses and the auxiliary ones, backward is autograd, optimizer is AdamW's arithmetic. All
else counts as overhead: rows and batches, statistics of the routing, gradient norms and clipping, logs, Lightning's
loop.
"""

import cProfile
import functools
import io
import pstats
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from torch.optim import adam  # type: ignore[attr-defined]

from benchmarks.gpu_parts.composing import composed
from benchmarks.growth.watch import Now
from lmoe.resume.stopping import StopSignals
from lmoe.run.train import train
from lmoe.training.auxiliary import Auxiliary
from lmoe.training.callbacks.stop_request import StopRequest
from lmoe.training.module import AdapterModule

WORK = ("forward", "backward", "optimizer")
BASES = {"tiny": 0.03, "smollm2_q4": 0.01}
"""Most overhead of a step, by backbone."""
SETTINGS = (
    "logger=none",
    "injection.num_experts=8",
    "moe=top_k",
    "trainer.val_every_n_steps=0",
    "data.val_rows_per_domain=1",
    "trainer.enable_progress_bar=false",
    "phase=joint",
)
PROFILED, TOP = 5, 8
"""Steps of the run under a profiler, and functions that are told."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Overhead:
    """Of the steps of one run, without the first and the last.

    Args:
        base: backbone.
        steps: milliseconds of each step, and of each kind of work in it.
        rest: what the rest consists of: functions by name, and the seconds a step that each took itself, profiled.
    """

    base: str
    steps: list[dict[str, float]]
    rest: list[tuple[str, float]]

    @property
    def share(self) -> float:
        """Returns the median over the steps of what is no work, over the step."""
        return statistics.median(1 - sum(one[name] for name in WORK) / one["step"] for one in self.steps)

    @property
    def limit(self) -> float:
        """Returns what is asked for."""
        return BASES[self.base]

    @property
    def met(self) -> bool:
        """Whether the share is within it."""
        return self.share <= self.limit

    def median(self, name: str) -> float:
        """Milliseconds of `step`, or of a kind of work."""
        return statistics.median(one[name] for one in self.steps)

    def as_json(self) -> dict[str, Any]:
        """Return every figure, times in milliseconds."""
        return {
            "base": self.base,
            "share": self.share,
            "limit": self.limit,
            "met": self.met,
            "steps_ms": self.steps,
            "rest_ms_a_step_under_a_profiler": [[name, 1000 * seconds] for name, seconds in self.rest],
        }


class Stopwatches:
    """Times of a run's steps.

    Args:
        now: seconds.
        count: of the run's steps, three or more.
        profile: of all that is no work, between the first step and the last; None: there is none.
    """

    def __init__(self, now: Now, count: int, profile: cProfile.Profile | None = None) -> None:
        self.now, self.count, self.profile = now, count, profile
        self.ends: list[float] = []
        self.work: list[dict[str, float]] = [dict.fromkeys(WORK, 0.0)]
        self._inside = False

    def timing(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose time counts as work of a kind."""

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return call(*args, **kwargs)
            self._profile(on=False)
            self._inside, begun = True, self.now()
            try:
                return call(*args, **kwargs)
            finally:
                self.work[-1][kind] += self.now() - begun
                self._inside = False
                self._profile(on=True)

        return timed

    def ending(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, after which a step is over."""

        @functools.wraps(call)
        def last(*args: Any, **kwargs: Any) -> Any:
            found = call(*args, **kwargs)
            self.ends.append(self.now())
            self.work.append(dict.fromkeys(WORK, 0.0))
            self._profile(on=True)
            return found

        return last

    def _profile(self, *, on: bool) -> None:
        if self.profile is None:
            return
        if on and 1 <= len(self.ends) < self.count - 1:
            self.profile.enable()
        else:
            self.profile.disable()

    def steps(self) -> list[dict[str, float]]:
        """Milliseconds of the steps between the first and the last."""
        spans = zip(self.ends, self.ends[1:], self.work[1:], strict=False)
        every = [{"step": end - start} | work for start, end, work in spans]
        return [{name: 1000 * seconds for name, seconds in one.items()} for one in every[:-1]]

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch what is run inside the block."""
        places = (
            ("forward", AdapterModule, "losses"),
            ("forward", Auxiliary, "losses"),
            ("backward", torch.Tensor, "backward"),
            ("optimizer", adam, "adam"),
        )
        with ExitStack() as patched:
            for kind, owner, name in places:
                patched.enter_context(patch.object(owner, name, self.timing(kind, getattr(owner, name))))
            ending = self.ending(StopRequest.on_train_batch_end)
            patched.enter_context(patch.object(StopRequest, "on_train_batch_end", ending))
            yield


def measure(base: str, steps: int, now: Now, overrides: tuple[str, ...] = ()) -> Overhead:
    """Two runs on the bundled rows: one that is timed, and one under a profiler.

    Args:
        base: name of a backbone.
        steps: of the timed run, three or more.
    """
    timed, profile = Stopwatches(now, steps), cProfile.Profile()
    _run(base, timed, overrides)
    _run(base, Stopwatches(now, PROFILED, profile), overrides)
    return Overhead(base=base, steps=timed.steps(), rest=_top(profile, PROFILED - 2))


def _run(base: str, watch: Stopwatches, overrides: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        run_dir.mkdir()
        config = composed([*SETTINGS, f"backbone={base}", f"trainer.max_steps={watch.count}", *overrides])
        with watch.on():
            train(config, run_dir, [], Console(file=io.StringIO()), StopSignals(), writes=True)


def _top(profile: cProfile.Profile, steps: int) -> list[tuple[str, float]]:
    """The functions that took most themselves, with seconds a step."""
    stats: Any = pstats.Stats(profile)
    own = {}
    for (file, line, name), (_, _, seconds, _, _) in stats.stats.items():
        place = name if file == "~" else f"{name} ({'.'.join(Path(file).with_suffix('').parts[-2:])}, line {line})"
        own[place] = own.get(place, 0.0) + seconds
    return [(name, own[name] / steps) for name in sorted(own, key=lambda name: -own[name])[:TOP]]
