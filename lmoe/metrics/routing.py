"""Routing statistics of every site, from sums that add up over batches and ranks.

Shapes: S sites, N tokens, E experts (the most of any site; sites with fewer leave the rest at 0), M domains.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lmoe.metrics.site_stack import SiteDecision, flat_tokens, places_of, shares_of
from lmoe.metrics.whole_result import WholeResult
from lmoe.ops.site_groups import sites_together, stacked
from lmoe.vocabulary import DEAD_SHARE

PROBABILITY_SLACK = 0.02
"""How far from 1 the mean sum of probabilities may be: a bfloat16 router rounds."""


class SiteRouting(NamedTuple):
    """Statistics of one site over valid tokens.

    Args:
        load: share of all assignments that each expert got; sums to 1 (relu: all 0 where no token had an expert).
        entropy: mean over tokens of the entropy of p, over ln E: 0 certain, 1 undecided.
        effective: mean over tokens of (sum_e w_e)^2 / sum_e w_e^2: how many experts share a token.
        importance: sum_t w_te over its sum over the experts (1701.06538, equation 6, here as shares); sums to 1. Empty
            where it was not measured.
        mean_probs: mean_t p_te; sums to 1. Empty where it was not measured.
    """

    load: list[float]
    entropy: float
    effective: float
    importance: Sequence[float] = ()
    mean_probs: Sequence[float] = ()

    @property
    def cv(self) -> float:
        """Coefficient of variation of the load: standard deviation over mean; 0 is balanced (1701.06538)."""
        mean = 1 / len(self.load)
        return math.sqrt(sum((share - mean) ** 2 for share in self.load) / len(self.load)) / mean

    @property
    def max_vio(self) -> float:
        """max_e load_e over the mean load, minus 1; 0 is balanced (2408.15664)."""
        return max(self.load) * len(self.load) - 1

    @property
    def dead(self) -> int:
        """Experts with less than a hundredth of a uniform load."""
        return sum(share < DEAD_SHARE / len(self.load) for share in self.load)

    @property
    def dead_share(self) -> float:
        """dead / E, so that sites with different numbers of experts can be compared."""
        return self.dead / len(self.load)

    @property
    def load_entropy(self) -> float:
        """-sum_e load_e ln load_e, over ln E: 1 balanced, 0 all on one expert; 1 where E = 1, which is balanced."""
        return _entropy(self.load) / math.log(len(self.load)) if len(self.load) > 1 else 1.0

    @property
    def information(self) -> float:
        """What a token tells about its expert: H(mean_t p_t) - mean_t H(p_t), over ln E; 0 where E = 1.

        The mutual information of token and expert (ModuleFormer, 2306.04640, its loss with the sign turned). 0: every
        token has the same p. 1: every token is certain, and the experts are equally probable over the tokens.
        """
        if len(self.mean_probs) < 2:
            return 0.0
        return max(0.0, _entropy(self.mean_probs) / math.log(len(self.mean_probs)) - self.entropy)


def _of_this_process(totals: Tensor) -> Tensor:
    """The totals as they are."""
    return totals


class RoutingStats(WholeResult):
    """Load, importance, entropy and effective experts of each site, and load by domain.

    Args:
        num_experts: E of each site, by site name, in order.
        domains: names, in the order of the domain ids; None: loads are not told apart by domain.
        over_ranks: sums the totals over the processes when computing; for where each of them sees rows of its own.
    """

    full_state_update = False
    load_sum: Tensor
    importance_sum: Tensor
    probs_sum: Tensor
    entropy_sum: Tensor
    effective_sum: Tensor
    tokens: Tensor

    def __init__(
        self,
        num_experts: dict[str, int],
        domains: list[str] | None,
        *,
        over_ranks: Callable[[Tensor], Tensor] = _of_this_process,
    ) -> None:
        super().__init__()
        self._over_ranks = over_ranks
        self.num_experts, self.domains = dict(num_experts), None if domains is None else list(domains)
        self._index = {site: i for i, site in enumerate(num_experts)}
        sites, experts = len(num_experts), max(num_experts.values(), default=0)
        shapes = {
            "load_sum": (1 if domains is None else len(domains), sites, experts),
            "importance_sum": (sites, experts),
            "probs_sum": (sites, experts),
            "entropy_sum": (sites,),
            "effective_sum": (sites,),
            "tokens": (sites,),
        }
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        site: str | Sequence[str],
        probs: Tensor,
        routing_weights: Tensor,
        assignment: Tensor,
        valid: Tensor,
        domain_ids: Tensor,
    ) -> None:
        """Add one batch of one site, or of several sites with the same number of experts.

        Args:
            site: name, or S names.
            probs, routing_weights, assignment: (B, T, E) as a Routing holds them, or (S, B, T, E).
            valid: (B, T) bool, False for padding.
            domain_ids: (B, T) domain of each token.

        Raises:
            ValueError: the routing has another number of sites or tokens than the names and the mask.
        """
        sites = [site] if isinstance(site, str) else list(site)
        p_SNE = flat_tokens(probs, sites, valid).float()
        w_SNE = flat_tokens(routing_weights, sites, valid).float()
        a_SNE = flat_tokens(assignment, sites, valid)
        where, experts = places_of(sites, self._index), p_SNE.shape[-1]
        mask_N = valid.reshape(-1).double()
        self._add_loads(where, a_SNE, mask_N, domain_ids)
        self.importance_sum[where, :experts] += torch.matmul(mask_N, _without_padding(w_SNE, mask_N))
        self.probs_sum[where, :experts] += torch.matmul(mask_N, _without_padding(p_SNE, mask_N))
        if experts > 1:
            # NOTE not torch.special.entr, which is some ten times slower on CPU; p ln p is 0 at p = 0 here too.
            plogp_SNE = p_SNE.clamp(min=torch.finfo(torch.float32).tiny).log_().mul_(p_SNE)
            plogp_SE = torch.matmul(mask_N, _without_padding(plogp_SNE, mask_N))
            self.entropy_sum[where] -= plogp_SE.sum(-1) / math.log(experts)
        least, most = torch.aminmax(w_SNE, dim=-1, keepdim=True)
        # NOTE beside the largest weight, or the squares of small ones would be 0.
        share_SNE = w_SNE / torch.maximum(most, -least).clamp(min=torch.finfo(torch.float32).tiny)
        spread_SN = share_SNE.sum(-1).square() / share_SNE.square_().sum(-1).clamp(min=1)
        self.effective_sum[where] += torch.matmul(_without_padding(spread_SN.unsqueeze(-1), mask_N).squeeze(-1), mask_N)
        self.tokens[where] += mask_N.sum()

    def _add_loads(self, where: slice | list[int], a_SNE: Tensor, mask_N: Tensor, domain_ids: Tensor) -> None:
        """NOTE the data may have many more domains than a batch: only those that are there cost a product."""
        experts = a_SNE.shape[-1]
        if self.domains is None:
            self.load_sum[0, where, :experts] += torch.matmul(mask_N, _without_padding(a_SNE, mask_N))
            return
        there_M, domain_N = domain_ids.reshape(-1).unique(return_inverse=True)
        domain_MN = (torch.nn.functional.one_hot(domain_N, len(there_M)) * mask_N[:, None]).T
        loads_MSE = self.load_sum[there_M]
        loads_MSE[:, where, :experts] += torch.matmul(domain_MN, _without_padding(a_SNE, mask_N)).transpose(0, 1)
        self.load_sum[there_M] = loads_MSE

    def update_all(self, routing: Mapping[str, SiteDecision], valid: Tensor, domain_ids: Tensor) -> None:
        """Add one batch of every site. Sites with the same number of experts are taken together (`sites_together`).

        Args:
            routing: Routing of each site, by site name, as RoutingTrace.routing.
            valid: (B, T) bool, False for padding.
            domain_ids: (B, T) domain of each token.
        """
        for sites in sites_together({site: r.probs for site, r in routing.items()}):
            group = [routing[site] for site in sites]
            self.update(
                sites,
                stacked([r.probs for r in group]),
                stacked([r.routing_weights for r in group]),
                stacked([r.assignment for r in group]),
                valid,
                domain_ids,
            )

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the sums of another one of the same sites and domains, or a saved `metric_state`; without domains also
        one with them, as checkpoints of earlier versions hold it."""
        if self.domains is None and isinstance(incoming_state, dict):
            incoming_state = incoming_state | {"load_sum": incoming_state["load_sum"].sum(0, keepdim=True)}
        super().merge_state(incoming_state)
        self._update_count += 1  # NOTE the library counts updates only

    def compute(self) -> dict[str, SiteRouting]:
        """Statistics by site; sites without tokens are left out.

        Raises:
            ValueError: probabilities that did not sum to 1.
        """
        result = {}
        for (site, experts), row in zip(self.num_experts.items(), self._totals(), strict=True):
            *sums, entropy, effective, tokens = row
            if not tokens:
                continue
            widest = len(sums) // 3
            load, importance, probs = (sums[start : start + experts] for start in (0, widest, 2 * widest))
            _check_probabilities(site, sum(probs) / tokens)
            result[site] = SiteRouting(
                load=shares_of(load),
                entropy=entropy / tokens,
                effective=effective / tokens,
                importance=shares_of(importance),
                mean_probs=[value / tokens for value in probs],
            )
        return result

    def _totals(self) -> list[list[float]]:
        """Sums over all processes, a row of 3 E + 3 numbers for each site: load, importance and probabilities of each
        expert, entropy, effective experts, tokens. NOTE brought together and read from the device once.
        """
        by_expert = (self.load_sum.sum(0), self.importance_sum, self.probs_sum)
        of_site = (self.entropy_sum, self.effective_sum, self.tokens)
        return self._over_ranks(torch.cat([*by_expert, *(values.unsqueeze(1) for values in of_site)], 1)).tolist()

    def load_by_domain(self) -> dict[str, dict[str, list[float]]]:
        """{domain: {site: load of each expert}}; domains without tokens are left out."""
        assert self.domains is not None
        result: dict[str, dict[str, list[float]]] = {}
        for name, by_site in zip(self.domains, self.load_sum.tolist(), strict=True):
            for (site, experts), counts in zip(self.num_experts.items(), by_site, strict=True):
                if total := sum(counts):
                    result.setdefault(name, {})[site] = [count / total for count in counts[:experts]]
        return result


def routing_summary(sites: dict[str, SiteRouting]) -> dict[str, float]:
    """Means over sites (dead: the sum), under the metric names of docs/METRICS.md."""
    values = list(sites.values())
    if not values:
        return {}
    return {
        "routing/entropy": sum(v.entropy for v in values) / len(values),
        "routing/cv": sum(v.cv for v in values) / len(values),
        "routing/max_vio": sum(v.max_vio for v in values) / len(values),
        "routing/dead": float(sum(v.dead for v in values)),
        "routing/dead_share": sum(v.dead_share for v in values) / len(values),
        "routing/effective": sum(v.effective for v in values) / len(values),
        "routing/load_entropy": sum(v.load_entropy for v in values) / len(values),
        "routing/information": sum(v.information for v in values) / len(values),
    }


def routing_rows(sites: dict[str, SiteRouting]) -> dict[str, float]:
    """routing/<site>/load/<e>, routing/<site>/importance/<e> and the six statistics of each site."""
    rows: dict[str, float] = {}
    for site, value in sites.items():
        rows.update({f"routing/{site}/load/{e}": share for e, share in enumerate(value.load)})
        rows.update({f"routing/{site}/importance/{e}": share for e, share in enumerate(value.importance)})
        rows[f"routing/{site}/entropy"] = value.entropy
        rows[f"routing/{site}/cv"] = value.cv
        rows[f"routing/{site}/max_vio"] = value.max_vio
        rows[f"routing/{site}/effective"] = value.effective
        rows[f"routing/{site}/load_entropy"] = value.load_entropy
        rows[f"routing/{site}/information"] = value.information
    return rows


def _check_probabilities(site: str, total: float) -> None:
    """Refuse what are no probabilities.

    Args:
        site: for the message.
        total: sum over the experts, on average.

    Raises:
        ValueError: it is not 1.
    """
    if abs(total - 1) > PROBABILITY_SLACK:
        raise ValueError(
            f"{site}: the probabilities of a token sum to {total:.4g} on average, must sum to 1; give the "
            "router's probabilities (a Routing's probs), not its logits, scores or weights"
        )


def _without_padding(values_SNE: Tensor, mask_N: Tensor) -> Tensor:
    """A copy in float64 that is 0 on padding, which may hold NaN: 0 * NaN is NaN."""
    return values_SNE.to(torch.float64, copy=True).masked_fill_((mask_N == 0).unsqueeze(-1), 0)


def _entropy(shares: Sequence[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)
