"""What the processes of a run tell one another: every reduction of a run passes through here."""

from typing import Literal, TypeVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor

Value = TypeVar("Value")


def over_ranks(trainer: Trainer, values: Tensor, operation: Literal["sum", "max"] = "sum") -> Tensor:
    """The values of all processes together, on the device of the run; every process must call it.

    NOTE nccl knows no tensor of the CPU, and gloo, which the tests run with, takes any: so the values are brought to
    the run's device here.

    Args:
        trainer: whose processes.
        values: on any device; may be overwritten.
        operation: what is done with them, element by element.
    """
    strategy = trainer.strategy
    return strategy.reduce(values.to(strategy.root_device), reduce_op=operation)  # type: ignore[return-value]


def any_rank(trainer: Trainer, decision: bool) -> bool:
    """Whether it is so in at least one process; every process must call it."""
    return trainer.strategy.reduce_boolean_decision(decision, all=False)


def from_every_rank(trainer: Trainer, value: object) -> list[object]:
    """The value of each process, in the order of the ranks; every process must call it.

    NOTE torch pickles it into a tensor on the device that the process group knows.
    """
    values = [value] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def from_first_rank(trainer: Trainer, value: Value) -> Value:
    """The value of the first process; every process must call it, what the others give is not looked at."""
    return trainer.strategy.broadcast(value)
