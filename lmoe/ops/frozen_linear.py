"""A frozen Linear, a router and the A's of the experts on one input, with one backward pass.

Shapes: N tokens, D in, O out, E experts, H = E * R (or R where all experts share one A); `...` leading dimensions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def frozen_and_down(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, router: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y = x W^T + bias, h = x A^T and z = x W_r^T, saving x alone.

    The gradient of x is summed in place, where autograd would add three tensors of the size of x. The router computes
    in its own type; its share of the gradient of x is added in the type of x.

    Args:
        x: (..., D).
        weight: (O, D), without gradient.
        bias: (O,) without gradient, or None.
        lora_A: (H, D) in float32.
        router: (E, D) W_r in the router's type, or None.
        dtype: type of y and h: that of autocast, or of all tensors.

    Returns:
        y (..., O), h (..., H), and z (..., E) or None.
    """
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
            x_c, weight_c = x.to(dtype), weight.to(dtype)
            together = router is not None and router.dtype == dtype
            down = torch.cat([lora_A, router]) if router is not None and together else lora_A
            if bias is None:
                y = linear(x_c, weight_c)
            else:  # NOTE linear would return a view here, and a view cannot be written into later
                y = x_c.new_empty(*x_c.shape[:-1], weight_c.shape[0])
                torch.addmm(bias.to(dtype), _rows(x_c), weight_c.t(), out=_rows(y))
            hidden, logits = linear(x_c, down.to(dtype)), None
            if together:
                logits, hidden = hidden[..., lora_A.shape[0] :], hidden[..., : lora_A.shape[0]]
            elif router is not None:
                logits = linear(x.to(router.dtype), router)
        ctx.save_for_backward(x_c, x if logits is not None and not together else None, weight_c, lora_A, router)
        ctx.x_dtype = x.dtype
        return y, hidden, logits

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_hidden: Tensor | None, grad_logits: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_c, x, weight, lora_A, router = ctx.saved_tensors
        together = router is not None and router.dtype == x_c.dtype
        parts = [(grad_hidden, lora_A)]
        if together:
            parts.append((grad_logits, router))
        given = [(_rows(grad), factor) for grad, factor in parts if grad is not None]
        grad_x = grad_A = grad_router = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.zeros_like(x_c).flatten(0, -2) if grad_y is None else _rows(grad_y) @ weight
            for grad, factor in given:
                grad_x.addmm_(grad, factor.to(grad_x.dtype))
            if router is not None and not together and grad_logits is not None:
                grad_x.addmm_(_rows(grad_logits).to(grad_x.dtype), router.to(grad_x.dtype))
            grad_x = grad_x.view(x_c.shape).to(ctx.x_dtype)
        x_rows = _rows(x_c)
        if ctx.needs_input_grad[3] and grad_hidden is not None:
            grad_A = (_rows(grad_hidden).t() @ x_rows).to(lora_A.dtype)
        if ctx.needs_input_grad[4] and grad_logits is not None:
            own = x_rows if together else _rows(x).to(grad_logits.dtype)
            grad_router = _rows(grad_logits).t() @ own
        return grad_x, None, None, grad_A, grad_router, None


def _rows(values: Tensor) -> Tensor:
    """(N, ...)."""
    return values.reshape(-1, values.shape[-1])
