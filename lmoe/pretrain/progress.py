"""Metrics of pre-training.

Logs: train/loss, lr/base, grad_norm/base, val/loss, val/<domain>/loss.
"""

import torch
from lightning.pytorch import Callback, Trainer

from lmoe.errors import TrainingError
from lmoe.pretrain.module import PretrainModule
from lmoe.training.callbacks.progress_line import ProgressLine
from lmoe.training.callbacks.step_metrics import finished_step, record


class PretrainProgress(Callback):
    """Logs a row every n optimizer steps, and validates every m.

    Args:
        log_every_n_steps: n.
        val_every_n_steps: m; 0: only at the end.
        line: told of every step.
    """

    def __init__(self, log_every_n_steps: int, val_every_n_steps: int, line: ProgressLine) -> None:
        self.log_every_n_steps, self.val_every_n_steps, self.line = log_every_n_steps, val_every_n_steps, line
        self._row: dict[str, float] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: PretrainModule, optimizer) -> None:
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        if not torch.isfinite(norm):
            raise TrainingError(f"a gradient of step {trainer.global_step} is not finite; lower optim.lr")
        self._row = {"grad_norm/base": float(norm), "lr/base": optimizer.param_groups[0]["lr"]}

    def on_train_batch_end(self, trainer: Trainer, pl_module: PretrainModule, outputs, batch, batch_idx: int) -> None:
        if not finished_step(trainer, batch_idx):
            return
        step, loss = trainer.global_step, float(pl_module.last_loss)
        self.line.step(step, "pretrain", loss)
        if step % self.log_every_n_steps == 0 or step == trainer.max_steps:
            record(trainer, {"train/loss": loss, **self._row})
        every = self.val_every_n_steps
        if (every and step % every == 0) or step == trainer.max_steps:
            losses = {f"val/{name}": value for name, value in pl_module.evaluate().items()}
            record(trainer, losses)
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in losses.items()})
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_validation_end(trainer, pl_module)  # the best checkpoint watches it
            self.line.say(f"validation loss {losses['val/loss']:.3f} after step {step}")
