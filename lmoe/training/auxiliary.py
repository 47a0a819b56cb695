"""The auxiliary losses of a micro-batch, and what moves after an optimizer step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmoe.injection.record import injected, mixtures, routers
from lmoe.layers.routers import LinearRouter, ReluRouter
from lmoe.ops.balancing import moved_bias, moved_l1
from lmoe.ops.expert_similarity import diversity_penalty
from lmoe.schema.moe import BalanceScope, LoadBalanceType
from lmoe.training.phases import Phase

OverRanks = Callable[[Tensor], Tensor]


@dataclass(slots=True, frozen=True, kw_only=True)
class MicroBatchLosses:
    """Auxiliary losses of one micro-batch, to be weighted by its share of the step's valid tokens.

    Args:
        values: each loss before its coefficient, by metric name.
        total: what is added to the task loss, or None where the phase adds nothing.
    """

    values: dict[str, Tensor]
    total: Tensor | None


class Auxiliary:
    """Computes the auxiliary losses that a phase has on, and balances without a loss after each step.

    Args:
        model: an injected model.
        over_ranks: sums a tensor over all processes.
    """

    def __init__(self, model: nn.Module, over_ranks: OverRanks) -> None:
        self.model, self.record = model, injected(model)
        moe = self.record.moe
        self.bias_free = moe.load_balance.type is LoadBalanceType.aux_loss_free
        self.relu = self.record.trace.losses.l1_top_k is not None
        self.whole_step = moe.load_balance.scope is BalanceScope.global_batch
        self.loads = StepMeans(over_ranks)
        self.activity = StepMeans(over_ranks)

    def losses(self, phase: Phase, valid: Tensor) -> MicroBatchLosses:
        """The losses of the forward that the trace holds.

        Args:
            phase: whose switches count.
            valid: (B, T) bool.
        """
        if not self.record.plan.routers:
            return MicroBatchLosses(values={}, total=None)
        trace, tokens, loads = self.record.trace, valid.sum(), None
        if self.whole_step:
            self.loads.add(trace.loads(), tokens)
            loads = self.loads.means()
        if self.bias_free or self.relu:
            self.activity.add(trace.activity(), tokens)
        balance, z_loss = trace.load_balancing_loss(loads), trace.router_z_loss()
        values = {"train/load_balancing_loss": balance, "train/router_z_loss": z_loss}
        terms = []
        balance_coef = _own_or(phase.aux_loss_coef, trace.losses.aux_loss_coef)
        if phase.load_balance and balance_coef:
            terms.append(balance_coef * balance)
        z_coef = _own_or(phase.router_z_loss_coef, trace.losses.router_z_loss_coef)
        if phase.router_z_loss and z_coef:
            terms.append(z_coef * z_loss)
        if self.relu:
            values["train/relu_l1"] = l1 = trace.relu_l1()
            terms += [l1] if phase.load_balance else []
        if self.record.moe.diversity_coef:
            values["train/diversity_penalty"] = penalty = diversity(self.model)
            terms += [self.record.moe.diversity_coef * penalty] if phase.diversity else []
        return MicroBatchLosses(values=values, total=torch.stack(terms).sum() if terms else None)

    @torch.no_grad()
    def after_step(self, phase: Phase) -> None:
        """Move selection biases and relu's L1 by the step that is done, and start the next one."""
        if phase.load_balance and (self.bias_free or self.relu):
            self._move(self.activity.means())
        self.start_step()

    def start_step(self) -> None:
        """Forget what the micro-batches of the step before left."""
        self.activity.reset()
        self.loads.reset()

    def _move(self, activity: dict[str, Tensor]) -> None:
        moe = self.record.moe
        mean_active = torch.stack([values.sum() for values in activity.values()]).mean()
        for site, router in routers(self.model):
            if self.bias_free:
                assert isinstance(router, LinearRouter) and router.selection_bias is not None
                rate = float(moe.load_balance.bias_update_rate or 0)
                router.selection_bias.copy_(moved_bias(router.selection_bias, activity[site], rate))
            if self.relu:
                assert isinstance(router, ReluRouter)
                target = float(self.record.injection.top_k)
                router.l1_coef.copy_(moved_l1(router.l1_coef, mean_active, target, moe.l1_growth))


def _own_or(own: float | None, default: float) -> float:
    return default if own is None else own


class StepMeans:
    """Means over the valid tokens of an optimizer step so far, on all ranks, by site."""

    def __init__(self, over_ranks: OverRanks) -> None:
        self._over_ranks = over_ranks
        self._sums: dict[str, Tensor] = {}
        self._tokens: Tensor | None = None

    def add(self, means: dict[str, Tensor], tokens: Tensor) -> None:
        """Add a micro-batch.

        Args:
            means: (E,) by site, over the valid tokens of this process.
            tokens: () their number.
        """
        flat = torch.cat([*(values * tokens for values in means.values()), tokens.view(1).float()])
        parts = self._over_ranks(flat).split([*(values.numel() for values in means.values()), 1])
        for site, part in zip(means, parts, strict=False):
            self._sums[site] = self._sums[site] + part if site in self._sums else part
        self._tokens = parts[-1] if self._tokens is None else self._tokens + parts[-1]

    def means(self) -> dict[str, Tensor]:
        """(E,) by site."""
        assert self._tokens is not None
        return {site: values / self._tokens.clamp(min=1) for site, values in self._sums.items()}

    def reset(self) -> None:
        """Start the next step."""
        self._sums.clear()
        self._tokens = None


def diversity(model: nn.Module) -> Tensor:
    """() mean over sites of the mean squared cosine between their experts."""
    return torch.stack([diversity_penalty(*module.factors()) for _, module in mixtures(model)]).mean()
