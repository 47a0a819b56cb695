"""How preferred and other answers are routed in a pass over validation rows, and how far routing has moved."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected
from lmoe.layers.routing import Routing
from lmoe.metrics.pair_routing import PairRouting, SitePairs
from lmoe.metrics.routing_drift import RoutingDrift, SiteDrift
from lmoe.objectives.objective import Batch, Objective
from lmoe.objectives.preference import PreferenceObjective
from lmoe.rules.routers import ROUTERS, ExpertsPerToken
from lmoe.training.site_metrics import site_metrics


@dataclass(slots=True, frozen=True)
class PreferenceEvaluation:
    """Routing of answers that are preferred and of those that are not.

    Args:
        pairs: overlap of the two answers of a pair, and loads.
        drift: changes since an earlier state of the routers.
    """

    pairs: PairRouting
    drift: RoutingDrift

    @classmethod
    def of(cls, model: PreTrainedModel, device: torch.device) -> "PreferenceEvaluation":
        """An empty one for the routers of a model."""
        record = injected(model)
        experts, router = record.plan.routers, record.moe.router
        uses_all = router is not None and ROUTERS[router].experts_per_token is ExpertsPerToken.all
        drift = RoutingDrift(experts, uses_all=experts if uses_all else ())
        return cls(PairRouting(experts).to(device), drift.to(device))

    def update(self, routing: dict[str, Routing], batch: dict[str, Tensor]) -> None:
        """Add one batch.

        Args:
            routing: Routing of every site, by site name.
            batch: with answer_mask (R, T) bool, tokens of the answers, and of rows that are no pairs good (R,) bool; of
                pairs the first half of the rows are the chosen answers, the second half the rejected ones.
        """
        self.pairs.update(routing, batch["answer_mask"], batch.get("good"))

    def update_drift(self, start: dict[str, Routing], now: dict[str, Routing], batch: dict[str, Tensor]) -> None:
        """Add one batch, seen with the routers of an earlier state and with those of the present one.

        Args:
            start, now: Routing of every site, by site name.
            batch: with valid_mask (R, T) bool, False for padding.
        """
        self.drift.update(start, now, batch["valid_mask"])

    def metrics(self) -> dict[str, float]:
        """val/routing/… of what was measured; nothing where nothing was."""
        pairs = self.pairs.compute() if self.pairs.update_called else {}
        drift = self.drift.compute() if self.drift.update_called else {}
        return pair_metrics(pairs) | drift_metrics(drift)


def routing_at_start(
    model: PreTrainedModel, objective: Objective, domains: Sequence[str]
) -> Callable[[Batch], dict[str, Routing]] | None:
    """Routes a batch with the adapters and routers as they were when the phase began; None: nothing keeps them.

    Args:
        model: injected, in evaluation mode when a batch is routed.
        objective: of the phase.
        domains: names, in the order of the batches' domain ids.
    """
    start = objective.start if isinstance(objective, PreferenceObjective) else None
    if start is None:
        return None
    record = injected(model)

    def routed(batch: Batch) -> dict[str, Routing]:
        with start.in_place(model), batch_info(record, batch, domains), record.trace.recording(batch["valid_mask"]):
            objective.answers(model, batch)  # type: ignore[attr-defined]
        return dict(record.trace.routing)

    return routed


def pair_metrics(sites: Mapping[str, SitePairs]) -> dict[str, float]:
    """val/routing/pair_overlap, load_chosen/<e> and load_rejected/<e>, means over sites, and the same of each site."""
    overlaps = {site: found.overlap for site, found in sites.items() if found.overlap is not None}
    metrics = site_metrics("pair_overlap", overlaps)
    both = {
        "load_chosen": {site: found.load_chosen for site, found in sites.items()},
        "load_rejected": {site: found.load_rejected for site, found in sites.items()},
    }
    for side, loads in both.items():
        for e in range(max(map(len, loads.values()), default=0)):
            metrics |= site_metrics(f"{side}/{e}", {site: load[e] for site, load in loads.items() if e < len(load)})
    return metrics


def drift_metrics(sites: Mapping[str, SiteDrift]) -> dict[str, float]:
    """val/routing/changed_sets and kl_from_start, means over sites, and the same of each site."""
    changed = {site: found.changed_sets for site, found in sites.items() if found.changed_sets is not None}
    divergences = {site: found.kl for site, found in sites.items()}
    return site_metrics("changed_sets", changed) | site_metrics("kl_from_start", divergences)
