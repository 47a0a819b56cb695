"""Do a study: tune each arm, judge it with fresh seeds, the best again with longer runs, and time them."""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain

from lmoe.config.trainer import max_seconds
from lmoe.files.run_folder import hydra_quoted
from lmoe.study.arms import Arm, Values, values_text
from lmoe.study.durations import short_run_seconds
from lmoe.study.in_time import SLACK, judge_in_time, judging_reserve, measuring_base, tune_in_time
from lmoe.study.jobs import Job, has_diverged, is_done, was_pruned
from lmoe.study.judged import read_judged
from lmoe.study.launching import Reserve, do, fits, is_settled, not_done, nothing_kept, times_of
from lmoe.study.planned import by_arm, choose, drawn_tries, judging_jobs, tuning_jobs, untried, untuned, wider
from lmoe.study.progress import Progress
from lmoe.study.sampling import ArmSampler, Watch, check_installed
from lmoe.study.study import Study, Tools
from lmoe.study.timing import LEFT_OUT, time_arms
from lmoe.study.tuning import MOST_WIDENED, Chosen
from lmoe.training.phases import PhaseSchedule
from lmoe.vocabulary import Sampler


def run_study(study: Study, tools: Tools, began: float | None = None) -> Progress:
    """Do what is not done yet.

    Args:
        began: when study.max_time began, on the monotonic clock; None: now.

    Raises:
        LmoeError: what is kept cannot be used, or study.max_time does not reach for judging.
        Stopped: a signal has ended it; the same command goes on.
    """
    limit = max_seconds(study.config.max_time)
    start = time.monotonic() if began is None else began
    progress = Progress(arms=dict(study.arms), deadline=None if limit is None else start + limit)
    if not any(arm.space for arm in progress.arms.values()):
        progress.chosen = {name: untuned() for name in progress.arms}
        progress.notes.append("nothing was tuned: each arm has the values that it was given")
    elif study.config.tuning.sampler is Sampler.tpe:
        tune_by_sampling(study, tools, progress)
        _say_chosen(tools, progress)
    elif limit is None:
        tune(study, tools, progress)
    else:
        tune_in_time(study, tools, progress)
        _say_chosen(tools, progress)
    values = {name: found.best.values for name, found in progress.chosen.items() if found.usable}
    seeds = judging_jobs(study, progress.arms, values)
    if limit is None:
        do(study, tools, seeds, "judging", progress)
    else:
        judge_in_time(study, tools, progress, seeds)
    progress.judged = by_arm(list(chain(*seeds)))
    if study.config.longer.arms:
        judge_longer(study, tools, progress, values)
    if study.config.timing.steps:
        time_each(study, tools, progress, values)
    return progress


def time_each(study: Study, tools: Tools, progress: Progress, values: Mapping[str, Values]) -> None:
    """Time the arms that were judged, as many turns as fit in."""
    config = study.config.timing
    if not any(is_done(job, study.folder) for jobs in progress.judged.values() for job in jobs):
        tools.say("the arms are not timed, since nothing was judged")
        return
    begun = out_of_time = False

    def has_time() -> bool:
        nonlocal begun, out_of_time
        expected = 0.0
        if progress.deadline is not None:
            steps = config.steps + LEFT_OUT
            of_arms = short_run_seconds(study.folder, steps, parallel=tools.parallel, machine=tools.machine)
            turn = sum(of_arms.get(name, 0.0) for name in values)
            expected = SLACK * turn + measuring_base(study)(times_of(study, tools))
        if expected >= progress.time_left:
            out_of_time = True
            return False
        if not begun:
            tools.say("timing each arm alone")
        begun = True
        return True

    progress.timings = time_arms(
        {name: _of_one_run(study, arm) for name, arm in progress.arms.items()},
        values,
        study.folder,
        steps=config.steps,
        repeats=config.repeats,
        alone=tools.alone,
        note=lambda text: progress.note(text, tools.say),
        has_time=has_time,
    )
    if out_of_time:
        turns = max((len(timing.seconds) for timing in progress.timings.values()), default=0)
        timed = f"timed in {turns} of {config.repeats} turns" if turns else "not timed"
        progress.note(f"the arms were {timed}, for want of time", tools.say)


def _of_one_run(study: Study, arm: Arm) -> Arm:
    """The arm; of one that trains apart, the runs of the first domain alone."""
    if not arm.apart:
        return arm
    return replace(arm, settings=(*arm.settings, f"data.domains=[{hydra_quoted(study.domains[0])}]"))


def tune(study: Study, tools: Tools, progress: Progress) -> None:
    """Try all values of each arm with the seeds of tuning, and choose; one more for all where the best is outermost."""
    seeds = progress.tuning_seeds = study.config.tuning.seeds
    for widenings in range(MOST_WIDENED + 1):
        tries = {name: arm.grid() for name, arm in progress.arms.items()}
        jobs = tuning_jobs(study, progress.arms, tries, seeds)
        do(study, tools, [jobs], f"tuning, grids widened ({widenings})" if widenings else "tuning", progress)
        progress.chosen = {name: choose(study, arm, tries[name], seeds) for name, arm in progress.arms.items()}
        _say_chosen(tools, progress)
        arms = wider(study, progress.arms, progress.chosen, widenings)
        if arms is None:
            return
        progress.arms = arms


def tune_by_sampling(study: Study, tools: Tools, progress: Progress) -> None:
    """Draw as many tries of each arm as asked for, one of each at a time, and choose; within study.max_time as many as
    fit in beside judging.

    With study.tuning.prune a try is watched with its first seed alone, and where it was pruned its other seeds are not
    trained.
    """
    check_installed()
    tuning = study.config.tuning
    tries = drawn_tries(study)
    samplers = {name: ArmSampler(arm, tries, study.folder) for name, arm in progress.arms.items()}
    reserve = nothing_kept if progress.deadline is None else judging_reserve(study, progress.arms)
    unfinished: dict[str, Values] = {}
    while asked := {name: got for name, sampler in samplers.items() if (got := sampler.ask()) is not None}:
        drawn = {name: values for name, (_, values) in asked.items()}
        if not _try_drawn(study, tools, progress, asked, tries, reserve):
            unfinished = drawn
            break
        for name, (trial, values) in asked.items():
            _tell(study, progress.arms[name], samplers[name], trial, values)
    tried = {
        name: [values for values in dict.fromkeys(sampler.all_values()) if values != unfinished.get(name)]
        for name, sampler in samplers.items()
    }
    if unfinished:
        made = min(map(len, tried.values()))
        progress.note(f"{made} of {tries} tries of each arm were made, for want of time", tools.say)
    if not all(tried.values()):
        progress.chosen = {name: untried(arm) for name, arm in progress.arms.items()}
        return
    progress.tuning_seeds = tuning.seeds
    for name, arm in progress.arms.items():
        found = choose(study, arm, tried[name], tuning.seeds)
        edges = samplers[name].edges(found.best.values) if found.usable else {}
        progress.chosen[name] = replace(found, edges=edges)


def _tell(study: Study, arm: Arm, sampler: ArmSampler, trial: int, values: Values) -> None:
    """Tell a sampler what came of a try; nothing yet where jobs of it have failed that the next start does again."""
    seeds = study.config.tuning.seeds
    jobs = tuning_jobs(study, {arm.name: arm}, {arm.name: [values]}, seeds)
    found = choose(study, arm, [values], seeds).best
    pruned = was_pruned(jobs[0], study.folder)
    hopeless = any(has_diverged(job, study.folder) for job in jobs) or not not_done(study, jobs)
    if found.scores or pruned or hopeless:
        sampler.tell(trial, found.mean if found.scores else None, pruned=pruned)
    else:
        sampler.leave(trial)


def _try_drawn(
    study: Study,
    tools: Tools,
    progress: Progress,
    asked: Mapping[str, tuple[int, Values]],
    tries: int,
    reserve: Reserve,
) -> bool:
    """Do a try of each arm.

    Args:
        asked: number and values of the try, by arm.
        tries: of each arm.

    Returns:
        Whether it was done; else there was no time for it.
    """
    tuning = study.config.tuning
    arms = {name: progress.arms[name] for name in asked}
    number = max(trial for trial, _ in asked.values()) + 1
    every = tuning_jobs(study, arms, {name: [values] for name, (_, values) in asked.items()}, tuning.seeds)
    if not fits(study, tools, every, progress, reserve):
        return False
    if tuning.prune:
        first = [job for job in every if job.seed == tuning.seeds[0]]
        watched = [replace(job, watch=_watch(study, job, asked[job.arm][0], tries)) for job in first]
        do(study, tools, [watched], f"tuning, try {number} of {tries}, first seed", progress, reserve)
        if progress.deadline is not None and not is_settled(study, first):
            return False
        ended = {job.arm for job in first if not is_done(job, study.folder)}
        every = [job for job in every if job.arm not in ended]
    do(study, tools, [every], f"tuning, try {number} of {tries}", progress, reserve)
    return progress.deadline is None or is_settled(study, every)


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


def judge_longer(study: Study, tools: Tools, progress: Progress, values: Mapping[str, Values]) -> None:
    """The best arms and the baseline again, each with its values and longer runs."""
    judged = read_judged(progress.judged, study.folder).in_the_mean(study.config.judging)
    ranked = sorted(judged.losses, key=lambda name: float(judged.means(name).mean()))
    best = ranked[: study.config.longer.arms]
    names = [study.config.baseline, *(name for name in best if name != study.config.baseline)]
    chosen_values = {name: values[name] for name in names if name in values}
    jobs = judging_jobs(study, progress.arms, chosen_values, longer=study.config.longer.times)
    what = f"judging with {study.config.longer.times} times the steps"
    do(study, tools, jobs, what, progress, measuring_base(study))
    progress.longer = by_arm(list(chain(*jobs)))


def _say_chosen(tools: Tools, progress: Progress) -> None:
    for name, found in progress.chosen.items():
        tools.say(_chosen_line(name, found))


def _chosen_line(name: str, found: Chosen) -> str:
    if not found.usable:
        return f"  {name}: every try has failed, so it is not judged"
    if found.untried:
        return f"  {name}: {values_text(found.best.values)} (not tried)"
    line = f"  {name}: {values_text(found.best.values)} ({found.best.mean:.4f})"
    if found.second is not None and math.isfinite(found.second.mean):
        line += f", then {values_text(found.second.values)} ({found.second.mean:.4f})"
    return line + "".join(f"; {key} is at the {side} edge" for key, side in found.edges.items())
