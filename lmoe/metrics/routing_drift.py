"""How far routing has moved from an earlier state of the same model, over the same tokens.

Shapes: B rows (or packed sequences) of T tokens, N = B * T, S sites, E experts.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lmoe.metrics.site_stack import SiteDecision, places_of, stacked_masks, stacked_sites


class SiteDrift(NamedTuple):
    """What has changed at one site, over valid tokens.

    Args:
        changed_sets: share of the tokens whose set of chosen experts is another one. None: the router uses every expert
            for every token, so that there is nothing to change.
        kl: mean of KL(start || now) = sum_e p_e ln(p_e / q_e) in nats, p the router's distribution then, q now.
    """

    changed_sets: float | None
    kl: float


class RoutingDrift(Metric):
    """Changed sets of experts, and KL(start || now) of the routers' distributions, by site.

    The distribution is a Routing's `probs`: the softmax with its temperature, of a sigmoid or relu router its scores
    made to sum to 1 (relu without an active expert: 1 / E). Probabilities below the smallest normal float32 (1.2e-38)
    count as that, so that the KL is finite: an expert that a relu router has switched off for a token adds about 87
    nats times its earlier probability. An expert is chosen where its assignment is above 0. Tokens on which no expert
    acts do not count.

    Args:
        num_experts: E of each site, by site name, in order.
        uses_all: sites whose router uses every expert for every token, also where its probability underflows to 0.
    """

    full_state_update = False
    changed_sum: Tensor
    kl_sum: Tensor
    tokens: Tensor

    def __init__(self, num_experts: dict[str, int], uses_all: Collection[str] = ()) -> None:
        super().__init__(sync_on_compute=False)  # every rank validates all rows
        self.num_experts, self.uses_all = dict(num_experts), frozenset(uses_all)
        self._index = {site: i for i, site in enumerate(num_experts)}
        for name in ("changed_sum", "kl_sum", "tokens"):
            self.add_state(name, torch.zeros(len(num_experts), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, start: Mapping[str, SiteDecision], now: Mapping[str, SiteDecision], valid: Tensor) -> None:
        """Add one batch.

        Args:
            start: Routing of every site in the earlier state, by site name.
            now: of the same tokens at present.
            valid: (B, T) bool, False for padding.

        Raises:
            ValueError: a site is missing, unknown or has other experts or tokens.
        """
        groups = zip(self._stacked(start, valid), self._stacked(now, valid), strict=True)
        for (sites, p_SNE, then_SNE), (_, q_SNE, now_SNE) in groups:
            where = places_of(sites, self._index)
            both = [stacked_masks([routing[site].acting for site in sites], valid) for routing in (start, now)]
            counted_SN = both[0] & both[1]
            changed_SN = ((then_SNE > 0) != (now_SNE > 0)).any(-1) & counted_SN
            self.changed_sum[where] += changed_SN.sum(-1)
            self.kl_sum[where] += _divergence(_counted(p_SNE, counted_SN), _counted(q_SNE, counted_SN)).sum(-1)
            self.tokens[where] += counted_SN.sum(-1)

    def _stacked(
        self, routing: Mapping[str, SiteDecision], valid: Tensor
    ) -> Iterator[tuple[list[str], Tensor, Tensor]]:
        """(names, probs, assignment), each (S, N, E), in the order of num_experts whatever that of the mapping is."""
        ordered = dict(sorted(routing.items(), key=lambda item: self._index.get(item[0], -1)))
        groups = zip(
            stacked_sites({site: r.probs for site, r in ordered.items()}, self.num_experts, valid),
            stacked_sites({site: r.assignment for site, r in ordered.items()}, self.num_experts, valid),
            strict=True,
        )
        for (sites, p_SNE), (_, a_SNE) in groups:
            yield sites, p_SNE, a_SNE

    def compute(self) -> dict[str, SiteDrift]:
        """The drift so far, by site; sites without tokens are left out."""
        sums = zip(self.num_experts, self.changed_sum.tolist(), self.kl_sum.tolist(), self.tokens.tolist(), strict=True)
        return {
            site: SiteDrift(None if site in self.uses_all else changed / tokens, kl / tokens)
            for site, changed, kl, tokens in sums
            if tokens
        }


def _counted(p_SNE: Tensor, counted_SN: Tensor) -> Tensor:
    """The distributions in float64, above 0; tokens that do not count, and may hold anything, have the uniform one."""
    kept_SNE = torch.where(counted_SN.unsqueeze(-1), p_SNE, 1).double().clamp(min=torch.finfo(torch.float32).tiny)
    return kept_SNE / kept_SNE.sum(-1, keepdim=True)  # of float32 they sum to 1 but for 1e-7, more than a small KL


def _divergence(p_SNE: Tensor, q_SNE: Tensor) -> Tensor:
    """(S, N) sum_e p_e ln(p_e / q_e)."""
    return (p_SNE * (p_SNE.log() - q_SNE.log())).sum(-1)
