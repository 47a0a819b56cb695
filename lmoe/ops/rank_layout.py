"""How the ranks of many experts at several sites lie in one stacked lora_A and in one lora_B a site.

lora_A has the rows of all sites that read one input, expert by expert and within an expert site by site, so that
neighbouring experts are one slice. lora_B of a site has its ranks expert by expert.

Shapes: E experts, S sites, R ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BRIDGED_RANKS = 32
"""A gap of silent experts up to this many ranks a site is computed with weight 0, in place of two more matmuls."""


@dataclass(slots=True, frozen=True)
class Ranks:
    """Ranks and scalings of every expert at every site of a group; hashable, as most layers of a model have the same.

    Args:
        ranks: [expert][site]; 0: no branch.
        scalings: [expert][site].
    """

    ranks: tuple[tuple[int, ...], ...]
    scalings: tuple[tuple[float, ...], ...]

    def rows(self, expert: int) -> tuple[int, int]:
        """First and last (excluded) row of an expert in lora_A."""
        first = sum(map(sum, self.ranks[:expert]))
        return first, first + sum(self.ranks[expert])

    def columns(self, expert: int, site: int) -> tuple[int, int]:
        """First and last (excluded) rank of an expert in lora_B of a site."""
        first = sum(ranks[site] for ranks in self.ranks[:expert])
        return first, first + self.ranks[expert][site]


@dataclass(slots=True, frozen=True, eq=False)
class Run:
    """Neighbouring experts that are computed together.

    Args:
        rows: slice of lora_A.
        columns: [site] slice of lora_B.
        order: (R,) that sorts h = x A^T by site, or None where it is sorted already.
        widths: [site] ranks in the sorted h.
        expert_of, site_of: (R,) of each sorted rank.
        scaling: (R,) of each sorted rank, float32.
    """

    rows: slice
    columns: tuple[slice, ...]
    order: Tensor | None
    widths: list[int]
    expert_of: Tensor
    site_of: Tensor
    scaling: Tensor


def runs(ranks: Ranks, active: tuple[bool, ...]) -> list[Run]:
    """Slices that hold all active experts, with small gaps bridged; experts without ranks here are no gap."""
    found: list[list[int]] = []
    for expert, own in enumerate(ranks.ranks):
        if not active[expert] or not sum(own):
            continue
        gap = sum(sum(ranks.ranks[e]) for e in range(found[-1][1], expert)) if found else 0
        if found and gap <= BRIDGED_RANKS * sum(map(bool, own)):
            found[-1][1] = expert + 1
        else:
            found.append([expert, expert + 1])
    return [_run(ranks, first, last) for first, last in found]


def _run(ranks: Ranks, first: int, last: int) -> Run:
    experts, sites = range(first, last), range(len(ranks.ranks[0]))
    cells = [(expert, site) for expert in experts for site in sites]
    counts = torch.tensor([ranks.ranks[e][s] for e, s in cells])
    expert_of = torch.tensor([e for e, _ in cells]).repeat_interleave(counts)
    site_of = torch.tensor([s for _, s in cells]).repeat_interleave(counts)
    scaling = torch.tensor([ranks.scalings[e][s] for e, s in cells]).repeat_interleave(counts)
    order = torch.argsort(site_of, stable=True)
    return Run(
        rows=slice(ranks.rows(first)[0], ranks.rows(last - 1)[1]),
        columns=tuple(slice(ranks.columns(first, s)[0], ranks.columns(last - 1, s)[1]) for s in sites),
        order=None if torch.equal(order, torch.arange(len(order))) else order,
        widths=[sum(ranks.ranks[e][site] for e in experts) for site in sites],
        expert_of=expert_of[order],
        site_of=site_of[order],
        scaling=scaling[order],
    )
