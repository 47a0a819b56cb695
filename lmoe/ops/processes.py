"""Sums over the processes of a torch.distributed group."""

import torch
from torch import Tensor


def sum_in_place(values: Tensor) -> Tensor:
    """The values, replaced by their sum over all processes; every process must call it.

    Args:
        values: on the device that the process group works on, as the gradients of the model are.
    """
    torch.distributed.all_reduce(values)
    return values


def several_processes() -> bool:
    """Whether this process belongs to a group of torch.distributed."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
