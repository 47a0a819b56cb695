"""What one pass over the validation rows measures."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmoe.injection.record import injected, mixtures
from lmoe.layers.routing import Routing
from lmoe.metrics.coactivation import Coactivation
from lmoe.metrics.knock_out import ALL_SITES, KnockOutTable, Silenced, knock_out_table
from lmoe.metrics.routing import RoutingStats
from lmoe.metrics.saturation import Choices, ChosenExperts, routing_saturation
from lmoe.metrics.specialisation import DomainSpecialisation, specialisation_rows, specialisation_summary
from lmoe.ops.expert_similarity import mean_expert_cosine
from lmoe.training.preference_evaluation import PreferenceEvaluation
from lmoe.training.sample_rows import SampleRows
from lmoe.training.site_metrics import site_metrics
from lmoe.training.target_evaluation import TargetEvaluation
from lmoe.vocabulary import KnockOut


@dataclass(slots=True, frozen=True)
class RoutingEvaluation:
    """Routing metrics of a pass.

    Args:
        stats: load, importance, entropies.
        specialisation: mutual information of domain and expert.
        coactivation: which experts work together.
        chosen: the experts of every token.
        targets: what they choose of what they are taught; None: they are taught nothing.
        pairs: how answers that are compared are routed; filled where batches mark them; None: not measured.
        at_start: routes a batch as the model did when the phase began; None: nothing keeps that.
        rows: gathers the tokens of some rows with their routing; None: nobody shows them.
    """

    stats: RoutingStats
    specialisation: DomainSpecialisation
    coactivation: Coactivation
    chosen: ChosenExperts
    targets: TargetEvaluation | None
    pairs: PreferenceEvaluation | None = None
    at_start: Callable[[dict[str, Tensor]], dict[str, Routing]] | None = None
    rows: SampleRows | None = None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        domains: list[str],
        device: torch.device,
        permutations: int,
        at_start: Callable[[dict[str, Tensor]], dict[str, Routing]] | None = None,
        rows: SampleRows | None = None,
    ) -> "RoutingEvaluation":
        """Empty metrics for the routers of a model."""
        experts = injected(model).plan.routers
        return cls(
            RoutingStats(experts, domains).to(device),
            DomainSpecialisation(experts, domains, permutations=permutations).to(device),
            Coactivation(experts).to(device),
            ChosenExperts(experts).to(device),
            TargetEvaluation.of(model, domains, device),
            PreferenceEvaluation.of(model, device),
            at_start,
            rows,
        )

    def update(self, routing: dict[str, Routing], batch: dict[str, Tensor]) -> None:
        """Add one batch."""
        valid, assignment = batch["valid_mask"], {site: r.assignment for site, r in routing.items()}
        self.stats.update_all(routing, valid, batch["domain_ids"])
        self.specialisation.update(assignment, valid, batch["row_ids"], batch["domain_ids"])
        self.coactivation.update(assignment, valid)
        self.chosen.update(assignment, valid)
        if self.rows is not None:
            self.rows.update(routing, batch)
        if self.targets is not None:
            self.targets.update(routing, batch)
        if self.pairs is not None and "answer_mask" in batch:
            self.pairs.update(routing, batch)
            if self.at_start is not None:
                now = dict(routing)  # the next forward's takes its place
                self.pairs.update_drift(self.at_start(batch), now, batch)


def specialisation_metrics(evaluation: RoutingEvaluation, earlier: Choices | None) -> dict[str, float]:
    """val/routing/… of domain information, and of saturation where an earlier pass is known."""
    found = evaluation.specialisation.compute()
    metrics = specialisation_summary(found) | specialisation_rows(found)
    if earlier is not None:
        metrics |= site_metrics("saturation", routing_saturation(earlier, evaluation.chosen.compute()))
    return metrics


def target_metrics(targets: TargetEvaluation | None) -> dict[str, float]:
    """val/routing/… of what routers are taught, and of each site."""
    metrics: dict[str, float] = {}
    for name, values in ({} if targets is None else targets.by_site()).items():
        metrics |= site_metrics(name, values)
    return metrics


def preference_metrics(pairs: PreferenceEvaluation | None) -> dict[str, float]:
    """val/routing/… of answers that are compared."""
    return {} if pairs is None else pairs.metrics()


@torch.no_grad()
def cosine_metrics(model: nn.Module) -> dict[str, float]:
    """val/routing/expert_cosine, and of each Linear with experts."""
    cosines = {path: float(mean_expert_cosine(*module.factors())) for path, module in mixtures(model)}
    return site_metrics("expert_cosine", cosines)


def knock_out(
    model: nn.Module, intact: dict[str, float], losses: Callable[[], dict[str, float]], mode: KnockOut
) -> KnockOutTable:
    """Change of each domain's loss when one expert is silenced: specialisation by cause.

    Args:
        model: an injected model.
        intact: loss of each domain with nothing silenced.
        losses: measures them over the same rows, as the model is.
        mode: experts: expert e of all sites at once, E passes; sites: of one site at a time, S * E passes.
    """
    record = injected(model)
    experts, passes = record.plan.routers, {}
    if mode is KnockOut.experts:
        for e in range(max(experts.values(), default=0)):
            passes[Silenced(ALL_SITES, e)] = {site: e for site, count in experts.items() if e < count}
    elif mode is KnockOut.sites:
        passes = {Silenced(site, e): {site: e} for site, count in experts.items() for e in range(count)}
    silenced = {}
    for key, one in passes.items():
        with record.context.silence(one):
            silenced[key] = losses()
    return knock_out_table(intact, silenced)


def losses_by_domain(losses: dict[str, float]) -> dict[str, float]:
    """{domain: loss} without the total, of the losses that DomainLoss computes."""
    return {name.removesuffix("/loss"): value for name, value in losses.items() if name.endswith("/loss")}
