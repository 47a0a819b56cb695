"""What a study will take: its jobs, what is matched between its arms, and the time."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from lmoe.config.run import RunConfig
from lmoe.config.study import StudyConfig
from lmoe.estimate.cost import rates, rough_duration
from lmoe.rules.study import points
from lmoe.study.arms import Arm
from lmoe.study.jobs import seconds_of
from lmoe.study.matched import arm_size

CPU = "this CPU"


def estimate_lines(
    config: StudyConfig, arms: Mapping[str, Arm], configs: Mapping[str, RunConfig], folder: Path, parallel: int
) -> Iterator[str]:
    """Yield a line for each arm, then the jobs and the time.

    Args:
        folder: of the study; what is done in it tells how long the rest will take.
        parallel: jobs that run beside one another.
    """
    device, rate = _rate(configs[config.baseline])
    known: dict[str, list[float]] = {}
    for job, seconds in seconds_of(folder):
        known.setdefault(job.arm, []).append(seconds)
    yield config.question or config.name
    seconds, jobs = 0.0, 0
    for name, arm in arms.items():
        run = configs[name]
        size = arm_size(run, 1)
        tokens = run.data.batch_size * run.data.max_length * run.trainer.accumulate_grad_batches
        own = known.get(name)
        steps = run.trainer.max_steps
        each = sum(own) / len(own) if own else size.flops_per_token * tokens * steps / rate
        count = points(arm.space) * len(config.tuning.seeds) * bool(arm.space) + len(config.judging.seeds)
        seconds += each * count
        jobs += count
        runs = ", one run a domain" if arm.apart else ""
        yield (
            f"  {name}: {size.total_parameters:,} parameters, {size.active_parameters:,} active, "
            f"{size.flops_per_token / 1e6:,.1f} MFLOP a token, {count} jobs{runs}"
        )
    if config.longer.arms:
        longer = min(config.longer.arms + 1, len(arms))
        count = longer * len(config.judging.seeds)
        seconds += seconds / jobs * config.longer.times * count
        jobs += count
        yield (
            f"  at most {longer} arms again, the baseline among them, {config.longer.times} times as long: {count} jobs"
        )
    how = "as the jobs took that are done" if known else f"on {device}, without start-up, validation and judging"
    yield f"{jobs} jobs, {parallel} beside one another: about {rough_duration(seconds / parallel)} ({how})"
    if any(arm.space for arm in arms.values()) and config.tuning.at_edge.value == "widen":
        yield "where the best value of an arm is outermost, every arm gets more tries, twice at most"


def _rate(config: RunConfig) -> tuple[str, float]:
    """The device of this machine, and its operations a second."""
    known = rates(config.trainer.precision)
    name = CPU if CPU in known else next(iter(known))
    return name, known[name]
