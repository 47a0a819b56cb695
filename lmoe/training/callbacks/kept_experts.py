"""Keep the first experts of a model that grows bit by bit as they are. Logs nothing."""

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lmoe.injection.kept import kept_rows
from lmoe.ops.row_guard import drop_gradients, first_rows, put_back
from lmoe.training.module import AdapterModule
from lmoe.training.step import Stage, StepCallback, StepRecord


class KeptExperts(StepCallback):
    """Their gradients are zero before norms and clipping, and their rows are put back after each step.

    NOTE after what moves selection biases, and before whatever reads weights at the end of a step. The originals are
    those that stand when training starts, which on resume are the checkpoint's, and equal because they never moved.
    """

    stage = Stage.guard

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.originals: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: AdapterModule) -> None:
        self.rows = kept_rows(pl_module.model)
        self.originals = first_rows(_tensors(pl_module, self.rows), self.rows)

    def before_step(self, trainer: Trainer, module: AdapterModule, step: StepRecord, optimizer) -> None:
        if self.rows:
            named = dict(module.model.named_parameters())
            drop_gradients({n: p.grad for n, p in named.items() if n in self.rows and p.grad is not None}, self.rows)

    @torch.no_grad()
    def after_step(self, trainer: Trainer, module: AdapterModule, step: StepRecord) -> None:
        if self.rows:
            put_back(_tensors(module, self.rows), self.originals, self.rows)


def _tensors(module: AdapterModule, names: dict[str, int]) -> dict[str, Tensor]:
    """Parameters and buffers of the model by name."""
    if not names:
        return {}
    every = {**dict(module.model.named_parameters()), **dict(module.model.named_buffers())}
    return {name: every[name] for name in names}
