"""A run that is killed at any moment, as often as may be, ends with the bytes of the run that nobody killed."""

import contextlib
import csv
import random
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.torture.outcome import Outcome
from benchmarks.torture.pieces import micro_overrides
from benchmarks.torture.process import Ended, Kill, Way, run
from benchmarks.torture.settings import RUNS, command_line

CLAIM = "killed runs of the micro model end with the bytes of the run that nobody killed"
STARTS = 12
"""So often a run may be started before it counts as lost."""
AIMED = 1 / 3
"""Share of the kills of runs with slow writes that wait for a checkpoint to be written."""
WRITES = ("*.partial", "checkpoints/*.partial", "adapter/*.partial", "cache/*.partial")


@dataclass(slots=True, frozen=True, kw_only=True)
class Job:
    """One kind of run.

    Args:
        name: for messages.
        arguments: overrides but for the run directory.
        own_cache: whether each run tokenises its rows anew.
    """

    name: str
    arguments: list[str]
    own_cache: bool = False


@dataclass(slots=True)
class Whole:
    """Uninterrupted runs, made when they are first asked for: their results and how long they live."""

    base: Path
    _lives: dict[tuple[str, Way], float] = field(default_factory=dict)
    _extra: dict[Way, float] = field(default_factory=dict)
    _first: Job | None = None

    def run_of(self, job: Job) -> Path:
        """The folder of the uninterrupted run."""
        self.life_of(job, Way())
        return self.base / job.name

    def life_of(self, job: Job, way: Way) -> float:
        """Seconds from start to end; what another way adds is measured once, on the first job."""
        self._first = self._first or job
        if (job.name, Way()) not in self._lives:
            self._lives[job.name, Way()] = self._measure(job, Way(), self.base / job.name)
        if way not in self._extra:
            other = self.base / f"{self._first.name} {way}"
            alone = self.life_of(self._first, Way()) if way != Way() else 0.0
            self._extra[way] = self._measure(self._first, way, other) - alone if way != Way() else 0.0
            if way != Way() and (problem := difference(other, self.base / self._first.name)):
                raise RuntimeError(f"two uninterrupted runs differ ({way}): {problem}")
        return self._lives[job.name, Way()] + max(self._extra[way], 0.0)

    def _measure(self, job: Job, way: Way, folder: Path) -> float:
        ended = run(way, new_run(job, folder), made(folder.parent))
        if ended.code:
            raise RuntimeError(f"the uninterrupted run {job.name} ended with {ended.code}: {ended.text[-2000:]}")
        return ended.seconds


def made(folder: Path) -> Path:
    """The folder, made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def new_run(job: Job, folder: Path) -> list[str]:
    """Overrides that start it; resume=auto goes on if there is something to go on with."""
    cache = [f"data.cache_dir='{folder}/cache'"] if job.own_cache else []
    kept = [a for a in job.arguments if not (cache and a.startswith("data.cache_dir="))]
    return [*kept, *cache, "resume=auto", f"hydra.run.dir='{folder}'"]


def kill_and_resume(job: Job, way: Way, whole: Whole, folder: Path, rng: random.Random, outcome: Outcome) -> None:
    """One run: up to three kills, uniform over the life of an uninterrupted one, some aimed; then left to end."""
    reference, life = whole.run_of(job), whole.life_of(job, way)
    kills, wanted = 0, rng.choice((1, 1, 2, 3))
    case = f"{job.name} in {folder.name}"
    ended, missed = None, 0
    for _ in range(STARTS):
        before = stamps(folder)
        kill = next_kill(folder, before, life, way, rng) if kills < wanted else None
        here = (folder / "config.yaml").exists()
        started = [f"resume='{folder}'"] if here and rng.random() < 0.5 else new_run(job, folder)
        ended = run(way, started, folder.parent, kill)
        if ended.killed:
            kills += 1
            outcome.count(place_of(folder, before))
            continue
        if ended.code == 0 and kills == 0:  # it was faster than the kill
            missed += 1
            outcome.count("ended before their kill")
            shutil.rmtree(folder)
            continue
        break
    outcome.count("kills", kills)
    outcome.judge(case, verdict(ended, kills, folder, reference))
    outcome.count("of them fresh processes", int(way.fresh))


def next_kill(folder: Path, before: dict[Path, int], life: float, way: Way, rng: random.Random) -> Kill:
    """When to kill next: at any moment, or inside the next write of a checkpoint after it."""
    aimed = way.slow and rng.random() < AIMED
    if not aimed:
        return Kill(after=rng.uniform(0, life))
    return Kill(after=rng.uniform(0, life / 2), once=lambda: _in_checkpoint(folder, before))


def verdict(ended: Ended | None, kills: int, folder: Path, reference: Path) -> str | None:
    """What is wrong, or None."""
    if ended is None or ended.killed or not kills:
        return f"never ended, or never killed ({kills} kills)"
    if ended.code or "Traceback" in ended.text:
        return f"lost: exit code {ended.code}: {ended.text[-800:]}"
    return difference(folder, reference)


def difference(folder: Path, reference: Path) -> str | None:
    """What differs between the results of two runs, or None."""
    adapter = Path("adapter") / "adapter.safetensors"
    if not (folder / adapter).exists():
        return "no adapter"
    if (folder / adapter).read_bytes() != (reference / adapter).read_bytes():
        return "another adapter"
    ours, theirs = logged(folder), logged(reference)
    if ours == theirs:
        return None
    steps = [row["step"] for row, other in zip(ours, theirs, strict=False) if row != other]
    return f"other metrics: {len(ours)} rows for {len(theirs)}, differing at steps {steps[:5]}"


def logged(folder: Path) -> list[dict[str, str]]:
    """metrics.csv but for the speed; columns in any order."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as lines:
        return [
            {k: _number(v) for k, v in row.items() if v and not k.startswith("throughput")}
            for row in csv.DictReader(lines)
        ]


def _number(text: str) -> str:
    """A step is written as 3 or, read back, as text; both are the same number."""
    return repr(float(text))


def stamps(folder: Path) -> dict[Path, int]:
    """Files that a write leaves when it is broken off, with their times; an earlier kill may have left some."""
    found = {}
    for path in (path for pattern in WRITES for path in folder.glob(pattern)):
        with contextlib.suppress(FileNotFoundError):  # it has its name by now
            found[path] = path.stat().st_mtime_ns
    return found


def fresh(folder: Path, before: dict[Path, int]) -> list[Path]:
    """Half-written files that were not there, or were older."""
    return [path for path, time in stamps(folder).items() if before.get(path) != time]


def _in_checkpoint(folder: Path, before: dict[Path, int]) -> bool:
    return any(path.parent.name == "checkpoints" for path in fresh(folder, before))


def place_of(folder: Path, before: dict[Path, int]) -> str:
    """Where a kill fell, as far as the folder shows it."""
    checkpoints = folder / "checkpoints"
    if _in_checkpoint(folder, before):
        return "inside a checkpoint write"
    if list(checkpoints.glob("step-*.ckpt")) and not (checkpoints / "last.ckpt").exists():
        return "between the renames of a checkpoint"
    if fresh(folder, before):
        return "inside another write"
    if not (folder / "config.yaml").exists():
        return "before config.yaml"
    if not list(checkpoints.glob("*.ckpt")):
        return "before the first checkpoint"
    return "later, at the end" if (folder / "adapter").exists() else "while training"


def torture(base: Path, count: int, seed: int, outcome: Outcome) -> None:
    """`count` runs of the micro model over the settings in turn."""
    common = micro_overrides(base)
    jobs = [
        Job(name=name, arguments=command_line(common, name), own_cache=number % 4 == 0)
        for number, name in enumerate(RUNS)
    ]
    kill_all(jobs, count, seed, base / "kills", outcome)


def kill_all(jobs: list[Job], count: int, seed: int, base: Path, outcome: Outcome) -> None:
    """Kill runs of the jobs in turn: each second run with slow writes, each fifth as fresh processes."""
    rng, whole = random.Random(seed), Whole(base / "whole")
    for number in range(count):
        way = Way(fresh=number % 5 == 4, slow=number % 2 == 0)
        folder = made(base / "killed") / f"run {number}"
        kill_and_resume(jobs[number % len(jobs)], way, whole, folder, rng, outcome)
        shutil.rmtree(folder, ignore_errors=True)
        if (number + 1) % 5 == 0:
            sys.stderr.write(f"  {outcome.passed} of {outcome.tried}, {outcome.figures}\n")
