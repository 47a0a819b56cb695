"""One optimizer step: what is known of it, and the stages in which callbacks act at its end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lmoe.metrics.routing import SiteRouting


class Stage(IntEnum):
    """When a callback acts at the end of an optimizer step. Each stage finds what the ones before it have left."""

    guard = 1
    """Gradients and weights are what they may be, and the routing of the step counts."""
    measure = 2
    """Losses, norms and routing become numbers in the logs."""
    decide = 3
    """What has been measured begins a phase, starts a validation, or ends the run."""
    save = 4
    """A checkpoint holds all of this."""


class WindowLosses:
    """Sums over the micro-batches of one optimizer step; the names are those of the first micro-batch."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self._sums: Tensor | None = None

    def add(self, shares: dict[str, Tensor]) -> None:
        """Add one micro-batch's shares, each ()."""
        values = torch.stack([share.detach().float() for share in shares.values()])
        self.names, self._sums = tuple(shares), values if self._sums is None else self._sums + values

    def sums(self, device: torch.device) -> Tensor:
        """(L,) float32 losses of the window, in the order of the names."""
        return torch.zeros(0, device=device) if self._sums is None else self._sums.to(device)

    def finite(self) -> bool:
        """Whether every loss of the window is a number."""
        return self._sums is None or bool(torch.isfinite(self._sums).all())

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in self.values().items())

    def values(self) -> dict[str, float]:
        """The losses of the window under their metric names."""
        values = [] if self._sums is None else self._sums.tolist()
        return dict(zip(self.names, values, strict=True)) if values else {}


@dataclass(slots=True)
class StepRecord:
    """What is known of one optimizer step, from its first micro-batch on.

    Args:
        window: losses of the micro-batches of this rank.
        tokens: valid tokens of the micro-batches of this rank.
        learning_rates: with which the step was made, by optimizer group.
        gradient_norms: before clipping, by optimizer group.
        losses: over all ranks, under their metric names; empty until they are read.
        tokens_of_all: valid tokens over all ranks, once they are read.
        finite: every loss and gradient is a number, on all ranks.
        skipped: the step is left out: its gradients or a loss are no numbers.
        routing: over all ranks and since the last logged step, by site; empty of a step that is not logged.
    """

    window: WindowLosses = field(default_factory=WindowLosses)
    tokens: Tensor | int = 0
    learning_rates: dict[str, float] = field(default_factory=dict)
    gradient_norms: Mapping[str, Tensor | float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    tokens_of_all: int = 0
    finite: bool = True
    skipped: bool = False
    routing: dict[str, SiteRouting] = field(default_factory=dict)


class StepCallback(Callback):
    """A callback that acts at the end of optimizer steps; Lightning's other moments are there as ever."""

    stage: ClassVar[Stage]

    def before_step(self, trainer: Trainer, module: Any, step: StepRecord, optimizer: torch.optim.Optimizer) -> None:
        """Called when the gradients of all micro-batches are there, before they are clipped."""

    def after_step(self, trainer: Trainer, module: Any, step: StepRecord) -> None:
        """Called when the optimizer has made the step, or has left it out."""


class StepStages(Callback):
    """Hands the module's `step_record` to callbacks, one after the other.

    Args:
        callbacks: in the order in which they act.
    """

    def __init__(self, callbacks: Sequence[StepCallback]) -> None:
        self.callbacks = callbacks

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer) -> None:
        for callback in self.callbacks:
            callback.before_step(trainer, pl_module, pl_module.step_record, optimizer)  # type: ignore[arg-type]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int) -> None:
        if finished_step(trainer, batch_idx):
            for callback in self.callbacks:
                callback.after_step(trainer, pl_module, pl_module.step_record)  # type: ignore[arg-type]


def in_stages(callbacks: Sequence[StepCallback], others: Sequence[Callback] = ()) -> list[Callback]:
    """The list of callbacks for a Trainer, in which those of a step act stage by stage.

    Args:
        callbacks: in the order in which they act, which is that of their stages.
        others: callbacks of the user, which act after what decides and before what saves.
    """
    assert list(callbacks) == sorted(callbacks, key=lambda callback: callback.stage), "a stage out of order"
    early = [callback for callback in callbacks if callback.stage < Stage.save]
    late = [callback for callback in callbacks if callback.stage is Stage.save]
    return [*early, StepStages(early), *others, *late, StepStages(late)]


def starts_step(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a micro-batch is the first of an optimizer step."""
    return batch_idx % trainer.accumulate_grad_batches == 0


def finished_step(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the micro-batch just done completed an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0
