"""The rows that a run was trained on, read again: what is fitted to them afterwards."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lmoe.adapter.run_data import run_data
from lmoe.config.data import DataConfig
from lmoe.data.domains import of_domains
from lmoe.data.prepare import read_all, split_off
from lmoe.data.reader import Reader
from lmoe.data.rows.sources import sources_of
from lmoe.evaluate.loss_rows import EvaluationRows
from lmoe.evaluate.subject import Subject
from lmoe.files.resources import resource_dir


def data_of(run: Path | None, subject: Subject) -> tuple[DataConfig, int]:
    """The data section of a run for rows of all domains under the template that its tokenizer has, and its seed."""
    own, seed = run_data(run)
    config = replace(own, packing=False, max_length=subject.max_length, chat_template=None, template_kwargs={})
    return config, seed


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
    whole, names, _ = read_all(Reader(config, subject.tokenizer), sources_of(config, resource_dir("data")))
    train = whole.subset(split_off(whole, names, config, seed).train)
    wanted = sorted(names if domains is None else domains)
    chosen, _ = of_domains(train, names, wanted)
    found = EvaluationRows(rows=chosen, domains=wanted, reports=[], data_hashes={})
    return found.first_of_each_domain(count)
