"""A frozen Linear, a router and the A's of the experts on one input, with one backward pass.

Shapes: N tokens, D in, O out, E experts, R rank, H = E * R, or R where all experts share one A; `...` any leading token
dimensions.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lmoe.ops.one_launch import copy_each, rows


class Down(NamedTuple):
    """What `frozen_and_down` returns.

    y: (..., O) output of the frozen Linear.
    hidden: (..., H) h = x A^T; H = 0 without A.
    logits: (..., E) z = x W_r^T, None without a router.
    lora_B: (E, O, R) in the type of the branch, None without one.
    """

    y: Tensor
    hidden: Tensor
    logits: Tensor | None
    lora_B: Tensor | None


def frozen_and_down(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    router: Tensor | None,
    dtype: torch.dtype,
) -> Down:
    """y = x W^T + bias, h = x A^T and z = x W_r^T, saving x alone.

    The backward pass has one matmul for both weight gradients and sums the gradient of x in place, where autograd would
    add three tensors of the size of x. Where the router's type is not that of the branch (float32 under autocast), z
    and its gradient are in the router's type; for the weight's gradient dz goes in two parts, dz = high + low, through
    the matmul of the branch, which loses nothing of dz. B is only brought into the type of the branch here, in one
    launch with A and the router, and its gradient back with A's.

    Args:
        x: (..., D).
        weight: (O, D), without gradient.
        bias: (O,) without gradient, or None.
        lora_A: (H, D) in float32, or None.
        lora_B: (E, O, R) in float32, or None; fastest where memory holds it as (E, R, O).
        router: (E, D) W_r in the router's type, or None.
        dtype: type of y and h: that of autocast, or of all tensors.
    """
    lora_A = weight.new_empty(0, weight.shape[1]) if lora_A is None else lora_A
    cast_B = lora_B is not None and lora_B.dtype != dtype
    y, hidden, logits, B = _FrozenAndDown.apply(x, weight, bias, lora_A, lora_B if cast_B else None, router, dtype)  # type: ignore[misc]
    return Down(y, hidden, logits, B if cast_B else lora_B)


class _FrozenAndDown(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor | None,
        router: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        width = lora_A.shape[0]  # H
        with torch.autocast(x.device.type, enabled=False):
            x_c, weight_c = x.to(dtype), weight.to(dtype)  # (..., D), (O, D)
            factors, B_ERO = _in_one_type(lora_A, router, lora_B, dtype)
            y = frozen_output(x_c, weight_c, bias)
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
        ctx.B_dtype = None if lora_B is None else lora_B.dtype
        ctx.router_dtype = None if router is None else router.dtype
        return y, hidden, logits, None if B_ERO is None else B_ERO.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor, grad_hidden: Tensor, grad_logits: Tensor | None, grad_B: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_c, weight, factors = ctx.saved_tensors  # (..., D), (O, D), (H + E, D)
        width, total = ctx.width, factors.shape[0]  # H, H + E
        left = _beside(rows(grad_hidden), None if grad_logits is None else rows(grad_logits))
        grad_x = grad_A = grad_router = None
        if ctx.needs_input_grad[0]:
            grad_x = rows(grad_y) @ weight  # (N, D); factors may be (0, D), which adds nothing
            grad_x.addmm_(left[:, :total], factors)
            grad_x = grad_x.view(x_c.shape).to(ctx.x_dtype)
        first = 0 if ctx.needs_input_grad[3] else width  # the columns of `left` that a gradient is asked for
        last = left.shape[1] if ctx.needs_input_grad[5] else width
        if first < last:
            grads = left[:, first:last].t() @ rows(x_c)  # (last - first, D)
            if ctx.needs_input_grad[3]:
                grad_A = grads[:width]  # (H, D)
            if ctx.needs_input_grad[5]:
                parts = grads[width - first :].view(-1, total - width, grads.shape[1])  # (1 or 2, E, D): high, low
                grad_router = parts.sum(0, dtype=ctx.router_dtype) if len(parts) > 1 else parts[0].to(ctx.router_dtype)
        grad_A, grad_B = _back(grad_A, ctx.A_dtype, grad_B if ctx.needs_input_grad[4] else None, ctx.B_dtype)
        return grad_x, None, None, grad_A, grad_B, grad_router, None


def _in_one_type(
    lora_A: Tensor, router: Tensor | None, lora_B: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """A over the router's weight, (H + E, D), and B as (E, R, O)."""
    parts = [lora_A] if router is None else [lora_A, router]
    if lora_B is None and all(part.dtype == dtype for part in parts):
        return lora_A if router is None else torch.cat(parts), None
    factors = lora_A.new_empty(sum(map(len, parts)), lora_A.shape[1], dtype=dtype)
    targets = list(factors.split([len(part) for part in parts]))
    B_ERO = None
    if lora_B is not None:
        B_ERO = lora_B.new_empty(lora_B.transpose(1, 2).shape, dtype=dtype)
        parts, targets = [*parts, lora_B.transpose(1, 2)], [*targets, B_ERO]
    copy_each(targets, parts)
    return factors, B_ERO


def _back(
    grad_A: Tensor | None, A_dtype: torch.dtype, grad_B: Tensor | None, B_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of (H, D) A and (E, O, R) B in the types of these."""
    if grad_B is None or B_dtype is None:
        return None if grad_A is None else grad_A.to(A_dtype), None
    found = [grad_B.transpose(1, 2)] if grad_A is None else [grad_B.transpose(1, 2), grad_A]
    cast = [torch.empty_like(grad, dtype=B_dtype, memory_format=torch.contiguous_format) for grad in found]
    copy_each(cast, found)
    return cast[1] if grad_A is not None else None, cast[0].transpose(1, 2)


def _beside(grad_hidden: Tensor, grad_logits: Tensor | None) -> Tensor:
    """The gradients of h and z, (N, H), (N, H + E), or (N, H + 2 E) where dz goes in two parts."""
    if grad_logits is None:
        return grad_hidden
    if grad_logits.dtype == grad_hidden.dtype:
        return torch.cat([grad_hidden, grad_logits], dim=1)
    (tokens, width), experts = grad_hidden.shape, grad_logits.shape[1]
    left = grad_hidden.new_empty(tokens, width + 2 * experts)
    hidden, high, low = left.split([width, experts, experts], dim=1)
    hidden.copy_(grad_hidden)
    high.copy_(grad_logits)
    torch.sub(grad_logits, high, out=low)  # in the type of dz, then rounded
    return left


def frozen_output(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias as a tensor that may be written into.

    Args:
        x: (..., D).
        weight: (O, D) in the same type.
        bias: (O,) in any type, or None.

    Returns:
        (..., O).
    """
    if bias is None:
        return linear(x, weight)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])  # NOTE linear would return a view here
    torch.addmm(bias.to(x.dtype), rows(x), weight.t(), out=rows(y))
    return y
