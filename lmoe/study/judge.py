"""Judge what a job has trained: the loss of each judging row, under the last adapter of its run."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lmoe.adapter.run_data import run_data
from lmoe.backbones.fingerprint import fingerprint
from lmoe.config.backbone import BackboneConfig
from lmoe.config.data import DataConfig
from lmoe.config.study import BUNDLED_TEXT
from lmoe.errors import DivergedError, StudyError
from lmoe.evaluate.loss_rows import EvaluationRows, prepare_judging
from lmoe.evaluate.row_losses import RowLoss, read_row_losses, row_losses, write_row_losses
from lmoe.evaluate.rows import with_experts
from lmoe.evaluate.subject import Subject, base_subject, subject_of
from lmoe.evaluate.training_rows import data_of, first_training_rows, for_subject
from lmoe.files.resources import resource_dir
from lmoe.files.write import write_whole
from lmoe.injection.record import injected
from lmoe.run.provenance import provenance_records
from lmoe.study.jobs import BASE_FILE, ROWS_FILE, Job, JobRun, Judging
from lmoe.study.kept_losses import adapter_hash, losses_file
from lmoe.study.prompt_classifier import PromptClassifier

CLASSIFIER_FILE = "classifier.json"
PROMPTS_PER_DOMAIN = 100
"""Training prompts of each domain that a classifier learns from."""


def judge(job: Job, place: Path) -> None:
    """Write the loss of each judging row into the folder of a job whose runs are done.

    Args:
        place: its folder.

    Raises:
        LmoeError: a run or rows that cannot be read, or a domain without an expert.
    """
    assert job.judging is not None
    if len(job.runs) == 1:
        subject, config, parts = _opened(job.runs[0], place, job.judging)
        of_parts = [_of_one_run(subject, data, config) for data in parts]
        losses = [loss for of_part in of_parts for loss in of_part]
    else:
        losses = _judge_apart(job, place)
    if diverged := sum(not math.isfinite(loss.loss) for loss in losses):
        raise DivergedError(
            f"{diverged} of {len(losses)} judging rows have a loss that is no finite number: the model has diverged, "
            "so it is not compared"
        )
    write_row_losses(losses, place / ROWS_FILE)
    if len(job.runs) == 1:  # for lmoe compare, of which these are the losses too
        run = place / job.runs[0].folder
        write_row_losses(of_parts[0], losses_file(run, adapter_hash(run), parts[0], config.max_length))


def base_losses(job: Job, backbone: BackboneConfig, folder: Path) -> dict[str, float]:
    """The loss of each judging row under the base without adapters, by the row's name; measured once.

    Args:
        job: of the baseline, which is done; its adapter may be gone.
        backbone: section of its runs.
        folder: of the study, which keeps the losses.

    Raises:
        LmoeError: a base or rows that cannot be read, or another base than that of the job.
    """
    file = folder / BASE_FILE
    if not file.exists():
        assert job.judging is not None
        run = folder / job.place / job.runs[0].folder
        data, seed = run_data(run)
        subject = base_subject(backbone, data, batch_size=job.judging.batch_size)
        _check_base(subject, run)
        parts = _judging_rows(for_subject(data, subject), seed, subject, job.judging)
        write_row_losses([loss for part in parts for loss in row_losses(subject, part)], file)
    return {loss.row: loss.loss for loss in read_row_losses(file)}


def _check_base(subject: Subject, run: Path) -> None:
    """Refuse a base with other weights than the one that a run was trained on, as far as the run has recorded it."""
    record = next(iter(provenance_records(run)[-1:]), {"backbone": {}})
    wanted, found = record["backbone"].get("fingerprint"), fingerprint(subject.model)
    if wanted not in (None, found):
        raise StudyError(
            f"{run} was trained on another base (fingerprint {wanted}) than {subject.model.name_or_path} is here "
            f"({found}), so that the losses of the base cannot be measured; put back the base of the runs"
        )


def _opened(run: JobRun, place: Path, judging: Judging) -> tuple[Subject, DataConfig, list[EvaluationRows]]:
    """A run, its data section for these rows, its judging rows, and then each of the further sets of rows as one
    domain."""
    subject = _subject(run, place, judging)
    config, seed = data_of(place / run.folder, subject)
    return subject, config, _judging_rows(config, seed, subject, judging)


def _subject(run: JobRun, place: Path, judging: Judging) -> Subject:
    return subject_of(place / run.folder, trust_remote_code=run.trusts_code, batch_size=judging.batch_size)


def _judging_rows(config: DataConfig, seed: int, subject: Subject, judging: Judging) -> list[EvaluationRows]:
    """The judging rows of a run, and then each of the further sets of rows as one domain.

    Args:
        config: its data section, for rows of the subject.
    """
    rows = prepare_judging(
        config, subject.tokenizer, seed=seed, bundled=resource_dir("data"), length_name="data.max_length"
    )
    parts = [rows, *more_rows(config, subject.tokenizer, judging.more, seed)]
    return [part.first_of_each_domain(judging.rows_per_domain) for part in parts]


def more_rows(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, more: Mapping[str, str], seed: int
) -> list[EvaluationRows]:
    """Each of the further sets of rows as one domain.

    Args:
        config: of a run, for rows of all domains under the template that the tokenizer has.
        more: paths by the domain that the rows are called.
        seed: of the run.

    Raises:
        DataError: rows that cannot be read.
    """
    parts = []
    for domain, path in more.items():
        place = str(resource_dir("data/text")) if path == BUNDLED_TEXT else path
        found = prepare_judging(
            replace(config, judge_path=place, judge_fraction=0.0, columns={}, prompt_prefix=None),
            tokenizer,
            seed=seed,
            bundled=resource_dir("data"),
            length_name=f"study.judging.more.{domain}",
        )
        parts.append(replace(found, rows=found.rows.with_domains([0] * len(found.domains)), domains=[domain]))
    return parts


def _of_one_run(subject: Subject, data: EvaluationRows, config: DataConfig) -> list[RowLoss]:
    """Each row under one run, by its own domain also where the run has dealt the domains anew."""
    dealt = with_experts(data.dealt_as(config), injected(subject.model).moe, "the judging rows")
    names = [data.domains[domain] for domain in data.rows.domains.tolist()]
    return [replace(loss, domain=name) for loss, name in zip(row_losses(subject, dealt), names, strict=True)]


def _judge_apart(job: Job, place: Path) -> list[RowLoss]:
    """Each row under the run whose domain a classifier gives it, which has learnt from training prompts."""
    assert job.judging is not None
    subject, _, parts = _opened(job.runs[0], place, job.judging)
    names = [run.domain for run in job.runs]
    train = first_training_rows(place / job.runs[0].folder, subject, PROMPTS_PER_DOMAIN, names)
    of_rows = [train.domains[i] for i in train.rows.domains.tolist()]
    classifier = PromptClassifier.fitted(subject, train.rows, of_rows)
    chosen = [classifier.classify(subject, data.rows) for data in parts]
    losses: dict[tuple[int, int], RowLoss] = {}
    for run in job.runs:
        expert = _subject(run, place, job.judging)
        for number, data in enumerate(parts):
            mine = [index for index, name in enumerate(chosen[number]) if name == run.domain]
            if mine:
                part = replace(data, rows=data.rows.subset(mine))
                found = row_losses(expert, part)
                losses |= {(number, index): loss for index, loss in zip(mine, found, strict=True)}
    own = [loss.domain for _, loss in sorted(losses.items())]
    told = [name for of_part in chosen for name in of_part]
    right = [name == domain for name, domain in zip(told, own, strict=True) if domain in names]
    report = {"domains": names, "prompts": len(right), "accuracy": sum(right) / len(right) if right else None}
    write_whole(place, {CLASSIFIER_FILE: json.dumps(report, indent=1).encode() + b"\n"})
    return [loss for _, loss in sorted(losses.items())]
