"""Sums over the processes of a torch.distributed group."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sum_in_place(values: Tensor) -> Tensor:
    """The values, replaced by their sum over all processes; every process must call it.

    Args:
        values: on the device that the process group works on, as the gradients of the model are.
    """
    torch.distributed.all_reduce(values)
    return values


def sum_all_in_place(values: Sequence[Tensor]) -> None:
    """Replace each of several tensors by its sum over all processes; every process must call it with the same ones.

    NOTE all are on their way at once and none is copied, as a single message of them would be. What is sent is the
    memory of a tensor in its order, so each must have the same strides in all processes, without gaps.

    Args:
        values: on the device that the process group works on.
    """
    flat = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in values if tensor.numel()]
    for work in [torch.distributed.all_reduce(tensor, async_op=True) for tensor in flat]:
        assert work is not None  # this process is in the group
        work.wait()


def several_processes() -> bool:
    """Whether this process belongs to a group of torch.distributed."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
