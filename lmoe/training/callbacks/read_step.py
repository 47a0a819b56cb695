"""Bring what an optimizer step has come to from the device, at once. Logs nothing."""

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lmoe.training.module import AdapterModule
from lmoe.training.ranks import over_ranks
from lmoe.training.step import Stage, StepCallback, StepRecord


class ReadStep(StepCallback):
    """Measures the norm of the gradients of each group before clipping, and reads it with the losses and tokens of the
    window.

    NOTE the one place where a step waits for the device, but for the routing that is logged: one sum over the ranks and
    one read. What follows finds numbers in the record, and asks for none.
    """

    stage = Stage.guard

    def before_step(self, trainer: Trainer, module: AdapterModule, step: StepRecord, optimizer) -> None:
        device = trainer.strategy.root_device
        norms = {
            group["name"]: _norm([p.grad for p in group["params"] if p.grad is not None], device)
            for group in optimizer.param_groups
        }
        losses = step.window.sums(device)
        judged = losses if trainer.precision == "16-mixed" else torch.cat([losses, *norms.values()])
        wrong = (~judged.isfinite()).any()
        tokens = torch.as_tensor(step.tokens, device=device)
        own = torch.cat([losses, tokens.view(1), wrong.view(1)]).double()  # whole numbers stay exact
        summed = over_ranks(trainer, own)
        count = len(losses)
        rounded = summed[:count].to(losses.dtype).double()  # as a sum in float32 would be
        read = torch.cat([rounded, summed[count:], *(norm.double() for norm in norms.values())]).tolist()
        step.losses = dict(zip(step.window.names, read, strict=False))
        step.tokens_of_all, step.finite = int(read[count]), not read[count + 1]
        step.gradient_norms = dict(zip(norms, read[count + 2 :], strict=True))


def _norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """(1,) of all together."""
    if not gradients:
        return torch.zeros(1, device=device)
    norms = [norm.to(device) for norm in torch._foreach_norm(gradients)]  # of a base on several devices they lie apart
    return torch.stack(norms).norm().view(1)
