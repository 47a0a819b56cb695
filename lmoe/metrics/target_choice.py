"""Whether routers choose the experts of what they are taught, counted in rows.

Shapes: B sequences of T tokens, N = B * T, P rows in a sequence, R = B * P, S sites, E experts (the most of any site;
sites with fewer leave the rest at 0), C targets, M domains, L = C + M labels: the targets, then the domains.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lmoe.metrics.site_stack import SiteDecision, stacked_sites
from lmoe.ops.mutual_information import adjusted_mutual_information, groups
from lmoe.ops.router_targets import NO_TARGET, RowTargets, target_log_probs, targets_of_rows


class SiteTargets(NamedTuple):
    """What one site's router chose, over rows.

    Args:
        chosen: L lists of C: rows of each label by the target that was chosen. A row of which only a share of the
            tokens chose a target counts as that share.
        loss: mean over rows with a target of the mean over their tokens of -ln p(target); None: there is no such row.
    """

    chosen: list[list[float]]
    loss: float | None


class TargetChoices(NamedTuple):
    """What all sites chose.

    Args:
        targets: names of the C targets.
        domains: names of the M domains.
        rows: L numbers: rows of each target, then those of each domain without a target.
        sites: by site name.
    """

    targets: list[str]
    domains: list[str]
    rows: list[int]
    sites: dict[str, SiteTargets]

    @property
    def with_target(self) -> int:
        """Rows that have a target."""
        return sum(self.rows[: len(self.targets)])

    def accuracy(self) -> dict[str, float]:
        """Share of the rows with a target whose target was chosen, by site; nothing without such rows."""
        if not self.with_target:
            return {}
        right = {site: sum(value.chosen[c][c] for c in range(len(self.targets))) for site, value in self.sites.items()}
        return {site: count / self.with_target for site, count in right.items()}

    def losses(self) -> dict[str, float]:
        """The loss of each site; nothing without rows that have a target."""
        return {site: value.loss for site, value in self.sites.items() if value.loss is not None}

    def mean_shares(self) -> list[list[float]]:
        """L lists of C: share of each label's rows by the target that was chosen, mean over sites; 0 without rows."""
        return [
            [
                fmean(site.chosen[label][c] for site in self.sites.values()) / max(count, 1)
                for c in _places(self.targets)
            ]
            for label, count in enumerate(self.rows)
        ]


class TargetChoice(Metric):
    """Rows by their target and by the target that the routers choose, at each site.

    A token chooses the target whose experts have most probability together, by the clean logits; the first of equal
    ones. Rows weigh alike, whatever their length. Rows without a target are counted by their domain.

    Args:
        num_experts: E of each site, by site name, in order.
        targets: names of the C targets.
        domains: names, in the order of the domain ids.
    """

    full_state_update = False
    chosen_sum: Tensor
    loss_sum: Tensor
    label_rows: Tensor
    expert_rows: Tensor

    def __init__(self, num_experts: dict[str, int], targets: Sequence[str], domains: Sequence[str]) -> None:
        super().__init__(sync_on_compute=False)  # every rank validates all rows
        self.num_experts, self.targets, self.domains = dict(num_experts), list(targets), list(domains)
        self._index = {site: i for i, site in enumerate(num_experts)}
        sites, labels = len(num_experts), len(targets) + len(domains)
        shapes = {
            "chosen_sum": (sites, labels, len(targets)),
            "loss_sum": (sites,),
            "label_rows": (labels,),
            "expert_rows": (sites, len(domains), max(num_experts.values())),
        }
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        routing: Mapping[str, SiteDecision],
        targets: RowTargets | None,
        valid: Tensor,
        row_ids: Tensor,
        domain_ids: Tensor,
    ) -> None:
        """Add one batch; a row lies in one batch as a whole.

        Args:
            routing: Routing of every site, by site name.
            targets: of the tokens; None: no row has one.
            valid: (B, T) bool, False for padding.
            row_ids: (B, T) int64 number of the token's row inside its packed sequence, from 0; all 0 without packing.
            domain_ids: (B, T) domain of each token.

        Raises:
            ValueError: a site is missing, unknown or has other experts.
        """
        rows = int(row_ids.max()) + 1
        row_N = (torch.arange(len(valid), device=valid.device)[:, None] * rows + row_ids).flatten()
        counts_N = valid.flatten().double()
        tokens_R = counts_N.new_zeros(len(valid) * rows).index_add_(0, row_N, counts_N)
        ids = torch.full_like(row_ids, NO_TARGET) if targets is None else targets.ids.to(valid.device)
        target_R = targets_of_rows(ids.masked_fill(~valid, NO_TARGET), row_ids, rows).flatten()
        domain_R = targets_of_rows(domain_ids.masked_fill(~valid, NO_TARGET), row_ids, rows).flatten()
        label_R = torch.where(target_R == NO_TARGET, len(self.targets) + domain_R, target_R)
        there_R = tokens_R > 0
        is_label_LR = _indicators(label_R, len(self.targets) + len(self.domains), there_R)
        is_domain_MR = _indicators(domain_R, len(self.domains), there_R)
        self.label_rows += is_label_LR.sum(-1)
        is_row_BPT = (torch.arange(rows, device=row_ids.device)[:, None] == row_ids.unsqueeze(1)).float()
        is_row_BPT *= valid.unsqueeze(1)
        groups = zip(
            stacked_sites({site: r.router_logits for site, r in routing.items()}, self.num_experts, valid),
            stacked_sites({site: r.routing_weights for site, r in routing.items()}, self.num_experts, valid),
            strict=True,
        )
        for (sites, z_SNE), (_, w_SNE) in groups:
            where = [self._index[site] for site in sites]
            log_p_SNC = target_log_probs(z_SNE, len(self.targets))
            share_SRC = _shares(log_p_SNC.argmax(-1), len(self.targets), row_N, counts_N, tokens_R)
            self.chosen_sum[where] += torch.matmul(is_label_LR, share_SRC)
            self.loss_sum[where] += _row_losses(log_p_SNC, target_R, row_N, counts_N, tokens_R)
            w_SBTE = torch.where(valid.reshape(-1, 1), w_SNE.float(), 0).unflatten(1, valid.shape)
            of_rows_SRE = torch.matmul(is_row_BPT, w_SBTE).flatten(1, 2)
            heaviest_SRE = _indicators(of_rows_SRE.argmax(-1), w_SNE.shape[-1], of_rows_SRE.sum(-1) > 0, dim=-1)
            self.expert_rows[where, :, : w_SNE.shape[-1]] += torch.matmul(is_domain_MR, heaviest_SRE)

    def compute(self) -> TargetChoices:
        """What was chosen for all rows so far."""
        rows = [round(count) for count in self.label_rows.tolist()]
        with_target = sum(rows[: len(self.targets)])
        sums = zip(self.num_experts, self.chosen_sum.tolist(), self.loss_sum.tolist(), strict=True)
        sites = {site: SiteTargets(chosen, loss / with_target if with_target else None) for site, chosen, loss in sums}
        return TargetChoices(self.targets, self.domains, rows, sites)

    def agreement(self) -> dict[str, float]:
        """Adjusted mutual information of a row's domain and the expert with most of its routing weight, by site.

        Of all rows that any expert has a weight in; nothing where these are of one domain, with which nothing can agree
        or not. It takes some milliseconds a site.
        """
        tables = zip(self.num_experts, self.expert_rows.cpu(), strict=True)
        return {site: adjusted_mutual_information(table_ME) for site, table_ME in tables if groups(table_ME) > 1}


def _indicators(ids: Tensor, count: int, counts: Tensor, dim: int = 0) -> Tensor:
    """1.0 where ids is 0, …, count - 1 along a new dimension, 0.0 where `counts` is False."""
    numbers = torch.arange(count, device=ids.device)
    numbers = numbers.view(-1, *(1 for _ in ids.shape)) if dim == 0 else numbers
    return ((ids.unsqueeze(dim) == numbers) & counts.unsqueeze(dim)).double()


def _shares(choice_SN: Tensor, targets: int, row_N: Tensor, counts_N: Tensor, tokens_R: Tensor) -> Tensor:
    """(S, R, C) share of each row's tokens that chose each target."""
    flat = counts_N.new_zeros(len(choice_SN), len(tokens_R) * targets)
    flat.scatter_add_(1, row_N * targets + choice_SN, counts_N.expand(choice_SN.shape))
    return flat.unflatten(1, (-1, targets)) / tokens_R.clamp(min=1)[:, None]


def _row_losses(log_p_SNC: Tensor, target_R: Tensor, row_N: Tensor, counts_N: Tensor, tokens_R: Tensor) -> Tensor:
    """(S,) sum over rows with a target of the mean over their tokens of -ln p(target)."""
    index_N = target_R[row_N].clamp(min=0)
    of_target_SN = log_p_SNC.gather(-1, index_N.view(1, -1, 1).expand(len(log_p_SNC), -1, 1)).squeeze(-1)
    weight_N = counts_N * (target_R != NO_TARGET)[row_N] / tokens_R.clamp(min=1)[row_N]
    return -torch.where(weight_N > 0, of_target_SN.double() * weight_N, 0).sum(-1)


def _places(names: Sequence[str]) -> range:
    return range(len(names))
