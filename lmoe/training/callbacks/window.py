"""What happens where a window of accumulated gradients ends."""

from lightning.pytorch import Callback, Trainer

from lmoe.training.callbacks.step_metrics import finished_step
from lmoe.training.sft_module import SftModule
from lmoe.training.sharded import ShardedStrategy, average_gradients


class GradientAverage(Callback):
    """NOTE before whatever looks at gradients; DDP does the same by itself."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: SftModule, optimizer) -> None:
        if isinstance(trainer.strategy, ShardedStrategy):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            average_gradients(parameters, trainer.world_size)


class WindowEnd(Callback):
    """Counts the routing of the step, and balances without a loss; NOTE before metrics and checkpoint of the step."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: SftModule, outputs, batch, batch_idx: int) -> None:
        if finished_step(trainer, batch_idx):
            pl_module.close_window()
