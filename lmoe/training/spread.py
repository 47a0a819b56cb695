"""One process whose base lies on several devices: its layers stay where they are, and batches go to the first."""

from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

from lmoe.training.module import AdapterModule


class SpreadStrategy(SingleDeviceStrategy):
    """Lightning's strategy for one device, which leaves the model where it lies.

    Args:
        device: the first one, where batches go and losses are summed up.
    """

    def model_to_device(self) -> None:
        """Only what the module counts with goes to the first device."""
        assert isinstance(self.lightning_module, AdapterModule)
        put_in_place(self.lightning_module, self)

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
