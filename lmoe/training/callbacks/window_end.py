"""Close the accumulation window after each optimizer step. Logs nothing."""

from lightning.pytorch import Callback, Trainer

from lmoe.training.callbacks.step_metrics import finished_step
from lmoe.training.sft_module import SftModule


class WindowEnd(Callback):
    """Counts the routing of the step, and balances without a loss; NOTE before metrics and checkpoint of the step."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: SftModule, outputs, batch, batch_idx: int) -> None:
        if finished_step(trainer, batch_idx):
            pl_module.close_window()
