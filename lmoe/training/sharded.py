"""FSDP2: the frozen backbone sharded over the processes, adapters and routers whole on each.

Adapters are small: sharding them would save little, gather them at every layer, and make checkpoints depend on the
number of processes. So only what is frozen is sharded (fully_shard, PyTorch FSDP2), the gradients of the rest are
averaged once a step, and a checkpoint is the same file as that of one process.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lmoe.injection.record import injected
from lmoe.injection.roles import adapter_buffers, adapter_parameters
from lmoe.ops.processes import sum_in_place


def shard_backbone(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the frozen parameters of an injected model, decoder layer by decoder layer, in place.

    Args:
        model: on any device; its adapters and routers stay whole.
        mesh: the processes, in one dimension.
    """
    whole = set(adapter_parameters(model).values())
    for path in injected(model).plan.layers:
        fully_shard(model.get_submodule(path), mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)


def average_gradients(parameters: list[nn.Parameter], processes: int) -> None:
    """Mean over all processes of the gradients of whole parameters, in one message; no gradient counts as zero."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / processes
    sum_in_place(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter).clone()


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 strategy, which saves and loads what is whole as one process would.

    Args:
        processes: of all nodes together.
    """

    def __init__(self, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # the phase must be known before the optimizer is made

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        model = self.lightning_module.model  # type: ignore[union-attr]
        whole = {**adapter_parameters(model), **adapter_buffers(model)}  # type: ignore[arg-type]
        return {f"model.{name}": tensor.detach() for name, tensor in whole.items()}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict=strict)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return Strategy.optimizer_state(self, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only=weights_only)
