"""What a finished run has to say about itself, as plain numbers that outlive the model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lmoe.errors import CheckpointError
from lmoe.files.small_file import Reader
from lmoe.files.wording import LONGEST_REASON, shown
from lmoe.report.files import write_bytes
from lmoe.report.targets import TargetReport
from lmoe.vocabulary import NATS

SUMMARY = Reader(most=2**30, what="it", finite=False, cure="it is no summary of a run")

FINISHED = "all steps done"
"""Why a run ends that nothing ended before."""
TIME_OVER = "trainer.max_time was over"
"""Why a run ends that goes on when it is resumed."""


@dataclass(slots=True, kw_only=True)
class RunSummary:
    """The end of a run. Losses are validation losses, in what the objective of its phase measures."""

    name: str
    """Name of the run."""
    run_dir: str
    """The run directory, as the user would type it."""
    domains: list[str]
    """Domains in the order in which tables and pictures show them."""
    before: dict[str, float]
    """Domain -> loss with the adapters off; domains that were not measured are left out."""
    after: dict[str, float]
    """Domain -> loss at the end."""
    site_load: dict[str, list[float]]
    """Site -> share of assignments of each expert; sums to 1. Sites may differ in their number of experts."""
    domain_load: dict[str, dict[str, list[float]]]
    """Domain -> site -> share of assignments of each expert."""
    phases: dict[str, int]
    """Phase -> its first optimizer step, in order."""
    max_steps: int
    """Length of the run in optimizer steps."""
    seconds: float
    """Wall-clock time of the run."""
    peak_memory_mb: float | None
    """Peak memory in MB; None: not measured."""
    trainable_parameters: int
    """Number of parameters that some phase trains."""
    backbone: str
    """Hub name or directory of the backbone."""
    collapsed: list[str]
    """Collapse warnings, each naming the site and what to change."""
    coactivation: dict[str, list[list[float]]] = field(default_factory=dict)
    """Site -> row i: share of the tokens of expert i that use j too; 1 for j = i, and 0 where no token uses i."""
    knock_out: dict[str, dict[str, float]] = field(default_factory=dict)
    """Silenced expert, as <site>/<e> or "all sites/<e>" -> domain -> change of its loss."""
    specialisation: dict[str, str | None] = field(default_factory=dict)
    """Silenced expert -> the domain whose loss rises most without it; None: no domain's does."""

    expert_names: list[str] = field(default_factory=list)
    """Names of the experts in their order; empty where they have none."""
    steps: int | None = None
    """Optimizer steps done; None: not recorded, by a version that did not yet."""
    ended: str = FINISHED
    """Why the run ended."""
    loss_title: str = "Validation loss"
    """How the objective calls its validation loss."""
    loss_measure: str = NATS
    """What the objective measures it in."""
    loss_unit: str = "label token"
    """What one loss belongs to, such as a pair."""
    phase_measures: dict[str, str] = field(default_factory=dict)
    """Phase -> what its objective measures; empty: what loss_measure says, in all phases."""
    metric_names: list[str] = field(default_factory=list)
    """Names of the metrics that the objective logs in a validation; empty: not recorded."""
    targets: TargetReport | None = None
    """What routers chose of what they are taught; None: they are taught nothing."""
    sites_of_one_router: int | None = None
    """With one router for the whole model: at how many sites its experts are; None: each site has a router."""

    @property
    def before_mean(self) -> float | None:
        """Mean of `before` over the measured domains; None without any."""
        return _mean(self.before, self.domains)

    @property
    def after_mean(self) -> float | None:
        """Mean of `after` over the measured domains; None without any."""
        return _mean(self.after, self.domains)

    @property
    def measures_differ(self) -> bool:
        """Whether phases measure different things, which cannot be compared."""
        return len(set(self.phase_measures.values())) > 1

    @property
    def last_phase(self) -> str | None:
        """The phase in which the run ended, whose objective the losses are of; None: no phases are known."""
        done = self.max_steps if self.steps is None else self.steps
        begun = [name for name, start in self.phases.items() if start < max(done, 1)]
        return begun[-1] if begun else None

    def expert_label(self, expert: int) -> str:
        """How tables call an expert: its number, and its name where it has one."""
        return f"{expert} {self.expert_names[expert]}" if expert < len(self.expert_names) else str(expert)

    def to_json(self, path: Path) -> Path:
        """Write the summary.

        Raises:
            TrainingError: the file cannot be written.
        """
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        return write_bytes(Path(path), (text + "\n").encode("utf-8"))

    @classmethod
    def from_json(cls, path: Path) -> "RunSummary":
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: no such file, not JSON, or keys that are missing or unknown.
        """
        return cls.from_content(SUMMARY.json(Path(path)), path)

    @classmethod
    def from_content(cls, content: Mapping[str, Any], path: Path, *, pass_over_unknown: bool = False) -> "RunSummary":
        """The summary in the content of a JSON file.

        Args:
            path: of the file, for messages.
            pass_over_unknown: leave out keys that this version does not know, for whoever knows what the losses are of.

        Raises:
            CheckpointError: keys that are missing or unknown.
        """
        if pass_over_unknown:
            content = _known(cls, content)
            if isinstance(content.get("targets"), dict):
                content = {**content, "targets": _known(TargetReport, content["targets"])}
        expected = {f.name for f in fields(cls)}
        optional = {f.name for f in fields(cls) if f.default_factory is not MISSING or f.default is not MISSING}
        if problems := sorted((expected - optional - content.keys()) | (content.keys() - expected)):
            named = ", ".join(f"{shown(key)} ({'missing' if key in expected else 'unknown'})" for key in problems)
            raise CheckpointError(
                f"{path} is no summary of a run that this version reads: {shown(named, longest=LONGEST_REASON)}"
            )
        return cls(**{**content, "targets": cls._targets(path, content.get("targets"))})

    @staticmethod
    def _targets(path: Path, content: object) -> TargetReport | None:
        """The part about targets.

        Raises:
            CheckpointError: it is none.
        """
        if content is None:
            return None
        try:
            return TargetReport(**content)  # type: ignore[arg-type]
        except TypeError:
            raise CheckpointError(f"{path} is no summary of a run that this version reads: targets") from None


def _known(schema: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """What of a mapping a dataclass has a field for."""
    names = {f.name for f in fields(schema)}
    return {key: value for key, value in content.items() if key in names}


def _mean(losses: Mapping[str, float], domains: Sequence[str]) -> float | None:
    measured = [losses[domain] for domain in domains if domain in losses]
    return sum(measured) / len(measured) if measured else None
