"""Whether routers choose for held-out rows what they are taught."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

from lmoe.config.moe import MoeConfig
from lmoe.injection.batch_info import row_targets
from lmoe.injection.record import injected
from lmoe.layers.routing import Routing
from lmoe.metrics.target_choice import TargetChoice
from lmoe.report.targets import TargetReport
from lmoe.rules.routers import target_count


@dataclass(slots=True, frozen=True)
class TargetEvaluation:
    """What routers choose in a pass over rows.

    Args:
        moe: section of the model, with the names of the targets.
        domains: names, in the order of the batches' domain ids.
        choice: filled with the choices.
    """

    moe: MoeConfig
    domains: list[str]
    choice: TargetChoice

    @classmethod
    def of(cls, model: nn.Module, domains: Sequence[str], device: torch.device) -> "TargetEvaluation | None":
        """An empty one for the routers of a model; None where they are taught nothing."""
        record = injected(model)
        if not target_count(record.moe):
            return None
        names = list(record.moe.domains or [])
        choice = TargetChoice(record.plan.routers, names, domains).to(device)
        return cls(record.moe, list(domains), choice)

    def update(self, routing: dict[str, Routing], batch: dict[str, Tensor]) -> None:
        """Add one batch."""
        targets = row_targets(self.moe, batch, self.domains)
        self.choice.update(routing, targets, batch["valid_mask"], batch["row_ids"], batch["domain_ids"])

    def report(self) -> TargetReport:
        """The choices for the report, means over sites."""
        found = self.choice.compute()
        shares, count = found.mean_shares(), len(found.targets)
        accuracy, losses, agreement = found.accuracy(), found.losses(), self.choice.agreement()
        others = [(name, count + d) for d, name in enumerate(found.domains) if found.rows[count + d]]
        return TargetReport(
            kind=str(self.moe.router_target),
            targets=found.targets,
            sites=len(found.sites),
            rows=found.rows[:count],
            chosen=shares[:count],
            untrained=[name for name, _ in others],
            untrained_rows=[found.rows[label] for _, label in others],
            untrained_chosen=[shares[label] for _, label in others],
            accuracy=fmean(accuracy.values()) if accuracy else None,
            loss=fmean(losses.values()) if losses else None,
            agreement=fmean(agreement.values()) if agreement else None,
        )

    def by_site(self) -> dict[str, dict[str, float]]:
        """Values of each site, by the last part of their metric names."""
        found = self.choice.compute()
        return {"target_accuracy": found.accuracy(), "target_loss": found.losses()}
