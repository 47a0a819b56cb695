"""From what the jobs of a study have left to its result."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmoe.config.study import JudgingConfig
from lmoe.errors import StudyError
from lmoe.files.small_file import Reader
from lmoe.report.curves import read_metrics
from lmoe.rules.phase_options import TRAIN_LOSS
from lmoe.run.machine import cpu_model
from lmoe.run.packages import installed_version
from lmoe.run.provenance import PACKAGES
from lmoe.statistics.comparison import Terms
from lmoe.statistics.strata import domain_losses
from lmoe.statistics.verdict import Judged, judge
from lmoe.study.arms import Values, values_text
from lmoe.study.beside import Beside, beside_baseline, beside_by_domain
from lmoe.study.jobs import ROWS_FILE, Job, begun_jobs, failure_of, finished, is_done, was_pruned
from lmoe.study.judge import CLASSIFIER_FILE, base_losses
from lmoe.study.judged import JudgedLosses, read_judged
from lmoe.study.ledger import models_judged, rows_digest
from lmoe.study.matched import ArmSize, arm_size
from lmoe.study.origins import study_origins
from lmoe.study.planned import make_job
from lmoe.study.progress import Progress
from lmoe.study.results.result import (
    EDGE,
    ArmResult,
    ComparisonResult,
    Curve,
    StudyResult,
    TryResult,
    comparison_result,
)
from lmoe.study.study import Study
from lmoe.study.tuning import score_of

CLASSIFIED = Reader(error=StudyError, cure=f"remove it and {ROWS_FILE} beside it, and it is judged again", what="it")
POINTS = 40
"""Of a curve."""
NO_SCORE = "its validation loss is no finite number"


def conclude(study: Study, progress: Progress) -> StudyResult:
    """The result of a study whose jobs are done, as far as they are.

    Raises:
        LmoeError: nothing was judged, judged runs had different bases, or a file is damaged.
    """
    config = study.config
    begun = [job for job in begun_jobs(study.folder) if job.arm in study.arms]  # there may be others that once were
    origins = _origins(study, progress, begun)
    every = read_judged(progress.judged, study.folder)
    judged = every.in_the_mean(config.judging)
    longer = _longer(study, progress)
    strata, digest = judged.strata, rows_digest(judged.rows)
    return StudyResult(
        name=config.name,
        question=config.question,
        command=study.command,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={name: installed_version(name) for name in PACKAGES},
        machine=f"{cpu_model()}, {torch.get_num_threads()} threads",
        baseline=config.baseline,
        metric=config.tuning.metric,
        tuning_seeds=list(progress.tuning_seeds),
        margin=config.judging.margin,
        alpha=config.judging.alpha,
        judging_rows=len(judged.rows),
        judging_tokens=int(strata.tokens.sum()),
        judging_digest=digest,
        left_out=judged.left_out,
        judged_before=models_judged(
            _root(study), config.name, _digest_of_all(every, config.judging), len(_judged_jobs(study, progress))
        ),
        domains=dict(zip(strata.names, strata.rows.astype(int).tolist(), strict=True)),
        more_domains={
            name: int(rows)
            for name, rows in zip(every.strata.names, every.strata.rows, strict=True)
            if name not in strata.names
        },
        base_domain_losses=_base(study, progress, every),
        arms=[
            _arm(study, progress, name, progress.judged.get(name, []), _of(begun, name), every, judged)
            for name in study.arms
        ],
        primary=_compared(study, progress, judged),
        secondary=_by_domain(study, progress, every),
        longer_times=config.longer.times if longer is not None else 1,
        longer_arms=[
            _arm(study, progress, name, jobs, _of(begun, name, longer=True), longer, longer)
            for name, jobs in progress.longer.items()
            if longer
        ],
        longer=_compared(study, progress, longer) if longer else [],
        commands=_commands(study, begun),
        notes=[*progress.notes, *_notes(study, progress, judged, longer), *origins],
    )


def _of(begun: Sequence[Job], arm: str, *, longer: bool = False) -> list[Job]:
    """The jobs of an arm that were begun: those of longer runs, or the others."""
    return [job for job in begun if job.arm == arm and job.is_longer is longer]


def _commands(study: Study, begun: Sequence[Job]) -> dict[str, list[str]]:
    """The commands of all jobs by their folders, as they would begin now: folders of further choices may have moved."""
    found = {}
    for name, arm in study.arms.items():
        for job in begun:
            if job.arm == name:
                times = study.config.longer.times if job.is_longer else 1
                now = make_job(study, arm, job.values, job.seed, judging=job.judging, longer=times)
                found[job.place] = commands_of(now)
    return found


def _digest_of_all(every: JudgedLosses, judging: JudgingConfig) -> str:
    """Which rows have judged, whichever of their domains are compared: they have been looked at all the same."""
    return rows_digest(every.in_the_mean(replace(judging, domains=None)).rows)


def _longer(study: Study, progress: Progress) -> JudgedLosses | None:
    """What the longer runs have left; None: there are none, or none of them is done."""
    if not any(is_done(job, study.folder) for jobs in progress.longer.values() for job in jobs):
        return None
    return read_judged(progress.longer, study.folder).in_the_mean(study.config.judging)


def _base(study: Study, progress: Progress, judged: JudgedLosses) -> dict[str, float]:
    """The loss of the base without adapters, by domain."""
    done = [job for job in progress.judged.get(study.config.baseline, []) if is_done(job, study.folder)]
    if not done:
        return {}
    by_row = base_losses(done[0], study.configs[study.config.baseline].backbone, study.folder)
    if not all(row in by_row for row in judged.rows):
        return {}
    losses = domain_losses(np.array([[by_row[row] for row in judged.rows]]), judged.strata)[0]
    return dict(zip(judged.strata.names, losses.tolist(), strict=True))


def _origins(study: Study, progress: Progress, begun: Sequence[Job]) -> list[str]:
    """What a reader has to know of what the runs were trained on and with.

    Args:
        begun: all jobs that were begun.
    """
    tuned = [job for job in begun if job.judging is None and is_done(job, study.folder)]
    backbones = {name: config.backbone for name, config in study.configs.items()}
    return study_origins(_judged_jobs(study, progress), tuned, backbones, study.folder)


def _judged_jobs(study: Study, progress: Progress) -> list[Job]:
    """The jobs that have judged, with longer runs too."""
    jobs = [job for of_arms in (progress.judged, progress.longer) for own in of_arms.values() for job in own]
    return [job for job in jobs if is_done(job, study.folder)]


def _root(study: Study) -> Path:
    """The folder of all studies; a study's name may have several parts."""
    return study.folder.parents[len(Path(study.config.name).parts) - 1]


def _compared(study: Study, progress: Progress, judged: JudgedLosses) -> list[ComparisonResult]:
    """Each arm beside the baseline on the mean over domains, one family; the A/A arm too."""
    baseline, config = study.config.baseline, study.config.judging
    if baseline not in judged.losses:
        return []
    found = beside_baseline(judged, judged.losses, baseline, judged.paired, _terms(config))
    return _verdicts(found, progress, study)


def _by_domain(study: Study, progress: Progress, judged: JudgedLosses) -> list[ComparisonResult]:
    """Each arm beside the baseline in each domain, all of them one family."""
    baseline, config = study.config.baseline, study.config.judging
    if baseline not in judged.losses:
        return []
    found = beside_by_domain(judged, judged.losses, baseline, judged.paired, _terms(config))
    return _verdicts(found, progress, study)


def _terms(config: JudgingConfig) -> Terms:
    return Terms(margin=config.margin, level=1 - config.alpha, draws=config.resamples)


def _verdicts(family: Sequence[Beside], progress: Progress, study: Study) -> list[ComparisonResult]:
    verdicts = judge([one.comparison for one in family], study.config.judging.alpha)
    baseline = study.config.baseline
    return [_comparison(of, one.arm, one.domain, progress, baseline) for of, one in zip(verdicts, family, strict=True)]


def _comparison(of: Judged, arm: str, domain: str | None, progress: Progress, baseline: str) -> ComparisonResult:
    found = comparison_result(of, arm, domain)
    edges = [name for name in (arm, baseline) if progress.chosen[name].edges]
    if not edges:
        return found
    whose = " and of ".join(edges)
    sentence = f"{EDGE}: {found.sentence}, but the best value of {whose} is the outermost that was tried"
    return replace(found, verdict=EDGE, sentence=sentence)


def _arm(
    study: Study,
    progress: Progress,
    name: str,
    jobs: Sequence[Job],
    begun: Sequence[Job],
    every: JudgedLosses,
    judged: JudgedLosses,
) -> ArmResult:
    """What is known of an arm.

    Args:
        jobs: that judge it.
        begun: all that were begun, those of tuning too.
        every: losses on all judging rows.
        judged: those of the rows in the mean.
    """
    arm, found, timing = (
        progress.arms.get(name, study.arms[name]),
        progress.chosen.get(name),
        progress.timings.get(name),
    )
    done = [job for job in jobs if is_done(job, study.folder)]
    runs = [study.folder / job.place / run.folder for job in done for run in job.runs]
    means = judged.means(name).tolist() if name in judged.losses else []
    domains = domain_losses(every.losses[name], every.strata).mean(0).tolist() if means else []
    size = _size(study, name)
    failures = [(job, why) for job in begun if (why := _why_failed(study, job)) is not None]
    return ArmResult(
        name=name,
        title=arm.title,
        commands=commands_of(done[0]) if done else [],
        space={key: list(values) for key, values in arm.space.items()},
        tries=[] if found is None or not arm.space else [_try(of.values, of.scores, failures) for of in found.tries],
        chosen=None if found is None or not found.usable else dict(found.best.values),
        second=None if found is None or found.second is None or not found.second.scores else dict(found.second.values),
        edges={} if found is None else dict(found.edges),
        seeds=[job.seed + arm.seed_offset for job in done],
        losses=means,
        loss=float(np.mean(means)) if means else None,
        domain_losses=dict(zip(every.strata.names, domains, strict=True)) if means else {},
        total_parameters=size.total_parameters,
        active_parameters=size.active_parameters,
        flops_per_token=size.flops_per_token,
        steps=_steps(study, name, jobs),
        tokens_per_step=None if timing is None else timing.tokens_per_step,
        seconds_per_step=None if timing is None else timing.median,
        peak_memory_mb=_peak(runs),
        classifier_accuracy=_accuracy(study, done),
        curve=_curve(runs) if len(done) == len(runs) else None,
        failures=[f"{job.label}: {why}" for job, why in failures],
        failed=not done and _stopped_by([job for job, _ in failures], begun, study.folder),
        reading_share=size.reading_share,
    )


def commands_of(job: Job) -> list[str]:
    """The commands of the runs of a job, as a shell takes them."""
    return [" ".join(["lmoe", "train", *map(shlex.quote, run.settings)]) for run in job.runs]


def _why_failed(study: Study, job: Job) -> str | None:
    """Why a job has failed, or has left nothing that values could be chosen by; None: neither."""
    if (why := failure_of(job, study.folder)) is not None or job.judging is not None:
        return why
    metric = study.config.tuning.metric
    return NO_SCORE if is_done(job, study.folder) and score_of(job, study.folder, metric) is None else None


def _stopped_by(failed: Sequence[Job], begun: Sequence[Job], folder: Path) -> bool:
    """Whether an arm without a judged model lacks it because jobs have failed: those that judge, or, where none of
    these was begun, one of each try that was not pruned.

    Args:
        folder: of the study.
    """
    if any(job.judging is not None for job in begun):
        return any(job.judging is not None for job in failed)
    tries = {Path(job.place).parent for job in begun if not was_pruned(job, folder)}
    return bool(tries) and tries == {Path(job.place).parent for job in failed}


def _size(study: Study, name: str) -> ArmSize:
    return arm_size(study.configs[name], len(study.domains) if study.arms[name].apart else 1)


def _steps(study: Study, name: str, jobs: Sequence[Job]) -> int:
    for job in jobs:
        if is_done(job, study.folder):
            summary = finished(study.folder / job.place / job.runs[0].folder)
            assert summary is not None
            return summary.max_steps
    return study.configs[name].trainer.max_steps


def _try(values: Values, scores: Mapping[int, float], failures: Sequence[tuple[Job, str]]) -> TryResult:
    """What came of some values.

    Args:
        scores: by seed.
        failures: jobs of the arm that have failed, and why.
    """
    mean = sum(scores.values()) / len(scores) if scores else None
    of_tuning = [(job, why) for job, why in failures if job.judging is None]
    return TryResult(
        values=dict(values),
        scores={str(seed): score for seed, score in scores.items()},
        mean=mean,
        failures={str(job.seed): why for job, why in of_tuning if values_text(job.values) == values_text(values)},
    )


def _peak(runs: Sequence[Path]) -> float | None:
    peaks = [summary.peak_memory_mb for run in runs if (summary := finished(run)) is not None]
    return max((peak for peak in peaks if peak is not None), default=None)


def _accuracy(study: Study, jobs: Sequence[Job]) -> float | None:
    files = [study.folder / job.place / CLASSIFIER_FILE for job in jobs]
    every: list[Any] = [CLASSIFIED.json(file).get("accuracy") for file in files if file.exists()]
    found = [float(accuracy) for accuracy in every if isinstance(accuracy, int | float)]
    return sum(found) / len(found) if found else None


def _curve(runs: Sequence[Path]) -> Curve | None:
    """Mean over runs of the training loss, each point the mean of the steps since the one before."""
    by_run = [dict(read_metrics(run / "metrics.csv", TRAIN_LOSS.__eq__).get(TRAIN_LOSS, [])) for run in runs]
    common = sorted(set.intersection(*(set(found) for found in by_run))) if by_run else []
    if not common:
        return None
    bins = np.array_split(np.array(common), min(POINTS, len(common)))
    loss = np.array([[found[step] for step in common] for found in by_run]).mean(0)
    means = np.split(loss, np.cumsum([len(part) for part in bins])[:-1])
    return Curve(steps=[int(part[-1]) for part in bins], loss=[float(part.mean()) for part in means])


def _failed_seeds(study: Study, jobs: Sequence[Job]) -> str:
    """Which seeds of jobs that judge have failed, in brackets; "": none."""
    seeds = [str(job.seed) for job in jobs if failure_of(job, study.folder) is not None]
    if not seeds:
        return ""
    return f" (seed {seeds[0]} has failed)" if len(seeds) == 1 else f" (seeds {', '.join(seeds)} have failed)"


def _notes(study: Study, progress: Progress, judged: JudgedLosses, longer: JudgedLosses | None) -> list[str]:
    notes = []
    for what, found in (("", judged), (" with longer runs", longer)):
        if found is not None and study.config.baseline not in found.losses:
            notes.append(
                f"the baseline {study.config.baseline} was not judged{what}, so that nothing is compared; mend what "
                "stopped it, and the same command goes on"
            )
    if progress.longer and longer is None:
        notes.append("none of the longer runs is done, so that they are not compared")
    if judged.left_out:
        notes.append(
            f"{judged.left_out} judging rows are not compared: not every arm was asked for the same tokens of them, "
            "such as where one was cut"
        )
    few = {name: len(seeds) for name, seeds in judged.seeds.items() if len(seeds) < len(study.config.judging.seeds)}
    if few:
        failed = {name: _failed_seeds(study, progress.judged[name]) for name in few}
        listed = ", ".join(f"{name} {count}{failed[name]}" for name, count in few.items())
        notes.append(f"fewer seeds than planned were judged of: {listed}")
    return notes
