"""One process whose base lies on several devices: its layers stay where they are, and batches go to the first."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

from lmoe.training.module import AdapterModule


class SpreadStrategy(SingleDeviceStrategy):
    """Lightning's strategy for one device, which leaves the model where it lies.

    Args:
        gpus: numbers of the GPUs, the first of which gets batches and sums up losses; none: the CPU.
    """

    def __init__(self, gpus: Sequence[int]) -> None:
        super().__init__(torch.device("cuda", gpus[0]) if gpus else torch.device("cpu"))
        self.gpus = tuple(gpus)

    def model_to_device(self) -> None:
        """Only what the module counts with goes to the first device."""
        assert isinstance(self.lightning_module, AdapterModule)
        put_in_place(self.lightning_module, self)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each moment goes to its parameter's device, where Lightning would take all of them to the first."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

    def teardown(self) -> None:
        """Let go of everything but the model, which Lightning would move to the CPU."""
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def put_in_place(module: AdapterModule, strategy: Strategy) -> None:
    """Put a module onto the device of a process, but for a base that lies on several devices, which stays there."""
    if not isinstance(strategy, SpreadStrategy):
        module.to(strategy.root_device)
        return
    for child in module.children():
        if child is not module.model:
            child.to(strategy.root_device)
