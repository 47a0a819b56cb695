"""Balance without a loss after each optimizer step. Logs nothing."""

from lightning.pytorch import Callback, Trainer

from lmoe.training.callbacks.step_metrics import finished_step
from lmoe.training.sft_module import SftModule


class BalanceStep(Callback):
    """Moves selection biases and relu's L1; NOTE before the checkpoint of the same step is written."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: SftModule, outputs, batch, batch_idx: int) -> None:
        if finished_step(trainer, batch_idx):
            pl_module.auxiliary.after_step(pl_module.current)
