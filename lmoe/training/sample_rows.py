"""Some validation rows, and how their tokens are routed in a pass over all rows.

Shapes: B rows of T tokens, R of which are kept with L tokens, E experts (the most of a site), S sites.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmoe.layers.routing import Routing
from lmoe.objectives.preference import KEYS
from lmoe.ops.site_groups import sites_of_one_shape
from lmoe.report.routing_file import in_255

MOST_ROWS = 16
ROWS_OF_DOMAIN = 4
"""Of one domain, at most."""
MOST_TOKENS = 256
"""Of one row."""
MOST_DECISIONS = 110_000
"""Tokens of all rows times sites: with more sites, less is kept of each row."""
FEWEST_TOKENS = 8


@dataclass(slots=True, frozen=True, kw_only=True)
class RoutedRow:
    """The routing of a row; shares in 1/255.

    Args:
        domain: number of its domain.
        number: of the row among those of its domain, in the order of the batches, from 0.
        of_pair: which answer of a pair it ends with, chosen or rejected; "": it is no pair.
        ids: (L,) int64 token ids.
        cut: tokens behind them.
        expert: (L, S) uint16 expert with the largest routing weight.
        weight: (L, S) its share of the token's routing weight; 0 where no expert acts.
        mean: (L, E) share of each expert, mean over sites.
    """

    domain: int
    number: int
    of_pair: str
    ids: list[int]
    cut: int
    expert: NDArray[np.uint16]
    weight: NDArray[np.uint8]
    mean: NDArray[np.uint8]


def rows_to_keep(domains: Tensor) -> dict[int, list[int]]:
    """Which rows of each domain are kept: evenly spread over them, so that short and long ones are among them.

    Args:
        domains: (N,) domain of each row, in the order of the batches.

    Returns:
        Domain -> numbers of rows among those of the domain.
    """
    counts = torch.bincount(domains.long()).tolist() if len(domains) else []
    there = [domain for domain, count in enumerate(counts) if count][:MOST_ROWS]
    each = max(1, min(ROWS_OF_DOMAIN, MOST_ROWS // max(1, len(there))))
    return {d: sorted({counts[d] * (2 * i + 1) // (2 * each) for i in range(each)}) for d in there}


class SampleRows:
    """Gathers the routing of rows while all validation rows pass by.

    Args:
        wanted: domain -> numbers of rows among those of the domain.
        num_experts: E of each site, by site name, in order.
    """

    def __init__(self, wanted: Mapping[int, Sequence[int]], num_experts: Mapping[str, int]) -> None:
        self.wanted, self.num_experts = {domain: set(numbers) for domain, numbers in wanted.items()}, dict(num_experts)
        self.rows: list[RoutedRow] = []
        self._passed: dict[int, int] = {}
        rows = max(1, sum(map(len, wanted.values())))
        most = MOST_DECISIONS // (rows * max(1, len(num_experts)))
        self.most_tokens = max(FEWEST_TOKENS, min(MOST_TOKENS, most))

    def update(self, routing: Mapping[str, Routing], batch: Mapping[str, Tensor]) -> None:
        """Add what is wanted of one batch; of pairs the row with the chosen answer and the one with the other."""
        domains = batch["domain_ids"][:, 0].tolist()
        pairs = len(domains) // 2 if KEYS in batch and len(batch[KEYS]) < len(domains) else 0
        found: list[tuple[int, int, int, str]] = []  # place in the batch, domain, number, of_pair
        for place, domain in enumerate(domains[:pairs] if pairs else domains):
            number = self._passed[domain] = self._passed.get(domain, -1) + 1
            if number not in self.wanted.get(domain, ()):
                continue
            if pairs:
                found += [(place, domain, number, "chosen"), (pairs + place, domain, number, "rejected")]
            else:
                found.append((place, domain, number, ""))
        if found:
            self._add(routing, batch, found)

    def _add(
        self, routing: Mapping[str, Routing], batch: Mapping[str, Tensor], found: Sequence[tuple[int, int, int, str]]
    ) -> None:
        valid = batch["valid_mask"]
        most = self.most_tokens if not found[0][-1] else max(FEWEST_TOKENS, self.most_tokens // 2)
        places = torch.tensor([place for place, *_ in found], device=valid.device)
        lengths = valid[places].sum(-1).tolist()  # padding is on the right
        ids = batch["input_ids"][places, :most].tolist()
        expert, weight, mean = self._shares(routing, valid, places, most)
        for row, (_, domain, number, of_pair) in enumerate(found):
            kept = min(lengths[row], most)
            self.rows.append(
                RoutedRow(
                    domain=domain,
                    number=number,
                    of_pair=of_pair,
                    ids=ids[row][:kept],
                    cut=lengths[row] - kept,
                    expert=expert[row, :kept].numpy().astype(np.uint16),
                    weight=in_255(weight[row, :kept].numpy()),
                    mean=in_255(mean[row, :kept].numpy()),
                )
            )

    def _shares(
        self, routing: Mapping[str, Routing], valid: Tensor, places: Tensor, most: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Heaviest expert and its share, (R, L, S), and the mean share of each expert, (R, L, E), of R rows."""
        names = list(self.num_experts)
        weights = {
            site: routing[site].acting_weights.reshape(*valid.shape, count)[places, :most]
            for site, count in self.num_experts.items()
        }
        shape = next(iter(weights.values())).shape[:2]
        expert = torch.zeros(*shape, len(names), dtype=torch.long)
        weight, mean = torch.zeros(expert.shape), torch.zeros(*shape, max(self.num_experts.values()))
        for sites in sites_of_one_shape(weights):
            stacked = torch.stack([weights[site] for site in sites], 2).detach().float().abs()
            share_RLSE = (stacked / stacked.sum(-1, keepdim=True).clamp(min=1e-12)).cpu()
            where = [names.index(site) for site in sites]
            weight[..., where], expert[..., where] = share_RLSE.max(-1)
            mean[..., : share_RLSE.shape[-1]] += share_RLSE.sum(2) / len(names)
        return expert, weight, mean
