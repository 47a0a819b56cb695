"""Average the gradients of adapters and routers over the processes of a sharded run. Logs nothing."""

from lightning.pytorch import Callback, Trainer

from lmoe.training.sft_module import SftModule
from lmoe.training.sharded import ShardedStrategy, average_gradients


class GradientAverage(Callback):
    """NOTE before whatever looks at gradients; DDP does the same by itself."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: SftModule, optimizer) -> None:
        if isinstance(trainer.strategy, ShardedStrategy):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            average_gradients(parameters, trainer.world_size)
