"""checkpoints/last.ckpt and best.ckpt, each written under another name, sealed, and then renamed."""

import math
import os
from pathlib import Path

from lightning.pytorch import Trainer

from lmoe.config.checkpoint import CheckpointConfig
from lmoe.errors import TrainingError
from lmoe.files.run_folder import resume_setting
from lmoe.resume.run_files import BEST, LAST, ORIGIN, keep_newest, origin_of, stand_at_step, step_file
from lmoe.resume.seal import seal
from lmoe.resume.stopping import Stopped
from lmoe.training.step import Stage, StepCallback, StepRecord

MONITOR = "val/loss"


class RunCheckpoint(StepCallback):
    """Save last.ckpt every n optimizer steps, at the end and when a signal ends the run; best.ckpt when the monitor is
    lower than before in this phase.

    Args:
        folder: the run's checkpoints.
        run_id: of the run, written into each of them.
        settings: how often, and how many.
        wandb_id: of the W&B run, kept for the run that goes on.
    """

    stage = Stage.save

    def __init__(self, folder: Path, run_id: str, settings: CheckpointConfig, wandb_id: str | None = None) -> None:
        self.folder, self.run_id, self.settings, self.wandb_id = folder, run_id, settings, wandb_id
        self.best: float | None = None
        self._last_step = 0  # of last.ckpt: there is nothing to save before the first step
        self._name = LAST

    def state_dict(self) -> dict:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict) -> None:
        self.best = state_dict["best"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module, checkpoint: dict) -> None:
        checkpoint[ORIGIN] = origin_of(self.run_id, self._name, self.wandb_id)

    def on_load_checkpoint(self, trainer: Trainer, pl_module, checkpoint: dict) -> None:
        stand_at_step(checkpoint, trainer.accumulate_grad_batches)
        if checkpoint[ORIGIN]["written_as"] == LAST:
            self._last_step = checkpoint["global_step"]

    def after_step(self, trainer: Trainer, module, step: StepRecord) -> None:
        every = self.settings.every_n_steps
        if every and trainer.global_step % every == 0:
            self._save_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module) -> None:
        value = trainer.callback_metrics.get(MONITOR)
        if trainer.sanity_checking or trainer.global_step == 0 or value is None:
            return
        if not math.isfinite(float(value)):
            return  # none would ever be lower than NaN
        if self.best is None or float(value) < self.best:
            self.best = float(value)
            self.save(trainer, BEST)

    def on_train_end(self, trainer: Trainer, pl_module) -> None:
        self._save_last(trainer)

    def on_exception(self, trainer: Trainer, pl_module, exception: BaseException) -> None:
        if isinstance(exception, Stopped) and not exception.at_once:
            self._save_last(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        if trainer.global_step != self._last_step:
            self.save(trainer, LAST)
            self._last_step = trainer.global_step

    def save(self, trainer: Trainer, name: str) -> None:
        """Write one checkpoint so that a kill at any moment leaves the old or the new one, whole."""
        target = self.folder / name
        partial, self._name = target.with_suffix(".partial"), name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(partial)
            if trainer.is_global_zero:
                self._put_in_place(partial, target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            before = "The previous checkpoint is intact" if target.exists() else "No checkpoint was written before"
            raise TrainingError(
                f"{target} cannot be written: {error.strerror or error}. {before}. Free space or mend the rights, then "
                f"{resume_setting(self.folder.parent)}"
            ) from None

    def _put_in_place(self, partial: Path, target: Path) -> None:
        """NOTE between the two renames there is no last.ckpt: a run that goes on then takes the newest step file."""
        seal(partial)
        keep = self.settings.keep_last - 1
        if target.name == LAST and keep and target.exists():
            os.replace(target, self.folder / step_file(self._last_step))
        os.replace(partial, target)
        directory = os.open(self.folder, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        if target.name == LAST:
            keep_newest(self.folder, keep)
