"""What happens where a window of accumulated gradients ends. Logs nothing."""

from lightning.pytorch import Trainer

from lmoe.training.module import AdapterModule
from lmoe.training.optimizers import role_of
from lmoe.training.sharded import ShardedStrategy, average_gradients
from lmoe.training.step import Stage, StepCallback, StepRecord
from lmoe.vocabulary import Role


class WindowEnd(StepCallback):
    """Counts the routing of the step, and balances without a loss."""

    stage = Stage.guard

    def after_step(self, trainer: Trainer, module: AdapterModule, step: StepRecord) -> None:
        module.close_window(skipped=step.skipped)


class RestingRouters(StepCallback):
    """Leaves routers and their moments as they are at steps at which they do not learn, whatever has reached them.

    NOTE after DDP has waited for their gradients, which are 0 then.
    """

    stage = Stage.guard

    def before_step(self, trainer: Trainer, module: AdapterModule, step: StepRecord, optimizer) -> None:
        if module.current.routers_rest(trainer.global_step):
            for group in optimizer.param_groups:
                if role_of(group["name"]) == Role.router.value:
                    for parameter in group["params"]:
                        parameter.grad = None


class GradientAverage(StepCallback):
    """Averages the gradients of a sharded run over the ranks; DDP does the same by itself.

    NOTE before whatever looks at gradients.
    """

    stage = Stage.guard

    def before_step(self, trainer: Trainer, module: AdapterModule, step: StepRecord, optimizer) -> None:
        if isinstance(trainer.strategy, ShardedStrategy):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            average_gradients(parameters, trainer.world_size)
