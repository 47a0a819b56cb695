"""Only the chosen experts: tokens sorted by expert, then one grouped matmul down and one up.

Shapes: N tokens, D in, O out, R rank, E experts, K chosen.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from lmoe.ops.card_rules import has_grouped_kernel
from lmoe.ops.tiled import Tiles, tiled_matmul, tiles_of

ALIGNMENT = 16
"""Bytes that a row must be a multiple of in torch's grouped matmul."""
GROUPED_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Groups(NamedTuple):
    """The (token, choice) pairs in the order of their experts; N * K rows.

    order: (N K,) row of each sorted pair in the flat (N, K).
    token: (N K,) its token.
    ends: (E,) int32 end of each expert's rows.
    expert: (N K,) its expert.
    tiles: of the rows, where torch has no kernel for grouped matmuls.
    by_triton: whether Triton kernels compute what is computed of them.
    """

    order: Tensor
    token: Tensor
    ends: Tensor
    expert: Tensor
    tiles: Tiles | None = None
    by_triton: bool = False


def group_by_expert(expert_indices: Tensor, num_experts: int, *, by_triton: bool = False) -> Groups:
    """Sort without asking the device how many tokens each expert got.

    Args:
        expert_indices: (N, K) int64.
        num_experts: E.
        by_triton: what computes the rows.
    """
    order, expert, ends = sort_by_key(expert_indices.reshape(-1), num_experts)
    token = order.div(expert_indices.shape[-1], rounding_mode="floor")
    tiled = not (by_triton or has_grouped_kernel(order.device, torch.bfloat16))
    return Groups(order, token, ends, expert, tiles_of(ends, len(order)) if tiled else None, by_triton)


def sort_by_key(keys: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order (S,), sorted keys (S,), and the int32 end of the rows of each key (number,).

    Args:
        keys: (S,) int64, from 0.
        number: of keys that there can be.
    """
    found, order = keys.sort(stable=True)
    counts = torch.zeros(number, dtype=torch.int32, device=keys.device)
    counts = counts.scatter_add(0, keys, torch.ones_like(keys, dtype=torch.int32))
    return order, found, counts.cumsum(0, dtype=torch.int32)


def compute_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The type that grouped matmuls run in: float32 on the CPU, where small ones in bfloat16 take twice as long."""
    return torch.promote_types(dtype, torch.float32) if device == "cpu" else dtype


def grouped_matmul(rows: Tensor, matrices: Tensor, ends: Tensor, tiles: Tiles | None = None) -> Tensor:
    """torch's grouped_mm, or tiles where that would wait for the device.

    NOTE torch's rules for compilers know bfloat16 only, so other types go by `_opaque_matmul`.

    Args:
        rows: (S, D) sorted by expert; or (D, S), and matrices (S, O), for a product of each expert's columns and rows.
        matrices: (E, D, O).
        ends: (E,) int32 end of each expert's rows.
        tiles: of the rows, where they have been made.
    """
    if not has_grouped_kernel(rows.device, rows.dtype):
        return tiled_matmul(rows, matrices, ends, tiles)
    if torch.compiler.is_compiling() and rows.dtype is not torch.bfloat16:
        return _opaque_matmul(rows, matrices, ends)
    return grouped_mm(rows, matrices, offs=ends)


@torch.library.custom_op("lmoe::grouped_matmul", mutates_args=())
def _opaque_matmul(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """What a compiler calls and does not look into; arguments as `grouped_matmul` has them."""
    return grouped_mm(rows, matrices, offs=ends).contiguous()


@_opaque_matmul.register_fake
def _shape_of_matmul(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    if matrices.dim() == 2:
        return rows.new_empty(ends.shape[0], rows.shape[0], matrices.shape[1])
    return rows.new_empty(rows.shape[0], matrices.shape[2])


def _keep_factors(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, matrices, ends = ctx.saved_tensors
    assert matrices.dim() == 3  # the other kind is only called by backward passes
    grad, grad_rows, grad_matrices = grad.contiguous(), None, None
    if ctx.needs_input_grad[0]:
        grad_rows = grouped_matmul(grad, matrices.transpose(1, 2), ends)
    if ctx.needs_input_grad[1]:
        grad_matrices = grouped_matmul(rows.t(), grad, ends)
    return grad_rows, grad_matrices, None


_opaque_matmul.register_autograd(_matmul_backward, setup_context=_keep_factors)


def add_grouped(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, gates: Tensor, expert_indices: Tensor) -> Tensor:
    """y + sum over the chosen experts of g_e B_e A_e x, written into y.

    Args:
        y: (N, O) output of the frozen layer; changed in place.
        x: (N, D) in the type of the branch; grouped matmuls run in `compute_dtype` of it.
        lora_A: (E, R, D).
        lora_B: (E, O, R); fastest where memory holds it as (E, R, O).
        gates: (N, K) routing weight times scaling of each chosen expert.
        expert_indices: (N, K) int64.

    Returns:
        y.
    """
    groups = group_by_expert(expert_indices, lora_A.shape[0])
    if torch.compiler.is_compiling():
        return y + grouped_delta(x, lora_A, lora_B, gates, groups).to(y.dtype)
    tiles = groups.tiles or (None, None)
    return _AddGrouped.apply(  # type: ignore[return-value]
        y, x, lora_A, lora_B, gates, groups.order, groups.token, groups.ends, *tiles
    )


def grouped_delta(x: Tensor, lora_A: Tensor, lora_B: Tensor, gates: Tensor, groups: Groups) -> Tensor:
    """What `add_grouped` adds, (N, O) in the type that it computes in, in plain operations, which torch.compile traces.

    Args:
        groups: of the chosen experts; the other arguments as `add_grouped` has them.
    """
    _, out = _hidden_and_out(x, lora_A, lora_B, gates, groups.order, groups.token, groups.ends, groups.tiles)
    return out.new_zeros(len(x), out.shape[1]).index_add(0, groups.token, out)


def _hidden_and_out(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gates: Tensor,
    order: Tensor,
    token: Tensor,
    ends: Tensor,
    tiles: Tiles | None,
) -> tuple[Tensor, Tensor]:
    """(N K, R) x A^T and (N K, O) what it becomes, weighted, behind B, of each sorted pair."""
    dtype = compute_dtype(x.device.type, x.dtype)
    hidden = grouped_matmul(_rows(x, token, dtype), lora_A.to(dtype).transpose(1, 2), ends, tiles)
    weighted = hidden * _sorted(gates, order, dtype)
    return hidden, grouped_matmul(weighted, lora_B.to(dtype).transpose(1, 2), ends, tiles)


class _AddGrouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        gates: Tensor,
        order: Tensor,
        token: Tensor,
        ends: Tensor,
        tile_expert: Tensor | None,
        tile_place: Tensor | None,
    ) -> Tensor:
        tiles = _tiles(tile_expert, tile_place)
        hidden, out = _hidden_and_out(x, lora_A, lora_B, gates, order, token, ends, tiles)
        ctx.save_for_backward(x, lora_A, lora_B, gates, order, token, ends, hidden, tile_expert, tile_place)
        ctx.mark_dirty(y)
        y.index_add_(0, token, out.to(y.dtype))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, gates, order, token, ends, hidden, *of_tiles = ctx.saved_tensors
        tiles = _tiles(*of_tiles)
        dtype = hidden.dtype
        weights = _sorted(gates, order, dtype)  # (N K, 1)
        grad_out = _rows(grad_y, token, dtype)  # (N K, O)
        grad_x = grad_A = grad_B = grad_gates = None
        if ctx.needs_input_grad[3]:
            grad_B = grouped_matmul((hidden * weights).t(), grad_out, ends, tiles).transpose(1, 2).to(lora_B.dtype)
        grad_mixed = grouped_matmul(grad_out, lora_B.to(dtype), ends, tiles)  # (N K, R)
        if ctx.needs_input_grad[4]:
            along = (grad_mixed * hidden).sum(-1, dtype=gates.dtype)  # (N K,)
            grad_gates = torch.empty_like(along).scatter_(0, order, along).view_as(gates)
        grad_hidden = grad_mixed * weights  # (N K, R)
        if ctx.needs_input_grad[2]:
            grad_A = grouped_matmul(grad_hidden.t(), _rows(x, token, dtype), ends, tiles).to(lora_A.dtype)
        if ctx.needs_input_grad[1]:
            rows = grouped_matmul(grad_hidden, lora_A.to(dtype), ends, tiles)  # (N K, D)
            grad_x = torch.zeros_like(x).index_add_(0, token, rows.to(x.dtype))
        return grad_y, grad_x, grad_A, grad_B, grad_gates, None, None, None, None, None


def _tiles(expert: Tensor | None, place: Tensor | None) -> Tiles | None:
    return None if expert is None or place is None else Tiles(expert, place)


def _rows(values: Tensor, token: Tensor, dtype: torch.dtype) -> Tensor:
    """(N K, ...) row of each sorted pair; NOTE values[token] would take twice as long on the CPU."""
    return values.to(dtype).index_select(0, token)


def _sorted(gates: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
    """(N K, 1) gate of each sorted pair."""
    return gates.reshape(-1, 1).index_select(0, order).to(dtype)


def misaligned(widths: dict[str, int], device: torch.device, dtype: torch.dtype) -> str | None:
    """What torch's grouped matmul cannot take, in words, or None; tiles, which stand in for it, take everything.

    Args:
        widths: lengths of the rows that it reads, by name: R, D and O.
        device: where the branch is computed.
        dtype: its type.
    """
    computed = compute_dtype(device.type, dtype)
    if not has_grouped_kernel(device, computed):
        return None
    if computed not in GROUPED_TYPES:
        return f"the type is {computed}; allowed: {', '.join(str(t) for t in GROUPED_TYPES)}"
    step = ALIGNMENT // computed.itemsize
    return next(
        (f"{name} is {width}, must be a multiple of {step}" for name, width in widths.items() if width % step), None
    )
