"""The rows that a run was trained on, read again: what is fitted to them afterwards."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lmoe.adapter.run_data import run_data, run_lessons
from lmoe.config.data import DataConfig
from lmoe.data.domains import of_domains
from lmoe.data.prepare import read_all, split_off
from lmoe.data.reader import Reader
from lmoe.data.rows.sources import sources_of
from lmoe.evaluate.lessons import loss_lesson, rows_of
from lmoe.evaluate.loss_rows import EvaluationRows
from lmoe.evaluate.subject import Subject
from lmoe.files.resources import resource_dir
from lmoe.vocabulary import RowKind


def data_of(run: Path | None, subject: Subject) -> tuple[DataConfig, int]:
    """The data section of a run for rows of all domains under the template that its tokenizer has, and its seed."""
    own, seed = run_data(run)
    return for_subject(own, subject), seed


def for_subject(config: DataConfig, subject: Subject) -> DataConfig:
    """The data section for rows under the template and the length that a subject has."""
    return replace(config, packing=False, max_length=subject.max_length, chat_template=None, template_kwargs={})


def first_training_rows(
    run: Path | None, subject: Subject, count: int, domains: Sequence[str] | None = None
) -> EvaluationRows:
    """The first training rows of each domain of a run.

    Args:
        run: its folder; None: of an adapter on its own, the bundled rows.
        subject: whose tokenizer and length count.
        count: rows of each domain.
        domains: of these alone; None: of all.

    Raises:
        DataError: rows that cannot be read.
    """
    config, seed = data_of(run, subject)
    train = _read(config, seed, subject, RowKind.answers)
    wanted = sorted(train.domains if domains is None else domains)
    chosen, _ = of_domains(train.rows, train.domains, wanted)
    return replace(train, rows=chosen, domains=wanted).first_of_each_domain(count)


def learnt_answers(run: Path | None, subject: Subject) -> EvaluationRows:
    """All training rows of that lesson of a run whose validation rows its loss is measured on, of the domains that it
    has learnt, and dealt anew where they were; of pairs of answers the chosen ones.

    Args:
        run: its folder; None: of an adapter on its own, the bundled rows.
        subject: whose tokenizer and length count.

    Raises:
        DataError: rows that cannot be read.
        CheckpointError: the config of the run cannot be read.
    """
    lesson = loss_lesson(run_lessons(run))
    _, seed = run_data(run)
    train = _read(for_subject(lesson.data, subject), seed, subject, rows_of(lesson))
    if (learnt := lesson.data.domains) is not None:
        rows, _ = of_domains(train.rows, train.domains, learnt)
        train = replace(train, rows=rows, domains=[name for name in train.domains if name in learnt])
    return train.dealt_as(lesson.data).preferred()


def _read(config: DataConfig, seed: int, subject: Subject, kind: RowKind) -> EvaluationRows:
    """All training rows of a config."""
    reader = Reader(config, subject.tokenizer, kind=kind)
    whole, names, _ = read_all(reader, sources_of(config, resource_dir("data")))
    train = whole.subset(split_off(whole, names, config, seed).train)
    return EvaluationRows(rows=train, domains=list(names), reports=[], data_hashes={})
