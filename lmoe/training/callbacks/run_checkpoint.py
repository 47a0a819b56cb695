"""checkpoints/last.ckpt and best.ckpt, each written under another name and then renamed."""

import os
from pathlib import Path

from lightning.pytorch import Callback, Trainer

from lmoe.errors import TrainingError

LAST, BEST = "last.ckpt", "best.ckpt"


class RunCheckpoint(Callback):
    """Save last.ckpt every n optimizer steps and at the end, best.ckpt when the monitor improves.

    Args:
        folder: the run's checkpoints folder.
        every_n_steps: optimizer steps between saves; 0: only at the end.
        monitor: metric to minimise.
    """

    def __init__(self, folder: Path, every_n_steps: int, monitor: str = "val/loss") -> None:
        self.folder, self.every_n_steps, self.monitor = folder, every_n_steps, monitor
        self.best: float | None = None
        self._saved_step = -1

    def state_dict(self) -> dict:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict) -> None:
        self.best = state_dict["best"]

    def on_train_batch_end(self, trainer: Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        step = trainer.global_step
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and self.every_n_steps and step % self.every_n_steps == 0 and step != self._saved_step:
            self.save(trainer, LAST)

    def on_validation_end(self, trainer: Trainer, pl_module) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if trainer.sanity_checking or trainer.global_step == 0 or value is None:
            return
        if self.best is None or float(value) < self.best:
            self.best = float(value)
            self.save(trainer, BEST)

    def on_train_end(self, trainer: Trainer, pl_module) -> None:
        if trainer.global_step != self._saved_step:
            self.save(trainer, LAST)

    def save(self, trainer: Trainer, name: str) -> None:
        """Write one checkpoint so that a kill at any moment leaves the old or the new one, whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / name
        partial = target.with_suffix(".partial")
        try:
            trainer.save_checkpoint(partial)
            if trainer.is_global_zero:
                with open(partial, "rb") as written:
                    os.fsync(written.fileno())
                os.replace(partial, target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            before = "The previous checkpoint is intact" if target.exists() else "No checkpoint was written before"
            raise TrainingError(
                f"{target} cannot be written: {error.strerror or error}. {before}. Free space or mend the rights, then "
                f"resume={self.folder.parent}"
            ) from None
        if name == LAST:
            self._saved_step = trainer.global_step
