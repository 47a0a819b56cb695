"""The losses of all judged models on the same rows.

Shapes: S seeds, N rows, G domains.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmoe.errors import StudyError
from lmoe.evaluate.row_losses import RowLoss, read_row_losses
from lmoe.study.jobs import ROWS_FILE, Job, is_done


@dataclass(slots=True, frozen=True, kw_only=True)
class Judged:
    """What the models of a study lose on the rows that all of them were judged on.

    Args:
        rows: names of the N rows.
        domains: names of the G domains.
        domain_ids: (N,) int64 domain of each row.
        label_tokens: (N,) float64, tokens that the loss of a row is summed over.
        losses: by arm, (S, N) float64, nats summed over the label tokens of a row.
        seeds: by arm, those of the S models, in their order.
        left_out: rows that some arm was not judged on, or was asked for other tokens of, such as one that was cut.
    """

    rows: tuple[str, ...]
    domains: tuple[str, ...]
    domain_ids: np.ndarray
    label_tokens: np.ndarray
    losses: Mapping[str, np.ndarray]
    seeds: Mapping[str, tuple[int, ...]]
    left_out: int

    def domain_losses(self, arm: str) -> np.ndarray:
        """(S, G) nats per label token of each domain."""
        members = np.eye(len(self.domains))[self.domain_ids]
        return (self.losses[arm] @ members) / (self.label_tokens @ members)

    def means(self, arm: str) -> np.ndarray:
        """(S,) the mean over domains of the loss per label token, in nats."""
        return self.domain_losses(arm).mean(1)


def read_judged(jobs: Mapping[str, Sequence[Job]], folder: Path, domains: Sequence[str] | None) -> Judged:
    """Read what the judging jobs of the arms have left.

    Args:
        jobs: by arm, those that are not done are passed over.
        folder: of the study.
        domains: rows of these alone; None: of all.

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
        raise StudyError("no job has judged anything")
    first = next(iter(found.values()))[0]
    wanted = [row for row, loss in first.items() if domains is None or loss.domain in domains]
    every = [losses for of_arm in found.values() for losses in of_arm]
    rows = [row for row in wanted if all(row in of and of[row].labels == first[row].labels for of in every)]
    if not rows:
        raise StudyError("no judging row was asked of all arms alike, so there is nothing to compare")
    names = tuple(sorted({first[row].domain for row in rows}))
    if domains is not None and (missing := sorted(set(domains) - set(names))):
        there = sorted({loss.domain for loss in first.values()})
        raise StudyError(
            f"study.judging.domains names {', '.join(missing)}, and the judging rows have {', '.join(there)}"
        )
    return Judged(
        rows=tuple(rows),
        domains=names,
        domain_ids=np.array([names.index(first[row].domain) for row in rows]),
        label_tokens=np.array([float(first[row].label_tokens) for row in rows]),
        losses={arm: np.array([[of[row].loss for row in rows] for of in own]) for arm, own in found.items()},
        seeds=seeds,
        left_out=len(wanted) - len(rows),
    )
