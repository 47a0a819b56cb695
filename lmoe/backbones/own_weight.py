"""Weights that something may be added to: plain numbers, held by one module."""

from torch import Tensor, nn

from lmoe.backbones.weight_files import base_parameter_name
from lmoe.ops.linear_sizes import weight_OD


class SharedWeightError(ValueError):
    """A weight that another module holds too.

    Args:
        other: name of the parameter there.
    """

    def __init__(self, other: str) -> None:
        super().__init__(f"the weight is {other} too")
        self.other = other


def own_weight(model: nn.Module, path: str, linear: nn.Module) -> Tensor:
    """The numbers of W, (O, D), a view without gradient; what is written to it changes this Linear alone.

    Args:
        model: all modules that may hold the weight.
        path: of the Linear in the bare backbone.
        linear: which stands there, or within what stands there.

    Raises:
        SharedWeightError: another module holds the weight.
        ValueError: the weight is quantised.
    """
    numbers = weight_OD(linear).detach()
    named = model.named_parameters(remove_duplicate=False)
    holders = [base_parameter_name(name) for name, parameter in named if parameter is linear.weight]
    if others := [name for name in holders if name != f"{path}.weight"]:
        raise SharedWeightError(others[0])
    return numbers
