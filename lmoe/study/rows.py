"""The rows of a study: what they are before anything runs, and that judging rows are nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from lmoe.backbones.load import load_tokenizer
from lmoe.config.backbone import BackboneConfig
from lmoe.config.data import DataConfig
from lmoe.config.run import RunConfig
from lmoe.config.study import MEAN, JudgingConfig
from lmoe.data.chats.template_source import take_template
from lmoe.data.encoded import EncodedRows
from lmoe.data.prepare import prepare
from lmoe.errors import LmoeError, StudyError
from lmoe.evaluate.loss_rows import prepare_judging
from lmoe.evaluate.row_losses import label_digest
from lmoe.files.resources import resource_dir
from lmoe.objectives.objective import objective_of
from lmoe.rules.routers import needs_domain
from lmoe.statistics.strata import FEWEST_ROWS
from lmoe.study.judge import more_rows


@dataclass(slots=True, frozen=True, kw_only=True)
class StudyRows:
    """What a study reads.

    Args:
        domains: of the training rows.
        judged_domains: of the judging rows.
        row_ids: names and label tokens of the judging rows that are compared, by domain: the first
            study.judging.rows_per_domain of each.
        data_hashes: SHA-256 by path, of all files.
        own: by arm, its rows; of an arm that is not there, these.
    """

    domains: list[str]
    judged_domains: list[str]
    row_ids: dict[str, list[str]]
    data_hashes: dict[str, str]
    own: Mapping[str, "StudyRows"] = field(default_factory=dict)

    def of_arm(self, name: str) -> "StudyRows":
        """The rows of an arm."""
        return self.own.get(name, self)


def rows_of_arms(configs: Mapping[str, RunConfig], judging: JudgingConfig) -> StudyRows:
    """The rows of a study, those of its first arm, checked for all arms, of which some may have rows of their own.

    Args:
        configs: by arm, the baseline first.

    Raises:
        LmoeError: as `study_rows`, arms that have no judging rows in common, or a domain with too few of them.
    """
    read: list[tuple[tuple[BackboneConfig, DataConfig], StudyRows]] = []
    own: dict[str, StudyRows] = {}
    for name, config in configs.items():
        sources = config.backbone, replace(config.data, permute_domains=False)
        rows = next((found for of, found in read if of == sources), None)
        if rows is None:
            try:
                rows = study_rows(config, judging)
            except LmoeError as error:
                if not read:
                    raise
                raise type(error)(f"arm {name}: {error}") from None
            read.append((sources, rows))
            check_judging(_in_common([found for _, found in read], name), judging)
        own[name] = rows
    hashes = {path: text for _, found in read for path, text in found.data_hashes.items()}
    return replace(read[0][1], data_hashes=hashes, own=own)


def _in_common(found: Sequence[StudyRows], name: str) -> dict[str, int]:
    """How many judging rows of each domain all arms have.

    Args:
        name: of the last arm.
    """
    common = {domain: set(ids) for domain, ids in found[0].row_ids.items()}
    for other in found[1:]:
        common = {domain: ids & set(other.row_ids.get(domain, [])) for domain, ids in common.items()}
    if not any(common.values()):
        raise StudyError(
            f"arm {name} is judged on other rows than the arms before it, or asked for other tokens of them, so that "
            "nothing could be compared; let all arms have the same rows (data.judge_path, data.judge_fraction), "
            "tokenizer and template"
        )
    return {domain: len(ids) for domain, ids in common.items()}


def check_judging(counts: Mapping[str, int], judging: JudgingConfig) -> None:
    """Refuse judging rows that nothing could be said of, before anything runs.

    Args:
        counts: judging rows by domain.

    Raises:
        StudyError: names the domains.
    """
    if missing := sorted(set(judging.domains or []) - set(counts)):
        raise StudyError(
            f"study.judging.domains names {', '.join(missing)}, and the judging rows have {', '.join(sorted(counts))}"
        )
    if few := sorted(name for name, count in counts.items() if count < FEWEST_ROWS):
        raise StudyError(
            f"{', '.join(few)}: fewer than {FEWEST_ROWS} judging rows, of which no spread can be told; keep more of "
            "them for judging (data.judge_fraction, data.judge_path), or take rows of these domains out"
        )


def study_rows(config: RunConfig, judging_config: JudgingConfig) -> StudyRows:
    """Read the rows of a run's config, and check that none of those that judge is trained or tuned on.

    Args:
        config: of an arm.

    Raises:
        LmoeError: rows that cannot be read; judging rows that are among the others.
    """
    tokenizer, bundled = load_tokenizer(config.backbone), resource_dir("data")
    data = replace(config.data, packing=False)
    take_template(tokenizer, data.chat_template, data.template_kwargs)
    plain = replace(data, chat_template=None, template_kwargs={})
    if data.streaming:
        raise StudyError("data.streaming=true: a study reads its rows before it begins; set data.streaming=false")
    prepared = prepare(plain, tokenizer, seed=config.seed, bundled=bundled, packing_model_type=None)
    judging = prepare_judging(plain, tokenizer, seed=config.seed, bundled=bundled, length_name="data.max_length")
    assert isinstance(prepared.train, EncodedRows)
    more = more_rows(plain, tokenizer, judging_config.more, config.seed)
    own = [judging.domains[i] for i in judging.rows.domains.unique().tolist()]
    if both := sorted(set(own) & set(judging_config.more)):
        raise StudyError(
            f"study.judging.more.{both[0]}: the judging rows have a domain {both[0]} already; call these rows otherwise"
        )
    parts = [judging, *more]
    for part in parts:
        for name, rows in (("training", prepared.train), ("validation", prepared.val)):
            if len(shared := torch.isin(part.rows.digests, rows.digests).nonzero()):
                first = part.place(int(shared[0]))
                raise StudyError(
                    f"{len(shared)} of {len(part.rows)} judging rows are {name} rows too, the first {first}; "
                    "a verdict on rows that were trained or tuned on says nothing: take them out of one of the files"
                )
    row_ids: dict[str, list[str]] = {}
    for part in parts:
        compared = part.first_of_each_domain(judging_config.rows_per_domain)
        for name, row in zip(compared.row_ids(), compared.rows, strict=True):
            row_ids.setdefault(compared.domains[row.domain], []).append(f"{name} {label_digest(row)}")
    return StudyRows(
        domains=prepared.domains,
        judged_domains=own,
        row_ids=row_ids,
        data_hashes=prepared.report.data_hashes
        | {path: text for part in parts for path, text in part.data_hashes.items()},
    )


def check_experts(rows: StudyRows, configs: Mapping[str, RunConfig]) -> None:
    """Refuse arms that choose the expert by the domain, where judging rows are of a domain that they do not train.

    Args:
        configs: by arm.

    Raises:
        StudyError: names the arms and the domain.
    """
    for name, config in configs.items():
        own = rows.of_arm(name)
        trained = config.data.domains or own.domains
        if needs_domain(config.moe) and (missing := sorted(set(own.judged_domains) - set(trained))):
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
        there = objective_of(config.task).metric_names(config.data.domains or rows.of_arm(name).domains)
        if name in apart:
            there = [one for one in there if one == "val/loss"]
        if metric not in (MEAN, *there):
            raise StudyError(
                f"study.tuning.metric={metric}: runs of arm {name} do not log it; they log {', '.join(there)}, or use "
                f"{MEAN}"
            )
