"""Experts around one frozen block on a CPU, a few rows at a time, so that little is kept for the backward pass.

Each expert's rows are gathered in blocks that fit a processor's cache, go through everything between the frozen
products, and are summed. The backward pass computes them again, block by block, from the frozen products of the tokens.

Shapes: N tokens, K chosen, S = N * K rows sorted by expert, b rows of a block, D in, W out of a Linear that reads x,
I inner, O out, R rank, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmoe.ops.grouped import Groups

MOST_ROWS = 512
"""Rows of a block: few enough to stay in a cache, and enough for a matmul."""
FEWEST_VALUES = 2**18
"""Inner values of an expert, on average, from which blocks are faster than all rows at once, despite their calls."""


class Factors(NamedTuple):
    """The branches of all experts beside one Linear.

    lora_A: (E, R, D).
    lora_B: (E, O, R); fastest where memory holds it as (E, R, O).
    """

    lora_A: Tensor
    lora_B: Tensor


def blocks_pay(rows: int, inner_features: int, num_experts: int) -> bool:
    """Whether all experts have so much to compute that `expert_blocks` is faster than grouped matmuls of all rows.

    Args:
        rows, inner_features, num_experts: S, I and E.
    """
    return rows * inner_features >= FEWEST_VALUES * num_experts


def expert_blocks(
    x: Tensor,
    products: Sequence[Tensor],
    firsts: Sequence[Factors | None],
    down: Factors | None,
    weights: Tensor,
    groups: Groups,
    inner: Callable[..., Tensor],
    scaling: float,
) -> tuple[Tensor, Tensor | None]:
    """m_n = sum_k w_nk h_nk and d_n = scaling * sum_k w_nk B_e A_e h_nk, where e is choice k of token n and
    h_nk = inner(y_n + scaling * B_e A_e x_n, ...) with a frozen product y, A and B of each Linear that reads x.

    Saves x, every y, and R numbers of a row and branch. NOTE it reads how many rows each expert has, for which any
    device but a CPU would be waited for. All experts get a gradient, of zeros where no token chose them.

    Args:
        x: (N, D) in the type of the branches, under autocast in that of autocast.
        products: y, (N, W) each.
        firsts: the branches of the Linears that read x, or None.
        down: those of the Linear that reads h, or None.
        weights: (N, K).
        groups: of the rows.
        inner: from (b, W) each to (b, I), row by row, without parameters that train; it is called twice for each row.
        scaling: alpha / R or alpha / sqrt(R).

    Returns:
        m (N, I) in the type of h, and d (N, O) in that of the branches; None without `down`.
    """
    factors = [factor for pair in (*firsts, down) for factor in pair or (None, None)]
    return _ExpertBlocks.apply(  # type: ignore[return-value]
        inner, scaling, len(products), groups.order, groups.token, groups.ends, x, weights, *products, *factors
    )


class _ExpertBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inner: Callable[..., Tensor],
        scaling: float,
        number: int,
        order: Tensor,
        token: Tensor,
        ends: Tensor,
        x: Tensor,
        weights: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        products = _products(tensors, number)
        *firsts, down = branches = _branches(tensors[number:], len(token), scaling, x)
        sorted_weights = weights.reshape(-1, 1).index_select(0, order)  # (S, 1)
        nothing = inner(*(y[:0] for y in products))  # (0, I)
        mixed = nothing.new_zeros(len(x), nothing.shape[1])
        delta = None if down is None else x.new_zeros(len(x), down.lora_B.shape[1])
        for block in _blocks(ends, token):
            x_bD, weight = x.index_select(0, block.token), sorted_weights[block.rows]
            for branch in firsts:
                if branch is not None:
                    branch.read(block, x_bD)
            h = inner(*_first_values(block, products, firsts))  # (b, I)
            if down is not None and delta is not None:
                down.read(block, h)
                delta.index_add_(0, block.token, down.output(block, weight))
            mixed.index_add_(0, block.token, h * weight.to(h.dtype))
        hidden = [None if branch is None else branch.hidden for branch in branches]
        ctx.save_for_backward(order, token, ends, x, weights, *hidden, *tensors)
        ctx.inner, ctx.scaling, ctx.number = inner, scaling, number
        ctx.autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
        return mixed, delta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mixed: Tensor, grad_delta: Tensor | None) -> tuple[Tensor | None, ...]:
        order, token, ends, x, weights, *saved = ctx.saved_tensors
        hidden, tensors = saved[: ctx.number + 1], saved[ctx.number + 1 :]
        needs_x, needs_weights, *needed = ctx.needs_input_grad[6:]
        products = _products(tensors, ctx.number)
        *firsts, down = branches = _branches(tensors[ctx.number :], len(token), ctx.scaling, x, hidden)
        for number, branch in enumerate(branches):
            if branch is not None:
                branch.begin_backward(*needed[ctx.number + 2 * number :][:2])
        sorted_weights = weights.reshape(-1, 1).index_select(0, order)  # (S, 1)
        grad_x = torch.zeros_like(x) if needs_x else None
        grad_products = [torch.zeros_like(y) if need else None for y, need in zip(products, needed, strict=False)]
        along = weights.new_empty(len(token))
        enabled, autocast_dtype = ctx.autocast
        for block in _blocks(ends, token):
            weight = sorted_weights[block.rows]
            values = [y.requires_grad_() for y in _first_values(block, products, firsts)]
            with torch.enable_grad(), torch.autocast(x.device.type, autocast_dtype, enabled):
                h = ctx.inner(*values)  # (b, I)
            grad_h = grad_mixed.index_select(0, block.token)  # without its weight
            if down is not None and grad_delta is not None:
                down.backward(block, h.detach(), grad_delta.index_select(0, block.token), grad_h, weight)
            if needs_weights:
                along[block.rows] = torch.linalg.vecdot(grad_h, h.detach()).to(along.dtype)
            grads = torch.autograd.grad(h, values, grad_h.mul_(weight.to(grad_h.dtype)))
            x_bD = x.index_select(0, block.token)
            grad_x_bD = None if grad_x is None else torch.zeros_like(x_bD)
            for grad, total, branch in zip(grads, grad_products, firsts, strict=True):
                if total is not None:
                    total.index_add_(0, block.token, grad)
                if branch is not None:
                    branch.backward(block, x_bD, grad.to(x.dtype), grad_x_bD)
            if grad_x is not None and grad_x_bD is not None:
                grad_x.index_add_(0, block.token, grad_x_bD)
        grad_weights = torch.empty_like(along).scatter_(0, order, along).view_as(weights) if needs_weights else None
        of_factors = [grad for branch in branches for grad in ((None, None) if branch is None else branch.grads)]
        return *[None] * 6, grad_x, grad_weights, *grad_products, *of_factors


class _Block(NamedTuple):
    """Rows of one expert.

    expert: its number.
    rows: where they lie among the S.
    token: (b,) their tokens.
    """

    expert: int
    rows: slice
    token: Tensor


def _blocks(ends: Tensor, token: Tensor) -> Iterator[_Block]:
    """Rows of all experts, each expert's in blocks of equal size."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        for left in range(-(-(end - start) // MOST_ROWS), 0, -1):
            rows = slice(start, start + -(-(end - start) // left))
            yield _Block(expert, rows, token[rows])
            start = rows.stop


class _Branch:
    """The branches of all experts beside one Linear, in one call.

    Args:
        factors: of the branches.
        scaling: alpha / R or alpha / sqrt(R).
        hidden: (S, R) A_e of each row's input, which `read` fills.
    """

    def __init__(self, factors: Factors, scaling: float, hidden: Tensor) -> None:
        self.lora_A, self.lora_B = factors
        self.scaling, self.hidden, self.dtype = scaling, hidden, hidden.dtype
        self.grads: tuple[Tensor | None, Tensor | None] = (None, None)

    def read(self, block: _Block, inputs: Tensor) -> None:
        """Take the (b, D) inputs of some rows."""
        lora_A = self.lora_A[block.expert].to(self.dtype)
        torch.mm(inputs.to(self.dtype), lora_A.t(), out=self.hidden[block.rows])

    def add_to(self, y: Tensor, block: _Block) -> None:
        """Add the output of some rows, (b, O), in place."""
        _add_product(y, self.hidden[block.rows], self._lora_B(block).t(), self.scaling)

    def output(self, block: _Block, weight: Tensor) -> Tensor:
        """(b, O) output of some rows, times their (b, 1) weight."""
        return (self.hidden[block.rows] * (self.scaling * weight).to(self.dtype)) @ self._lora_B(block).t()

    def begin_backward(self, needs_A: bool, needs_B: bool) -> None:
        """Make the gradients that are asked for, of zeros and in the layout of the factors."""
        grad_A = torch.zeros_like(self.lora_A) if needs_A else None
        self.grads = grad_A, torch.zeros_like(self.lora_B) if needs_B else None

    def backward(
        self, block: _Block, inputs: Tensor, grad: Tensor, grad_inputs: Tensor | None, weight: Tensor | None = None
    ) -> None:
        """Add to the gradients, in place.

        Args:
            block: the rows.
            inputs: (b, D) of the rows.
            grad: (b, O) of their output.
            grad_inputs: (b, D) gradient of the inputs, without their weight.
            weight: (b, 1) of the rows, None: all 1.
        """
        e, (grad_A, grad_B), hidden = block.expert, self.grads, self.hidden[block.rows]
        grad_hidden = (grad @ self._lora_B(block)).mul_(self.scaling)  # (b, R)
        if grad_inputs is not None:
            _add_product(grad_inputs, grad_hidden, self.lora_A[e].to(self.dtype))
        if weight is not None:
            weight = weight.to(self.dtype)
            grad_hidden, hidden = grad_hidden * weight, hidden * weight
        if grad_A is not None:
            _add_product(grad_A[e], grad_hidden.t(), inputs.to(self.dtype))
        if grad_B is not None:
            _add_product(grad_B[e].t(), hidden.t(), grad, self.scaling)

    def _lora_B(self, block: _Block) -> Tensor:
        return self.lora_B[block.expert].to(self.dtype)


def _products(tensors: Sequence[Tensor | None], number: int) -> list[Tensor]:
    """The frozen products, which come first."""
    return [tensor for tensor in tensors[:number] if tensor is not None]


def _branches(
    factors: Sequence[Tensor | None],
    rows: int,
    scaling: float,
    x: Tensor,
    hidden: Sequence[Tensor | None] | None = None,
) -> list[_Branch | None]:
    """The branches of each Linear, the last one's last, with room for their hidden values or with these."""
    found: list[_Branch | None] = []
    for number, (lora_A, lora_B) in enumerate(zip(factors[::2], factors[1::2], strict=True)):
        if lora_A is None or lora_B is None:
            found.append(None)
            continue
        of_rows = None if hidden is None else hidden[number]
        of_rows = x.new_empty(rows, lora_A.shape[1]) if of_rows is None else of_rows
        found.append(_Branch(Factors(lora_A, lora_B), scaling, of_rows))
    return found


def _first_values(block: _Block, products: Sequence[Tensor], firsts: Sequence[_Branch | None]) -> list[Tensor]:
    """(b, W) each: what the expert's Linears that read x make of it."""
    found = [y.index_select(0, block.token) for y in products]
    for y, branch in zip(found, firsts, strict=True):
        if branch is not None:
            branch.add_to(y, block)
    return found


def _add_product(y: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """y += scale * left right, in place, in whatever type y is."""
    if y.dtype == left.dtype:
        y.addmm_(left, right, alpha=scale)
    else:
        y.add_(left @ right, alpha=scale)
