"""Frozen Linears, routers and the A's of the experts that read one input, with one backward pass.

Shapes: N tokens, D in, O out, E experts, R rank, H = E * R, or R where there is one A; S sites; `...` any leading
token dimensions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lmoe.ops.one_launch import copy_each, in_type, rows


class Beside(NamedTuple):
    """A frozen Linear, and what reads its input beside it.

    weight: (O, D), without gradient.
    bias: (O,) without gradient, or None.
    lora_A: (H, D) in float32, or None.
    lora_B: of any shape in float32, or None.
    router: (E, D) W_r in the routers' type, or None.
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    router: Tensor | None = None


class Down(NamedTuple):
    """What `frozen_and_down` returns of a site.

    y: (..., O) output of the frozen Linear.
    hidden: (..., H) h = x A^T; H = 0 without A.
    logits: (..., E) z = x W_r^T, None without a router.
    lora_B: B in the type of the branch, None without one.
    """

    y: Tensor
    hidden: Tensor
    logits: Tensor | None
    lora_B: Tensor | None


def frozen_and_down(x: Tensor, sites: Sequence[Beside], dtype: torch.dtype) -> list[Down]:
    """y = x W^T + bias, h = x A^T and z = x W_r^T of each site, saving x alone.

    The A's of all sites are multiplied in one matmul, and so are their routers. The backward pass has one matmul for
    all their gradients and sums the gradient of x in place, where autograd would add three tensors of the size of x for
    each site. Where the routers' type is not that of the branches (float32 under autocast), z and its gradient are in
    the routers' type; for the weights' gradients dz goes in two parts, dz = high + low, through the matmul of the
    branches, which loses nothing of dz. B is only brought into the type of the branches here, in one launch with A and
    the routers, and its gradient back with A's.

    Args:
        x: (..., D).
        sites: S of them, at least one; all routers are of one type.
        dtype: type of y and h: that of autocast, or of all tensors.

    Returns:
        S results, in the order of the sites.
    """
    if not torch.is_grad_enabled():
        return _computed(x, sites, dtype)[0]
    flat: list[Tensor | None] = []
    for weight, bias, lora_A, lora_B, router in sites:
        cast_B = None if lora_B is None or lora_B.dtype == dtype else lora_B
        flat += [weight, bias, lora_A, cast_B, router]
    found: Any = _FrozenAndDown.apply(x, dtype, *flat)
    downs = [Down(*found[first : first + 4]) for first in range(0, len(found), 4)]
    return [
        down if down.lora_B is not None else down._replace(lora_B=site.lora_B)
        for site, down in zip(sites, downs, strict=True)
    ]


def _computed(x: Tensor, sites: Sequence[Beside], dtype: torch.dtype) -> tuple[list[Down], Tensor, Tensor]:
    """What `frozen_and_down` returns, x in the type of the branches, and the A's over the routers' weights, (H + E, D).

    NOTE a copy of a weight is let go before that of the next is made: what is large is slow to allocate.
    """
    every_A = [site.weight.new_empty(0, x.shape[-1]) if site.lora_A is None else site.lora_A for site in sites]
    routers, widths = [site.router for site in sites if site.router is not None], [len(A) for A in every_A]
    logits: list[Tensor | None] = [None] * len(sites)
    with torch.autocast(x.device.type, enabled=False):
        x_c = x.to(dtype)
        factors, every_B = _in_one_type([*every_A, *routers], [site.lora_B for site in sites], dtype)
        ys = [frozen_output(x_c, site.weight.to(dtype), site.bias) for site in sites]
        if not routers:
            hidden = _parts(linear(x_c, factors), widths, -1)  # (..., H)
        else:
            lengths = [0 if site.router is None else len(site.router) for site in sites]
            if routers[0].dtype == dtype:
                found = _parts(linear(x_c, factors), [*widths, *lengths], -1)  # (..., H + E): both in one matmul
                hidden, every_z = found[: len(sites)], found[len(sites) :]
            else:
                hidden = _parts(linear(x_c, factors[: sum(widths)]), widths, -1)  # (..., H)
                router = routers[0] if len(routers) == 1 else torch.cat(routers)
                every_z = _parts(linear(x.to(router.dtype), router), lengths, -1)  # (..., E)
            logits = [z if length else None for z, length in zip(every_z, lengths, strict=True)]
    return list(map(Down, ys, hidden, logits, every_B)), x_c, factors


class _FrozenAndDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, *flat: Any) -> tuple[Tensor | None, ...]:
        sites = [
            Beside(weight.to(dtype), *others)
            for weight, *others in (flat[first : first + 5] for first in range(0, len(flat), 5))
        ]
        downs, x_c, factors = _computed(x, sites, dtype)
        ctx.save_for_backward(x_c, factors, *(site.weight for site in sites))
        ctx.widths = [down.hidden.shape[-1] for down in downs]
        ctx.experts = [0 if down.logits is None else down.logits.shape[-1] for down in downs]
        ctx.x_dtype = x.dtype
        ctx.A_dtype = next((site.lora_A.dtype for site in sites if site.lora_A is not None), dtype)
        ctx.router_dtype = next((down.logits.dtype for down in downs if down.logits is not None), dtype)
        return tuple(value for down in downs for value in down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x_c, factors, *weights = ctx.saved_tensors  # (..., D), (H + E, D), (O, D)
        grad_ys, grads_hidden, grads_logits, grads_B = (grads[part::4] for part in range(4))
        needs_x, _, *needs = ctx.needs_input_grad
        needs_A, needs_B, needs_router = (needs[part::5] for part in (2, 3, 4))
        width, total = sum(ctx.widths), len(factors)  # H, H + E
        left = _beside(grads_hidden, [grad for grad in grads_logits if grad is not None])
        grad_x = None
        if needs_x:
            grad_x = rows(grad_ys[0]) @ weights[0]  # (N, D)
            for grad_y, weight in zip(grad_ys[1:], weights[1:], strict=True):
                grad_x.addmm_(rows(grad_y), weight)
            grad_x.addmm_(left[:, :total], factors)  # which may be (0, D), and then adds nothing
            grad_x = grad_x.view(x_c.shape).to(ctx.x_dtype)
        every_A: list[Tensor | None] = [None] * len(weights)
        every_router = every_A
        first = 0 if any(needs_A) else width  # the columns of `left` that a gradient is asked for
        last = left.shape[1] if any(needs_router) else width
        if first < last:
            found = left[:, first:last].t() @ rows(x_c)  # (last - first, D)
            if first == 0:
                every_A = _wanted(_parts(found[:width], ctx.widths, 0), needs_A)  # (H, D)
            if last > width:
                parts = found[width - first :].view(-1, total - width, found.shape[1])  # (1 or 2, E, D): high, low
                dtype = ctx.router_dtype
                summed = parts.sum(0, dtype=dtype) if len(parts) > 1 else parts[0].to(dtype)
                every_router = _wanted(_parts(summed, ctx.experts, 0), needs_router)
        every_A, every_B = _back(every_A, _wanted(grads_B, needs_B), ctx.A_dtype)
        of_sites = zip(every_A, every_B, every_router, strict=True)
        return grad_x, None, *(grad for of_site in of_sites for grad in (None, None, *of_site))


def _in_one_type(
    parts: Sequence[Tensor], every_B: Sequence[Tensor | None], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor | None]]:
    """The A's over the routers' weights, (H + E, D), and the B's."""
    given = [B for B in every_B if B is not None]
    if all(part.dtype == dtype for part in (*parts, *given)):
        return parts[0] if len(parts) == 1 else torch.cat(list(parts)), list(every_B)
    lengths = [len(part) for part in parts]
    factors = parts[0].new_empty(sum(lengths), parts[0].shape[1], dtype=dtype)
    cast = [torch.empty_like(B, dtype=dtype, memory_format=torch.contiguous_format) for B in given]
    copy_each([*factors.split(lengths), *cast], [*parts, *given])
    left = iter(cast)
    return factors, [None if B is None else next(left) for B in every_B]


def _back(
    every_A: Sequence[Tensor | None], every_B: Sequence[Tensor | None], dtype: torch.dtype
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradients of the A's and B's in the type of these."""
    every = [*every_A, *every_B]
    cast = iter(in_type([grad for grad in every if grad is not None], dtype))
    found = [None if grad is None else next(cast) for grad in every]
    return found[: len(every_A)], found[len(every_A) :]


def _beside(grads_hidden: Sequence[Tensor], grads_logits: Sequence[Tensor]) -> Tensor:
    """The gradients of h and z of all sites, (N, H), (N, H + E), or (N, H + 2 E) where dz goes in two parts."""
    every_h, every_z = ([rows(grad) for grad in grads] for grads in (grads_hidden, grads_logits))
    if not every_z or every_z[0].dtype == every_h[0].dtype:
        return _joined([*every_h, *every_z])
    dz, widths = _joined(every_z), [grad.shape[1] for grad in every_h]
    experts = dz.shape[1]
    left = every_h[0].new_empty(len(dz), sum(widths) + 2 * experts)
    *hidden, high, low = left.split([*widths, experts, experts], dim=1)
    copy_each(hidden, every_h)
    high.copy_(dz)
    torch.sub(dz, high, out=low)  # in the type of dz, then rounded
    return left


def _joined(columns: list[Tensor]) -> Tensor:
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)


def _parts(values: Tensor, lengths: list[int], dim: int) -> Sequence[Tensor]:
    return [values] if len(lengths) == 1 else values.split(lengths, dim)


def _wanted(grads: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needed, strict=True)]


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
