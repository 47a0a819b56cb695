"""The rows that losses and samples are measured on."""

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lmoe.adapter.run_data import run_data
from lmoe.config.data import BUNDLED, BUNDLED_PREFERENCE, JUDGE, DataConfig
from lmoe.config.evaluate import EvaluateSettings
from lmoe.config.moe import MoeConfig
from lmoe.data.report import PERMUTED, unprefixed
from lmoe.errors import DataError
from lmoe.evaluate.loss_rows import EvaluationRows, prepare_evaluation, prepare_judging
from lmoe.files.resources import resource_dir
from lmoe.rules.routers import needs_domain
from lmoe.vocabulary import RowKind

BUNDLED_ROWS = "data"
"""Folder of what ships with lmoe."""

CALLED = {BUNDLED: "the bundled rows", BUNDLED_PREFERENCE: "the bundled pairs of answers"}
"""Rows that ship with lmoe, as people call them."""


def evaluation_rows(
    settings: EvaluateSettings,
    run: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    moe: MoeConfig,
    *,
    max_length: int,
    dealt: bool = True,
    kind: RowKind = RowKind.answers,
    data: DataConfig | None = None,
) -> tuple[EvaluationRows, str]:
    """The rows, and what they are called.

    Args:
        run: the run directory of the checkpoint, or None.
        moe: section of the checkpoint.
        tokenizer: with the template that rows are rendered by.
        max_length: longest row in tokens.
        dealt: whether domains are dealt anew where the run has data.permute_domains.
        kind: what the rows are read as.
        data: section that says which rows and how they are read; None: that of the run.

    Raises:
        DataError: rows that cannot be read, and for moe.router=oracle rows of a domain without an expert.
        CheckpointError: the config of the run cannot be read.
    """
    own, seed = run_data(run)
    own = replace(own if data is None else data, packing=False, max_length=max_length)
    own = replace(own, permute_domains=own.permute_domains and dealt, chat_template=None, template_kwargs={})
    config, bundled = rows_config(settings, own), resource_dir(BUNDLED_ROWS)
    if settings.data == JUDGE:
        named = "the judging rows" + ("" if run is None else f" of {run}")
        rows = prepare_judging(config, tokenizer, seed=seed, bundled=bundled, length_name="`max_length`", kind=kind)
        return with_experts(rows.dealt_as(own).first_of_each_domain(settings.limit), moe, named), named
    if settings.data is not None:
        named = CALLED.get(settings.data, settings.data)
    else:
        named = CALLED[BUNDLED] if run is None else f"the validation rows of {run}"
    try:
        rows = prepare_evaluation(
            config,
            tokenizer,
            seed=seed,
            bundled=bundled,
            named=(None if settings.data is None else "`data`", "`max_length`"),
            limit=settings.limit,
            kind=kind,
        )
    except DataError as error:
        if settings.data is not None or run is None:
            raise
        raise DataError(f"{named} cannot be used, name others with `data`: {error}") from None
    return with_experts(rows, moe, named), named


def rows_config(settings: EvaluateSettings, own: DataConfig) -> DataConfig:
    """The section `data` of the rows that are measured: that of the run, or one for what `data` names.

    Args:
        own: section of the run.
    """
    return own if settings.data in (None, JUDGE) else named_rows(settings.data, own)


def named_rows(path: str, own: DataConfig) -> DataConfig:
    """The section `data` for rows that the user names: all of them, read as the run reads its own.

    Args:
        path: as data.path.
        own: section of the run.
    """
    return replace(
        own,
        path=path,
        sources={},
        columns=own.columns_of(path),
        val_path=path,
        domains=None,
        permute_domains=False,
        val_rows_per_domain=0,
    )


def with_experts(rows: EvaluationRows, moe: MoeConfig, named: str) -> EvaluationRows:
    """The same rows, where a router that goes by domain has an expert for each of them.

    Args:
        named: what the rows are called.

    Raises:
        DataError: for moe.router=oracle rows of a domain without an expert.
    """
    unknown = sorted(set(rows.domains) - set(moe.domains or []))
    if needs_domain(moe) and unknown:
        raise DataError(
            f"{named}: moe.router={moe.router} has no expert for the domain {unknown[0]!r} of these rows; "
            f"it has {moe.domains}"
        )
    return rows


def row_notes(rows: EvaluationRows, max_length: int) -> list[str]:
    """Rows that were dropped or cut, one line a source and reason."""
    notes = [f"data: {PERMUTED}"] if rows.permuted else []
    for source in rows.reports:
        account = source.account
        notes += [
            f"data: {count} of {account.read} rows dropped: {why}" for why, count in sorted(account.dropped.items())
        ]
        if account.bad:
            notes.append(f"data: {account.bad} of {account.read} rows cannot be used, such as {account.first_bad[0]}")
        if account.unprefixed:
            notes.append(f"data: {unprefixed(account)}")
        if account.truncated:
            notes.append(f"data: {account.truncated} of {account.read} rows cut at {max_length} tokens")
    return notes
