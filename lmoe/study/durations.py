"""How long jobs of a study will take, by those that are done."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from pathlib import Path
from statistics import median

from lmoe.errors import LmoeError
from lmoe.study.jobs import Job, finished, seconds_of

JUDGING = 1.5
"""A job that judges lasts so many times as long as one that tunes, where no arm has both; measured on the bundled data
with the tiny base: 1.3 to 1.6."""


def at_once(each: Iterable[float], parallel: int) -> float:
    """Seconds of jobs that are launched at once: whoever is free takes the next of them.

    Args:
        each: seconds of each job, in the order of the launch.
        parallel: jobs that run beside one another.
    """
    free = [0.0] * parallel
    for seconds in each:
        heapreplace(free, free[0] + seconds)
    return max(free)


def in_groups(each: Sequence[float], parallel: int) -> float:
    """Seconds of jobs that are launched as many at a time as run beside one another, as within a limit of time: every
    group lasts as long as its longest job.

    Args:
        each: seconds of each job, in the order of the launches.
        parallel: jobs that run beside one another.
    """
    return sum(max(each[first : first + parallel]) for first in range(0, len(each), parallel))


@dataclass(slots=True, frozen=True, kw_only=True)
class JobTimes:
    """Seconds of jobs: the median of those that are done, which one that was held up does not move.

    Args:
        known: by arm, and whether the job judges.
        longer: factor of a longer run.
        parallel: jobs that run beside one another.
    """

    known: Mapping[tuple[str, bool], float]
    longer: int
    parallel: int

    @classmethod
    def of(cls, folder: Path, *, longer: int, parallel: int, machine: str) -> "JobTimes":
        """Read the seconds of the jobs that were done on a machine, as many beside one another.

        Args:
            folder: of the study.
            machine: as `Tools` has it.
        """
        found: dict[tuple[str, bool], list[float]] = {}
        for job, seconds in seconds_of(folder, machine=machine, parallel=parallel):
            found.setdefault((job.arm, job.judging is not None), []).append(seconds)
        return cls(known={of: median(seconds) for of, seconds in found.items()}, longer=longer, parallel=parallel)

    @property
    def ratio(self) -> float:
        """How many times as long a job lasts that judges."""
        both = [name for name, judges in self.known if judges and (name, False) in self.known]
        return median(self.known[name, True] / self.known[name, False] for name in both) if both else JUDGING

    def of_job(self, job: Job) -> float | None:
        """Seconds of a job: of its arm, or else of any; None: no job is done yet."""
        usual = self._usual(job.arm, job.judging is not None)
        return usual if usual is None or not job.is_longer else self.longer * usual

    def measuring(self, arm: str) -> float:
        """Seconds of judging a model of an arm, without its training; 0 where no job is done yet."""
        return max(0.0, (self._usual(arm, True) or 0.0) - (self._usual(arm, False) or 0.0))

    def together(self, jobs: Iterable[Job]) -> float:
        """Seconds that jobs take in this order, as many at a time as run beside one another; 0 where no job is done
        yet."""
        return in_groups([self.of_job(job) or 0.0 for job in jobs], self.parallel)

    def _usual(self, name: str, judges: bool) -> float | None:
        """Seconds of a job of an arm that judges or tunes, with runs of the usual length."""
        for arm in (name, None):
            if alike := self._of(arm, judges):
                return median(alike)
            if others := self._of(arm, not judges):
                return median(others) * (self.ratio if judges else 1 / self.ratio)
        return None

    def _of(self, arm: str | None, judges: bool) -> list[float]:
        return [seconds for (name, kind), seconds in self.known.items() if kind == judges and arm in (None, name)]


def short_run_seconds(folder: Path, steps: int, *, parallel: int, machine: str) -> dict[str, float]:
    """Seconds of a run of a few steps, by arm: what a job takes beside its runs, the least of all, and these steps.

    Args:
        folder: of the study.
        parallel, machine: of the jobs that it is told by.
    """
    found: dict[str, list[float]] = {}
    for job, seconds in seconds_of(folder, machine=machine, parallel=parallel):
        try:
            runs = [finished(folder / job.place / run.folder) for run in job.runs]
        except LmoeError:  # only an estimate is made of it
            continue
        done = [run for run in runs if run is not None]
        if done and len(done) == len(runs):
            beside = max(0.0, seconds - sum(run.seconds for run in done)) / len(runs)
            found.setdefault(job.arm, []).append(beside + done[0].seconds * steps / max(1, done[0].max_steps))
    return {name: min(each) for name, each in found.items()}
