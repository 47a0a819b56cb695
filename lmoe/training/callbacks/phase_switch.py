"""Switch to the next phase at an accumulation boundary."""

from lightning.pytorch import Callback, Trainer
from torch.nn.parallel import DistributedDataParallel

from lmoe.training.optimizers import carry_state
from lmoe.training.sft_module import SftModule


class PhaseSwitch(Callback):
    """Before the first micro-batch of a phase: roles, stale gradients, DDP, optimizer, scheduler."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: SftModule, batch, batch_idx: int) -> None:
        phase = pl_module.schedule.phase_at(trainer.global_step)
        if phase == pl_module.phase:
            return
        pl_module.set_phase(phase)
        strategy = trainer.strategy
        if isinstance(strategy.model, DistributedDataParallel):  # its reducer was made for the old phase's parameters
            strategy.model = strategy.lightning_module
            strategy.configure_ddp()  # type: ignore[attr-defined]
        old = trainer.optimizers[0]
        strategy.setup_optimizers(trainer)
        carry_state(old, trainer.optimizers[0])
