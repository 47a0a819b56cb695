"""Keep the first experts of a model that grows bit by bit as they are. Logs nothing."""

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lmoe.injection.kept import kept_rows
from lmoe.ops.row_guard import drop_gradients, first_rows, put_back
from lmoe.training.callbacks.step_metrics import finished_step
from lmoe.training.sft_module import SftModule


class KeptExperts(Callback):
    """Their gradients are zero before norms and clipping, and their rows are put back after each step.

    NOTE after what moves selection biases, and before whatever reads weights at the end of a step. The originals are
    those that stand when training starts, which on resume are the checkpoint's, and equal because they never moved.
    """

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.originals: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: SftModule) -> None:
        self.rows = kept_rows(pl_module.model)
        self.originals = first_rows(_tensors(pl_module, self.rows), self.rows)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: SftModule, optimizer) -> None:
        if self.rows:
            named = dict(pl_module.model.named_parameters())
            drop_gradients({n: p.grad for n, p in named.items() if n in self.rows and p.grad is not None}, self.rows)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: SftModule, outputs, batch, batch_idx: int) -> None:
        if self.rows and finished_step(trainer, batch_idx):
            put_back(_tensors(pl_module, self.rows), self.originals, self.rows)


def _tensors(module: SftModule, names: dict[str, int]) -> dict[str, Tensor]:
    """Parameters and buffers of the model by name."""
    if not names:
        return {}
    every = {**dict(module.model.named_parameters()), **dict(module.model.named_buffers())}
    return {name: every[name] for name in names}
