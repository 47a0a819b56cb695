"""Choose the values of each arm by the validation rows, with the same number of tries for all."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmoe.config.study import MEAN
from lmoe.errors import StudyError
from lmoe.report.curves import DOMAIN_LOSS, read_metrics
from lmoe.rules.study import is_number
from lmoe.study.arms import UNTUNED, Arm, Values
from lmoe.study.jobs import Job, finished, is_done
from lmoe.study.sampling import LOWER, UPPER

MOST_WIDENED = 2
"""How often grids are widened."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Try:
    """What was found with some values of an arm.

    Args:
        values: of the tuned keys.
        scores: by seed, of the runs that are done.
        diverged: whether the loss of a run of it was no finite number.
    """

    values: Values
    scores: Mapping[int, float]
    diverged: bool = False

    @property
    def counts(self) -> bool:
        """Whether it tells how good its values are: that a model diverged tells it too, that a run was killed does
        not."""
        return bool(self.scores) or self.diverged

    @property
    def mean(self) -> float:
        """Mean over the seeds; infinity without any, so that nothing is chosen by runs that failed."""
        return sum(self.scores.values()) / len(self.scores) if self.scores else math.inf


@dataclass(slots=True, frozen=True, kw_only=True)
class Chosen:
    """The values with which an arm is judged.

    Args:
        best: of the tries.
        second: the second best; None: there was one try.
        edges: of each key whose best value is outermost, which side: lower or upper.
        tries: all, in their order.
        untried: whether the values were taken without a run.
    """

    best: Try
    second: Try | None
    edges: Mapping[str, str]
    tries: tuple[Try, ...]
    untried: bool = False

    @property
    def usable(self) -> bool:
        """Whether a try has done its runs, or none is needed."""
        return bool(self.best.scores) or self.untried or self.best.values == UNTUNED


def score_of(job: Job, folder: Path, metric: str) -> float | None:
    """What tuning makes small, of a job; None: it is not done.

    Args:
        folder: of the study.
        metric: `mean`, or a metric that validations log.

    Raises:
        StudyError: no validation has logged the metric.
    """
    if not is_done(replace(job, judging=None), folder):
        return None
    found = []
    for run in job.runs:
        place = folder / job.place / run.folder
        summary = finished(place)
        assert summary is not None
        value = summary.after_mean
        if metric != MEAN:
            points = read_metrics(place / "metrics.csv", metric.__eq__).get(metric)
            if not points:
                there = ", ".join(summary.metric_names) or "none is recorded"
                raise StudyError(
                    f"study.tuning.metric={metric}: no validation of {job.label} logs it; there are: {there}"
                )
            value = points[-1][1]
        if value is None:
            raise StudyError(f"study.tuning.metric={metric}: {job.label} has no validation loss of any domain")
        found.append(value)
    mean = sum(found) / len(found)
    return mean if math.isfinite(mean) else None


def validated(place: Path, job: Job, metric: str) -> dict[int, float]:
    """What the validations of a job that is under way have found, by step: of a job with several runs the mean of those
    that have come as far.

    Args:
        place: its folder.
    """

    def wanted(name: str) -> bool:
        return DOMAIN_LOSS.fullmatch(name) is not None if metric == MEAN else name == metric

    by_step: dict[int, list[float]] = {}
    for run in job.runs:
        file = place / run.folder / "metrics.csv"
        if not file.exists():
            continue
        metrics = read_metrics(file, wanted)
        found: dict[int, list[float]] = {}
        for points in metrics.values():
            for step, value in points:
                found.setdefault(step, []).append(value)
        for step, values in found.items():
            by_step.setdefault(step, []).append(sum(values) / len(values))
    return {step: sum(values) / len(values) for step, values in by_step.items() if len(values) == len(job.runs)}


def chosen(arm: Arm, tries: Sequence[Try]) -> Chosen:
    """The best values of an arm, and the second best; of equals the first.

    Args:
        tries: with the arm's space as it is now.
    """
    ranked = sorted(tries, key=lambda found: found.mean)
    best = ranked[0]
    edges = {} if not math.isfinite(best.mean) else _edges(arm, best.values, tries)
    return Chosen(best=best, second=ranked[1] if len(ranked) > 1 else None, edges=edges, tries=tuple(tries))


def _edges(arm: Arm, values: Values, tries: Sequence[Try]) -> dict[str, str]:
    """Keys whose value is outermost, in the space or among the tries that count."""
    found = {}
    for key, value in values:
        if is_movable(arm.space[key]):
            tried = [dict(other.values)[key] for other in tries if other.counts]
            side = side_of(value, arm.space[key]) or side_of(value, tried)
            if side is not None:
                found[key] = side
    return found


def side_of(value: Any, values: Sequence[Any]) -> str | None:
    """The side on which a value is the outermost of some; None: on neither."""
    if value == min(values):
        return LOWER
    return UPPER if value == max(values) else None


def is_movable(values: Sequence[Any]) -> bool:
    """Whether there may be a value beyond the outermost: of two numbers or more."""
    return len(values) > 1 and all(is_number(value) for value in values)


def widened(arms: Mapping[str, Arm], found: Mapping[str, Chosen]) -> dict[str, Arm] | None:
    """All arms with one more value on each side on which the best of any of them is outermost; None: there is none.

    A side is that of a key's place in the space: arms may tune keys of other names, but as many. What an arm has in
    that place stays as it is where it is not movable. Nothing is added beyond values whose runs have failed.
    """
    sides = {
        (number, side)
        for name, of in found.items()
        for number, (key, value) in enumerate(of.best.values)
        if (side := of.edges.get(key)) is not None and side == side_of(value, arms[name].space[key])
    }
    wider = {}
    for name, arm in arms.items():
        space = {key: list(values) for key, values in arm.space.items()}
        for number, side in sorted(sides):
            key = list(space)[number]
            if is_movable(space[key]):
                space[key] = with_one_more(space[key], side)
        wider[name] = replace(arm, space={key: tuple(values) for key, values in space.items()})
    return None if wider == arms else wider


def with_one_more(values: Sequence[Any], side: str) -> list[Any]:
    """The values with another one beyond the outermost, as far from it as that is from its neighbour: in ratio where
    all are above 0, else in difference; none below 0 where no value is: a rate of dropout or a weight of a loss ends
    there."""
    ordered = sorted(values)
    outer, inner = (ordered[0], ordered[1]) if side == LOWER else (ordered[-1], ordered[-2])
    whole = all(isinstance(value, int) for value in values)
    if ordered[0] > 0:
        beyond = outer * outer / inner
    else:
        beyond = 2 * outer - inner
    if whole:
        beyond = math.ceil(beyond) if side == UPPER else math.floor(beyond)
        if beyond in values or beyond < 1 <= ordered[0]:
            return list(values)
    else:
        beyond = float(f"{beyond:.3g}")
    if beyond < 0 <= ordered[0]:
        return list(values)
    return [beyond, *values] if side == LOWER else [*values, beyond]
