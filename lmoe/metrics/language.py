"""Mean loss by domain, and other figures of the same units, from sums that add up over batches and ranks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class DomainLoss(Metric):
    """Mean loss of each domain, and over all that counts; likewise of other figures.

    Args:
        domains: names, in the order of the domain ids.
        figures: names of what is averaged beside the loss.
    """

    full_state_update = False
    loss_sum: Tensor
    unit_sum: Tensor
    figure_sums: Tensor

    def __init__(self, domains: list[str], figures: Sequence[str] = ()) -> None:
        super().__init__(sync_on_compute=False)  # every rank validates all rows
        self.domains, self.figures = list(domains), tuple(figures)
        self.add_state("loss_sum", torch.zeros(len(domains), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("unit_sum", torch.zeros(len(domains), dtype=torch.float64), dist_reduce_fx="sum")

        sums = torch.zeros(len(self.figures), len(domains), dtype=torch.float64)
        self.add_state("figure_sums", sums, dist_reduce_fx="sum")

    def update(
        self, losses: Tensor, counted: Tensor, domain_ids: Tensor, figures: Mapping[str, Tensor] | None = None
    ) -> None:
        """Add a batch.

        Args:
            losses: (...) of any shape, such as (B, T) nats of each token.
            counted: (...) bool, which of them count.
            domain_ids: (...) domain of each, or what expands to it, such as (B, 1) where a row has one domain.
            figures: (...) of each, by name.
        """
        valid = counted.double()
        ids = domain_ids.expand_as(counted).flatten()
        self.loss_sum.index_add_(0, ids, (losses.double() * valid).flatten())
        self.unit_sum.index_add_(0, ids, valid.flatten())
        for number, name in enumerate(self.figures):
            self.figure_sums[number].index_add_(0, ids, ((figures or {})[name].double() * valid).flatten())

    def compute(self) -> dict[str, float]:
        """{"loss": over all units, "<domain>/loss": …}, and so of each figure; domains without units are left out."""
        counts = self.unit_sum.tolist()
        values: dict[str, float] = {}
        for figure, sums in zip(("loss", *self.figures), (self.loss_sum, *self.figure_sums), strict=True):
            of_domains = sums.tolist()
            values[figure] = sum(of_domains) / max(sum(counts), 1)
            for name, value, count in zip(self.domains, of_domains, counts, strict=True):
                if count:
                    values[f"{name}/{figure}"] = value / count
        return values
