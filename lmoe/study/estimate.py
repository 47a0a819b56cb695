"""What a study will take: its jobs, what is matched between its arms, and the time."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from lmoe.config.run import RunConfig
from lmoe.config.trainer import max_seconds
from lmoe.estimate.cost import rates, rough_duration
from lmoe.study.durations import JobTimes, at_once, in_groups
from lmoe.study.in_time import RESERVED
from lmoe.study.jobs import Job
from lmoe.study.launching import not_done
from lmoe.study.left import StudyJobs, study_jobs
from lmoe.study.matched import ArmSize, arm_size
from lmoe.study.study import Study

CPU = "this CPU"


def estimate_lines(study: Study, parallel: int, machine: str) -> Iterator[str]:
    """Yield a line for each arm, then the jobs and the time of those that are not done.

    Args:
        parallel: jobs that run beside one another.
        machine: on which they run.

    Raises:
        LmoeError: no config of a backbone there, or what is kept of the study is damaged.
    """
    config, jobs = study.config, study_jobs(study)
    sizes = {name: arm_size(study.configs[name], 1) for name in study.arms}
    yield config.question or config.name
    for name, arm in study.arms.items():
        own, size = jobs.of_arm(name), sizes[name]
        runs = ", one run a domain" if arm.apart else ""
        done = _done(len(own) - len(not_done(study, own)))
        yield (
            f"  {name}: {size.total_parameters:,} parameters, {size.active_parameters:,} active, "
            f"{size.flops_per_token / 1e6:,.1f} MFLOP a token, {len(own) + jobs.undrawn[name]} jobs{done}{runs}"
        )
    if jobs.longer:
        arms = jobs.longer // len(config.judging.seeds)
        yield (
            f"  at most {arms} arms again, the baseline among them, {config.longer.times} times as long: {jobs.longer} "
            f"jobs{_done(jobs.longer_done)}"
        )
    yield from _time_lines(study, jobs, _Clock(study, sizes, parallel, machine), parallel)


def _time_lines(study: Study, jobs: StudyJobs, clock: "_Clock", parallel: int) -> Iterator[str]:
    known = [*jobs.tuning, *chain(*jobs.judging)]
    left = not_done(study, known)
    not_drawn = sum(jobs.undrawn.values())
    count = len(known) + not_drawn + jobs.longer
    left_count = len(left) + not_drawn + jobs.longer - jobs.longer_done
    if left_count:
        of_seed = clock.seconds(jobs.judging[0])
        seconds = clock.seconds(left)
        if of_seed is not None and seconds is not None:
            usual = sum(of_seed) / len(of_seed)
            seconds += [usual / clock.judging] * not_drawn
            seconds += [usual * study.config.longer.times] * (jobs.longer - jobs.longer_done)
        began = f"{count} jobs" if left_count == count else f"{left_count} of {count} jobs are left"
        reserved = clock.seconds(not_done(study, list(chain(*jobs.judging[:RESERVED]))))
        yield f"{began}, {parallel} beside one another: {_how_long(study, seconds, reserved, parallel)} ({clock.how})"
    else:
        yield f"{count} jobs, all of them done"
    if jobs.wider:
        fitting = ", as far as they fit in" if study.config.max_time else ", twice at most"
        yield (
            f"where the best value of an arm is outermost, every arm gets more tries{fitting}: up to {jobs.wider} jobs "
            "more, not counted here"
        )


def _how_long(study: Study, seconds: Sequence[float] | None, reserved: Sequence[float] | None, parallel: int) -> str:
    """How long what is left takes.

    Args:
        seconds: of each job; None: not known.
        reserved: likewise, of the judging that time is kept for.
        parallel: jobs that run beside one another.
    """
    limit = max_seconds(study.config.max_time)
    together = at_once if limit is None else in_groups
    whole = None if seconds is None else together(seconds, parallel)
    about = "for a time that is not known yet" if whole is None else f"about {rough_duration(whole)}"
    if limit is None:
        return about
    most = f"at most {rough_duration(limit)} (study.max_time)"
    if whole is None or whole <= limit:
        return f"{about}, {most}"
    seeds = min(RESERVED, len(study.config.judging.seeds))
    if reserved is not None and (judging := together(reserved, parallel)) > limit:
        return (
            f"{about}, and study.max_time={study.config.max_time} may be too short: judging with {seeds} seeds alone "
            f"takes about {rough_duration(judging)}"
        )
    return f"{about} for all of it, {most}: time for judging with {seeds} seeds is kept, the rest goes into tuning"


class _Clock:
    """How long jobs take: as those that are done, or else by the operations of their steps.

    Args:
        sizes: by arm.
    """

    def __init__(self, study: Study, sizes: Mapping[str, ArmSize], parallel: int, machine: str) -> None:
        self.study, self.sizes = study, sizes
        longer = study.config.longer.times
        self.times = JobTimes.of(study.folder, longer=longer, parallel=parallel, machine=machine)
        self.device, self.rate = _rate(study.configs[study.config.baseline])
        self.open_end = [name for name, run in study.configs.items() if run.trainer.max_epochs is not None]

    @property
    def how(self) -> str:
        """What it goes by."""
        if self.times.known:
            return "as the jobs took that are done"
        if self.open_end:
            return f"trainer.max_epochs of {', '.join(self.open_end)}: known once a job is done"
        return f"on {self.device}, without start-up, validation and judging"

    @property
    def judging(self) -> float:
        """How many times as long a job lasts that judges."""
        return self.times.ratio if self.times.known else 1.0

    def seconds(self, jobs: Sequence[Job]) -> list[float] | None:
        """Seconds of each job; None: not known."""
        if self.times.known:
            return [self.times.of_job(job) or 0.0 for job in jobs]
        if self.open_end:
            return None
        return [self._by_operations(job.arm) for job in jobs]

    def _by_operations(self, name: str) -> float:
        run = self.study.configs[name]
        tokens = run.data.batch_size * run.data.max_length * run.trainer.accumulate_grad_batches
        return self.sizes[name].flops_per_token * tokens * run.trainer.max_steps / self.rate


def _done(count: int) -> str:
    return f", {count} of them done" if count else ""


def _rate(config: RunConfig) -> tuple[str, float]:
    """The device of this machine, and its operations a second."""
    known = rates(config.trainer.precision)
    name = CPU if CPU in known else next(iter(known))
    return name, known[name]
