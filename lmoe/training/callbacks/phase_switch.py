"""Switch to the next phase at an accumulation boundary."""

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch.nn.parallel import DistributedDataParallel

from lmoe.training.callbacks.run_checkpoint import RunCheckpoint
from lmoe.training.module import AdapterModule
from lmoe.training.optimizers import carry_state


class PhaseSwitch(Callback):
    """Before the first micro-batch of a phase: roles, stale gradients, DDP, optimizer, scheduler, best values."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: AdapterModule, batch, batch_idx: int) -> None:
        phase = pl_module.schedule.phase_at(trainer.global_step)
        if phase == pl_module.phase:
            return
        if pl_module.schedule[phase].waits_for is not None:  # it has waited to the end
            pl_module.begin_phases({pl_module.schedule[phase].name: pl_module.schedule[phase].start})
        pl_module.set_phase(phase)
        strategy = trainer.strategy
        if isinstance(strategy.model, DistributedDataParallel):  # its reducer was made for the old phase's parameters
            strategy.model = strategy.lightning_module
            strategy.configure_ddp()  # type: ignore[attr-defined]
        old = trainer.optimizers[0]
        strategy.setup_optimizers(trainer)
        carry_state(old, trainer.optimizers[0])
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            start_anew(callback)


def start_anew(callback: Callback) -> None:
    """What looks for a best value forgets the one it has, such as that of the phase before."""
    if isinstance(callback, RunCheckpoint):
        callback.best = None
    if isinstance(callback, EarlyStopping):
        callback.wait_count = 0
        callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
