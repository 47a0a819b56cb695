"""FSDP2: the frozen backbone sharded over the processes, adapters and routers whole on each.

Adapters are small: sharding them would save little, gather them at every layer, and make checkpoints depend on the
number of processes. So only what is frozen is sharded (fully_shard, PyTorch FSDP2), the gradients of the rest are
averaged once a step, and a checkpoint is the same file as that of one process. Weights that are unread
(backbones/weight_files.py) are sharded without numbers, and then each process reads its own rows of them.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lmoe.backbones.weight_files import UNREAD, WeightFiles, base_parameter_name, unread
from lmoe.injection.record import injected
from lmoe.injection.roles import adapter_buffers, adapter_parameters
from lmoe.injection.tracing import adapters_off
from lmoe.ops.processes import sum_all_in_place


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


@contextmanager
def whole_outside_layers(model: nn.Module) -> Iterator[None]:
    """Have embeddings, norms and head whole inside the block, for forwards that begin in the midst of a sharded model;
    nothing where it is not sharded. Layers gather their own.

    NOTE torch takes the module whose forward is the first for the outermost that is sharded, and each layer would be it
    if nothing else had run before.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    with adapters_off(model), torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def read_shards(model: nn.Module, device: torch.device) -> None:
    """Read the rows of this process of each unread weight of a sharded model; nothing where all are read.

    Args:
        model: sharded by `shard_backbone`.
        device: of this process.
    """
    files = unread(model)
    if files is None:
        return
    read: dict[Tensor, nn.Parameter] = {}  # a weight that two modules share is one weight
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor) and parameter.to_local().is_meta:
                if parameter not in read:
                    weight = base_parameter_name(f"{path}.{name}")
                    read[parameter] = nn.Parameter(_read_shard(files, weight, parameter, device), requires_grad=False)
                module._parameters[name] = read[parameter]
    delattr(model, UNREAD)


def _read_shard(files: WeightFiles, name: str, parameter: DTensor, device: torch.device) -> DTensor:
    """A weight with the rows of this process read.

    As `fully_shard` cuts it each process has as many rows as the first, and the last ones have what is left.
    """
    mesh, rows = parameter.device_mesh, torch.empty_like(parameter.to_local(), device=device)
    first = mesh.get_local_rank() * math.ceil(len(parameter) / mesh.size())
    if len(rows):
        files.read_rows(name, rows, first)
    return DTensor.from_local(
        rows, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def average_gradients(parameters: list[nn.Parameter], processes: int) -> None:
    """Mean over all processes of the gradients of whole parameters, in place; no gradient counts as zero.

    NOTE no copy is made of them, but of one that is not laid out as its parameter, which every process knows alike.
    """
    gradients = []
    for parameter in parameters:
        own = parameter.grad
        if own is None or own.stride() != parameter.stride():
            parameter.grad = torch.zeros_like(parameter) if own is None else torch.empty_like(parameter).copy_(own)
        assert parameter.grad is not None
        gradients.append(parameter.grad.div_(processes))
    sum_all_in_place(gradients)


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
