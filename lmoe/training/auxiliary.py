"""The auxiliary losses of a micro-batch in a phase, and what moves after an optimizer step."""

from torch import Tensor, nn

from lmoe.injection.balance import move_balance
from lmoe.injection.record import injected
from lmoe.layers.step_means import OverRanks, StepMeans
from lmoe.layers.trace import ForwardLosses, LossWeights
from lmoe.training.phases import Phase
from lmoe.vocabulary import BalanceScope


class Auxiliary:
    """Computes the auxiliary losses that a phase has on, and balances without a loss after each step.

    Args:
        model: an injected model.
        over_ranks: sums a tensor over all processes.
    """

    def __init__(self, model: nn.Module, over_ranks: OverRanks) -> None:
        self.model, self.record = model, injected(model)
        self.whole_step = self.record.moe.load_balance.scope is BalanceScope.global_batch
        self.loads = StepMeans(over_ranks)
        self.over_ranks, self.activity = over_ranks, StepMeans()

    def losses(self, phase: Phase, valid: Tensor) -> ForwardLosses:
        """The losses of the forward that the trace holds, to be weighted by its share of the step's valid tokens.

        Args:
            phase: whose switches count.
            valid: (B, T) bool.
        """
        trace, tokens, loads = self.record.trace, valid.sum(), None
        if self.record.plan.routers:
            if self.whole_step:
                self.loads.add(trace.loads(), tokens)
                loads = self.loads.means()
            if trace.losses.moves_after_step:
                self.activity.add(trace.activity(), tokens)
        return trace.forward_losses(self._weights(phase), loads)

    def _weights(self, phase: Phase) -> LossWeights:
        own = self.record.trace.losses
        balance, z = phase.aux_loss_coef, phase.router_z_loss_coef
        return LossWeights(
            load_balancing=(own.aux_loss_coef if balance is None else balance) if phase.load_balance else 0.0,
            router_z=(own.router_z_loss_coef if z is None else z) if phase.router_z_loss else 0.0,
            relu_l1=phase.load_balance,
            diversity=phase.diversity,
            router_target=phase.router_target_coef,
            routers_rest=self.record.context.routers_rest,
        )

    def after_step(self, phase: Phase) -> None:
        """Move selection biases and relu's L1 by the step that is done, and start the next one."""
        if phase.load_balance and self.record.trace.losses.moves_after_step:
            move_balance(self.model, self.record, self.activity.summed(self.over_ranks).means())
        self.start_step()

    def start_step(self) -> None:
        """Forget what the micro-batches of the step before left."""
        self.activity.reset()
        self.loads.reset()
