"""What the jobs of a multirun leave, wherever they run, and the table of them at its end."""

import json
import math
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from omegaconf import DictConfig

from lmoe.cli.launchers import JobError
from lmoe.errors import LmoeError
from lmoe.files.run_folder import SUMMARY_FILE, path_from_here
from lmoe.report.files import write_bytes
from lmoe.resume.rules import SAFE
from lmoe.resume.stopping import Stopped
from lmoe.run.claim import is_first_process
from lmoe.vocabulary import NATS, Strategy

BASIC_SWEEPER = "basic"
"""Hydra's own, whose jobs are all combinations of what the settings say."""
ELSEWHERE = ("hydra/launcher=submitit_slurm", "hydra/launcher=ray")
"""Launchers whose jobs may run on machines that share the working directory alone."""
NOTES = ".lmoe_jobs_"
"""Beginning of the name of the folder of notes, which is there while the multirun runs."""
DONE, LOST = "done", "it ended without an answer"


@dataclass(slots=True, frozen=True, kw_only=True)
class JobNote:
    """What a job leaves for the table.

    Args:
        number: of Hydra, from 0.
        total: jobs of the multirun; None: not known.
        label: its settings that differ from job to job.
        folder: its run directory.
        seconds: since it began.
        state: done, or why it has failed.
    """

    number: int
    total: int | None
    label: str
    folder: str
    seconds: float
    state: str

    @property
    def line(self) -> str:
        """How the job names itself."""
        place = "" if self.total is None else f" ({self.number + 1} of {self.total})"
        return f"job {self.number}{place}" + (f": {self.label}" if self.label else "")


@dataclass(slots=True)
class JobNotes:
    """Notes of the jobs of a command; pickled with what runs a job in another process.

    Args:
        settings: of the command, as Hydra gets them.
        folder: of the notes; None: it is no multirun.
    """

    settings: list[str] = field(default_factory=list)
    folder: Path | None = None

    @contextmanager
    def job(self, composed: DictConfig) -> Iterator[None]:
        """Name a job before it begins, and note how it ends; inside the task that Hydra calls."""
        if self.folder is None or not is_first_process(_processes(composed)):
            yield
            return
        note, started = self._begun(), time.monotonic()
        sys.stdout.write(f"{note.line}\n")
        sys.stdout.flush()
        if composed.get("dry_run", "none") != "none":
            yield
            return
        self._write(note)
        try:
            yield
        except BaseException as error:
            self._write(replace(note, state=state_of(error), seconds=time.monotonic() - started))
            raise
        self._write(replace(note, state=DONE, seconds=time.monotonic() - started))

    def _begun(self) -> JobNote:
        runtime = HydraConfig.get()
        basic = runtime.runtime.choices.get("hydra/sweeper") == BASIC_SWEEPER
        swept = swept_settings([*_params(runtime.sweeper.get("params")), *self.settings]) if basic else None
        overrides = [str(text) for text in runtime.overrides.task]
        return JobNote(
            number=int(runtime.job.num),
            total=None if swept is None else swept.jobs,
            label=" ".join(overrides if swept is None else swept.of_job(overrides)),
            folder=str(runtime.runtime.output_dir),
            seconds=math.nan,
            state=f"failed: {LOST}",
        )

    def _write(self, note: JobNote) -> None:
        assert self.folder is not None
        with suppress(LmoeError):  # the table lacks it, and the job goes on
            write_bytes(self.folder / f"{note.number}.json", json.dumps(asdict(note)).encode())

    def read(self) -> list[JobNote]:
        """The notes so far, by the numbers of the jobs."""
        if self.folder is None:
            return []
        notes = [JobNote(**json.loads(file.read_text(encoding="utf-8"))) for file in self.folder.glob("*.json")]
        return sorted(notes, key=lambda note: note.number)


@dataclass(slots=True, frozen=True)
class Swept:
    """What differs from job to job.

    Args:
        keys: that several values are given for, as `Override.get_key_element` has them.
        jobs: their number; None: it cannot be counted here.
    """

    keys: tuple[str, ...]
    jobs: int | None

    def of_job(self, overrides: Sequence[str]) -> list[str]:
        """The settings of one job that differ from those of another."""
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        return [
            text.lstrip("+")
            for text, override in zip(overrides, parsed, strict=True)
            if override.get_key_element() in self.keys
        ]


def swept_settings(settings: Sequence[str]) -> Swept:
    """What differs from job to job of Hydra's own sweeper, which makes a job of every combination.

    Args:
        settings: of the sweeper and of the command; of the same key the last one counts.
    """
    counts: dict[str, int | None] = {}
    for override in OverridesParser.create().parse_overrides(list(settings)):
        key, count = override.get_key_element(), 1
        if override.is_sweep_override():
            countable = override.is_discrete_sweep() and not isinstance(override.value(), Glob)
            count = sum(1 for _ in override.sweep_string_iterator()) if countable else None
        counts[key] = count
    known = [count for count in counts.values() if count is not None]
    return Swept(
        keys=tuple(key for key, count in counts.items() if count != 1),
        jobs=math.prod(known) if len(known) == len(counts) else None,
    )


def _params(given: Mapping[str, Any] | None) -> list[str]:
    return [f"{key}={value}" for key, value in (given or {}).items()]


def _processes(composed: DictConfig) -> int:
    trainer = composed.get("trainer") or {}
    if trainer.get("strategy") == Strategy.device_map:
        return 1
    counts = [trainer.get(name, 1) for name in ("devices", "num_nodes")]
    return math.prod(count if isinstance(count, int) else 1 for count in counts)


def state_of(error: BaseException) -> str:
    """Return in a line that a job was stopped, or why it has failed: the first problem of several."""
    if isinstance(error, Stopped):
        return str(error)
    lines = str(error).splitlines()
    if isinstance(error, JobError):
        lines = lines[1:] or lines  # the first one says which job it was
    problems = [line.strip().removeprefix("- ") for line in lines if line.startswith("  - ")]
    first = (problems or [line.strip() for line in lines if line.strip()] or [type(error).__name__])[0]
    kind = "" if isinstance(error, LmoeError) else f"{type(error).__name__}: "
    return f"failed: {kind}{first}" + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


@contextmanager
def job_notes(multirun: bool, settings: Sequence[str]) -> Iterator[JobNotes]:
    """Notes of the jobs of a command, whose table ends it, however it ends.

    Args:
        multirun: whether it is one; else nothing is noted.
        settings: of the command, to find its launcher.
    """
    notes = JobNotes()
    if multirun:
        shared = any(text in ELSEWHERE for text in settings)
        with suppress(OSError):  # without a place for notes there is no table
            notes.folder = Path(tempfile.mkdtemp(prefix=NOTES, dir=Path.cwd() if shared else None))
    try:
        yield notes
    finally:
        if notes.folder is not None:
            try:
                print_table(notes.read())
            finally:
                shutil.rmtree(notes.folder, ignore_errors=True)


@dataclass(slots=True, frozen=True, kw_only=True)
class JobResult:
    """A line of the table.

    Args:
        note: of the job.
        before, after: mean validation loss of the base and at the end; None: not measured.
        ended: why the run ended before its last step; "": it did not.
        finished: whether it has a summary.
        prefers: whether some phase of it learnt preferences, which `lmoe compare` does not judge.
    """

    note: JobNote
    before: float | None
    after: float | None
    ended: str
    finished: bool
    prefers: bool = False

    @property
    def rank(self) -> tuple[float, int]:
        """The best first, those without a loss last."""
        none = self.after is None or not math.isfinite(self.after)
        return math.inf if none else float(self.after or 0.0), self.note.number


def job_result(note: JobNote) -> JobResult:
    """What a job has left in its run directory."""
    from lmoe.report.summary import FINISHED, RunSummary

    file = Path(note.folder) / SUMMARY_FILE
    missing = JobResult(note=note, before=None, after=None, ended="", finished=False)
    if note.state != DONE or not file.exists():
        return missing
    try:
        summary = RunSummary.from_json(file)
    except LmoeError:
        return missing
    ended = "" if summary.ended == FINISHED else summary.ended
    before = summary.before_mean if summary.before.keys() == summary.after.keys() else None
    prefers = {summary.loss_measure, *summary.phase_measures.values()} != {NATS}
    return JobResult(note=note, before=before, after=summary.after_mean, ended=ended, finished=True, prefers=prefers)


def print_table(notes: Sequence[JobNote]) -> None:
    """The jobs, the best first, and the command that compares those that are done."""
    if not notes:
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lmoe.report.say import say
    from lmoe.report.wording import NOT_MEASURED, duration, loss

    console, results = Console(), [job_result(note) for note in notes]
    table = Table(title="Jobs of this multirun", title_justify="left", box=None, pad_edge=False)
    for name in ("job", "settings", "val. loss", "change", "time", "state"):
        left = name in ("settings", "state")
        table.add_column(name, overflow="fold", justify="left" if left else "right")
    for one in sorted(results, key=lambda result: result.rank):
        note = one.note
        change = NOT_MEASURED if one.before is None or one.after is None else f"{one.after - one.before:+.3f}"
        spent = NOT_MEASURED if math.isnan(note.seconds) else duration(note.seconds)
        state = f"{note.state}, {one.ended}" if one.ended else note.state
        table.add_row(*map(Text, (str(note.number), note.label, loss(one.after), change, spent, state)))
    say(console, "")
    console.print(table)
    total = notes[0].total
    if total is not None and len(notes) < total:
        say(console, f"{total - len(notes)} of {total} jobs have not begun")
    for line in next_lines([one for one in results if one.finished]):
        say(console, line)


def next_lines(results: Sequence[JobResult]) -> list[str]:
    """What to do next with jobs that have a summary: the command that compares them, or those that measure each."""
    from lmoe.report.summary import TIME_OVER

    if len(results) > 1 and any(one.prefers for one in results):
        measure = [["lmoe", "evaluate", "--checkpoint", path_from_here(Path(one.note.folder))] for one in results]
        return [
            "lmoe compare judges runs by their answers, and these learn preferences; measure each:",
            *(f"  {shlex.join(words)}" for words in measure),
        ]
    whole = [one.note for one in results if one.ended != TIME_OVER]
    if len(whole) < 2:
        return []
    compare = shlex.join(["lmoe", "compare", *(path_from_here(Path(note.folder)) for note in whole)])
    if are_one_arm([note.label for note in whole]):
        return [f"they are one arm, which is compared beside runs of other settings: {compare} RUN …"]
    return [f"compare them: {compare}"]


def are_one_arm(labels: Sequence[str]) -> bool:
    """Whether jobs differ in nothing that `lmoe compare` takes for another arm.

    Args:
        labels: of the jobs, see `JobNote`.
    """
    settings = [set(label.split()) for label in labels]
    differing = set.union(*settings) - set.intersection(*settings)
    keys = {text.lstrip("+").partition("=")[0] for text in differing}
    return all(any(key == name or key.startswith(f"{name}.") for name in ("seed", *SAFE)) for key in keys)
