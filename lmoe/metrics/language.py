"""Mean loss of predicted tokens by domain, from sums that add up over batches and ranks."""

import torch
from torch import Tensor
from torchmetrics import Metric

from lmoe.ops.labels import IGNORE
from lmoe.ops.log_probabilities import token_losses as token_losses  # measured with DomainLoss


class DomainLoss(Metric):
    """Loss in nats per label token for each domain, and over all tokens.

    Args:
        domains: names, in the order of the domain ids.
    """

    full_state_update = False
    loss_sum: Tensor
    token_sum: Tensor

    def __init__(self, domains: list[str]) -> None:
        super().__init__(sync_on_compute=False)  # every rank validates all rows
        self.domains = list(domains)
        self.add_state("loss_sum", torch.zeros(len(domains), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("token_sum", torch.zeros(len(domains), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses_BT: Tensor, labels_BT: Tensor, domain_BT: Tensor) -> None:
        """Add a batch.

        Args:
            losses_BT: (B, T) nats, 0 without label.
            labels_BT: (B, T), -100 without label.
            domain_BT: (B, T) domain id of each token, or (B, 1) where a row has one domain.
        """
        valid = (labels_BT != IGNORE).double()
        ids = domain_BT.expand_as(labels_BT).flatten()
        self.loss_sum.index_add_(0, ids, (losses_BT.double() * valid).flatten())
        self.token_sum.index_add_(0, ids, valid.flatten())

    def compute(self) -> dict[str, float]:
        """{"loss": over all tokens, "<domain>/loss": …}; domains without tokens are left out."""
        sums, counts = self.loss_sum.tolist(), self.token_sum.tolist()
        values = {"loss": sum(sums) / max(sum(counts), 1)}
        for name, loss, count in zip(self.domains, sums, counts, strict=True):
            if count:
                values[f"{name}/loss"] = loss / count
        return values
