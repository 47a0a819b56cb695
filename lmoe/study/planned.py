"""The jobs that a study needs, and what those that are done have chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lmoe.study.arms import UNTUNED, Arm, Values
from lmoe.study.jobs import Job, Judging, has_diverged, is_done, job_of
from lmoe.study.study import Study
from lmoe.study.tuning import MOST_WIDENED, Chosen, Try, chosen, score_of, widened
from lmoe.vocabulary import AtEdge


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


def judging_jobs(
    study: Study, arms: Mapping[str, Arm], values: Mapping[str, Values], *, longer: int = 1
) -> list[list[Job]]:
    """A job of each arm for each seed, by seed, so that a study that is stopped has whole seeds."""
    config = study.config.judging
    judging = Judging(rows_per_domain=config.rows_per_domain, batch_size=config.batch_size, more=config.more)
    return [
        [make_job(study, arms[name], values[name], seed, judging=judging, longer=longer) for name in values]
        for seed in config.seeds
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


def choose(study: Study, arm: Arm, tries: Sequence[Values], seeds: Sequence[int]) -> Chosen:
    """The best values of an arm by what its jobs have left; a try counts where all its seeds are done."""
    found = []
    for values in tries:
        scores, diverged = {}, False
        for seed in seeds:
            job = make_job(study, arm, values, seed, judging=None)
            score = score_of(job, study.folder, study.config.tuning.metric)
            if score is not None:
                scores[seed] = score
            elif has_diverged(job, study.folder) or is_done(job, study.folder):  # or its validation loss is no number
                diverged = True
        scores = scores if len(scores) == len(seeds) else {}
        found.append(Try(values=values, scores=scores, diverged=diverged))
    return chosen(arm, found)


def untuned() -> Chosen:
    """What an arm without a space is judged with."""
    alone = Try(values=UNTUNED, scores={})
    return Chosen(best=alone, second=None, edges={}, tries=(alone,))


def untried(arm: Arm) -> Chosen:
    """The middle of an arm's values, where there was no time to compare them."""
    middle = Try(values=from_the_middle(arm)[0], scores={})
    return Chosen(best=middle, second=None, edges={}, tries=(), untried=True)


def wider(study: Study, arms: Mapping[str, Arm], found: Mapping[str, Chosen], widenings: int) -> dict[str, Arm] | None:
    """All arms with more values where the best of any of them is outermost; None: nothing is to be widened.

    Args:
        widenings: that there were.
    """
    if study.config.tuning.at_edge is not AtEdge.widen or widenings >= MOST_WIDENED:
        return None
    return widened(arms, found)


def drawn_tries(study: Study) -> int:
    """Tries of each arm with sampler=tpe."""
    return study.config.tuning.tries or max(len(arm.grid()) for arm in study.arms.values())


def from_the_middle(arm: Arm) -> list[Values]:
    """The grid of an arm, the point in the middle first and the outermost last."""
    places = {key: {repr(value): i for i, value in enumerate(values)} for key, values in arm.space.items()}

    def from_middle(values: Values) -> float:
        spans = [(places[key][repr(value)], len(arm.space[key]) - 1) for key, value in values]
        return sum(abs(2 * place - last) / last for place, last in spans if last)

    return sorted(arm.grid(), key=from_middle)


def with_tried(arm: Arm, tries: Sequence[Values]) -> Arm:
    """The arm with the values alone that were tried, so that the outermost of these are its edges."""
    tried = {(key, repr(value)) for values in tries for key, value in values}
    space = {key: tuple(v for v in values if (key, repr(v)) in tried) for key, values in arm.space.items()}
    return replace(arm, space=space)


def by_arm(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """Jobs of each arm, in their order."""
    return {name: [job for job in jobs if job.arm == name] for name in dict.fromkeys(job.arm for job in jobs)}
