"""Tune and judge within study.max_time: what judging needs is kept back, and tuning has what is left beyond it."""

import math
from collections.abc import Mapping, Sequence
from itertools import chain

from lmoe.config.trainer import max_seconds
from lmoe.errors import StudyError
from lmoe.report.wording import duration
from lmoe.study.arms import Arm, Values
from lmoe.study.durations import JobTimes
from lmoe.study.jobs import BASE_FILE, Job
from lmoe.study.launching import Reserve, do, fits, is_settled, not_done, times_of
from lmoe.study.planned import choose, from_the_middle, judging_jobs, make_job, tuning_jobs, untried, wider, with_tried
from lmoe.study.progress import Progress
from lmoe.study.study import Study, Tools
from lmoe.study.tuning import Chosen

SCREENED = 3
"""Values of an arm that are tried before it may be dropped."""
CLEARLY = 5.0
"""Margins by which an arm must be behind the baseline in a screening to be dropped."""
RESERVED = 3
"""Seeds of judging that time is kept for: with fewer there is no verdict."""
SLACK = 1.1
"""How many times the expected time is kept."""


def judging_reserve(study: Study, arms: Mapping[str, Arm]) -> Reserve:
    """The time of RESERVED seeds of judging, with something for jobs that last longer than the others did, and of the
    base."""
    values = {name: next(iter(arm.grid())) for name, arm in arms.items()}
    jobs = list(chain(*judging_jobs(study, arms, values)[:RESERVED]))

    def reserve(times: JobTimes) -> float:
        return SLACK * times.together(jobs) + measuring_base(study)(times)

    return reserve


def measuring_base(study: Study) -> Reserve:
    """The time of the losses of the base, which are measured once, when everything else is done."""

    def reserve(times: JobTimes) -> float:
        return 0.0 if (study.folder / BASE_FILE).exists() else times.measuring(study.config.baseline)

    return reserve


def tune_in_time(study: Study, tools: Tools, progress: Progress) -> None:
    """Tune as far as the time reaches beyond that of judging.

    First a screening with one seed: value by value over all arms, the middle of each first; what is clearly worse after
    SCREENED values is dropped. Then all values with all seeds, with wider grids where the best is outermost, or else
    the two best values of each arm with all seeds, or else nothing more.
    """
    seeds = study.config.tuning.seeds
    order = {name: from_the_middle(arm) for name, arm in progress.arms.items()}
    points = min(len(values) for values in order.values())
    tried = _screen(study, tools, progress, order, range(min(SCREENED, points)))
    if tried:
        _drop(study, tools, progress, order, tried, worse=tried == min(SCREENED, points))
    if tried == SCREENED < points:
        tried += _screen(study, tools, progress, order, range(SCREENED, points))
    if tried < min(2, points):
        middle = {name: untried(arm) for name, arm in progress.arms.items()}
        values = {name: found.best.values for name, found in middle.items()}
        _check_time(study, tools, progress, judging_jobs(study, progress.arms, values))
        progress.chosen = middle
        why = "nothing was tuned, for want of time: each arm is judged with the middle of its values"
        progress.note(why, tools.say)
        return
    screened = {name: order[name][:tried] for name in progress.arms}
    arms = {name: with_tried(arm, screened[name]) for name, arm in progress.arms.items()}
    progress.chosen = {name: choose(study, arm, screened[name], seeds[:1]) for name, arm in arms.items()}
    progress.tuning_seeds = seeds[:1]
    if tried < points or not _with_all_seeds(study, tools, progress):
        of = f"{tried} of {points} values" if tried < points else "all values"
        progress.note(f"values were chosen with one seed, from {of}: the time did not reach further", tools.say)


def _screen(
    study: Study, tools: Tools, progress: Progress, order: Mapping[str, Sequence[Values]], numbers: range
) -> int:
    """Try values of all arms with the first seed.

    Args:
        order: values by arm.
        numbers: of the values in it.

    Returns:
        How many values were tried of every arm.
    """
    seed = study.config.tuning.seeds[0]
    rounds = [
        [make_job(study, arm, order[name][number], seed, judging=None) for name, arm in progress.arms.items()]
        for number in numbers
    ]
    do(study, tools, rounds, "screening", progress, judging_reserve(study, progress.arms))
    return next((i for i, of_round in enumerate(rounds) if not is_settled(study, of_round)), len(rounds))


def _drop(
    study: Study,
    tools: Tools,
    progress: Progress,
    order: Mapping[str, Sequence[Values]],
    tried: int,
    *,
    worse: bool,
) -> None:
    """Drop the arms whose runs of the screening have failed.

    Args:
        worse: drop also what is clearly worse.
    """
    baseline = study.config.baseline
    means = screening_means(study, progress.arms, order, tried)
    dropped = behind(study, means, worse=worse)
    for name, mean in dropped.items():
        why = "its runs of the screening failed"
        if math.isfinite(mean):
            why = f"{mean - means[baseline]:.3f} behind the baseline in the screening, with one seed"
        progress.note(f"{name} was dropped: {why}", tools.say)
    progress.arms = {name: arm for name, arm in progress.arms.items() if name not in dropped}


def screening_means(
    study: Study, arms: Mapping[str, Arm], order: Mapping[str, Sequence[Values]], tried: int
) -> dict[str, float]:
    """The best mean of each arm in a screening.

    Args:
        order: values by arm.
        tried: of them.
    """
    seeds = study.config.tuning.seeds[:1]
    return {name: choose(study, arm, order[name][:tried], seeds).best.mean for name, arm in arms.items()}


def behind(study: Study, means: Mapping[str, float], *, worse: bool) -> dict[str, float]:
    """The means of arms that are dropped after a screening.

    Args:
        means: by arm.
        worse: also of what is clearly worse.
    """
    baseline = study.config.baseline
    bar = means[baseline] + CLEARLY * study.config.judging.margin if worse else math.inf
    return {name: mean for name, mean in means.items() if name != baseline and (mean > bar or not math.isfinite(mean))}


def _with_all_seeds(study: Study, tools: Tools, progress: Progress) -> bool:
    """Choose by all seeds of tuning, where they fit in: of all values, or of the two best of each arm.

    Returns:
        Whether it was done.
    """
    every = {name: arm.grid() for name, arm in progress.arms.items()}
    if found := _chosen_by_all(study, tools, progress, progress.arms, every, "tuning"):
        progress.chosen, progress.tuning_seeds = found, study.config.tuning.seeds
        _widen(study, tools, progress)
        return True
    best = {
        name: [each.values for each in (found.best, found.second) if each is not None]
        for name, found in progress.chosen.items()
    }
    if found := _chosen_by_all(study, tools, progress, progress.arms, best, "tuning, the two best values"):
        progress.chosen, progress.tuning_seeds = found, study.config.tuning.seeds
        progress.note("the two best values of each arm were tried with all seeds, the others with one", tools.say)
        return True
    return False


def _widen(study: Study, tools: Tools, progress: Progress) -> None:
    """More values for all arms while the best of one is outermost, as far as they fit in."""
    widenings = 0
    while (arms := wider(study, progress.arms, progress.chosen, widenings)) is not None:
        widenings += 1
        grids = {name: arm.grid() for name, arm in arms.items()}
        what = f"tuning, grids widened ({widenings})"
        found = _chosen_by_all(study, tools, progress, arms, grids, what)
        if found is None:
            why = "the best value of an arm is outermost, and the time did not reach for more values"
            progress.note(why, tools.say)
            return
        progress.arms, progress.chosen = arms, found


def _chosen_by_all(
    study: Study,
    tools: Tools,
    progress: Progress,
    arms: Mapping[str, Arm],
    tries: Mapping[str, Sequence[Values]],
    what: str,
) -> dict[str, Chosen] | None:
    """The best of some tries by all seeds of tuning; None: they do not fit in."""
    seeds, reserve = study.config.tuning.seeds, judging_reserve(study, arms)
    jobs = tuning_jobs(study, arms, tries, seeds)
    if not fits(study, tools, jobs, progress, reserve):
        return None
    do(study, tools, [jobs], what, progress, reserve)
    if not is_settled(study, jobs):
        return None
    return {name: choose(study, arm, tries[name], seeds) for name, arm in arms.items()}


def judge_in_time(study: Study, tools: Tools, progress: Progress, seeds: Sequence[Sequence[Job]]) -> None:
    """Judge seed by seed over all arms, as many whole seeds as fit in.

    Args:
        seeds: jobs by seed.

    Raises:
        StudyError: the time does not reach for as many seeds as a verdict needs; says how long it takes at least.
    """
    reserved = list(chain(*seeds[:RESERVED]))
    if (left := not_done(study, reserved)) and not times_of(study, tools).known:
        do(study, tools, [left[: tools.parallel]], "judging, to learn how long a job takes", progress)
    _check_time(study, tools, progress, seeds)
    do(study, tools, [reserved, *seeds[RESERVED:]], "judging", progress, measuring_base(study))


def _check_time(study: Study, tools: Tools, progress: Progress, seeds: Sequence[Sequence[Job]]) -> None:
    """Refuse to go on where the time does not reach for the seeds of judging that a verdict needs.

    Args:
        seeds: jobs by seed.

    Raises:
        StudyError: says how long it takes at least.
    """
    left, times = not_done(study, list(chain(*seeds[:RESERVED]))), times_of(study, tools)
    needed = times.together(left) + measuring_base(study)(times)
    if left and times.known and needed >= progress.time_left:
        raise StudyError(_too_short(study, needed, len(left), progress.time_left))


def _too_short(study: Study, needed: float, jobs: int, time_left: float) -> str:
    minutes = math.ceil(SLACK * needed / 60)
    limit = f"{minutes // 1440:02d}:{minutes // 60 % 24:02d}:{minutes % 60:02d}:00"
    again = f"with study.max_time={limit} or more the same command goes on"
    if 60 * minutes <= (max_seconds(study.config.max_time) or 0.0):
        again = "started again, which gives it that time anew, the same command goes on"
    seeds = min(RESERVED, len(study.config.judging.seeds))
    return (
        f"study.max_time={study.config.max_time} is too short: judging with {seeds} seeds takes about "
        f"{duration(needed)} more at least ({jobs} jobs), and {duration(max(0.0, time_left))} are left. What is done "
        f"is kept; {again}, and what is more than that goes into tuning and further seeds"
    )
