"""A frozen Linear, a router and the A's of the experts on one input, with one backward pass.

Shapes: N tokens, D in, O out, E experts, H = E * R (or R where all experts share one A); `...` leading dimensions.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def frozen_and_down(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor | None, router: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y = x W^T + bias, h = x A^T and z = x W_r^T, saving x alone.

    The backward pass has one matmul for both weight gradients and sums the gradient of x in place, where autograd would
    add three tensors of the size of x. Where the router's type is not that of the branch (float32 under autocast), z
    and its gradient are in the router's type; for the weight's gradient dz goes in two parts, dz = high + low, through
    the matmul of the branch, which loses nothing of dz.

    Args:
        x: (..., D).
        weight: (O, D), without gradient.
        bias: (O,) without gradient, or None.
        lora_A: (H, D) in float32, or None: h is then (..., 0).
        router: (E, D) W_r in the router's type, or None.
        dtype: type of y and h: that of autocast, or of all tensors.

    Returns:
        y (..., O), h (..., H), and z (..., E) or None.
    """
    lora_A = weight.new_empty(0, weight.shape[1]) if lora_A is None else lora_A
    y, hidden, logits = _FrozenAndDown.apply(x, weight, bias, lora_A, router, dtype)  # type: ignore[misc]
    return y, hidden, logits


class _FrozenAndDown(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        router: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        with torch.autocast(x.device.type, enabled=False):
            x_c, weight_c = x.to(dtype), weight.to(dtype)  # (..., D), (O, D)
            factors = lora_A.to(dtype)  # (H, D)
            if router is not None:
                factors = torch.cat([factors, router.to(dtype)])  # (H + E, D)
            if bias is None:
                y = linear(x_c, weight_c)  # (..., O)
            else:  # NOTE linear would return a view here, and a view cannot be written into later
                y = x_c.new_empty(*x_c.shape[:-1], weight_c.shape[0])
                torch.addmm(bias.to(dtype), _rows(x_c), weight_c.t(), out=_rows(y))
            width = lora_A.shape[0]  # H
            logits = None
            if router is None or router.dtype == dtype:
                hidden = linear(x_c, factors)  # (..., H + E): both in one matmul
                if router is not None:
                    hidden, logits = hidden[..., :width], hidden[..., width:]
            else:
                hidden = linear(x_c, factors[:width])  # (..., H)
                logits = linear(x.to(router.dtype), router)  # (..., E)
        ctx.save_for_backward(x_c, weight_c, factors)
        ctx.width, ctx.x_dtype, ctx.A_dtype = width, x.dtype, lora_A.dtype
        ctx.router_dtype = None if router is None else router.dtype
        return y, hidden, logits

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor, grad_hidden: Tensor, grad_logits: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_c, weight, factors = ctx.saved_tensors  # (..., D), (O, D), (H + E, D)
        x_ND = _rows(x_c)
        width, total = ctx.width, factors.shape[0]  # H, H + E
        parts = [_rows(grad_hidden)]  # (N, H)
        if grad_logits is not None:
            dz_NE = _rows(grad_logits)
            high_NE = dz_NE.to(x_c.dtype)
            parts.append(high_NE)
            if dz_NE.dtype != x_c.dtype:
                parts.append((dz_NE - high_NE).to(x_c.dtype))
        left = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]  # (N, H), (N, H + E) or (N, H + 2 E)
        grad_x = grad_A = grad_router = None
        if ctx.needs_input_grad[0]:
            grad_x = _rows(grad_y) @ weight  # (N, D); factors may be (0, D), which adds nothing
            grad_x.addmm_(left[:, :total], factors)
            grad_x = grad_x.view(x_c.shape).to(ctx.x_dtype)
        first = 0 if ctx.needs_input_grad[3] else width  # the columns of `left` that a gradient is asked for
        last = left.shape[1] if ctx.needs_input_grad[4] else width
        if first < last:
            grads = left[:, first:last].t() @ x_ND  # (last - first, D)
            if ctx.needs_input_grad[3]:
                grad_A = grads[:width].to(ctx.A_dtype)  # (H, D)
            if ctx.needs_input_grad[4]:
                grad_router = grads[width - first : total - first].to(ctx.router_dtype)  # (E, D)
                if len(parts) > 2:
                    grad_router = grad_router + grads[total - first :]
        return grad_x, None, None, grad_A, grad_router, None


def _rows(values: Tensor) -> Tensor:
    """Values with all dimensions but the last made one, (N, ...)."""
    return values.reshape(math.prod(values.shape[:-1]), values.shape[-1])  # which may be 0 wide
