"""Runs that exist, compared on rows that all of them are measured on: the same statistics as a study."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lmoe.adapter.folder import read_adapter_config
from lmoe.adapter.place import adapter_folder
from lmoe.config.data import JUDGE
from lmoe.config.defaults import moe_section
from lmoe.config.evaluate import EvaluateSettings
from lmoe.data.rows.sources import judge_source
from lmoe.errors import StudyError, TrainingError
from lmoe.evaluate.loss_rows import EvaluationRows
from lmoe.evaluate.row_losses import RowLoss, row_losses, write_row_losses
from lmoe.evaluate.rows import evaluation_rows
from lmoe.evaluate.subject import row_tokenizer, subject_of
from lmoe.files.places import expanded
from lmoe.files.resources import resource_dir
from lmoe.statistics.comparison import Terms
from lmoe.statistics.inference import rows_interval
from lmoe.statistics.strata import Floats, domain_losses
from lmoe.statistics.verdict import FEWEST_SEEDS, judge
from lmoe.study.beside import Beside, beside_baseline, beside_by_domain
from lmoe.study.given import NAMED, GivenArm, GivenRun, arms_of_runs, check_once, check_rows, read_run
from lmoe.study.judged import JudgedLosses, judged_losses
from lmoe.study.kept_losses import asked_of, kept_losses, losses_file
from lmoe.study.ledger import models_judged, rows_digest
from lmoe.study.origins import origin_notes
from lmoe.study.results.answer import judged_often
from lmoe.study.results.runs_result import RunsArm, RunsComparison, RunsResult

VAL = "val"
"""What `data` calls the validation rows of the runs."""
LOOKED_AT = (
    "compared on the runs' own validation rows, which were looked at in training (best.ckpt, early stopping, tuning): "
    "this flatters whatever was tuned on them"
)
Say = Callable[[str], None]


@dataclass(slots=True, frozen=True, kw_only=True)
class CompareSettings:
    """Which runs are compared, and how.

    Args:
        runs: run directories.
        baseline: which of them the others are compared with; None: the first.
        names: of the arms, in the order of their first runs; None: what their settings differ in.
        data: judge, val, or rows as data.path; None: judge where all runs keep judging rows, else val.
        domains: rows of these alone; None: of all.
        margin: arms are equivalent within it, in nats a token.
        alpha: of each family of comparisons.
        resamples: of the bootstrap.
        batch_size: rows in a batch.
        device: as torch names it; None: a GPU where there is one.
        trust_remote_code: run Python that comes with a base or a tokenizer.
        unfinished: take runs that have not finished too.
    """

    runs: tuple[str, ...]
    baseline: str | None = None
    names: tuple[str, ...] | None = None
    data: str | None = None
    domains: tuple[str, ...] | None = None
    margin: float = 0.01
    alpha: float = 0.05
    resamples: int = 2000
    batch_size: int = 16
    device: str | None = None
    trust_remote_code: bool = False
    unfinished: bool = False


def compare_runs(settings: CompareSettings, ledger: Path, say: Say = lambda line: None) -> RunsResult:
    """Measure each run where it was not measured yet, and compare.

    Args:
        ledger: folder whose judged.json counts how often judging rows have judged.
        say: told what is measured now.

    Raises:
        LmoeError: settings or runs that cannot be, runs that cannot be compared, rows that cannot be read.
    """
    check_settings(settings)
    runs = [read_run(place, unfinished=settings.unfinished) for place in settings.runs]
    check_once(runs)
    data, notes = data_of(settings.data, runs)
    notes += check_rows(runs, measured_on_split=any(split_off_for(data, run) for run in runs))
    arms = baseline_first(arms_of_runs(runs, settings.names), runs, settings.baseline)
    tokenizers = {run.folder: row_tokenizer(run.folder, trust_remote_code=settings.trust_remote_code) for run in runs}
    check_tokenizers(runs, tokenizers)
    measured = measure_runs(arms, tokenizers, data, settings, say)
    judged = measured.judged
    notes += notes_of(arms, judged, measured.files if data not in (JUDGE, VAL) else set())
    often: dict[str, int] = {}
    if data == JUDGE:
        often = models_judged(ledger, _ledger_name(runs), rows_digest(measured.every_row), len(runs))
        notes.append(judged_often(often))
    return RunsResult(
        data=data,
        rows=len(judged.rows),
        tokens=int(judged.strata.tokens.sum()),
        digest=rows_digest(judged.rows),
        left_out=judged.left_out,
        judged_before=often,
        domains=dict(zip(judged.strata.names, judged.strata.rows.astype(int).tolist(), strict=True)),
        baseline=arms[0].name,
        margin=settings.margin,
        alpha=settings.alpha,
        arms=[_arm(arm, judged) for arm in arms],
        primary=_primary(arms, judged, settings),
        by_domain=_by_domain(arms, judged, settings),
        notes=notes,
    )


def check_settings(settings: CompareSettings) -> None:
    """Refuse settings that cannot be.

    Raises:
        StudyError: says which.
    """
    if len(settings.runs) < 2:
        raise StudyError(f"{len(settings.runs)} run: a comparison needs two or more; the first is the baseline")
    if not settings.margin > 0:
        raise StudyError(f"`margin={settings.margin:g}` must be above 0: no two runs are equivalent within nothing")
    if not 0 < settings.alpha < 0.5:
        raise StudyError(f"`alpha={settings.alpha:g}` must be above 0 and below 0.5")


def data_of(asked: str | None, runs: Sequence[GivenRun]) -> tuple[str, list[str]]:
    """Which rows the runs are compared on, and what a reader has to know of them.

    Raises:
        StudyError: judging rows are asked for, and a run keeps none.
    """
    bundled = resource_dir("data")
    keep = [bool(run.config.data.judge_fraction) or judge_source(run.config.data, bundled) is not None for run in runs]
    if asked in (None, JUDGE) and not all(keep):
        run = runs[keep.index(False)]
        if asked == JUDGE:
            raise StudyError(
                f"`data=judge`: {run.name} keeps no rows for judging (data.judge_path, data.judge_fraction); name a "
                "file of rows that the runs have not read"
            )
        return VAL, [f"no rows are kept for judging by {run.name} (data.judge_path, data.judge_fraction)", LOOKED_AT]
    data = asked or JUDGE
    return data, [LOOKED_AT] if data == VAL else []


def split_off_for(data: str, run: GivenRun) -> bool:
    """Whether the rows that a run is measured on are split off its training rows."""
    own = run.config.data
    if data == VAL:
        return own.splits_val
    return data == JUDGE and own.judge_path is None and own.judge_fraction > 0


def baseline_first(arms: Sequence[GivenArm], runs: Sequence[GivenRun], baseline: str | None) -> list[GivenArm]:
    """The arms with that of the baseline in front.

    Raises:
        StudyError: the baseline is none of the runs.
    """
    folder = runs[0].folder if baseline is None else expanded(baseline).resolve()
    own = next((arm for arm in arms if any(run.folder == folder for run in arm.runs)), None)
    if own is None:
        raise StudyError(f"`baseline={baseline}` is none of the runs: {', '.join(run.name for run in runs)}")
    return [own, *(arm for arm in arms if arm is not own)]


def check_tokenizers(runs: Sequence[GivenRun], tokenizers: dict[Path, PreTrainedTokenizerBase]) -> None:
    """Refuse runs whose rows become other tokens.

    Raises:
        StudyError: says which two, and what differs.
    """
    first = runs[0]
    for run in runs[1:]:
        own, other = tokenizers[run.folder], tokenizers[first.folder]
        found = []
        if _vocabulary(own) != _vocabulary(other):
            found.append("another tokenizer")
        if own.chat_template != other.chat_template:
            found.append("another chat template")
        if found:
            raise StudyError(
                f"{run.name} has {' and '.join(found)} than {first.name}: a loss per token of one says nothing beside "
                "that of the other; compare runs whose rows become the same tokens"
            )


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> Any:
    """What makes tokens of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    return {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")}


@dataclass(slots=True, frozen=True, kw_only=True)
class Measured:
    """What the runs lose.

    Args:
        judged: on the rows that are compared.
        every_row: names of all rows of the first run that have a label token, also of domains that are not asked for.
        files: SHA-256 of the files of the rows.
    """

    judged: JudgedLosses
    every_row: list[str]
    files: set[str]


def measure_runs(
    arms: Sequence[GivenArm],
    tokenizers: dict[Path, PreTrainedTokenizerBase],
    data: str,
    settings: CompareSettings,
    say: Say,
) -> Measured:
    """The losses of all runs on the rows that were asked of them alike.

    Raises:
        LmoeError: rows that cannot be read, a domain without rows or without an expert, no row in common.
    """
    found: dict[str, list[dict[str, RowLoss]]] = {}
    files: set[str] = set()
    every_row: list[str] = []
    for arm in arms:
        for run in arm.runs:
            rows = rows_of(run, tokenizers[run.folder], data)
            files |= set(rows.data_hashes.values())
            losses = losses_of(run, rows, data, settings, say)
            every_row = every_row or [loss.row for loss in losses if loss.label_tokens]
            there = {loss.domain for loss in losses}
            if missing := sorted(set(settings.domains or ()) - there):
                raise StudyError(
                    f"`domains`: no row is of {', '.join(missing)}; the rows of {run.name} are of "
                    f"{', '.join(sorted(there))}"
                )
            kept = [loss for loss in losses if settings.domains is None or loss.domain in settings.domains]
            found.setdefault(arm.name, []).append({loss.row: loss for loss in kept})
    judged = judged_losses(found, {arm.name: arm.seeds for arm in arms})
    return Measured(judged=judged, every_row=every_row, files=files)


def rows_of(run: GivenRun, tokenizer: PreTrainedTokenizerBase, data: str) -> EvaluationRows:
    """The rows that a run is measured on, each of its own domain."""
    moe = moe_section(read_adapter_config(adapter_folder(run.folder)).moe)
    asked = EvaluateSettings(checkpoint=str(run.folder), data=None if data == VAL else data)
    length = run.config.data.max_length
    return evaluation_rows(asked, run.folder, tokenizer, moe, max_length=length, dealt=False)[0]


def losses_of(run: GivenRun, rows: EvaluationRows, data: str, settings: CompareSettings, say: Say) -> list[RowLoss]:
    """The loss of each row under the last adapter of a run: those that it keeps, or measured and kept.

    Raises:
        StudyError: one of them is no finite number.
        LmoeError: the model cannot be loaded.
    """
    length, asked = run.config.data.max_length, asked_of(rows)
    file = losses_file(run.folder, run.adapter_hash, rows, length)
    if (kept := kept_losses(file, asked)) is not None:
        return kept
    say(f"losses on {len(asked):,} rows: {run.name}")
    subject = subject_of(
        run.folder,
        batch_size=settings.batch_size,
        max_length=length,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
    )
    measured = rows.dealt_as(run.config.data) if data in (JUDGE, VAL) else rows
    losses = row_losses(subject, measured)
    losses = [replace(loss, domain=domain) for loss, (_, domain, _) in zip(losses, asked, strict=True)]
    if diverged := sum(not math.isfinite(loss.loss) for loss in losses):
        raise StudyError(
            f"{run.name}: {diverged} of {len(losses)} rows have a loss that is no finite number: the model has "
            "diverged; leave it out"
        )
    try:
        write_row_losses(losses, file)
    except TrainingError as error:
        say(f"not kept for the next time: {error}")
    return losses


def paired(judged: JudgedLosses, arm: str, baseline: str) -> tuple[Floats, Floats]:
    """(S, N) losses of both with the seeds that both have; where none is common, in the order of their seeds."""
    mine, others = judged.paired(arm, baseline)
    if len(mine):
        return mine, others
    count = min(len(judged.losses[arm]), len(judged.losses[baseline]))
    return judged.losses[arm][:count], judged.losses[baseline][:count]


def _primary(arms: Sequence[GivenArm], judged: JudgedLosses, settings: CompareSettings) -> list[RunsComparison]:
    """Each arm beside the baseline on the mean over domains, one family."""
    names = [arm.name for arm in arms]
    return _verdicts(beside_baseline(judged, names, names[0], partial(paired, judged), _terms(settings)), settings)


def _by_domain(arms: Sequence[GivenArm], judged: JudgedLosses, settings: CompareSettings) -> list[RunsComparison]:
    """Each arm beside the baseline in each domain, another family; nothing where there is one domain."""
    names = [arm.name for arm in arms]
    return _verdicts(beside_by_domain(judged, names, names[0], partial(paired, judged), _terms(settings)), settings)


def _verdicts(family: Sequence[Beside], settings: CompareSettings) -> list[RunsComparison]:
    verdicts = judge([one.comparison for one in family], settings.alpha)
    level = 1 - settings.alpha
    return [
        RunsComparison.of(verdict, one.arm, one.domain, rows_interval(one.delta, one.strata, level))
        for verdict, one in zip(verdicts, family, strict=True)
    ]


def _terms(settings: CompareSettings) -> Terms:
    return Terms(margin=settings.margin, level=1 - settings.alpha, draws=settings.resamples)


def _arm(arm: GivenArm, judged: JudgedLosses) -> RunsArm:
    means = judged.means(arm.name).tolist()
    domains = domain_losses(judged.losses[arm.name], judged.strata).mean(0).tolist()
    return RunsArm(
        name=arm.name,
        differs=arm.differs,
        runs=[run.name for run in arm.runs],
        seeds=list(arm.seeds),
        losses=means,
        loss=float(np.mean(means)),
        domain_losses=dict(zip(judged.strata.names, domains, strict=True)),
    )


def notes_of(arms: Sequence[GivenArm], judged: JudgedLosses, files: set[str]) -> list[str]:
    """What a reader has to know of the runs and their seeds.

    Args:
        files: SHA-256 of the files of the rows, where these are not the runs' own.
    """
    runs = [run for arm in arms for run in arm.runs]
    notes = [f"{run.name} ended before its last step: {run.ended}" for run in runs if run.ended]
    if read := [path for path, digest in runs[0].data_hashes.items() if digest in files]:
        notes.append(
            f"the runs have read these rows in training, as {', '.join(read[:NAMED])}: they are not new to them"
        )
    notes += origin_notes([run.record for run in runs])
    if judged.left_out:
        notes.append(
            f"{judged.left_out} rows are not compared: not every run was asked for the same tokens of them, such as "
            "where one was cut"
        )
    return notes + _seed_notes(arms)


def _seed_notes(arms: Sequence[GivenArm]) -> list[str]:
    notes, fewest = [], FEWEST_SEEDS
    for arm in arms[1:]:
        common = [seed for seed in arm.seeds if seed in arms[0].seeds]
        count = len(common) or min(len(arm.seeds), len(arms[0].seeds))
        fewest = min(fewest, count)
        if not common:
            notes.append(f"{arm.name}: no seed is that of a run of the baseline, so they are paired in their order")
        if count < max(len(arm.seeds), len(arms[0].seeds)):
            listed = ", ".join(map(str, common)) if common else f"the first {count}"
            notes.append(f"{arm.name}: not all seeds have a partner; compared are {listed}")
    if fewest < FEWEST_SEEDS:
        notes.append(
            f"{fewest} seed{'s' * (fewest > 1)}: another seed may turn the difference round, and nothing is concluded "
            f"below {FEWEST_SEEDS}; the interval over rows alone is of these very models on other "
            "rows, and says nothing of other seeds"
        )
    return notes


def _ledger_name(runs: Sequence[GivenRun]) -> str:
    """Return the name of a comparison of these models, the same whatever order they are given in."""
    models = " ".join(sorted(run.adapter_hash for run in runs))
    return f"compare {hashlib.sha256(models.encode()).hexdigest()[:8]}"
