"""What routers were taught, and what they choose for validation rows, as plain numbers that outlive the model."""

from dataclasses import dataclass, field

WITHOUT_TARGET = {"domain": "not trained", "cluster": "no cluster"}
"""How a domain is marked whose rows have no target, by what the targets are."""


@dataclass(slots=True, kw_only=True)
class TargetReport:
    """Choices of the routers in one pass over rows; shares are of rows, mean over sites."""

    kind: str
    """What the targets are: domain or cluster."""
    targets: list[str]
    """Names of the targets, in their order."""
    sites: int
    """Routers that chose."""
    rows: list[int]
    """Rows of each target."""
    chosen: list[list[float]]
    """For each target the share of its rows for which each target was chosen; zeros without rows."""
    untrained: list[str] = field(default_factory=list)
    """Domains with rows that have no target."""
    untrained_rows: list[int] = field(default_factory=list)
    """Their rows."""
    untrained_chosen: list[list[float]] = field(default_factory=list)
    """For each of them the share of its rows for which each target was chosen."""
    accuracy: float | None = None
    """Share of the rows with a target whose target was chosen; None: there is no such row."""
    loss: float | None = None
    """Their mean cross-entropy in nats; None: there is no such row."""
    agreement: float | None = None
    """Adjusted mutual information of the rows' domains and the experts with most of their routing weight; None: rows
    of one domain."""
    domains: list[str] = field(default_factory=list)
    """Domains of the training rows, where clusters are the targets."""
    cluster_rows: list[list[int]] = field(default_factory=list)
    """For each of them its training rows in each cluster."""
    cluster_agreement: float | None = None
    """Adjusted mutual information of clusters and domains, over training rows; None: these are of one domain."""

    @property
    def largest(self) -> float | None:
        """Accuracy of always choosing the target with most rows; None without rows that have a target."""
        total = sum(self.rows)
        return max(self.rows) / total if total else None

    @property
    def labels(self) -> list[str]:
        """Names of the rows of the whole table: the targets, then the domains that none is."""
        return [*self.targets, *(f"{name} ({WITHOUT_TARGET[self.kind]})" for name in self.untrained)]

    @property
    def table(self) -> list[list[float]]:
        """The choices of all of them."""
        return [*self.chosen, *self.untrained_chosen]

    @property
    def counts(self) -> list[int]:
        """The rows of all of them."""
        return [*self.rows, *self.untrained_rows]

    def right(self, target: int) -> float | None:
        """Share of a target's rows for which it was chosen; None without rows."""
        return self.chosen[target][target] if self.rows[target] else None

    def most_other(self, label: int) -> int | None:
        """The target that is chosen most for the rows of a label, its own aside; None: no other is."""
        others = {c: share for c, share in enumerate(self.table[label]) if c != label and share > 0}
        return max(others, key=lambda c: others[c], default=None)
