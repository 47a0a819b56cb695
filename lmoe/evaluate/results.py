"""What an evaluation found, as plain numbers with the adapters off and on, and the files that keep them."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lmoe.report.files import write_bytes
from lmoe.report.targets import TargetReport

JSON_FILE = "evaluation.json"
TABLES = ("losses", "preferences", "target_choices", "choices", "samples", "tasks", "exported")
"""Parts of an evaluation that become a CSV file and a W&B table of that name."""
ALL_TOKENS, ALL_PAIRS, ALL_ANSWERS, MEAN = "(all tokens)", "(all pairs)", "(all answers)", "(domain mean)"
SUMS = (ALL_TOKENS, ALL_PAIRS, ALL_ANSWERS, MEAN)
"""What the sums over domains are called in place of a domain; a domain may be called anything else."""


@dataclass(slots=True, frozen=True, kw_only=True)
class DomainLosses:
    """Loss in nats per label token, and perplexity = exp(loss)."""

    domain: str
    """A domain, or one of SUMS."""
    label_tokens: int
    """Tokens that the loss is taken on."""
    off_loss: float
    """With the adapters off."""
    on_loss: float
    """With the adapters on."""
    off_perplexity: float
    """exp(off_loss)."""
    on_perplexity: float
    """exp(on_loss)."""


@dataclass(slots=True, frozen=True, kw_only=True)
class PreferenceFigures:
    """How well answers are told apart that are preferred from those that are not, means over pairs (kto: over answers).

    A figure of equals, such as two answers with the same reward, counts one half.
    """

    lesson: str
    """The objective, and where several of the run have the same its phases."""
    domain: str
    """A domain, or one of SUMS."""
    pairs: int
    """Number of pairs; kto: of answers."""
    off_loss: float
    """Loss of the objective with the adapters off, measured against the base."""
    on_loss: float
    """With the adapters on."""
    off_accuracy: float
    """Share of pairs whose chosen answer has the higher reward (kto: of answers whose reward has the right sign), with
    the adapters off."""
    off_accuracy_stderr: float | None
    """Its standard error, sqrt(p (1 - p) / (n - 1))."""
    on_accuracy: float
    """With the adapters on."""
    on_accuracy_stderr: float | None
    """Its standard error."""
    off_margin: float
    """Reward of the chosen answer, less that of the rejected one, with the adapters off."""
    off_margin_stderr: float | None
    """Its standard error."""
    on_margin: float
    """With the adapters on."""
    on_margin_stderr: float | None
    """Its standard error."""
    shorter: float | None
    """Accuracy of choosing the answer with fewer label tokens; None: the answers are no pairs."""
    longer: float | None
    """Accuracy of choosing the one with more of them: 1 - shorter."""
    length_stderr: float | None
    """Standard error of both."""
    base_log_prob: float | None
    """Accuracy of choosing the answer with the higher log-probability by the base."""
    base_log_prob_stderr: float | None
    """Its standard error."""
    base_mean_log_prob: float | None
    """Accuracy of choosing the answer whose label tokens have the higher mean log-probability by the base."""
    base_mean_log_prob_stderr: float | None
    """Its standard error."""


@dataclass(slots=True, frozen=True, kw_only=True)
class TargetShare:
    """How often routers choose a target for rows of one kind."""

    row: str
    """A target that the rows have, or the domain of rows without one."""
    has_target: bool
    """Whether they have one: routers were taught their domain, or the rows were put into clusters."""
    rows: int
    """Number of such rows."""
    chosen: str
    """The target that is chosen."""
    share: float
    """For which share of these rows, mean over the routers."""


@dataclass(slots=True, frozen=True, kw_only=True)
class ChoiceAccuracy:
    """Multiple choice: log-likelihood a character (normalised) and in sum (plain)."""

    task: str
    """Name of the file."""
    questions: int
    """Number answered."""
    too_long: int
    """Number left out because they pass the longest row."""
    random: float
    """Expected accuracy of guessing."""
    majority: float
    """Accuracy of the index that is right most often."""
    off_normalised: float
    """Accuracy with the adapters off."""
    off_normalised_stderr: float | None
    """Its standard error."""
    on_normalised: float
    """Accuracy with the adapters on."""
    on_normalised_stderr: float | None
    """Its standard error."""
    off_plain: float
    """As above, by the plain log-likelihood."""
    off_plain_stderr: float | None
    """Its standard error."""
    on_plain: float
    """As above, by the plain log-likelihood."""
    on_plain_stderr: float | None
    """Its standard error."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Sample:
    """A prompt of the rows, and what follows it."""

    domain: str
    """The row's."""
    prompt: str
    """Everything before the first label token, special tokens written out."""
    reference: str
    """What the row says next; of a pair of answers the chosen one."""
    off: str
    """What the model writes with the adapters off."""
    on: str
    """What it writes with the adapters on."""
    rejected: str = ""
    """Of a pair of answers the rejected one, or a single answer that is a bad one; empty: the row has none."""


@dataclass(slots=True, frozen=True, kw_only=True)
class TaskScore:
    """One metric of a task of the LM evaluation harness."""

    task: str
    """Task or group."""
    metric: str
    """Name as the harness gives it, with its filter: acc,none."""
    off: float
    """With the adapters off."""
    off_stderr: float | None
    """Its standard error; None: the harness gives none."""
    on: float
    """With the adapters on."""
    on_stderr: float | None
    """Its standard error."""


@dataclass(slots=True, frozen=True, kw_only=True)
class ExportedLosses:
    """Loss of an exported model in nats per label token, beside that of the run that it is of."""

    domain: str
    """A domain, or one of SUMS."""
    label_tokens: int
    """Tokens that the loss is taken on."""
    loss: float
    """Of the exported model."""
    perplexity: float
    """exp(loss)."""
    run_loss: float | None
    """Of the run, with its adapters on; None: it was not measured."""


@dataclass(slots=True, kw_only=True)
class Evaluation:
    """Everything that was measured."""

    settings: dict[str, Any]
    """What was asked for, with the defaults that were filled in."""
    notes: list[str] = field(default_factory=list)
    """What a reader has to know about the numbers."""
    losses: list[DomainLosses] = field(default_factory=list)
    """One a domain, then the sums."""
    preferences: list[PreferenceFigures] = field(default_factory=list)
    """Of each objective that compares answers one a domain, then the sums."""
    targets: TargetReport | None = None
    """What routers choose of what they were taught; None: they were taught nothing."""
    choices: list[ChoiceAccuracy] = field(default_factory=list)
    """One a task."""
    samples: list[Sample] = field(default_factory=list)
    """Prompts in the order of the domains."""
    tasks: list[TaskScore] = field(default_factory=list)
    """One a task and metric."""
    exported: list[ExportedLosses] = field(default_factory=list)
    """Of an exported folder in place of `losses`; one a domain, then the sums."""

    @property
    def target_choices(self) -> list[TargetShare]:
        """One for each kind of row that there is, and each target."""
        report = self.targets
        if report is None:
            return []
        names = [*report.targets, *report.untrained]
        return [
            TargetShare(row=name, has_target=label < len(report.targets), rows=count, chosen=chosen, share=share)
            for label, (name, count) in enumerate(zip(names, report.counts, strict=True))
            if count
            for chosen, share in zip(report.targets, report.table[label], strict=True)
        ]

    def write(self, folder: Path) -> list[Path]:
        """evaluation.json and a CSV file for each part that was measured; files of an earlier evaluation go.

        Raises:
            TrainingError: a file cannot be written.
        """
        text = json.dumps(without_infinity(asdict(self)), indent=1, ensure_ascii=False, allow_nan=False)
        written = [write_bytes(folder / JSON_FILE, (text + "\n").encode("utf-8"))]
        for name in TABLES:
            if rows := getattr(self, name):
                written.append(write_bytes(folder / f"{name}.csv", as_csv(rows)))
            else:
                (folder / f"{name}.csv").unlink(missing_ok=True)
        return written


def columns(rows: Sequence[Any]) -> list[str]:
    """Names of the fields of a part's rows."""
    return [f.name for f in fields(rows[0])]


def as_csv(rows: Sequence[Any]) -> bytes:
    """A table with a heading; what was not measured is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue().encode("utf-8")


def without_infinity(value: Any) -> Any:
    """Nested lists and dicts with None in place of what JSON has no number for."""
    if isinstance(value, dict):
        return {key: without_infinity(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinity(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
