"""Whole runs of `lmoe train` on a very small base, so that what is not the model shows, while rows or steps grow."""

import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console

from benchmarks.gpu_parts.composing import composed
from benchmarks.growth.rows import write_base, write_rows
from benchmarks.growth.watch import Now
from benchmarks.timing import Laps
from lmoe.resume.stopping import StopSignals
from lmoe.run import train as run

PARTS = ("build", "train", "report")
"""From the config to a model and rows; steps and validations; adapter, pictures and page."""
WORDS = 16
COMMON = (
    "logger=none",
    "trainer.precision=32-true",
    "trainer.enable_progress_bar=false",
    "trainer.val_every_n_steps=0",
    "injection.num_experts=8",
    "moe=top_k",
    "injection.lora_r=2",
    "data.max_length=64",
    "data.batch_size=8",
    "data.packing=false",
    "data.val_rows_per_domain=0",
    "optim.warmup_steps=1",
)


@dataclass(slots=True, frozen=True, kw_only=True)
class Size:
    """One point of a series.

    Args:
        domains: of the rows.
        rows, val_rows: to train and to validate on.
        steps: optimizer steps, each logged.
    """

    domains: int = 1
    rows: int = 64
    val_rows: int = 16
    steps: int = 4


def series() -> dict[str, tuple[str, str | None, dict[int, Size]]]:
    """What grows -> the rest of the job in words, the part of a run that is judged (None: all), and the points."""
    return {
        "domains": (
            "1,000 rows and 400 validation rows of as many domains, 10 steps, two validations; the whole run",
            None,
            {m: Size(domains=m, rows=1000, val_rows=400, steps=10) for m in (1, 8, 40, 200)},
        ),
        "validation rows": (
            "4 steps, two validations; without building and report",
            "train",
            {n: Size(val_rows=n) for n in (100, 400, 1600)},
        ),
        "logged steps": (
            "two validations of 16 rows; without building and report",
            "train",
            {n: Size(steps=n) for n in (25, 100, 400)},
        ),
    }


class Job:
    """One run, each time in a folder of its own and without cached rows."""

    def __init__(self, size: Size, folder: Path, now: Now) -> None:
        self.size, self.folder, self.now = size, folder, now
        self.base = folder / "base-of-jobs"
        if not self.base.exists():
            write_base(self.base, hidden=32, layers=2)

    def __call__(self) -> Laps:
        """Returns the milliseconds of its parts."""
        size = self.size
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            place = Path(name)
            rows = write_rows(place / "rows.jsonl", size.rows, words=WORDS, domains=size.domains)
            val = write_rows(place / "val.jsonl", size.val_rows, words=WORDS, domains=size.domains)
            overrides = [
                *COMMON,
                f"backbone.model_name={self.base}",
                f"data.path={rows}",
                f"data.val_path={val}",
                f"data.cache_dir={place / 'cache'}",
                f"trainer.max_steps={size.steps}",
            ]
            return timed_run(overrides, place / "run", self.now)


def timed_run(overrides: list[str], run_dir: Path, now: Now) -> Laps:
    """Milliseconds of the parts of a run of `lmoe train`, which prints nothing."""
    config, marks = composed(overrides), []
    run_dir.mkdir()

    def marked(call: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
        def and_mark(*args: Any, **kwargs: Any) -> Any:
            if before:
                marks.append(now())
            found = call(*args, **kwargs)
            if not before:
                marks.append(now())
            return found

        return and_mark

    begun = now()
    with (
        patch.object(run, "build_parts", marked(run.build_parts, before=False)),
        patch.object(run, "finish", marked(run.finish, before=True)),
    ):
        run.train(config, run_dir, [], Console(file=io.StringIO()), StopSignals(), writes=True)
    times = [begun, *marks, now()]
    assert len(times) == len(PARTS) + 1
    return tuple(1000 * (end - start) for start, end in pairwise(times))
