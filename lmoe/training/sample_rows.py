"""Some validation rows, and how their tokens are routed in a pass over all rows.

Shapes: B rows of T tokens, E experts, S sites, L tokens that are kept of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmoe.layers.trace import Routing
from lmoe.objectives.preference import KEYS
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
        for place, domain in enumerate(domains[:pairs] if pairs else domains):
            number = self._passed[domain] = self._passed.get(domain, -1) + 1
            if number not in self.wanted.get(domain, ()):
                continue
            if pairs:
                self.rows += [
                    self._row(routing, batch, place, domain, number, "chosen"),
                    self._row(routing, batch, pairs + place, domain, number, "rejected"),
                ]
            else:
                self.rows.append(self._row(routing, batch, place, domain, number, ""))

    def _row(
        self,
        routing: Mapping[str, Routing],
        batch: Mapping[str, Tensor],
        place: int,
        domain: int,
        number: int,
        of_pair: str,
    ) -> RoutedRow:
        valid = batch["valid_mask"]
        length = int(valid[place].sum())  # padding is on the right
        most = self.most_tokens if not of_pair else max(FEWEST_TOKENS, self.most_tokens // 2)
        kept = min(length, most)
        widest = max(self.num_experts.values())
        experts, weights, total = [], [], torch.zeros(kept, widest)
        for site, count in self.num_experts.items():
            weight = _acting_weights(routing[site]).reshape(*valid.shape, count)[place, :kept].detach().float().cpu()
            share = weight.abs() / weight.abs().sum(-1, keepdim=True).clamp(min=1e-12)
            top, index = share.max(-1)
            experts.append(index)
            weights.append(top)
            total[:, :count] += share
        return RoutedRow(
            domain=domain,
            number=number,
            of_pair=of_pair,
            ids=batch["input_ids"][place, :kept].tolist(),
            cut=length - kept,
            expert=torch.stack(experts, -1).numpy().astype(np.uint16),
            weight=in_255(torch.stack(weights, -1).numpy()),
            mean=in_255((total / len(self.num_experts)).numpy()),
        )


def _acting_weights(routing: Routing) -> Tensor:
    """Routing weights, 0 at tokens on which no expert acts."""
    weights = routing.routing_weights
    return weights if routing.acting is None else weights * routing.acting.reshape(*weights.shape[:-1], 1)
