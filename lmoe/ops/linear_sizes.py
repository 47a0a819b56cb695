"""Sizes and numbers of the layers that count as a Linear, whatever they call them.

Shapes: D in, O out.
"""

import math

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types of weights that are the numbers themselves. NOTE those of 8 bits are floating point too, and yet codes, which
count together with scales that lie beside them."""


def is_linear(module: nn.Module) -> bool:
    """Whether y = x W^T + b is all that a module computes: nn.Linear, quantised ones, and GPT-2's Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def sizes(linear: nn.Module) -> tuple[int, int]:
    """Numbers of inputs and outputs, (D, O). NOTE a quantised weight does not have this shape, and that of Conv1D is
    (D, O)."""
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Numbers that each parameter stands for, by name: of a quantised weight those before several went into a byte."""
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        name = f"{path}.weight" if path else "weight"
        if is_linear(module) and name in counts:
            counts[name] = math.prod(sizes(module))
    return counts


def weight_OD(linear: nn.Module) -> Tensor:
    """The numbers of W, (O, D); a view.

    Raises:
        ValueError: the weight is packed, or of codes that scales belong to, so that it has no numbers of this shape.
    """
    weight = linear.weight
    assert isinstance(weight, Tensor)
    if isinstance(linear, Conv1D):
        weight = weight.t()
    in_features, out_features = sizes(linear)
    if weight.dtype not in PLAIN or weight.shape != (out_features, in_features):
        raise ValueError("the weight is quantised")
    return weight
