"""DDP: the frozen backbone whole in every process, adapters and routers averaged.

DDP sends whatever a module holds when it is wrapped, which a run does at the start of each phase: the frozen base too,
that every process has read from the same files. So it is told to leave that alone.
"""

from lightning.pytorch.strategies import DDPStrategy

from lmoe.injection.roles import adapter_buffers
from lmoe.training.module import AdapterModule

IGNORED = "_ddp_params_and_buffers_to_ignore"
"""Where DDP looks for names. NOTE PyTorch's function that sets it marks the parameters too, for good, and in a later
phase others train."""


class ReplicatedStrategy(DDPStrategy):
    """Lightning's DDP, which sends what trains and the buffers of adapters and routers."""

    def __init__(self) -> None:
        super().__init__(gradient_as_bucket_view=True)

    def configure_ddp(self) -> None:
        """Wrap the module, for the phase of a run of adapters; of any other module everything is sent."""
        module = self.lightning_module
        if isinstance(module, AdapterModule):
            setattr(module, IGNORED, ignored(module))
        super().configure_ddp()


def ignored(module: AdapterModule) -> list[str]:
    """Names of all that DDP has not to send: parameters that do not train now, and the backbone's buffers."""
    own = {f"model.{name}" for name in adapter_buffers(module.model)}
    still = [name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad]
    return still + [name for name, _ in module.named_buffers(remove_duplicate=False) if name not in own]
