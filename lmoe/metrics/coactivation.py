"""Which experts answer together.

Shapes: B rows (or packed sequences) of T tokens, N = B * T, S sites, E experts (the most of any site; sites with fewer
leave the rest at 0).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lmoe.metrics.site_stack import stacked_sites
from lmoe.metrics.whole_result import WholeResult

FEW = 64
"""From so many times the pairs that a token uses on, the product of all experts with all takes longer than counting."""


class SiteCoactivation(NamedTuple):
    """Pairs of experts at one site, over valid tokens.

    Args:
        share: E lists of E: share of the tokens that use both i and j; on the diagonal, that use i. Symmetric.
    """

    share: list[list[float]]

    @property
    def conditional(self) -> list[list[float]]:
        """P(j | i) = N_ij / N_i: share of the tokens of i that use j too (OLMoE, 2409.02060, section 5.2).

        Row i is 0 where no token uses i; else its diagonal is 1.
        """
        return [[both / row[i] if row[i] else 0.0 for both in row] for i, row in enumerate(self.share)]


def _pairs(used_SNE: Tensor) -> Tensor:
    """(S, E, E) how many tokens use each pair.

    Args:
        used_SNE: 1 where a token uses an expert, else 0.
    """
    sites, _, experts = used_SNE.shape
    most = int(used_SNE.sum(-1).max()) if used_SNE.numel() else 0
    if FEW * most**2 > experts**2:
        return torch.matmul(used_SNE.mT, used_SNE)
    # K of E experts make K^2 pairs of a token, where the product takes E^2.
    used_SNK, expert_SNK = used_SNE.topk(most, dim=-1)
    both = used_SNK.unsqueeze(-1) * used_SNK.unsqueeze(-2)
    place = expert_SNK.unsqueeze(-1) * experts + expert_SNK.unsqueeze(-2)
    sums = used_SNE.new_zeros(sites, experts**2).scatter_add_(1, place.flatten(1), both.flatten(1))
    return sums.unflatten(1, (experts, experts))


class Coactivation(WholeResult):
    """share_ij = (1 / N) sum_t [a_ti > 0] [a_tj > 0] of each site.

    An expert is used where its assignment is above 0. With top_k that is the K chosen experts: the diagonal sums to K,
    and with K = 1 the rest is 0. A soft router uses every expert for every token, so all entries are 1.

    Args:
        num_experts: E of each site, by site name, in order.
    """

    full_state_update = False
    pair_sum: Tensor
    tokens: Tensor

    def __init__(self, num_experts: dict[str, int]) -> None:
        super().__init__()
        self.num_experts = dict(num_experts)
        self._index = {site: i for i, site in enumerate(num_experts)}
        sites, experts = len(num_experts), max(num_experts.values())
        self.add_state("pair_sum", torch.zeros(sites, experts, experts, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, assignment: Mapping[str, Tensor], valid: Tensor) -> None:
        """Add one batch.

        Args:
            assignment: (B, T, E) of every site, as a Routing holds it, by site name.
            valid: (B, T) bool, False for padding.

        Raises:
            ValueError: a site is missing, unknown or has other experts.
        """
        for sites, a_SNE in stacked_sites(assignment, self.num_experts, valid):
            used_SNE = ((a_SNE > 0) & valid.reshape(-1, 1)).double()
            where, experts = [self._index[site] for site in sites], a_SNE.shape[-1]
            self.pair_sum[where, :experts, :experts] += _pairs(used_SNE)
        self.tokens += valid.sum()

    def compute(self) -> dict[str, SiteCoactivation]:
        """Coactivation of the experts by site; nothing where there was no valid token."""
        tokens = float(self.tokens)
        if not tokens:
            return {}
        return {
            site: SiteCoactivation([[pairs / tokens for pairs in row[:experts]] for row in matrix[:experts]])
            for (site, experts), matrix in zip(self.num_experts.items(), self.pair_sum.tolist(), strict=True)
        }
