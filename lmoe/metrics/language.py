"""Mean loss of predicted tokens by domain, from sums that add up over batches and ranks."""

import torch
from torch import Tensor
from torchmetrics import Metric


class DomainLoss(Metric):
    """Mean loss of each domain, and over all that counts.

    Args:
        domains: names, in the order of the domain ids.
    """

    full_state_update = False
    loss_sum: Tensor
    unit_sum: Tensor

    def __init__(self, domains: list[str]) -> None:
        super().__init__(sync_on_compute=False)  # every rank validates all rows
        self.domains = list(domains)
        self.add_state("loss_sum", torch.zeros(len(domains), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("unit_sum", torch.zeros(len(domains), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, counted: Tensor, domain_ids: Tensor) -> None:
        """Add a batch.

        Args:
            losses: (...) of any shape, such as (B, T) nats of each token.
            counted: (...) bool, which of them count.
            domain_ids: (...) domain of each, or what expands to it, such as (B, 1) where a row has one domain.
        """
        valid = counted.double()
        ids = domain_ids.expand_as(counted).flatten()
        self.loss_sum.index_add_(0, ids, (losses.double() * valid).flatten())
        self.unit_sum.index_add_(0, ids, valid.flatten())

    def compute(self) -> dict[str, float]:
        """{"loss": over all tokens, "<domain>/loss": …}; domains without tokens are left out."""
        sums, counts = self.loss_sum.tolist(), self.unit_sum.tolist()
        values = {"loss": sum(sums) / max(sum(counts), 1)}
        for name, loss, count in zip(self.domains, sums, counts, strict=True):
            if count:
                values[f"{name}/loss"] = loss / count
        return values
