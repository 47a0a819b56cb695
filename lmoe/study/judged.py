"""The losses of all judged models on the same rows.

Shapes: S seeds, N rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmoe.config.study import JudgingConfig
from lmoe.errors import StudyError
from lmoe.evaluate.row_losses import RowLoss, read_row_losses
from lmoe.statistics.strata import Strata, measure
from lmoe.study.jobs import ROWS_FILE, Job, begun_jobs, failure_of, is_done


@dataclass(slots=True, frozen=True, kw_only=True)
class JudgedLosses:
    """What the models of a study lose on the rows that all of them were judged on.

    Args:
        rows: names of the N rows.
        strata: their domains and label tokens.
        losses: by arm, (S, N) float64, nats summed over the label tokens of a row.
        seeds: by arm, those of the S models, in their order.
        left_out: rows that some arm was not judged on, or was asked for other tokens of, such as one that was cut.
    """

    rows: tuple[str, ...]
    strata: Strata
    losses: Mapping[str, np.ndarray]
    seeds: Mapping[str, tuple[int, ...]]
    left_out: int

    def means(self, arm: str) -> np.ndarray:
        """(S,) the measure of each model of an arm, in nats a token."""
        return measure(self.losses[arm], self.strata)

    def in_the_mean(self, config: JudgingConfig) -> "JudgedLosses":
        """The rows of the domains whose mean is compared: study.judging.domains, or all but those of judging.more.

        Raises:
            StudyError: a domain without rows.
        """
        names = config.domains or [name for name in self.strata.names if name not in config.more]
        if missing := sorted(set(names) - set(self.strata.names)):
            raise StudyError(
                f"study.judging.domains names {', '.join(missing)}, and the judging rows have "
                f"{', '.join(self.strata.names)}"
            )
        domains = [self.strata.names[i] for i in self.strata.domain_ids.tolist()]
        kept = [index for index, name in enumerate(domains) if name in names]
        return JudgedLosses(
            rows=tuple(self.rows[index] for index in kept),
            strata=Strata.of_rows(self.strata.tokens[kept], [domains[index] for index in kept]),
            losses={arm: losses[:, kept] for arm, losses in self.losses.items()},
            seeds=self.seeds,
            left_out=self.left_out,
        )

    def paired(self, arm: str, other: str) -> tuple[np.ndarray, np.ndarray]:
        """(S, N) losses of both arms with the seeds that both were judged with, in the same order."""
        common = [seed for seed in self.seeds[arm] if seed in self.seeds[other]]
        mine, others = ([self.seeds[name].index(seed) for seed in common] for name in (arm, other))
        return self.losses[arm][mine], self.losses[other][others]


def read_judged(jobs: Mapping[str, Sequence[Job]], folder: Path) -> JudgedLosses:
    """Read what the judging jobs of the arms have left.

    Args:
        jobs: by arm, those that are not done are passed over.
        folder: of the study.

    Raises:
        LmoeError: a damaged file, or no row that all arms were judged on.
    """
    found: dict[str, list[dict[str, RowLoss]]] = {}
    seeds: dict[str, tuple[int, ...]] = {}
    for arm, own in jobs.items():
        done = [job for job in own if is_done(job, folder)]
        if done:
            files = [read_row_losses(folder / job.place / ROWS_FILE) for job in done]
            found[arm] = [{loss.row: loss for loss in losses} for losses in files]
            seeds[arm] = tuple(job.seed for job in done)
    if not found:
        raise StudyError(_nothing(folder))
    return judged_losses(found, seeds)


def judged_losses(
    found: Mapping[str, Sequence[Mapping[str, RowLoss]]], seeds: Mapping[str, tuple[int, ...]]
) -> JudgedLosses:
    """The losses on the rows of which all models were asked for the same tokens.

    Args:
        found: by arm, of each model, each row by its name.
        seeds: by arm, of these models.

    Raises:
        StudyError: there is no such row.
        DataError: a single one in some domain.
    """
    every = [losses for of_arm in found.values() for losses in of_arm]
    first = {row: loss for losses in reversed(every) for row, loss in losses.items()}
    wanted = [row for row in {row: None for losses in every for row in losses} if first[row].label_tokens]
    rows = [row for row in wanted if all(row in of and of[row].labels == first[row].labels for of in every)]
    if not rows:
        raise StudyError("no judging row was asked of all arms alike, so there is nothing to compare")
    return JudgedLosses(
        rows=tuple(rows),
        strata=Strata.of_rows([first[row].label_tokens for row in rows], [first[row].domain for row in rows]),
        losses={arm: np.array([[of[row].loss for row in rows] for of in own]) for arm, own in found.items()},
        seeds=seeds,
        left_out=len(wanted) - len(rows),
    )


def _nothing(folder: Path) -> str:
    """Why there is nothing to compare."""
    failed = [(job, why) for job in begun_jobs(folder) if (why := failure_of(job, folder)) is not None]
    if failed:
        job, why = failed[0]
        return f"no job has judged anything: {len(failed)} have failed, the first, {job.label}, with: {why}"
    return (
        "no job has judged anything: none was begun, because tuning has left no values to judge with or the time was "
        "over (study.max_time); what is done is kept, and the same command goes on"
    )
