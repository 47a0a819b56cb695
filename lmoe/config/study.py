"""A study: ways of fine-tuning beside one another, tuned alike, judged on rows that nothing else reads."""

from dataclasses import dataclass, field
from typing import Any

from lmoe.vocabulary import AtEdge, Sampler

BUNDLED_TEXT = "bundled_text"
"""What judging.more calls the plain text that ships with lmoe."""
LEDGER_FILE = "judged.json"
"""Beside the studies: how often rows have judged."""
MEAN = "mean"
"""What tuning calls the mean over domains of the validation loss."""


@dataclass(slots=True, kw_only=True)
class ArmConfig:
    """One way of fine-tuning."""

    title: str = ""
    """In tables and pictures; "": its name."""
    overrides: list[str] = field(default_factory=list)
    """Settings of its runs, as on the command line of lmoe train."""
    space: dict[str, Any] = field(default_factory=dict)
    """Values to try, as study.space, in place of its values for the same key."""
    seed_offset: int = 0
    """Added to every seed, so that the same arm under two names (A/A) is trained twice."""
    apart: bool = False
    """One run for each domain of the rows, on its rows alone; judged behind a classifier of prompts."""


@dataclass(slots=True, kw_only=True)
class TuningConfig:
    """How the values of each arm are chosen: by the validation rows, each arm with the same number of tries."""

    seeds: list[int] = field(default_factory=lambda: [100, 101])
    """Seeds of the runs of each try, at least two; none of them judges."""
    sampler: Sampler = Sampler.grid
    """grid: every combination of the values; tpe: Optuna's TPE between the least and the largest value of each key."""
    tries: int | None = None
    """Tries of each arm with sampler=tpe; null: as many as the grid has points."""
    metric: str = MEAN
    """What is made small: mean (over domains of val/<domain>/loss), or a metric of docs/METRICS.md that a validation
    logs, such as val/loss."""
    at_edge: AtEdge = AtEdge.widen
    """Where the best value of an arm is the first or the last one of its grid. widen: all arms try one more value on
    that side, twice at most; report: nothing, and the verdict on that arm is edge."""
    prune: bool = False
    """With sampler=tpe: end runs that fall behind the median, once their last phase has begun."""


@dataclass(slots=True, kw_only=True)
class JudgingConfig:
    """How the arms are compared, with the values that tuning has chosen."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    """Seeds of the runs that are judged; below three there is no verdict."""
    rows_per_domain: int = 0
    """Judging rows of each domain, the first ones; 0: all."""
    domains: list[str] | None = None
    """Domains of the judging rows whose mean is compared; null: all."""
    more: dict[str, str] = field(default_factory=dict)
    """More rows to judge, by the domain that they are to be called: file or folder, or bundled_text (plain text that
    ships with lmoe). They are compared by domain alone, and count in no mean."""
    margin: float = 0.01
    """Arms are equivalent within this difference, in nats."""
    alpha: float = 0.05
    """Rate of false alarms of the whole family of comparisons; intervals have the level 1 - alpha."""
    resamples: int = 2000
    """Draws of the bootstrap beside each interval."""
    batch_size: int = 16
    """Rows in a batch."""


@dataclass(slots=True, kw_only=True)
class LongerConfig:
    """The best arms again, with longer runs."""

    arms: int = 0
    """How many, by their judged loss, and the baseline with them; 0: none."""
    times: int = 4
    """Factor of trainer.max_steps, or of trainer.max_epochs."""


@dataclass(slots=True, kw_only=True)
class TimingConfig:
    """Seconds a step of each arm, alone, the arms in turns, after the runs."""

    steps: int = 8
    """Optimizer steps that are timed in a turn; 0: nothing is timed."""
    repeats: int = 3
    """Turns of each arm."""


@dataclass(slots=True, kw_only=True)
class StudyConfig:
    """A question, the arms that answer it, and how they are tuned and judged."""

    name: str = ""
    """Of the study and its folder, outputs/study/<name>; a file of conf/study/ has its own."""
    question: str = ""
    """What is asked, in a sentence, for the head of the result."""
    baseline: str = ""
    """Arm that the others are compared with."""
    common: list[str] = field(default_factory=list)
    """Settings of the runs of all arms, which those of the command line and of an arm come behind."""
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    """By name."""
    space: dict[str, Any] = field(default_factory=dict)
    """Values to try, by section and key of a run, such as {optim: {lr: [0.001, 0.002]}}; empty: nothing is tuned."""
    tuning: TuningConfig = field(default_factory=TuningConfig)
    judging: JudgingConfig = field(default_factory=JudgingConfig)
    longer: LongerConfig = field(default_factory=LongerConfig)
    timing: TimingConfig = field(default_factory=TimingConfig)
    max_time: str | None = None
    """Answer as well as can be within this wall time of each start (days:hours:minutes:seconds): time for judging with
    three seeds is kept, what is left goes into tuning; null: no limit."""


@dataclass(slots=True, kw_only=True)
class StudyFile:
    """What conf/study.yaml holds."""

    study: StudyConfig = field(default_factory=StudyConfig)
