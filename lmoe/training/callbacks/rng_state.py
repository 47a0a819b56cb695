"""Restore the random state, so that dropout goes on as if the run had never stopped."""

import random

import numpy as np
import torch
from lightning.pytorch import Callback


def rng_state() -> dict:
    """The state of every global generator, in types that load with weights_only."""
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
    return state


def set_rng_state(state: dict) -> None:
    """Inverse of rng_state."""
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    words = state["numpy"]["state"]
    keys = np.array(words["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {"key": keys, "pos": words["pos"]}})
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


class RngState(Callback):
    """Saves the generators and restores them on the first batch.

    NOTE not on_train_start: iter(DataLoader) draws a seed from the global generator after it.
    """

    def __init__(self) -> None:
        self._pending: dict | None = None

    def state_dict(self) -> dict:
        return rng_state()

    def load_state_dict(self, state_dict: dict) -> None:
        self._pending = state_dict

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self._pending is not None:
            set_rng_state(self._pending)
            self._pending = None
