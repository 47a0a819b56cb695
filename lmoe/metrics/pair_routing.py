"""How the chosen and the rejected answer to one prompt are routed.

Shapes: B pairs, R rows (two for each pair) of T tokens, N = R * T, S sites, E experts (the most of any site; sites with
fewer leave the rest at 0).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lmoe.metrics.site_stack import SiteDecision, places_of, shares_of, stacked_masks, stacked_sites


class SitePairs(NamedTuple):
    """Routing of answers at one site.

    Args:
        overlap: mean over pairs of sum_e min(f_e(chosen), f_e(rejected)), f_e the share of an answer's assignments that
            expert e got: 1 routed alike, 0 to different experts. None: there is no pair in which both answers have a
            token with an expert.
        load_chosen: share of the assignments of all chosen answers that each expert got; sums to 1, all 0 where there
            are none.
        load_rejected: the same of the rejected answers.
    """

    overlap: float | None
    load_chosen: list[float]
    load_rejected: list[float]


class PairRouting(Metric):
    """Overlap of the experts of the two answers of a pair, and the loads of chosen and of rejected answers, by site.

    Pairs weigh alike in the overlap, however long their answers are; tokens weigh alike in the loads. Tokens on which
    no expert acts, and those for which a relu router has none, count for neither.

    Args:
        num_experts: E of each site, by site name, in order.
    """

    full_state_update = False
    overlap_sum: Tensor
    pairs: Tensor
    load_sum: Tensor

    def __init__(self, num_experts: dict[str, int]) -> None:
        super().__init__(sync_on_compute=False)  # every rank validates all rows
        self.num_experts = dict(num_experts)
        self._index = {site: i for i, site in enumerate(num_experts)}
        sites, experts = len(num_experts), max(num_experts.values(), default=0)
        shapes = {"overlap_sum": (sites,), "pairs": (sites,), "load_sum": (sites, 2, experts)}
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, routing: Mapping[str, SiteDecision], answers: Tensor, good: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            routing: Routing of every site, by site name.
            answers: (R, T) bool, tokens of the answers.
            good: (R,) bool, of rows that are no pairs: which of them have a good answer, which counts as chosen. None:
                the first half of the rows are the chosen answers, the second half the rejected ones of the same pairs.

        Raises:
            ValueError: a site is missing, unknown or has other experts, or the rows are no pairs.
        """
        is_chosen_R = _chosen_rows(answers, good)
        sides_2R = torch.stack([is_chosen_R, ~is_chosen_R]).double()
        assignment = {site: r.assignment for site, r in routing.items()}
        for sites, a_SNE in stacked_sites(assignment, self.num_experts, answers):
            where, experts = places_of(sites, self._index), a_SNE.shape[-1]
            counted_SN = stacked_masks([routing[site].acting for site in sites], answers)
            # NOTE no product with the mask: padding may hold NaN, and 0 * NaN is NaN.
            kept_SNE = torch.where(counted_SN.unsqueeze(-1), a_SNE, 0)
            sums_SRE = kept_SNE.view(len(sites), *answers.shape, experts).sum(2, dtype=torch.float64)
            self.load_sum[where, :, :experts] += torch.matmul(sides_2R, sums_SRE)
            if good is None:
                overlap_SB, is_pair_SB = _overlaps(sums_SRE)
                self.overlap_sum[where] += overlap_SB.sum(-1)
                self.pairs[where] += is_pair_SB.sum(-1)

    def compute(self) -> dict[str, SitePairs]:
        """Routing of the answers so far, by site; sites without a token that has an expert are left out."""
        sums = zip(
            self.num_experts.items(),
            self.overlap_sum.tolist(),
            self.pairs.tolist(),
            self.load_sum.tolist(),
            strict=True,
        )
        return {
            site: SitePairs(overlap / pairs if pairs else None, *(shares_of(side[:experts]) for side in loads))
            for (site, experts), overlap, pairs, loads in sums
            if any(map(any, loads))
        }


def _chosen_rows(answers: Tensor, good: Tensor | None) -> Tensor:
    """(R,) bool: rows with a chosen or good answer.

    Raises:
        ValueError: rows that are no pairs, or `good` of other rows.
    """
    rows = len(answers)
    if good is None and rows % 2:
        raise ValueError(
            f"{rows} rows of answers are no pairs: give all chosen answers, then the rejected ones in the same order; "
            "of rows that are no pairs say in `good` which are good"
        )
    if good is not None and good.shape != (rows,):
        raise ValueError(f"good is {tuple(good.shape)}; it must be ({rows},), one for each row of answers")
    return torch.arange(rows, device=answers.device) < rows // 2 if good is None else good


def _overlaps(sums_SRE: Tensor) -> tuple[Tensor, Tensor]:
    """(S, B) sum_e min(f_e(chosen), f_e(rejected)) of each pair, 0 where it does not count, and (S, B) whether it does.

    Args:
        sums_SRE: assignments of each answer; the chosen ones, then the rejected ones.
    """
    totals_SR = sums_SRE.sum(-1)
    shares_SRE = sums_SRE / totals_SR.clamp(min=torch.finfo(totals_SR.dtype).tiny).unsqueeze(-1)
    chosen_SBE, rejected_SBE = shares_SRE.chunk(2, dim=1)
    chosen_SB, rejected_SB = (totals_SR > 0).chunk(2, dim=1)
    return torch.minimum(chosen_SBE, rejected_SBE).sum(-1), chosen_SB & rejected_SB
