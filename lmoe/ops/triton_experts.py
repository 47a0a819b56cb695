"""Experts as Triton kernels: rows gathered by expert, multiplied by its matrix, and added where they belong.

Two kernels do all of it, forward and backward: rows times the matrix of their expert (`_rows_kernel`), and for each
expert the sum of the outer products of its rows (`_products_kernel`). No row is copied to be sorted, no sum is made by
atomics, so that the same input gives the same bits, and the host never waits. Nothing of it has been timed on a card:
moe.backend=auto does not choose it. With TRITON_INTERPRET=1 it runs on the CPU, for tests.

Shapes: N tokens, K chosen, S = N * K sorted rows, D in, O out, R rank, E experts; C choices, each of which a token is
in once, so that its rows can be added without meeting.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# (triton is an extra that the environment of the checks does not have)

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmoe.errors import RoutingError
from lmoe.ops.grouped import sort_by_key
from lmoe.ops.tiled import tile_size

TYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_ROWS, LARGEST_COLUMNS, INNER_BYTES = 64, 128, 128
"""Rows and columns of a block, and bytes of a row of it that are multiplied at a time."""


class Segments(NamedTuple):
    """Rows sorted by choice and expert, and the blocks that programs take.

    row: (S,) of x and of y, for each sorted row.
    ends: (C * E,) int64 end of the rows of each choice and expert.
    expert, start, stop: (C, T) of each block: its expert, its first sorted row, and the one after its last.
    """

    row: Tensor
    ends: Tensor
    expert: Tensor
    start: Tensor
    stop: Tensor


# --- kernels


@triton.jit
def _rows_kernel(
    rows,
    row_stride,
    row_of,
    weights,
    matrices,
    expert_stride,
    inner_stride,
    outer_stride,
    out,
    out_stride,
    target_of,
    block_expert,
    block_start,
    block_stop,
    inner,
    outer,
    ADDS: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
):
    """out[target_of[s]] (+)= weights[s] * rows[row_of[s]] @ matrices[expert of s], for one block of sorted rows s.

    Without row_of, target_of or weights these are s, s and 1.
    """
    parts = tl.cdiv(outer, OUTER)
    block = tl.program_id(0) // parts
    start = tl.load(block_start + block)
    stop = tl.load(block_stop + block)
    if start < stop:
        expert = tl.load(block_expert + block)
        s = start + tl.arange(0, ROWS)
        there = s < stop
        source = s if row_of is None else tl.load(row_of + s, mask=there, other=0)
        j = (tl.program_id(0) % parts) * OUTER + tl.arange(0, OUTER)
        total = tl.zeros((ROWS, OUTER), tl.float32)
        for first in range(0, inner, INNER):
            i = first + tl.arange(0, INNER)
            left = tl.load(
                rows + source[:, None] * row_stride + i[None, :], mask=there[:, None] & (i < inner)[None, :], other=0.0
            )
            right = tl.load(
                matrices + expert * expert_stride + i[:, None] * inner_stride + j[None, :] * outer_stride,
                mask=(i < inner)[:, None] & (j < outer)[None, :],
                other=0.0,
            ).to(left.dtype)
            if EXACT:  # the interpreter takes the bits of bfloat16 for whole numbers
                left = left.to(tl.float32)
                right = right.to(tl.float32)
            total = tl.dot(left, right, total, input_precision="ieee")
        if weights is not None:
            total *= tl.load(weights + s, mask=there, other=0.0)[:, None]
        target = s if target_of is None else tl.load(target_of + s, mask=there, other=0)
        place = out + target[:, None] * out_stride + j[None, :]
        mask = there[:, None] & (j < outer)[None, :]
        if ADDS:
            total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
        tl.store(place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _products_kernel(
    left_rows,
    left_stride,
    weights,
    right_rows,
    right_stride,
    right_row_of,
    ends,
    choices,
    experts,
    out,
    width,
    outer,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    OUTER: tl.constexpr,
):
    """out[e] = sum over the sorted rows s of expert e of weights[s] * outer(left_rows[s], right_rows[right_row_of[s]]).

    Without right_row_of or weights these are s and 1.
    """
    expert = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    j = tl.program_id(2) * OUTER + tl.arange(0, OUTER)
    total = tl.zeros((WIDTH, OUTER), tl.float32)
    for choice in range(choices):
        segment = choice * experts + expert
        start = tl.load(ends + segment - 1, mask=segment > 0, other=0)
        stop = tl.load(ends + segment)
        for first in range(start, stop, ROWS):
            s = first + tl.arange(0, ROWS)
            there = s < stop
            left = tl.load(
                left_rows + s[None, :] * left_stride + i[:, None], mask=(i < width)[:, None] & there[None, :], other=0.0
            )
            if weights is not None:
                weight = tl.load(weights + s, mask=there, other=0.0)
                left = (left.to(tl.float32) * weight[None, :]).to(left.dtype)
            source = s if right_row_of is None else tl.load(right_row_of + s, mask=there, other=0)
            right = tl.load(
                right_rows + source[:, None] * right_stride + j[None, :],
                mask=there[:, None] & (j < outer)[None, :],
                other=0.0,
            ).to(left.dtype)
            if EXACT:
                left = left.to(tl.float32)
                right = right.to(tl.float32)
            total = tl.dot(left, right, total, input_precision="ieee")
    place = out + expert * width * outer + i[:, None] * outer + j[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(i < width)[:, None] & (j < outer)[None, :])


IS_INTERPRETED = not isinstance(_rows_kernel, triton.JITFunction)


# --- their launches


def _block(size: int, largest: int) -> int:
    """A power of two from 16, the least that products take."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def _rows(rows: int, experts: int) -> int:
    return min(LARGEST_ROWS, tile_size(rows, experts))


def _segments(row: Tensor, ends: Tensor, choices: int) -> Segments:
    """Blocks of sorted rows, as many as shapes allow at most; the last ones may be empty."""
    number = len(row) // choices
    experts = len(ends) // choices
    size, ends = _rows(number, experts), ends.long()
    counts = ends.diff(prepend=ends.new_zeros(1))
    blocks = (counts + (size - 1)).div(size, rounding_mode="floor").view(choices, experts)
    last_block, first_row = blocks.cumsum(1), (ends - counts).view(choices, experts)
    block = torch.arange(number // size + min(experts, number), device=ends.device).repeat(choices, 1)
    expert = torch.searchsorted(last_block, block, right=True).clamp(max=experts - 1)
    start = first_row.gather(1, expert) + (block - (last_block - blocks).gather(1, expert)) * size
    stop = torch.minimum(ends.view(choices, experts).gather(1, expert), start + size)
    return Segments(row, ends, expert, start, stop)


def _times(
    rows: Tensor,
    matrices: Tensor,
    segments: Segments,
    out: Tensor,
    *,
    gathered: bool = False,
    weights: Tensor | None = None,
    scattered: bool = False,
    adds: bool = False,
) -> Tensor:
    """Rows (…, I) times matrices (E, I, J), into `out` (…, J).

    Args:
        gathered: a sorted row is rows[segments.row]; else rows are sorted.
        weights: (S,) of the sorted rows.
        scattered: it goes to out[segments.row], choice by choice; else `out` is sorted.
        adds: to what is in `out`.
    """
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    choices = len(segments.expert)
    inner, outer = matrices.shape[1:]
    columns = _block(outer, LARGEST_COLUMNS)
    for choice in range(choices if scattered else 1):
        blocks = [part[choice] if scattered else part for part in (segments.expert, segments.start, segments.stop)]
        grid = (blocks[0].numel() * triton.cdiv(outer, columns),)
        if not grid[0]:
            continue
        with _on_device_of(rows):
            _rows_kernel[grid](
                rows,
                rows.stride(0),
                segments.row if gathered else None,
                weights,
                matrices,
                *matrices.stride(),
                out,
                out.stride(0),
                segments.row if scattered else None,
                *blocks,
                inner,
                outer,
                ADDS=adds or choice > 0,  # the first choice of every token writes all of `out`
                EXACT=IS_INTERPRETED,
                ROWS=_rows(len(segments.row) // choices, len(matrices)),
                INNER=_block(inner, INNER_BYTES // rows.element_size()),
                OUTER=columns,
            )
    return out


def _products(
    left: Tensor,
    right: Tensor,
    segments: Segments,
    dtype: torch.dtype,
    *,
    gathered: bool = False,
    weights: Tensor | None = None,
) -> Tensor:
    """(E, I, J) in a type: sums of weights * outer(left, right) of sorted left (S, I), and right (…, J), gathered by
    segments.row or sorted."""
    left, right = (t if t.stride(-1) == 1 else t.contiguous() for t in (left, right))
    choices, experts = len(segments.expert), len(segments.ends) // len(segments.expert)
    width, outer = left.shape[1], right.shape[1]
    wide, columns = _block(width, LARGEST_ROWS), _block(outer, LARGEST_COLUMNS)
    out = left.new_empty(experts, width, outer, dtype=dtype)
    with _on_device_of(left):
        _products_kernel[(experts, triton.cdiv(width, wide), triton.cdiv(outer, columns))](
            left,
            left.stride(0),
            weights,
            right,
            right.stride(0),
            segments.row if gathered else None,
            segments.ends,
            choices,
            experts,
            out,
            width,
            outer,
            EXACT=IS_INTERPRETED,
            ROWS=32,
            WIDTH=wide,
            OUTER=columns,
        )
    return out


def _on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Launch where a tensor lies: NOTE Triton takes the current GPU, which may be another one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()  # type: ignore[return-value]


def _check_type(dtype: torch.dtype) -> None:
    """Refuse a type.

    Raises:
        RoutingError: it is none that the kernels compute in.
    """
    if dtype not in TYPES:
        allowed = ", ".join(map(str, TYPES))
        raise RoutingError(f"moe.backend=triton cannot compute in {dtype}; allowed: {allowed}. Choose auto")


# --- what the backend is made of


@torch.compiler.disable
def add_by_triton(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, gates: Tensor, expert_indices: Tensor
) -> Tensor:
    """y + sum over the chosen experts of g_e B_e A_e x, written into y: what `add_grouped` computes.

    Args:
        y: (N, O) output of the frozen layer; changed in place.
        x: (N, D) in the type of the branch.
        lora_A: (E, R, D).
        lora_B: (E, O, R); fastest where memory holds it as (E, R, O).
        gates: (N, K) routing weight times scaling of each chosen expert.
        expert_indices: (N, K) int64.

    Returns:
        y.

    Raises:
        RoutingError: a type that the kernels do not know.
    """
    _check_type(x.dtype)
    tokens, choices = expert_indices.shape
    experts = len(lora_A)
    key = expert_indices + experts * torch.arange(choices, device=x.device)  # sorted by choice, then by expert
    order, _, ends = sort_by_key(key.t().reshape(-1), choices * experts)
    weights = gates.t().reshape(-1).index_select(0, order).float()
    segments = _segments(order.remainder(max(1, tokens)), ends, choices)
    return _AddByTriton.apply(y, x, lora_A, lora_B, weights, *segments)  # type: ignore[return-value]


class _AddByTriton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, weights: Tensor, *parts: Tensor
    ) -> Tensor:
        segments = Segments(*parts)
        hidden = x.new_empty(len(segments.row), lora_A.shape[1])
        _times(x, lora_A.transpose(1, 2), segments, hidden, gathered=True)
        ctx.save_for_backward(x, lora_A, lora_B, weights, hidden, *parts)
        ctx.mark_dirty(y)
        return _times(hidden, lora_B.transpose(1, 2), segments, y, weights=weights, scattered=True, adds=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, weights, hidden, *parts = ctx.saved_tensors
        segments, grad = Segments(*parts), grad_y.to(x.dtype)
        grad_x = grad_A = grad_B = grad_weights = None
        mixed = _times(grad, lora_B, segments, torch.empty_like(hidden), gathered=True)  # (S, R), without weights
        if ctx.needs_input_grad[1]:
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
            _times(mixed, lora_A, segments, grad_x, weights=weights, scattered=True)
        if ctx.needs_input_grad[2]:
            grad_A = _products(mixed, x, segments, lora_A.dtype, weights=weights, gathered=True)
        if ctx.needs_input_grad[3]:
            grad_B = _products(hidden, grad, segments, lora_B.dtype, weights=weights, gathered=True).transpose(1, 2)
        if ctx.needs_input_grad[4]:
            grad_weights = (mixed.float() * hidden.float()).sum(-1)
        return grad_y, grad_x, grad_A, grad_B, grad_weights, *(None for _ in parts)


@torch.compiler.disable
def matmul_by_triton(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """What torch's grouped_mm computes: each sorted row times the matrix of its expert.

    Args:
        rows: (S, D) sorted by expert.
        matrices: (E, D, O), of any strides.
        ends: (E,) end of each expert's rows.

    Returns:
        (S, O) in the type of the rows.

    Raises:
        RoutingError: a type that the kernels do not know.
    """
    _check_type(rows.dtype)
    segments = _segments(torch.arange(len(rows), device=rows.device), ends, 1)
    return _MatmulByTriton.apply(rows, matrices, *segments)  # type: ignore[return-value]


class _MatmulByTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(rows, matrices, *parts)
        return _times(rows, matrices, Segments(*parts), rows.new_empty(len(rows), matrices.shape[2]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, matrices, *parts = ctx.saved_tensors
        segments, grad_rows, grad_matrices = Segments(*parts), None, None
        if ctx.needs_input_grad[0]:
            grad_rows = _times(grad, matrices.transpose(1, 2), segments, torch.empty_like(rows))
        if ctx.needs_input_grad[1]:
            grad_matrices = _products(rows, grad, segments, matrices.dtype)
        return grad_rows, grad_matrices, *(None for _ in parts)
