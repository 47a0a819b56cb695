"""A frozen Linear and one low-rank branch on one input, with one backward pass.

Shapes: N tokens, D in, O out, R rank; `...` any leading token dimensions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lmoe.ops.frozen_linear import frozen_output
from lmoe.ops.one_launch import in_type, rows, times


def frozen_and_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """y = x W^T + bias + scaling * x A^T B^T, saving x and x A^T.

    The branch is added by the matmul with B, and its gradient to that of x by the matmul with A, where autograd would
    add tensors of the size of y and of x.

    Args:
        x: (..., D).
        weight: (O, D), without gradient.
        bias: (O,) without gradient, or None.
        lora_A: (R, D) in float32.
        lora_B: (O, R) in float32.
        scaling: alpha / R.
        dtype: type of y: that of autocast, or of all tensors.

    Returns:
        (..., O).
    """
    return _FrozenAndLora.apply(x, weight, bias, lora_A, lora_B, scaling, dtype)  # type: ignore[return-value]


class _FrozenAndLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x_c, weight_c = x.to(dtype), weight.to(dtype)  # (..., D), (O, D)
            A, B = in_type([lora_A, lora_B], dtype)
            y = frozen_output(x_c, weight_c, bias)
            hidden = linear(rows(x_c), A)  # (N, R)
            rows(y).addmm_(hidden, B.t(), alpha=scaling)
        ctx.save_for_backward(x_c, weight_c, A, B, hidden)
        ctx.scaling, ctx.x_dtype, ctx.dtype = scaling, x.dtype, lora_A.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x_c, weight, A, B, hidden = ctx.saved_tensors  # (..., D), (O, D), (R, D), (O, R), (N, R)
        grad_NO = rows(grad_y)
        grad_x = grad_A = grad_B = None
        grad_hidden = times(ctx.scaling, grad_NO, B)  # (N, R)
        if ctx.needs_input_grad[0]:
            grad_x = (grad_NO @ weight).addmm_(grad_hidden, A).view(x_c.shape).to(ctx.x_dtype)
        if ctx.needs_input_grad[3]:
            grad_A = grad_hidden.t() @ rows(x_c)  # (R, D)
        if ctx.needs_input_grad[4]:
            grad_B = times(ctx.scaling, grad_NO.t(), hidden)  # (O, R)
        found = in_type([grad for grad in (grad_A, grad_B) if grad is not None], ctx.dtype)
        if grad_B is not None:
            grad_B = found.pop()
        if grad_A is not None:
            grad_A = found.pop()
        return grad_x, None, None, grad_A, grad_B, None, None
