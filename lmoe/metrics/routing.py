"""Routing statistics of every site, from sums that add up over batches and ranks.

Shapes: S sites, E experts (the most of any site; sites with fewer leave the rest at 0), M domains.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

DEAD_SHARE = 0.01


class SiteRouting(NamedTuple):
    """Statistics of one site over valid tokens.

    Args:
        load: share of all assignments that each expert got; sums to 1.
        entropy: mean over tokens of the entropy of p, over ln E: 0 certain, 1 undecided.
        effective: mean over tokens of (sum_e w_e)^2 / sum_e w_e^2: how many experts share a token.
    """

    load: list[float]
    entropy: float
    effective: float

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


class RoutingStats(Metric):
    """Load, entropy and effective experts of each site, and load by domain.

    Args:
        num_experts: E of each site, by site name, in order.
        domains: names, in the order of the domain ids.
    """

    full_state_update = False
    load_sum: Tensor
    entropy_sum: Tensor
    effective_sum: Tensor
    tokens: Tensor

    def __init__(self, num_experts: dict[str, int], domains: list[str]) -> None:
        super().__init__()
        self.num_experts, self.domains = dict(num_experts), list(domains)
        self._index = {site: i for i, site in enumerate(num_experts)}
        shape = (len(domains), len(num_experts), max(num_experts.values()))
        self.add_state("load_sum", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("entropy_sum", torch.zeros(len(num_experts), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("effective_sum", torch.zeros(len(num_experts), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(len(num_experts), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, site: str, probs: Tensor, routing_weights: Tensor, assignment: Tensor, valid: Tensor, domain_ids: Tensor
    ) -> None:
        """Add one site's routing of one batch.

        Args:
            site: name.
            probs, routing_weights, assignment: (B, T, E) as a Routing holds them.
            valid: (B, T) bool, False for padding.
            domain_ids: (B, T) domain of each token.
        """
        index, mask = self._index[site], valid.reshape(-1)
        p_NE = probs.detach().reshape(mask.numel(), -1).float()
        w_NE = routing_weights.detach().reshape(mask.numel(), -1).float()
        a_NE = assignment.detach().reshape(mask.numel(), -1).double()
        experts = p_NE.shape[-1]
        counted = mask.double()
        self.load_sum[:, index, :experts].index_add_(0, domain_ids.reshape(-1), a_NE * counted[:, None])
        if experts > 1:
            self.entropy_sum[index] += counted @ torch.special.entr(p_NE).sum(-1).double() / math.log(experts)
        spread = w_NE.sum(-1).square() / w_NE.square().sum(-1).clamp(min=1e-12)
        self.effective_sum[index] += counted @ spread.double()
        self.tokens[index] += counted.sum()

    def compute(self) -> dict[str, SiteRouting]:
        """Statistics by site; sites without tokens are left out."""
        loads = self.load_sum.sum(0).tolist()
        sums = zip(
            self.num_experts.items(),
            loads,
            self.entropy_sum.tolist(),
            self.effective_sum.tolist(),
            self.tokens.tolist(),
            strict=True,
        )
        return {
            site: SiteRouting(
                load=[value / tokens for value in load[:experts]],
                entropy=entropy / tokens,
                effective=effective / tokens,
            )
            for (site, experts), load, entropy, effective, tokens in sums
            if tokens
        }

    def load_by_domain(self) -> dict[str, dict[str, list[float]]]:
        """{domain: {site: load of each expert}}; domains without tokens are left out."""
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
        "routing/effective": sum(v.effective for v in values) / len(values),
    }


def routing_rows(sites: dict[str, SiteRouting]) -> dict[str, float]:
    """routing/<site>/load/<e> and the four statistics of each site."""
    rows: dict[str, float] = {}
    for site, value in sites.items():
        rows.update({f"routing/{site}/load/{e}": share for e, share in enumerate(value.load)})
        rows[f"routing/{site}/entropy"] = value.entropy
        rows[f"routing/{site}/cv"] = value.cv
        rows[f"routing/{site}/max_vio"] = value.max_vio
        rows[f"routing/{site}/effective"] = value.effective
    return rows
