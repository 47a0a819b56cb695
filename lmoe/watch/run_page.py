"""The page of a run as its files are now: what is not there yet is left out."""

import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from lmoe.config.pretrain import PretrainConfig
from lmoe.config.read import read_section
from lmoe.config.run import RunConfig
from lmoe.errors import CheckpointError, LmoeError
from lmoe.files.places import expanded, is_dir, is_file
from lmoe.files.run_folder import CONFIG_FILE, METRICS_FILE, REPORT, SUMMARY_FILE, path_from_here
from lmoe.files.small_file import Reader
from lmoe.files.wording import LONGEST_REASON, shown
from lmoe.report.curves import Curves, domain_losses, read_metrics
from lmoe.report.page import CAPTIONS, Watched, is_shown, page_content, run_page
from lmoe.report.routing_file import ROUTING_FILE, WHOLE, RoutingHistory, read_routing
from lmoe.report.summary import RunSummary
from lmoe.report.wording import duration
from lmoe.rules.lessons import Lesson, lesson_of
from lmoe.rules.objectives import OBJECTIVES
from lmoe.rules.phases import ordered_phases

SAVED = Reader(cure="put back the file that the run has written")
OFTEN, SELDOM = 3.0, 30.0
"""Seconds between two questions of a page while a run goes on, and when it has ended."""
REST = 20
"""A page asks so much more seldom than reading and making its data takes, because the run needs the machine."""
SILENT = 600
"""Seconds without news after which a run may have stopped."""


@dataclass(slots=True, frozen=True)
class Found:
    """What the files of a run hold.

    Args:
        summary: of a run that has not ended, what is known so far.
        ended: whether the run has ended.
        metrics: those that the page shows.
        routing: what the routers did so far, if there is anything.
        pictures: names of those that are there.
        step: newest step in the metrics; None: there is none yet.
        notes: files that could not be read.
    """

    summary: RunSummary
    ended: bool
    metrics: Curves
    routing: RoutingHistory | None
    pictures: tuple[str, ...]
    step: int | None
    notes: tuple[str, ...]

    @property
    def shape(self) -> str:
        """Changes where the page has other parts than before."""
        routing = self.routing
        parts = (
            self.ended,
            self.pictures,
            sorted(name for name in self.metrics if not name.startswith("routing/")),
            None if routing is None else (routing.sites, bool(len(routing.steps)), len(routing.validation_steps) > 0),
            None if routing is None else bool(routing.rows),
            any(name.startswith("routing/") for name in self.metrics),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class RunPage:
    """The page of a run, and what is new on it; made anew when a file has changed. May be asked by several threads.

    Args:
        place: run directory.

    Raises:
        CheckpointError: no such folder, no run, or a config that cannot be read.
    """

    def __init__(self, place: str | Path) -> None:
        self.folder = run_directory(place)
        self._run = hashlib.sha256(os.fsencode(self.folder.resolve())).hexdigest()[:16]
        self._lock = threading.Lock()
        self._stamp = _stamp(self.folder)
        self._config = _config(self.folder)
        self._notes: list[str] = []  # of a config that a run which goes on has written, and that cannot be read
        self._found: Found | None = None
        self._content: dict[str, Any] | None = None  # of what was found, once somebody has asked for it
        self._version, self._seconds = "", 0.0

    def page(self) -> str:
        """The page as it is now."""
        with self._lock:
            found = self._now()
            return run_page(
                *(found.summary, found.metrics, {name: f"{name}.png" for name in found.pictures}),
                routing=found.routing,
                watched=self._watched(found),
            )

    def news(self, version: str) -> dict[str, Any]:
        """What a page is told that asks.

        Args:
            version: of the data that it has; "": none.
        """
        with self._lock:
            found = self._now()
            content = {} if version == self._version else self._made(found)
            watched = self._watched(found)
            told: dict[str, Any] = {
                "state": watched.state,
                "version": self._version,
                "watched": {"shape": watched.shape, "every": watched.every},
                "data": None,
                "tables": None,
            }
            return told | content

    def picture(self, name: str) -> Path | None:
        """The file of a picture by its name; None: there is none of this name."""
        path = self.folder / REPORT / f"{name}.png"
        return path if name in CAPTIONS and is_file(path) else None

    def _now(self) -> Found:
        stamp = _stamp(self.folder)
        if self._found is None or stamp != self._stamp:
            begun = time.monotonic()
            if stamp[CONFIG_FILE] != self._stamp[CONFIG_FILE]:
                self._notes = []
                path = self.folder / CONFIG_FILE
                self._config = _read(lambda: _config(self.folder), path, self._notes) or self._config
            self._found, self._stamp, self._content = find(self.folder, self._config, self._notes), stamp, None
            self._version = hashlib.sha256(repr(stamp).encode()).hexdigest()[:16]
            self._seconds = time.monotonic() - begun
        return self._found

    def _made(self, found: Found) -> dict[str, Any]:
        """What of the page changes while a run goes on; made once, however many pages ask."""
        if self._content is None:
            begun = time.monotonic()
            self._content = page_content(found.summary, found.metrics, found.routing, under_way=not found.ended)
            self._seconds += time.monotonic() - begun
        return self._content

    def _watched(self, found: Found) -> Watched:
        every = SELDOM if found.ended else max(OFTEN, REST * self._seconds)
        state = said(found, _age(self.folder / METRICS_FILE))
        return Watched(state=state, ended=found.ended, run=self._run, shape=found.shape, every=round(every, 1))


def run_directory(place: str | Path) -> Path:
    """The folder of a run.

    Raises:
        CheckpointError: there is none, or it holds no run.
    """
    folder = expanded(str(place))
    if not is_dir(folder):
        raise CheckpointError(f"{folder}: no such run directory")
    if not is_file(folder / CONFIG_FILE):
        raise CheckpointError(
            f"{folder}: no run: it has no {CONFIG_FILE}; name the folder that a training calls its run directory"
        )
    return folder


def _config(folder: Path) -> RunConfig:
    content = SAVED.yaml(folder / CONFIG_FILE)
    config, reading = read_section(RunConfig, content)
    if reading.problems:
        if not read_section(PretrainConfig, content)[1].problems:
            raise CheckpointError(
                f"{folder}: a run that pre-trains a base, which has no such page: name a run with adapters; the losses "
                f"of this one are in its {METRICS_FILE}"
            )
        raise SAVED.refusal(folder / CONFIG_FILE, shown("; ".join(reading.problems), longest=LONGEST_REASON))
    return config


def find(folder: Path, config: RunConfig, notes: Sequence[str] = ()) -> Found:
    """Read the files of a run.

    Args:
        notes: of other files that could not be read.
    """
    notes = list(notes)
    report = folder / REPORT
    metrics = _read(lambda: read_metrics(folder / METRICS_FILE, is_shown), folder / METRICS_FILE, notes) or {}
    routing = _read(lambda: read_routing(report / ROUTING_FILE), report / ROUTING_FILE, notes)
    summary = _read(lambda: RunSummary.from_json(folder / SUMMARY_FILE), folder / SUMMARY_FILE, notes)
    step = max((points[-1][0] for points in metrics.values() if points), default=None)
    ended = summary is not None and _has_ended(folder, config, summary, step)
    if summary is None or not ended:
        summary = provisional(folder, config, metrics, routing, step or 0)
    pictures = tuple(name for name in CAPTIONS if ended and is_file(report / f"{name}.png"))
    return Found(summary, ended, metrics, routing, pictures, step, tuple(notes))


def _has_ended(folder: Path, config: RunConfig, summary: RunSummary, step: int | None) -> bool:
    """Whether a run has come to the end that its summary is of, and has not gone on since.

    NOTE a copy of a folder may date its files in any order, so their dates count only where the newest metrics are of
    an earlier step than the end: those behind it were taken back by a run that goes on, or were never logged.

    Args:
        step: newest one in the metrics; None: there is none.
    """
    done = summary.max_steps if summary.steps is None else summary.steps
    if config.trainer.max_steps > summary.max_steps:
        return False
    if step is None or step == done:
        return True
    written, logged = _stat(folder / SUMMARY_FILE), _stat(folder / METRICS_FILE)
    return step < done and written is not None and logged is not None and written[0] >= logged[0]


def provisional(
    folder: Path, config: RunConfig, metrics: Curves, routing: RoutingHistory | None, step: int
) -> RunSummary:
    """The summary of a run that has not ended, in which what only its end tells is empty."""
    points = {domain: found for domain, found in domain_losses(metrics).items() if found}
    phases = _phases(config) if routing is None else routing.phases
    lessons = {name: lesson_of(config, name) for name in phases if name in config.phase.phases}
    measures = {name: OBJECTIVES[lesson.task.name].measure for name, lesson in lessons.items()}
    begun = [name for name in lessons if phases[name] < max(step, 1)]
    since, as_at_first = _same_losses(phases, lessons, begun)
    loads = {} if routing is None or not len(routing.steps) else _loads(routing)
    return RunSummary(
        name=config.name,
        run_dir=path_from_here(folder),
        domains=list(points),
        before={domain: found[0][1] for domain, found in points.items() if as_at_first and found[0][0] == 0},
        after={domain: found[-1][1] for domain, found in points.items() if found[-1][0] > since},
        site_load=loads,
        domain_load={},
        phases=phases,
        max_steps=config.trainer.max_steps,
        seconds=0.0,
        peak_memory_mb=None,
        trainable_parameters=0,
        backbone=config.backbone.full_name,
        collapsed=[],
        expert_names=[] if routing is None else routing.expert_names,
        steps=step,
        loss_measure=measures[begun[-1]] if begun else OBJECTIVES[config.task.name].measure,
        phase_measures=measures if len(set(measures.values())) > 1 else {},
    )


def _same_losses(phases: Mapping[str, int], lessons: Mapping[str, Lesson], begun: Sequence[str]) -> tuple[int, bool]:
    """The step after which losses are of what the phase under way learns, and whether those at step 0 are too.

    Args:
        phases: first optimizer step of each by name, in order.
        lessons: what each learns.
        begun: names of the phases that have begun.
    """
    if not begun:
        return 0, True

    def same(name: str) -> bool:
        one, other = lessons[name], lessons[begun[-1]]
        return one.task == other.task and one.same_rows(other)

    *_, first = takewhile(same, reversed(begun))
    return phases[first], same(begun[0])


def said(found: Found, age: float | None) -> str:
    """How far a run is, in words.

    Args:
        age: seconds since its newest numbers; None: there are none.
    """
    summary = found.summary
    if found.ended:
        state = f"The run has ended: {summary.ended}."
    elif found.step is None or age is None:
        state = "The run has no numbers yet."
    else:
        state = f"Step {found.step:,} of {summary.max_steps:,}; the newest numbers are {duration(age)} old."
        state += " Perhaps the run has stopped." if age > SILENT else ""
    return " ".join([state, *(f"Left out: {note}." for note in found.notes)])


def _loads(routing: RoutingHistory) -> dict[str, list[float]]:
    """Load of each expert by site at the last step."""
    found, begin = {}, 0
    for site, count in zip(routing.sites, routing.experts, strict=True):
        found[site] = (routing.load[-1, begin : begin + count] / WHOLE).tolist()
        begin += count
    return found


def _phases(config: RunConfig) -> dict[str, int]:
    try:
        return {name: start for name, start, _ in ordered_phases(config)}
    except ValueError:
        return {}


def _read(read: Any, path: Path, notes: list[str]) -> Any:
    """What a file holds; None: it is not there, or cannot be read, which is noted."""
    if not is_file(path):
        return None
    try:
        return read()
    except LmoeError as error:
        notes.append(str(error))
        return None


def _stamp(folder: Path) -> dict[str, object]:
    """What changes when a file of the run does, by its name."""
    names = [CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, *(f"{REPORT}/{name}" for name in (ROUTING_FILE, "index.html"))]
    return {name: _stat(folder / name) for name in names}


def _stat(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _age(path: Path) -> float | None:
    found = _stat(path)
    return None if found is None else max(0.0, time.time() - found[0] / 1e9)


def as_json(value: Any) -> bytes:
    """JSON as a page reads it."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()
