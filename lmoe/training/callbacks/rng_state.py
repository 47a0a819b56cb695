"""Restore the random state, so that dropout goes on as if the run had never stopped."""

import random
from collections.abc import Sequence

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer

from lmoe.training.ranks import from_every_rank
from lmoe.training.spread import SpreadStrategy
from lmoe.training.step import finished_step

ENTRY = "lmoe_rng"
"""Entry of a checkpoint: the state of every rank."""


def rng_state(gpus: Sequence[int] = ()) -> dict:
    """The state of every global generator, in types that load with weights_only.

    Args:
        gpus: of a process that computes on several.
    """
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    words = numpy_state["state"]
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {"key": words["key"].tolist(), "pos": words["pos"]}},
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if gpus:
        state["gpus"] = {number: torch.cuda.get_rng_state(number) for number in gpus}
    return state


def set_rng_state(state: dict) -> None:
    """Set the generators to a state that `rng_state` has returned."""
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    words = state["numpy"]["state"]
    keys = np.array(words["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {"key": keys, "pos": words["pos"]}})
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
        for number, own in state.get("gpus", {}).items():
            if number < torch.cuda.device_count():
                torch.cuda.set_rng_state(own.cpu(), number)


def _gpus(trainer: Trainer) -> Sequence[int]:
    return trainer.strategy.gpus if isinstance(trainer.strategy, SpreadStrategy) else ()


class RngState(Callback):
    """Saves the generators of every rank as they were at the start of the accumulation window, which is where a resumed
    run starts, and restores them on the first batch.

    NOTE not on_train_start: iter(DataLoader) draws a seed from the global generator after it.
    """

    def __init__(self) -> None:
        self._pending: dict | None = None
        self._window_start: dict | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module, checkpoint: dict) -> None:
        own = self._pending or self._window_start or rng_state(_gpus(trainer))
        checkpoint[ENTRY] = from_every_rank(trainer, own)

    def on_load_checkpoint(self, trainer: Trainer, pl_module, checkpoint: dict) -> None:
        states, rank = checkpoint[ENTRY], trainer.global_rank
        self._pending = states[min(rank, len(states) - 1)]
        if rank >= len(states):  # more processes than wrote it: each further one draws numbers of its own
            generator = torch.Generator().manual_seed(trainer.global_step * trainer.world_size + rank)
            self._pending = {**states[0], "torch": generator.get_state()}

    def on_train_batch_start(self, trainer: Trainer, pl_module, batch, batch_idx: int) -> None:
        if self._pending is not None:
            set_rng_state(self._pending)
            self._pending = None
        if batch_idx % trainer.accumulate_grad_batches == 0 and trainer.accumulate_grad_batches > 1:
            self._window_start = rng_state(_gpus(trainer))

    def on_train_batch_end(self, trainer: Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if finished_step(trainer, batch_idx):
            self._window_start = None
