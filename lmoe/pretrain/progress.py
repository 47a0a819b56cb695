"""Metrics of pre-training.

Logs: train/loss, lr/base, grad_norm/base, val/loss, val/<domain>/loss.
"""

import torch
from lightning.pytorch import Trainer

from lmoe.errors import TrainingError
from lmoe.pretrain.module import PretrainModule
from lmoe.training.callbacks.progress_line import ProgressLine
from lmoe.training.callbacks.step_metrics import record
from lmoe.training.step import Stage, StepCallback, StepRecord


class PretrainProgress(StepCallback):
    """Logs a row every n optimizer steps, and validates every m.

    Args:
        log_every_n_steps: n.
        val_every_n_steps: m; 0: only at the end.
        line: told of every step.
    """

    stage = Stage.measure

    def __init__(self, log_every_n_steps: int, val_every_n_steps: int, line: ProgressLine) -> None:
        self.log_every_n_steps, self.val_every_n_steps, self.line = log_every_n_steps, val_every_n_steps, line

    def before_step(self, trainer: Trainer, module: PretrainModule, step: StepRecord, optimizer) -> None:
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        if not torch.isfinite(norm):
            raise TrainingError(f"a gradient of step {trainer.global_step} is not finite; lower optim.lr")
        step.gradient_norms, step.learning_rates = {"base": norm}, {"base": optimizer.param_groups[0]["lr"]}

    def after_step(self, trainer: Trainer, module: PretrainModule, step: StepRecord) -> None:
        done, step.losses = trainer.global_step, step.window.values()
        self.line.step(done, "pretrain", step.losses["train/loss"])
        if done % self.log_every_n_steps == 0 or done == trainer.max_steps:
            norm, lr = float(step.gradient_norms["base"]), step.learning_rates["base"]
            record(trainer, {**step.losses, "grad_norm/base": norm, "lr/base": lr})
        every = self.val_every_n_steps
        if (every and done % every == 0) or done == trainer.max_steps:
            losses = {f"val/{name}": value for name, value in module.evaluate().items()}
            record(trainer, losses)
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in losses.items()})
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_validation_end(trainer, module)  # the best checkpoint watches it
            self.line.say(f"validation loss {losses['val/loss']:.3f} after step {done}")
