"""Launch the jobs of a study that are not done, as far as the time reaches, and say how they went."""

import time
from collections.abc import Callable, Sequence
from itertools import chain

from lmoe.report.wording import duration
from lmoe.study.durations import JobTimes
from lmoe.study.jobs import Job, failure_of, has_diverged, is_done, was_pruned
from lmoe.study.progress import Progress
from lmoe.study.study import Study, Tools

NAMED = 3
"""Jobs that a message names."""
Reserve = Callable[[JobTimes], float]
"""Seconds that are kept for what comes later."""


def nothing_kept(times: JobTimes) -> float:
    """The reserve where nothing comes later."""
    return 0.0


def times_of(study: Study, tools: Tools) -> JobTimes:
    """How long the jobs of a study take, as far as it is known."""
    longer = study.config.longer.times
    return JobTimes.of(study.folder, longer=longer, parallel=tools.parallel, machine=tools.machine)


def not_done(study: Study, jobs: Sequence[Job]) -> list[Job]:
    """The jobs that are to be launched: also those that have failed, but for a loss that is no finite number."""
    folder = study.folder
    return [job for job in jobs if not (is_done(job, folder) or was_pruned(job, folder) or has_diverged(job, folder))]


def is_settled(study: Study, jobs: Sequence[Job]) -> bool:
    """Whether each of the jobs is done, was pruned or has failed."""
    return all(failure_of(job, study.folder) is not None for job in not_done(study, jobs))


def fits(study: Study, tools: Tools, jobs: Sequence[Job], progress: Progress, reserve: Reserve) -> bool:
    """Whether there is time for what is not done of the jobs, beside the reserve; while no job is done: whether there
    is any time."""
    left, times = not_done(study, jobs), times_of(study, tools)
    return not left or times.together(left) < progress.time_left - reserve(times)


def do(
    study: Study,
    tools: Tools,
    rounds: Sequence[Sequence[Job]],
    what: str,
    progress: Progress,
    reserve: Reserve = nothing_kept,
) -> None:
    """Launch the jobs that are not done, and say which have failed.

    Args:
        rounds: jobs of which, with a deadline, all are begun or none.
        what: they are for.
        reserve: with a deadline, time that is not theirs.
    """
    jobs = list(chain(*rounds))
    left = not_done(study, jobs)
    diverged = [job for job in jobs if has_diverged(job, study.folder)]
    count = len(jobs) - len(left) - len(diverged)
    done = f", {count} of them done" if count else ""
    if diverged:
        done += f", {len(diverged)} have diverged and are not begun again (to do so, remove their folders)"
    tools.say(f"{what}: {len(jobs)} jobs{done}")
    if not left:
        return
    started = time.monotonic()
    if progress.deadline is None:
        begun = left
        tools.launch(left)
    else:
        begun = _launch_in_time(study, tools, [not_done(study, of_round) for of_round in rounds], progress, reserve)
    pruned = [job for job in begun if was_pruned(job, study.folder)]
    failed = [job for job in begun if job not in pruned and not is_done(job, study.folder)]
    ended = f", {len(pruned)} of them pruned" if pruned else ""
    tools.say(f"{what}: {len(begun) - len(failed)} done{ended} in {duration(time.monotonic() - started)}")
    if len(begun) < len(left):
        short = f"{what}: {len(left) - len(begun)} of {len(jobs)} jobs were not begun, for want of time"
        progress.note(short, tools.say)
    reasons: dict[str, list[str]] = {}
    for job in failed:
        reasons.setdefault(failure_of(job, study.folder) or "it was not begun", []).append(job.label)
    for reason, labels in reasons.items():
        more = f" and {len(labels) - NAMED} more" if len(labels) > NAMED else ""
        tools.say(f"failed: {', '.join(labels[:NAMED])}{more}: {reason}")


def _launch_in_time(
    study: Study, tools: Tools, rounds: Sequence[Sequence[Job]], progress: Progress, reserve: Reserve
) -> list[Job]:
    """Launch as many jobs at a time as run beside one another: a round is begun where all of it fits in, and of a round
    that was begun whatever fits in.

    Returns:
        Those that were begun.
    """
    waiting = [(number, job) for number, of_round in enumerate(rounds) for job in of_round]
    count, entered = 0, -1
    while count < len(waiting):
        times = times_of(study, tools)
        room = progress.time_left - reserve(times)
        group: list[Job] = []
        for number, job in waiting[count : count + tools.parallel]:
            rest = [other for other_number, other in waiting[count:] if other_number <= number]
            if number > entered and times.together(rest) > room:
                break
            entered = max(entered, number)
            group.append(job)
        if not group or room <= 0 or times.together(group) > room:
            break
        tools.launch(group)
        count += len(group)
    return [job for _, job in waiting[:count]]
