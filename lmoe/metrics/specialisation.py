"""Whether experts divide the domains among them: mutual information of domain and expert, beside what chance shows.

Shapes: B rows (or packed sequences) of T tokens, N valid tokens, R rows of the data, S sites, E experts (the most of
any site; sites with fewer leave the rest at 0), M domains, P permutations.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lmoe.metrics.site_stack import stacked_sites
from lmoe.ops.mutual_information import entropy, mutual_information, permuted_information

SAME = 1e-12
"""Nats within which a permuted value counts as the observed one: sums in another order differ in the last bits."""


class SiteSpecialisation(NamedTuple):
    """Mutual information of domain and expert at one site, over valid tokens.

    Args:
        information: I(D; E) of the loads in nats: 0 independent, H(D) where the expert tells the domain.
        bound: min(H(D), ln E), the most that E experts could tell about these domains.
        null: I(D; E) of each of P permutations of the rows' domains.
    """

    information: float
    bound: float
    null: Sequence[float]

    @property
    def null_mean(self) -> float:
        """Mean of the null: what chance shows with this many rows, above 0 and larger the fewer they are."""
        return fmean(self.null)

    @property
    def null_std(self) -> float:
        """Standard deviation of the null."""
        return pstdev(self.null)

    @property
    def excess(self) -> float:
        """information - null_mean: 0 on average where domains do not matter; may be below 0."""
        return self.information - self.null_mean

    @property
    def p_value(self) -> float:
        """(1 + #{null >= information}) / (1 + P), never 0 (Phipson and Smyth, 1603.05766)."""
        return (1 + sum(value >= self.information - SAME for value in self.null)) / (1 + len(self.null))

    @property
    def normalised(self) -> float:
        """information / bound, 0 to 1; 0 where the bound is 0 (one domain, or one expert).

        Kvålseth (Entropy 19(11), 631, 2017) divides by min(H(D), H(E)), the least upper bound of I. Here ln E stands
        for H(E): a collapsed site has H(E) near 0, and few stray tokens would make it look specialised.
        """
        return self.information / self.bound if self.bound > SAME else 0.0

    @property
    def adjusted(self) -> float:
        """excess / (bound - null_mean): 0 on average by chance, 1 at the bound; 0 where no room is left between them.

        The adjustment for chance of Vinh, Epps and Bailey (JMLR 11, 2837, 2010), with the null above for theirs.
        """
        room = self.bound - self.null_mean
        return self.excess / room if room > SAME else 0.0


class DomainSpecialisation(Metric):
    """I(D; E) of each site with a permutation null over rows; keeps the loads of each row.

    The observed values do not depend on the order of the rows. The permutations do: ranks or batches that bring the
    same rows in another order draw other permutations of them.

    Args:
        num_experts: E of each site, by site name, in order.
        domains: names, in the order of the domain ids.
        permutations: P; the smallest p-value is 1 / (1 + P).
        seed: of the permutations.
    """

    full_state_update = False
    row_loads: list[Tensor]
    row_domains: list[Tensor]

    def __init__(self, num_experts: dict[str, int], domains: list[str], permutations: int = 200, seed: int = 0) -> None:
        super().__init__(sync_on_compute=False)  # every rank validates all rows
        if permutations < 1:
            raise ValueError(f"permutations is {permutations}, must be 1 or more; 200 tells p-values down to 0.005")
        self.num_experts, self.domains = dict(num_experts), list(domains)
        self.permutations, self.seed = permutations, seed
        self._index = {site: i for i, site in enumerate(num_experts)}
        self.add_state("row_loads", [], dist_reduce_fx="cat")
        self.add_state("row_domains", [], dist_reduce_fx="cat")

    def update(self, assignment: Mapping[str, Tensor], valid: Tensor, row_ids: Tensor, domain_ids: Tensor) -> None:
        """Add one batch; a row lies in one batch as a whole.

        Args:
            assignment: (B, T, E) of every site, as a Routing holds it, by site name.
            valid: (B, T) bool, False for padding.
            row_ids: (B, T) int64 number of the token's row inside its packed sequence, from 0; all 0 without packing.
            domain_ids: (B, T) domain of each token.

        Raises:
            ValueError: a site is missing, unknown or has other experts, or a row has tokens of several domains.
        """
        kept = valid.reshape(-1)
        sequence = torch.arange(len(valid), device=valid.device)[:, None].expand_as(valid)
        pairs_N2 = torch.stack([sequence.reshape(-1)[kept], row_ids.reshape(-1)[kept]], dim=1)
        rows, row_N = torch.unique(pairs_N2, dim=0, return_inverse=True)
        domain_N = domain_ids.reshape(-1)[kept]
        domains = domain_N.new_zeros(len(rows)).scatter_reduce(0, row_N, domain_N, "amax", include_self=False)
        if bool((domains[row_N] != domain_N).any()):
            raise ValueError(
                "a row has tokens of several domains: row_ids must count the rows inside each packed sequence, and "
                "domain_ids name one domain a row"
            )
        shape = (len(rows), len(self.num_experts), max(self.num_experts.values()))
        loads_RSE = torch.zeros(shape, dtype=torch.float64, device=valid.device)
        for sites, a_SNE in stacked_sites(assignment, self.num_experts, valid):
            kept_NSE = a_SNE[:, kept].double().transpose(0, 1)
            found_RSE = loads_RSE.new_zeros(len(rows), *kept_NSE.shape[1:]).index_add_(0, row_N, kept_NSE)
            loads_RSE[:, [self._index[site] for site in sites], : a_SNE.shape[-1]] = found_RSE
        self.row_loads.append(loads_RSE)
        self.row_domains.append(domains)

    def compute(self) -> dict[str, SiteSpecialisation]:
        """Specialisation of the experts by site; nothing where there was no valid token."""
        if not len(self.row_loads):
            return {}
        loads_RSE, domains_R = dim_zero_cat(self.row_loads), dim_zero_cat(self.row_domains)
        joint_MSE = loads_RSE.new_zeros(len(self.domains), *loads_RSE.shape[1:]).index_add_(0, domains_R, loads_RSE)
        joint_SME = joint_MSE.transpose(0, 1)
        null_PS = permuted_information(loads_RSE, domains_R, len(self.domains), self.permutations, self.seed)
        share_SM = joint_SME.sum(-1)
        share_SM = share_SM / share_SM.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        values = zip(
            self.num_experts.items(),
            mutual_information(joint_SME).tolist(),
            entropy(share_SM).tolist(),
            null_PS.T.tolist(),
            strict=True,
        )
        return {
            site: SiteSpecialisation(information, min(of_domain, math.log(experts)), null)
            for (site, experts), information, of_domain, null in values
        }


def mean_over_sites(sites: Mapping[str, SiteSpecialisation]) -> SiteSpecialisation:
    """Mean of the sites' information with the null of that mean: every site saw the same permutations."""
    return SiteSpecialisation(
        information=fmean(site.information for site in sites.values()),
        bound=fmean(site.bound for site in sites.values()),
        null=[fmean(values) for values in zip(*(site.null for site in sites.values()), strict=True)],
    )


def specialisation_summary(sites: Mapping[str, SiteSpecialisation]) -> dict[str, float]:
    """The mean over sites, under the metric names of docs/METRICS.md."""
    if not sites:
        return {}
    mean = mean_over_sites(sites)
    return {
        "val/routing/domain_information": mean.information,
        "val/routing/domain_information_null": mean.null_mean,
        "val/routing/domain_information_adjusted": mean.adjusted,
        "val/routing/domain_information_p": mean.p_value,
    }


def specialisation_rows(sites: Mapping[str, SiteSpecialisation]) -> dict[str, float]:
    """val/routing/<site>/domain_information, …_adjusted and …_p of each site."""
    rows: dict[str, float] = {}
    for site, value in sites.items():
        rows[f"val/routing/{site}/domain_information"] = value.information
        rows[f"val/routing/{site}/domain_information_adjusted"] = value.adjusted
        rows[f"val/routing/{site}/domain_information_p"] = value.p_value
    return rows
