"""One low-rank branch, added to the output of a frozen Linear in place.

Shapes: O out, R rank; `...` any leading token dimensions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmoe.ops.one_launch import rows, times


def add_lora(y: Tensor, hidden: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """y + scaling * h B^T, written into y by the matmul with B, where autograd would add tensors of the size of y.

    Args:
        y: (..., O) contiguous output of the frozen layer; changed in place.
        hidden: (..., R) h = x A^T in the type of y.
        lora_B: (O, R) in the type of y.
        scaling: alpha / R.

    Returns:
        y.
    """
    if not torch.is_grad_enabled():
        return _added(y, hidden, lora_B, scaling)
    return _AddLoRA.apply(y, hidden, lora_B, scaling)  # type: ignore[return-value]


def _added(y: Tensor, hidden: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    rows(y).addmm_(rows(hidden), lora_B.t(), alpha=scaling)
    return y


class _AddLoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, hidden: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(hidden, lora_B)
        ctx.scaling = scaling
        ctx.mark_dirty(y)
        return _added(y, hidden, lora_B, scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        hidden, lora_B = ctx.saved_tensors  # (..., R), (O, R)
        grad_NO = rows(grad_y)
        grad_hidden = grad_B = None
        if ctx.needs_input_grad[1]:
            grad_hidden = times(ctx.scaling, grad_NO, lora_B).view(hidden.shape)
        if ctx.needs_input_grad[2]:
            grad_B = times(ctx.scaling, grad_NO.t(), rows(hidden))  # (O, R)
        return grad_y, grad_hidden, grad_B, None
