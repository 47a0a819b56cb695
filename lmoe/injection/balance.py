"""Balance without a loss: what moves after an optimizer step."""

import warnings

import torch
from torch import Tensor, nn

from lmoe.errors import RoutingError
from lmoe.injection.record import Injected, injected, routers
from lmoe.layers.routers import LinearRouter, ReluRouter
from lmoe.ops.processes import several_processes, sum_in_place
from lmoe.ops.routing_losses import moved_bias, moved_l1
from lmoe.vocabulary import LoadBalanceType


@torch.no_grad()
def balance(model: nn.Module) -> None:
    """Move the selection biases (moe.load_balance.type=aux_loss_free) and the L1 coefficients (moe.router=relu) of a
    model by the optimizer step that is done. In a training loop of your own, call it after each optimizer.step();
    `lmoe train` does it by itself. With other routers nothing is to move, and the call does nothing.

    What counts are the forwards whose `trace.auxiliary_loss()` was taken since the last call. Under torch.distributed
    they are those of all processes, and each must call it.

    Args:
        model: an injected model.

    Raises:
        InjectionError: the model carries no experts.
        RoutingError: no forward was counted.
    """
    record = injected(model)
    trace = record.trace
    if not (trace.has_routers and trace.losses.moves_after_step):
        return
    if not trace.step_activity:
        raise RoutingError(
            "lmoe.balance found no forward to balance by: in each training step run the model inside "
            "`with lmoe.trace(model, attention_mask=…) as trace`, and add trace.auxiliary_loss() to the loss"
        )
    activity = trace.step_activity.summed(sum_in_place) if several_processes() else trace.step_activity
    move_balance(model, record, activity.means())
    trace.step_activity.reset()


@torch.no_grad()
def move_balance(model: nn.Module, record: Injected, activity: dict[str, Tensor]) -> None:
    """Move selection biases and L1 coefficients.

    NOTE by target the load is that of the rows, which no bias changes: biases would move on for as long as the run
    lasts, and then decide where the router does.

    Args:
        model: an injected model.
        record: its own.
        activity: (E,) share of the step's valid tokens that use each expert, by site.
    """
    moe = record.moe
    free = moe.load_balance.type is LoadBalanceType.aux_loss_free and not record.context.by_target
    mean_active = torch.stack([values.sum() for values in activity.values()]).mean()
    for site, router in routers(model):
        if free:
            assert isinstance(router, LinearRouter) and router.selection_bias is not None
            rate = float(moe.load_balance.bias_update_rate or 0)
            own = activity[site].to(router.weight.device)
            router.selection_bias.copy_(moved_bias(router.selection_bias, own, rate))
        if record.trace.losses.l1_top_k is not None:
            assert isinstance(router, ReluRouter)
            target = float(record.injection.top_k)
            router.l1_coef.copy_(moved_l1(router.l1_coef, mean_active.to(router.weight.device), target, moe.l1_growth))


def warn_of_missing_balance(model: nn.Module) -> None:
    """Warn at the first forward of a step where an optimizer has stepped and `balance` was not called after it."""
    trace = injected(model).trace
    if not trace.losses.moves_after_step or not torch.is_grad_enabled():
        return
    version = sum(parameter._version for parameter in model.parameters() if parameter.requires_grad)
    if not trace.step_activity:
        trace.counted_from = version
    elif version != trace.counted_from:
        warnings.warn(
            "an optimizer step was taken and lmoe.balance(model) was not called after it: the selection biases (or the "
            "L1) of this model's routers do not move, so nothing balances its experts. Call it after each "
            "optimizer.step()",
            stacklevel=4,
        )
