"""What a study has found, as plain numbers: study.json, which tables and the page are made of."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from lmoe.errors import StudyError
from lmoe.files.small_file import Reader
from lmoe.report.files import write_bytes
from lmoe.statistics.verdict import Judged

RESULT_FILE = "study.json"
RESULT_VERSION = 1
KEPT = Reader(error=StudyError, most=2**28, what="it", cure="the same study writes it anew")
EDGE = "edge"
"""Verdict where the best value of the arm or of the baseline is outermost."""


@dataclass(slots=True, kw_only=True)
class TryResult:
    """Values that were tried."""

    values: dict[str, Any]
    """By key of a run."""
    scores: dict[str, float]
    """What tuning makes small, by seed; of a try that was not chosen among, because a run of it failed, none."""
    mean: float | None
    """Over the seeds."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why a run of it failed, by seed."""


@dataclass(slots=True, kw_only=True)
class Curve:
    """The training loss, mean over the judged seeds, at some steps."""

    steps: list[int]
    """Optimizer steps."""
    loss: list[float]
    """Nats per label token, mean of the steps since the one before."""


@dataclass(slots=True, kw_only=True)
class ArmResult:
    """One arm."""

    name: str
    """In folders."""
    title: str
    """In tables."""
    commands: list[str]
    """With which its first judged model is made again: one, or one for each domain; StudyResult.commands has all."""
    space: dict[str, list[Any]]
    """Values that were tried, widened ones included."""
    tries: list[TryResult]
    """All of them."""
    chosen: dict[str, Any] | None
    """Values with which it was judged; None: every try has failed, or it was dropped."""
    second: dict[str, Any] | None
    """The second best values."""
    edges: dict[str, str]
    """Keys whose chosen value is outermost: lower or upper."""
    seeds: list[int]
    """Seeds of the models that were judged."""
    losses: list[float]
    """Of each of these models: mean over domains of the loss per label token, in nats."""
    loss: float | None
    """Mean over the models."""
    domain_losses: dict[str, float]
    """By domain, mean over the models."""
    total_parameters: int
    """Added by experts and routers, of all runs of a model."""
    active_parameters: int
    """Those of them that work on one token."""
    flops_per_token: float
    """Of a training step, forward and backward, by count; what reading_share says comes on top."""
    steps: int
    """Optimizer steps of a run."""
    tokens_per_step: float | None
    """Valid tokens; None: not measured."""
    seconds_per_step: float | None
    """Alone on the machine; None: not measured."""
    peak_memory_mb: float | None
    """Largest peak of a judged run; None: not measured."""
    classifier_accuracy: float | None
    """Of the classifier of prompts of an arm that trains apart, on the judging rows; None: it has none."""
    curve: Curve | None
    """None: nothing was judged."""
    failures: list[str]
    """Jobs that failed, of tuning and of judging, and why."""
    failed: bool = False
    """Whether it was not judged because of them."""
    reading_share: float = 0.0
    """What a router that reads each prompt first adds to flops_per_token, were all tokens prompts; 0: it reads none."""


@dataclass(slots=True, kw_only=True)
class ComparisonResult:
    """An arm beside the baseline. Nats per label token; below 0 the arm is better."""

    arm: str
    """Its name."""
    domain: str | None
    """None: the mean over domains."""
    seeds: int
    """Seeds that both were judged with."""
    estimate: float
    """The difference."""
    low: float | None
    """Of the interval of level 1 - alpha; None with a single seed."""
    high: float | None
    """Likewise."""
    bootstrap_low: float | None
    """Of the bootstrap, to look at."""
    bootstrap_high: float | None
    """Likewise."""
    standard_error: float | None
    """Of the estimate."""
    df: float | None
    """Degrees of freedom after Satterthwaite, for the reader."""
    difference_p: float | None
    """Of no difference, Holm-adjusted in its family; None: too few seeds."""
    equivalence_p: float | None
    """Of a difference of the margin or more, Holm-adjusted; None: too few seeds."""
    smallest_effect: float | None
    """That this study could have seen with probability 0.8, taken alone."""
    verdict: str
    """better, worse, equivalent, undecided, too few seeds or edge."""
    sentence: str
    """The verdict in words."""
    by_seed: list[float]
    """The difference of each seed."""


def comparison_result(judged: Judged, arm: str, domain: str | None) -> ComparisonResult:
    """A comparison with the verdict of its family.

    Args:
        domain: None: the mean over domains.
    """
    comparison, spread = judged.comparison, judged.comparison.spread
    return ComparisonResult(
        arm=arm,
        domain=domain,
        seeds=comparison.seeds,
        estimate=comparison.estimate,
        low=None if spread is None else spread.low,
        high=None if spread is None else spread.high,
        bootstrap_low=None if spread is None else spread.bootstrap_low,
        bootstrap_high=None if spread is None else spread.bootstrap_high,
        standard_error=None if spread is None else spread.standard_error,
        df=None if spread is None else spread.satterthwaite_df,
        difference_p=judged.difference_p,
        equivalence_p=judged.equivalence_p,
        smallest_effect=None if spread is None else spread.smallest_effect,
        verdict=judged.verdict.value,
        sentence=judged.sentence(),
        by_seed=list(comparison.by_seed),
    )


@dataclass(slots=True, kw_only=True)
class StudyResult:
    """All of a study."""

    format_version: int = RESULT_VERSION
    """Of study.json."""
    name: str
    """Of the study."""
    question: str
    """What was asked."""
    command: str
    """With which it is done again."""
    finished: str
    """When this was written, in UTC."""
    versions: dict[str, str | None]
    """Of the libraries."""
    machine: str
    """What it was written on."""
    baseline: str
    """Name of the arm that the others are beside."""
    metric: str
    """What tuning made small."""
    tuning_seeds: list[int]
    """Seeds of tuning; empty where nothing was tuned."""
    margin: float
    """Arms are equivalent within it, in nats."""
    alpha: float
    """Of each family of comparisons."""
    judging_rows: int
    """Rows that all models were judged on."""
    judging_tokens: int
    """Their label tokens."""
    judging_digest: str
    """Of the names of these rows."""
    left_out: int
    """Judging rows that could not be compared."""
    judged_before: dict[str, int]
    """Models that these rows have judged, by study in the same folder of studies, this one included."""
    domains: dict[str, int]
    """Judging rows of each domain that counts in the mean."""
    base_domain_losses: dict[str, float]
    """By domain, of the base with all adapters off; empty: not measured."""
    arms: list[ArmResult]
    """The baseline first."""
    primary: list[ComparisonResult]
    """Each arm beside the baseline on the mean over domains: one family."""
    secondary: list[ComparisonResult]
    """Each arm in each domain: another family."""
    longer_times: int
    """Factor of the steps of the longer runs; 1: there are none."""
    longer_arms: list[ArmResult] = field(default_factory=list)
    """The arms with longer runs."""
    longer: list[ComparisonResult] = field(default_factory=list)
    """These beside the baseline with longer runs: a family of its own."""
    more_domains: dict[str, int] = field(default_factory=dict)
    """Judging rows of each domain that counts in no mean, and is compared alone."""
    commands: dict[str, list[str]] = field(default_factory=dict)
    """The commands of every job that was begun, by its folder below that of the study: one, or one for each domain."""
    notes: list[str] = field(default_factory=list)
    """What a reader has to know of how it was done."""

    @property
    def base_loss(self) -> float | None:
        """Mean over domains of the base's loss."""
        values = [loss for name, loss in self.base_domain_losses.items() if name in self.domains]
        return sum(values) / len(values) if values else None

    def arm(self, name: str) -> ArmResult:
        """The arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)

    def write(self, folder: Path) -> Path:
        """Write study.json, whole or not at all.

        Raises:
            TrainingError: it cannot be written.
        """
        text = json.dumps(finite(asdict(self)), indent=1, ensure_ascii=False, allow_nan=False)
        return write_bytes(folder / RESULT_FILE, (text + "\n").encode("utf-8"))

    @classmethod
    def read(cls, folder: Path) -> "StudyResult":
        """Read what `write` has written.

        Raises:
            StudyError: it is not there, damaged, or of another version.
        """
        file = folder / RESULT_FILE
        kept = KEPT.json(file)
        if kept.get("format_version") != RESULT_VERSION:
            raise KEPT.refusal(
                file, f"format_version is {kept.get('format_version')}, this version reads {RESULT_VERSION}"
            )
        try:
            return _read(cls, kept)
        except (KeyError, TypeError, AttributeError) as error:
            raise KEPT.refusal(file, f"holds something else ({error})") from None


def _read(schema: Any, kept: Mapping[str, Any]) -> Any:
    """A dataclass from a mapping; of lists of dataclasses likewise."""
    inner = {
        "tries": TryResult,
        "arms": ArmResult,
        "longer_arms": ArmResult,
        "primary": ComparisonResult,
        "secondary": ComparisonResult,
        "longer": ComparisonResult,
    }
    known = {spec.name for spec in fields(schema)}
    values = {name: value for name, value in kept.items() if name in known}
    for name, of in inner.items():
        if name in values:
            values[name] = [_read(of, item) for item in values[name]]
    if isinstance(values.get("curve"), dict):
        values["curve"] = Curve(**values["curve"])
    return schema(**values)


def finite(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    assert not is_dataclass(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
