"""Do a study: tune each arm, judge it with fresh seeds, the best again with longer runs, and time them."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lmoe.config.trainer import max_seconds
from lmoe.files.run_folder import hydra_quoted
from lmoe.report.wording import duration
from lmoe.study.arms import UNTUNED, Arm, Values, values_text
from lmoe.study.jobs import Job, Judging, failure_of, is_done, job_of, seconds_of, was_pruned
from lmoe.study.judged import read_judged
from lmoe.study.sampling import ArmSampler, Watch, check_installed
from lmoe.study.study import Study, Tools
from lmoe.study.timing import ArmTiming, time_arms
from lmoe.study.tuning import MOST_WIDENED, Chosen, Try, chosen, score_of, widened
from lmoe.training.phases import PhaseSchedule
from lmoe.vocabulary import AtEdge, Sampler

NAMED = 3
"""Jobs that a message names."""
SCREENED = 3
"""Values of an arm that a screening tries."""
CLEARLY = 5.0
"""Margins by which an arm must be behind the baseline in a screening to be dropped."""
RESERVED = 3
"""Seeds of judging that a study with a time limit keeps time for."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """What a study has so far.

    Args:
        arms: with their spaces as they are now.
        chosen: by arm; of an arm without a space its only values.
        judged: jobs that judge, by arm, in the order of the seeds.
        longer: the same of the longer runs.
        timings: by arm.
        notes: what a reader has to know of how it was done.
        deadline: on the monotonic clock; None: there is none.
    """

    arms: dict[str, Arm]
    chosen: dict[str, Chosen] = field(default_factory=dict)
    judged: dict[str, list[Job]] = field(default_factory=dict)
    longer: dict[str, list[Job]] = field(default_factory=dict)
    timings: dict[str, ArmTiming] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    deadline: float | None = None

    @property
    def time_left(self) -> float:
        """Seconds; infinity without a deadline."""
        return math.inf if self.deadline is None else self.deadline - time.monotonic()


def run_study(study: Study, tools: Tools) -> Progress:
    """Do what is not done yet.

    Raises:
        LmoeError: what is kept cannot be used.
        Stopped: a signal has ended it; the same command goes on.
    """
    limit = max_seconds(study.config.max_time)
    progress = Progress(arms=dict(study.arms), deadline=None if limit is None else time.monotonic() + limit)
    if not any(arm.space for arm in progress.arms.values()):
        progress.chosen = {name: _untuned() for name in progress.arms}
        progress.notes.append("nothing was tuned: each arm has the values that it was given")
    elif study.config.tuning.sampler is Sampler.tpe:
        tune_by_sampling(study, tools, progress)
    elif limit is None:
        tune(study, tools, progress)
    else:
        tune_in_time(study, tools, progress)
    values = {name: found.best.values for name, found in progress.chosen.items() if found.usable}
    jobs = judging_jobs(study, progress.arms, values)
    do(study, tools, jobs, "judging", progress)
    progress.judged = by_arm(jobs)
    if study.config.longer.arms:
        judge_longer(study, tools, progress, values)
    if study.config.timing.steps and progress.time_left > 0:
        tools.say("timing each arm alone")
        progress.timings = time_arms(
            {name: _of_one_run(study, arm) for name, arm in progress.arms.items()},
            values,
            study.folder,
            steps=study.config.timing.steps,
            repeats=study.config.timing.repeats,
            alone=tools.alone,
            say=tools.say,
        )
    return progress


def _of_one_run(study: Study, arm: Arm) -> Arm:
    """The arm; of one that trains apart, the runs of the first domain alone."""
    if not arm.apart:
        return arm
    return replace(arm, settings=(*arm.settings, f"data.domains=[{hydra_quoted(study.domains[0])}]"))


def tune(study: Study, tools: Tools, progress: Progress) -> None:
    """Try all values of each arm with the seeds of tuning, and choose; one more for all where the best is outermost."""
    seeds = study.config.tuning.seeds
    for widenings in range(MOST_WIDENED + 1):
        tries = {name: arm.grid() for name, arm in progress.arms.items()}
        jobs = tuning_jobs(study, progress.arms, tries, seeds)
        do(study, tools, jobs, f"tuning, grids widened ({widenings})" if widenings else "tuning", progress)
        progress.chosen = {name: choose(study, arm, tries[name], seeds) for name, arm in progress.arms.items()}
        for name, found in progress.chosen.items():
            tools.say(_chosen_line(name, found))
        widen = study.config.tuning.at_edge is AtEdge.widen and widenings < MOST_WIDENED
        wider = widened(progress.arms, progress.chosen) if widen else None
        if wider is None:
            return
        progress.arms = wider


def tune_by_sampling(study: Study, tools: Tools, progress: Progress) -> None:
    """Draw as many tries of each arm as asked for, one of each at a time, and choose.

    With study.tuning.prune a try is watched with its first seed alone, and where it was pruned its other seeds are not
    trained.
    """
    check_installed()
    tuning = study.config.tuning
    tries = tuning.tries or max(len(arm.grid()) for arm in progress.arms.values())
    samplers = {name: ArmSampler(arm, tries, study.folder) for name, arm in progress.arms.items()}
    while asked := {name: got for name, sampler in samplers.items() if (got := sampler.ask()) is not None}:
        first = [make_job(study, progress.arms[n], v, tuning.seeds[0], judging=None) for n, (_, v) in asked.items()]
        if tuning.prune:
            watched = [replace(job, watch=_watch(study, job, asked[job.arm][0], tries)) for job in first]
            number = max(trial for trial, _ in asked.values()) + 1
            do(study, tools, watched, f"tuning, try {number} of {tries}, first seed", progress)
            first = [job for job in first if is_done(job, study.folder)]
        values = {job.arm: [job.values] for job in first}
        arms = {name: progress.arms[name] for name in values}
        jobs = tuning_jobs(study, arms, values, tuning.seeds)
        do(study, tools, jobs, f"tuning, try {max(trial for trial, _ in asked.values()) + 1} of {tries}", progress)
        for name, (trial, drawn) in asked.items():
            found = choose(study, progress.arms[name], [drawn], tuning.seeds).best
            pruned = was_pruned(
                make_job(study, progress.arms[name], drawn, tuning.seeds[0], judging=None), study.folder
            )
            samplers[name].tell(trial, found.mean if found.scores else None, pruned=pruned)
    for name, arm in progress.arms.items():
        found = choose(study, arm, list(dict.fromkeys(samplers[name].all_values())), tuning.seeds)
        edges = samplers[name].edges(found.best.values) if found.usable else {}
        progress.chosen[name] = replace(found, edges=edges)
        tools.say(_chosen_line(name, progress.chosen[name]))


def _watch(study: Study, job: Job, trial: int, tries: int) -> Watch:
    """What a launcher has to know to prune a job."""
    phases = PhaseSchedule.of(study.configs[job.arm]).phases
    return Watch(
        arm=job.arm,
        trial=trial,
        tries=tries,
        several_keys=len(job.values) > 1,
        from_step=phases[-1].start if isinstance(phases[-1].start, int) else 0,
        metric=study.config.tuning.metric,
    )


def tune_in_time(study: Study, tools: Tools, progress: Progress) -> None:
    """Tune as far as the time reaches: a screening with one seed first, which drops arms that are clearly worse.

    Then, with time kept for RESERVED seeds of judging, all values with all seeds, or else the two best values of each
    arm with all seeds, or else nothing more.
    """
    seeds = study.config.tuning.seeds
    few = {name: screened(arm.grid()) for name, arm in progress.arms.items()}
    do(study, tools, tuning_jobs(study, progress.arms, few, seeds[:1]), "screening", progress)
    first = {name: choose(study, arm, few[name], seeds[:1]) for name, arm in progress.arms.items()}
    bar = first[study.config.baseline].best.mean + CLEARLY * study.config.judging.margin
    kept = {name: found for name, found in first.items() if name == study.config.baseline or found.best.mean <= bar}
    for name in first.keys() - kept.keys():
        behind = first[name].best.mean - first[study.config.baseline].best.mean
        note = f"{name} was dropped after the screening: {behind:.3f} behind the baseline with one seed"
        if not math.isfinite(behind):
            jobs = tuning_jobs(study, {name: progress.arms[name]}, few, seeds[:1])
            failed = any(failure_of(job, study.folder) is not None for job in jobs)
            why = "its runs of the screening failed" if failed else "the time did not reach for its screening"
            note = f"{name} was dropped: {why}"
        progress.notes.append(note)
        tools.say(progress.notes[-1])
    arms = {name: progress.arms[name] for name in kept}
    every = {name: arm.grid() for name, arm in arms.items()}
    best = {name: [t.values for t in (found.best, found.second) if t is not None] for name, found in kept.items()}
    wanted, tried = seeds[:1], few
    for tries in (every, best):
        jobs = tuning_jobs(study, arms, tries, seeds)
        left = [job for job in jobs if not is_done(job, study.folder)]
        reserve = len(arms) * min(RESERVED, len(study.config.judging.seeds)) * _expected(study, left, tools)
        if len(left) * _expected(study, left, tools) <= progress.time_left - reserve:
            do(study, tools, jobs, "tuning", progress)
            wanted, tried = seeds, tries
            break
    else:
        progress.notes.append(
            "values were chosen by the screening alone, with one seed: the time did not reach further"
        )
    progress.arms = arms
    progress.chosen = {name: choose(study, arm, tried[name], wanted) for name, arm in arms.items()}
    for name, found in progress.chosen.items():
        tools.say(_chosen_line(name, found))


def screened(grid: Sequence[Values]) -> list[Values]:
    """SCREENED points of a grid, the outermost and those between them."""
    if len(grid) <= SCREENED:
        return list(grid)
    return [grid[round(i * (len(grid) - 1) / (SCREENED - 1))] for i in range(SCREENED)]


def judge_longer(study: Study, tools: Tools, progress: Progress, values: Mapping[str, Values]) -> None:
    """The best arms and the baseline again, each with its values and longer runs."""
    judged = read_judged(progress.judged, study.folder).in_the_mean(study.config.judging)
    ranked = sorted(judged.losses, key=lambda name: float(judged.means(name).mean()))
    best = ranked[: study.config.longer.arms]
    names = [study.config.baseline, *(name for name in best if name != study.config.baseline)]
    chosen_values = {name: values[name] for name in names if name in values}
    jobs = judging_jobs(study, progress.arms, chosen_values, longer=study.config.longer.times)
    do(study, tools, jobs, f"judging with {study.config.longer.times} times the steps", progress)
    progress.longer = by_arm(jobs)


def tuning_jobs(
    study: Study, arms: Mapping[str, Arm], tries: Mapping[str, Sequence[Values]], seeds: Sequence[int]
) -> list[Job]:
    """A job for each try and seed, the seeds outermost."""
    return [
        make_job(study, arm, values, seed, judging=None)
        for seed in seeds
        for name, arm in arms.items()
        for values in tries[name]
    ]


def judging_jobs(study: Study, arms: Mapping[str, Arm], values: Mapping[str, Values], *, longer: int = 1) -> list[Job]:
    """A job for each arm and seed, the seeds outermost, so that a study that is stopped has whole seeds."""
    config = study.config.judging
    judging = Judging(rows_per_domain=config.rows_per_domain, batch_size=config.batch_size, more=config.more)
    return [
        make_job(study, arms[name], values[name], seed, judging=judging, longer=longer)
        for seed in config.seeds
        for name in values
    ]


def make_job(study: Study, arm: Arm, values: Values, seed: int, *, judging: Judging | None, longer: int = 1) -> Job:
    """The job of an arm."""
    trainer = study.configs[arm.name].trainer
    return job_of(
        arm,
        values,
        seed,
        study=study.config.name,
        domains=study.domains,
        max_steps=None if trainer.max_epochs is not None else trainer.max_steps,
        max_epochs=trainer.max_epochs,
        judging=judging,
        longer=longer,
    )


def do(study: Study, tools: Tools, jobs: Sequence[Job], what: str, progress: Progress) -> None:
    """Launch the jobs that are not done, as far as the time reaches, and say which have failed."""
    left = [job for job in jobs if not is_done(job, study.folder) and not was_pruned(job, study.folder)]
    done = f", {len(jobs) - len(left)} of them done" if len(left) < len(jobs) else ""
    tools.say(f"{what}: {len(jobs)} jobs{done}")
    if not left:
        return
    started = time.monotonic()
    begun = _launch(study, tools, left, progress)
    pruned = [job for job in begun if was_pruned(job, study.folder)]
    failed = [job for job in begun if job not in pruned and not is_done(job, study.folder)]
    ended = f", {len(pruned)} of them pruned" if pruned else ""
    tools.say(f"{what}: {len(begun) - len(failed)} done{ended} in {duration(time.monotonic() - started)}")
    if len(begun) < len(left):
        progress.notes.append(f"{what}: {len(left) - len(begun)} of {len(jobs)} jobs were not begun, for want of time")
        tools.say(progress.notes[-1])
    reasons: dict[str, list[str]] = {}
    for job in failed:
        reasons.setdefault(failure_of(job, study.folder) or "it was not begun", []).append(job.label)
    for reason, labels in reasons.items():
        more = f" and {len(labels) - NAMED} more" if len(labels) > NAMED else ""
        tools.say(f"failed: {', '.join(labels[:NAMED])}{more}: {reason}")


def _launch(study: Study, tools: Tools, jobs: Sequence[Job], progress: Progress) -> list[Job]:
    """Launch jobs: all at once, or with a deadline as many at a time as run beside one another, while they fit in.

    Returns:
        Those that were begun.
    """
    if progress.deadline is None:
        tools.launch(jobs)
        return list(jobs)
    begun: list[Job] = []
    while len(begun) < len(jobs):
        group = jobs[len(begun) : len(begun) + tools.parallel]
        if progress.time_left < _expected(study, group, tools) * tools.parallel:
            break
        tools.launch(group)
        begun += group
    return begun


def _expected(study: Study, jobs: Sequence[Job], tools: Tools) -> float:
    """Seconds that one of the jobs adds to the study, from those that are done: of the same arms, or else of any."""
    arms = {job.arm for job in jobs}
    known = {job.arm: seconds for job, seconds in seconds_of(study.folder)}
    own = [seconds for arm, seconds in known.items() if arm in arms] or list(known.values())
    return sum(own) / len(own) / tools.parallel if own else 0.0


def choose(study: Study, arm: Arm, tries: Sequence[Values], seeds: Sequence[int]) -> Chosen:
    """The best values of an arm by what its jobs have left; a try counts where all its seeds are done."""
    found = []
    for values in tries:
        scores = {}
        for seed in seeds:
            job = make_job(study, arm, values, seed, judging=None)
            score = score_of(job, study.folder, study.config.tuning.metric)
            if score is not None:
                scores[seed] = score
        found.append(Try(values=values, scores=scores if len(scores) == len(seeds) else {}))
    return chosen(arm, found)


def by_arm(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """Jobs of each arm, in their order."""
    return {name: [job for job in jobs if job.arm == name] for name in dict.fromkeys(job.arm for job in jobs)}


def _untuned() -> Chosen:
    alone = Try(values=UNTUNED, scores={})
    return Chosen(best=alone, second=None, edges={}, tries=(alone,))


def _chosen_line(name: str, found: Chosen) -> str:
    if not found.usable:
        return f"  {name}: every try has failed, so it is not judged"
    line = f"  {name}: {values_text(found.best.values)} ({found.best.mean:.4f})"
    if found.second is not None and math.isfinite(found.second.mean):
        line += f", then {values_text(found.second.values)} ({found.second.mean:.4f})"
    return line + "".join(f"; {key} is at the {side} edge" for key, side in found.edges.items())
