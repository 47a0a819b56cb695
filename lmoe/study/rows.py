"""The rows of a study: what they are before anything runs, and that judging rows are nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lmoe.backbones.load import load_tokenizer
from lmoe.config.run import RunConfig
from lmoe.config.study import MEAN
from lmoe.data.chats.template_source import take_template
from lmoe.data.encoded import EncodedRows
from lmoe.data.prepare import prepare
from lmoe.data.stream import RowStream
from lmoe.errors import StudyError
from lmoe.evaluate.loss_rows import EvaluationRows, prepare_judging
from lmoe.files.resources import resource_dir
from lmoe.objectives.objective import objective_of
from lmoe.rules.routers import needs_domain


@dataclass(slots=True, frozen=True, kw_only=True)
class StudyRows:
    """What a study reads.

    Args:
        domains: of the training rows.
        judged_domains: of the judging rows.
        judged: judging rows.
        data_hashes: SHA-256 by path, of all files.
        repeated: judging rows whose tokens a judging row before them has.
    """

    domains: list[str]
    judged_domains: list[str]
    judged: int
    data_hashes: dict[str, str]
    repeated: int


def study_rows(config: RunConfig) -> StudyRows:
    """Read the rows of a run's config, and check that none of those that judge is trained or tuned on.

    Args:
        config: of the baseline.

    Raises:
        LmoeError: rows that cannot be read; judging rows that are among the others.
    """
    tokenizer, bundled = load_tokenizer(config.backbone), resource_dir("data/sft")
    data = replace(config.data, packing=False)
    take_template(tokenizer, data.chat_template, data.template_kwargs)
    plain = replace(data, chat_template=None, template_kwargs={})
    if data.streaming:
        raise StudyError("data.streaming=true: a study reads its rows before it begins; set data.streaming=false")
    prepared = prepare(plain, tokenizer, seed=config.seed, bundled=bundled, packing_model_type=None)
    judging = prepare_judging(plain, tokenizer, seed=config.seed, bundled=bundled, length_name="data.max_length")
    assert isinstance(prepared.train, EncodedRows) and not isinstance(prepared.train, RowStream)
    for name, rows in (("training", prepared.train), ("validation", prepared.val)):
        if len(shared := torch.isin(judging.rows.digests, rows.digests).nonzero()):
            first = _place(judging, int(shared[0]))
            raise StudyError(
                f"{len(shared)} of {len(judging.rows)} judging rows are {name} rows too, the first {first}; "
                "a verdict on rows that were trained or tuned on says nothing: take them out of one of the files"
            )
    digests = judging.rows.digests
    return StudyRows(
        domains=prepared.domains,
        judged_domains=[judging.domains[i] for i in judging.rows.domains.unique().tolist()],
        judged=len(judging.rows),
        data_hashes=prepared.report.data_hashes | judging.data_hashes,
        repeated=len(digests) - len(digests.unique()),
    )


def check_experts(rows: StudyRows, configs: Mapping[str, RunConfig]) -> None:
    """Refuse arms that choose the expert by the domain, where judging rows are of a domain that they do not train.

    Args:
        configs: by arm.

    Raises:
        StudyError: names the arms and the domain.
    """
    for name, config in configs.items():
        trained = config.data.domains or rows.domains
        if needs_domain(config.moe) and (missing := sorted(set(rows.judged_domains) - set(trained))):
            raise StudyError(
                f"arm {name}: moe.router={config.moe.router} has no expert for {', '.join(missing)} of the judging "
                f"rows, since it trains {', '.join(trained)}; take the arm out, or judge on other rows"
            )


def check_metric(metric: str, rows: StudyRows, configs: Mapping[str, RunConfig], apart: Sequence[str]) -> None:
    """Refuse to tune by a metric that not every run logs.

    Args:
        metric: study.tuning.metric.
        configs: by arm.
        apart: arms with a run for each domain, which validates on that domain alone.

    Raises:
        StudyError: names the metrics that there are.
    """
    for name, config in configs.items():
        there = objective_of(config.task.name).metric_names(config.data.domains or rows.domains)
        if name in apart:
            there = [one for one in there if one == "val/loss"]
        if metric not in (MEAN, *there):
            raise StudyError(
                f"study.tuning.metric={metric}: runs of arm {name} do not log it; they log {', '.join(there)}, or use "
                f"{MEAN}"
            )


def _place(rows: EvaluationRows, index: int) -> str:
    """File and line of a row, as far as they are known."""
    place, number = rows.rows.places[index].tolist()
    files = list(rows.data_hashes)
    return f"{files[place]}:{number + 1}" if place < len(files) else f"row {number + 1}"
