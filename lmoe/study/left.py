"""What is left of a study: the jobs that it needs, and which of them are done."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod

from lmoe.errors import LmoeError
from lmoe.study.arms import Arm, Values
from lmoe.study.in_time import SCREENED, behind, screening_means
from lmoe.study.jobs import JOB_FILE, RUNS, Job, is_done, read_job
from lmoe.study.launching import is_settled
from lmoe.study.planned import (
    choose,
    drawn_tries,
    from_the_middle,
    judging_jobs,
    tuning_jobs,
    untried,
    untuned,
    wider,
)
from lmoe.study.sampling import check_installed
from lmoe.study.study import Study
from lmoe.study.tuning import MOST_WIDENED, Chosen, is_movable
from lmoe.vocabulary import AtEdge, Sampler


@dataclass(slots=True, frozen=True, kw_only=True)
class StudyJobs:
    """The jobs of a study; which values are judged is not known before all of tuning is done.

    Args:
        tuning: jobs whose values are known.
        undrawn: how many jobs of tuning there are whose values are not drawn yet, by arm.
        judging: by seed.
        longer: how many there are at most.
        longer_done: how many of them are done.
        wider: how many more there may be at most, where the best values are outermost.
    """

    tuning: Sequence[Job]
    undrawn: Mapping[str, int]
    judging: Sequence[Sequence[Job]]
    longer: int
    longer_done: int
    wider: int

    def of_arm(self, name: str) -> list[Job]:
        """The jobs of an arm, without those of longer runs and those whose values are not drawn."""
        return [job for job in (*self.tuning, *chain(*self.judging)) if job.arm == name]


def study_jobs(study: Study) -> StudyJobs:
    """The jobs of a study, as far as they are known.

    Raises:
        LmoeError: what is kept is damaged, or values are to be drawn and Optuna is not installed.
    """
    config = study.config
    tuned = any(arm.space for arm in study.arms.values())
    arms, undrawn = dict(study.arms), dict.fromkeys(study.arms, 0)
    tuning, more = [], 0
    if tuned and config.tuning.sampler is Sampler.tpe:
        check_installed()
        drawn = {name: _drawn(study, name) for name in arms}
        tuning = tuning_jobs(study, arms, drawn, config.tuning.seeds)
        tries = drawn_tries(study)
        undrawn = {name: (tries - len(values)) * len(config.tuning.seeds) for name, values in drawn.items()}
        chosen = {name: _chosen(study, arm, drawn[name]) for name, arm in arms.items()}
    elif tuned:
        kept, screened = _screened(study)
        arms, tuning, more = _grids(study, kept)
        tuning += screened
        chosen = {name: _chosen(study, arm, arm.grid()) for name, arm in arms.items()}
    else:
        chosen = {name: untuned() for name in arms}
    values = {name: found.best.values for name, found in chosen.items()}
    again = min(config.longer.arms + 1, len(arms)) * len(config.judging.seeds) if config.longer.arms else 0
    longer = chain(*judging_jobs(study, arms, values, longer=config.longer.times)) if again else ()
    return StudyJobs(
        tuning=tuning,
        undrawn=undrawn,
        judging=judging_jobs(study, arms, values),
        longer=again,
        longer_done=min(again, sum(is_done(job, study.folder) for job in longer)),
        wider=more,
    )


def _screened(study: Study) -> tuple[dict[str, Arm], list[Job]]:
    """The arms that a screening within study.max_time has not dropped, and the jobs of those that it has: they have no
    others."""
    arms = dict(study.arms)
    order = {name: from_the_middle(arm) for name, arm in arms.items()}
    tried = min(SCREENED, *(len(values) for values in order.values()))
    first = {name: values[:tried] for name, values in order.items()}
    seeds = study.config.tuning.seeds[:1]
    if study.config.max_time is None or not is_settled(study, tuning_jobs(study, arms, first, seeds)):
        return arms, []
    dropped = behind(study, screening_means(study, arms, order, tried), worse=True)
    jobs = tuning_jobs(study, {name: arms[name] for name in dropped}, first, seeds)
    return {name: arm for name, arm in arms.items() if name not in dropped}, jobs


def _grids(study: Study, arms: Mapping[str, Arm]) -> tuple[dict[str, Arm], list[Job], int]:
    """The arms with grids as wide as they are by what is done, their jobs, and how many more there may be."""
    arms, seeds = dict(arms), study.config.tuning.seeds
    widenings = 0
    while True:
        tries = {name: arm.grid() for name, arm in arms.items()}
        jobs = tuning_jobs(study, arms, tries, seeds)
        if not is_settled(study, jobs):
            break
        found = {name: choose(study, arm, tries[name], seeds) for name, arm in arms.items()}
        more = wider(study, arms, found, widenings)
        if more is None:
            return arms, jobs, 0
        arms = more
        widenings += 1
    if study.config.tuning.at_edge is not AtEdge.widen:
        return arms, jobs, 0
    wide = [_widest(arm.space, MOST_WIDENED - widenings) for arm in arms.values()]
    return arms, jobs, len(seeds) * sum(wide) - len(jobs)


def _widest(space: Mapping[str, Sequence[object]], widenings: int) -> int:
    """How many points a grid has that is widened on all sides."""
    return prod(len(values) + 2 * widenings * is_movable(values) for values in space.values())


def _drawn(study: Study, name: str) -> list[Values]:
    """Values of an arm that runs were begun with."""
    found: list[Values] = []
    for file in sorted(study.folder.glob(f"{RUNS}/{name}/*/*/{JOB_FILE}")):
        try:
            job = read_job(file.parent)
        except LmoeError:  # the study says which file it is
            continue
        if job.judging is None:
            found.append(job.values)
    return list(dict.fromkeys(found))


def _chosen(study: Study, arm: Arm, tries: Sequence[Values]) -> Chosen:
    """The best by all seeds, or else by the first one, or else the middle."""
    for seeds in (study.config.tuning.seeds, study.config.tuning.seeds[:1]):
        if tries and (found := choose(study, arm, tries, seeds)).usable:
            return found
    return untried(arm)
