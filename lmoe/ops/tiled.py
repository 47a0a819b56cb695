"""Grouped matmuls as one batch of tiles, without asking the device how many rows each expert has.

The rows of each expert are filled up to whole tiles of M rows, and a tile is multiplied by a copy of its expert's
matrix. How many tiles there can be at most follows from shapes alone: S / M, and one more for each expert.

Shapes: S rows sorted by expert, D in, O out, E experts, T tiles of M rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALLEST, LARGEST = 16, 512
"""Rows of a tile: a small one has few rows that are filled up, a large one has few copies of matrices."""
COPIED_BYTES = 2**28
"""Size of the copies of matrices that are there at a time."""


class Tiles(NamedTuple):
    """Where the rows of each expert lie in tiles.

    expert: (T,) of each tile; the last tiles may be empty.
    place: (S,) of each row among the T * M places.
    """

    expert: Tensor
    place: Tensor


def tile_size(rows: int, experts: int) -> int:
    """M: a power of two near half the mean number of rows of an expert.

    Args:
        rows, experts: S, E.
    """
    size = SMALLEST
    while size < LARGEST and 4 * size * experts <= rows:
        size *= 2
    return size


def tiles_of(ends: Tensor, rows: int) -> Tiles:
    """Tiles of sorted rows.

    Args:
        ends: (E,) integer end of each expert's rows.
        rows: S.
    """
    experts = len(ends)
    size, ends = tile_size(rows, experts), ends.long()
    counts = ends.diff(prepend=ends.new_zeros(1))
    tiles = (counts + (size - 1)).div(size, rounding_mode="floor")
    last_tile = tiles.cumsum(0)
    number = rows // size + min(experts, rows)
    tile = torch.arange(number, device=ends.device)
    row = torch.arange(rows, device=ends.device)
    expert = torch.searchsorted(last_tile, tile, right=True).clamp(max=experts - 1)
    shift = (last_tile - tiles) * size - (ends - counts)
    return Tiles(expert, row + shift.index_select(0, torch.searchsorted(ends, row, right=True)))


def tiled_matmul(rows: Tensor, matrices: Tensor, ends: Tensor, tiles: Tiles | None = None) -> Tensor:
    """What torch's grouped_mm computes, in the type of the rows.

    Args:
        rows: (S, D) sorted by expert; or (D, S), and matrices (S, O), for a product of each expert's columns and rows,
            which has no gradient.
        matrices: (E, D, O).
        ends: (E,) int32 end of each expert's rows.
        tiles: of `tiles_of`; None: they are made.

    Returns:
        (S, O), or (E, D, O).
    """
    if matrices.dim() == 2:
        return _products(rows.t(), matrices, tiles or tiles_of(ends, len(matrices)), len(ends))
    return _TiledMatmul.apply(rows, matrices, *(tiles or tiles_of(ends, len(rows))))  # type: ignore[return-value]


class _TiledMatmul(torch.autograd.Function):
    """Saves no copies of matrices: the backward makes them again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor, expert: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(rows, matrices, expert, place)
        return _by_matrices(rows, matrices, Tiles(expert, place))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, matrices, expert, place = ctx.saved_tensors
        tiles, grad_rows, grad_matrices = Tiles(expert, place), None, None
        if ctx.needs_input_grad[0]:
            grad_rows = _by_matrices(grad, matrices.transpose(1, 2), tiles)
        if ctx.needs_input_grad[1]:
            grad_matrices = _products(rows, grad, tiles, len(matrices))
        return grad_rows, grad_matrices, None, None


def _by_matrices(rows: Tensor, matrices: Tensor, tiles: Tiles) -> Tensor:
    """(S, O): each row times the matrix of its expert."""
    filled = _filled(rows, tiles, len(matrices))
    out = rows.new_empty(*filled.shape[:2], matrices.shape[2])
    step = max(1, COPIED_BYTES // max(1, matrices[0].numel() * matrices.element_size()))
    for start in range(0, len(filled), step):
        piece = slice(start, start + step)
        # NOTE autocast leaves products with `out` alone, which it would else compute in another type.
        torch.bmm(filled[piece], matrices.index_select(0, tiles.expert[piece]), out=out[piece])
    return out.flatten(0, 1).index_select(0, tiles.place)


def _products(left: Tensor, right: Tensor, tiles: Tiles, experts: int) -> Tensor:
    """(E, D, O): sum over the rows of each expert of left (S, D) times right (S, O); added up in float32."""
    left_TMD, right_TMO = _filled(left, tiles, experts), _filled(right, tiles, experts)
    width, out = left.shape[1], right.shape[1]
    total = left.new_zeros(experts, width, out, dtype=torch.promote_types(left.dtype, torch.float32))
    step = max(1, COPIED_BYTES // max(1, width * out * left.element_size()))
    for start in range(0, len(left_TMD), step):
        piece = slice(start, start + step)
        products = left.new_empty(len(left_TMD[piece]), width, out)
        torch.bmm(left_TMD[piece].transpose(1, 2), right_TMO[piece], out=products)
        total.index_add_(0, tiles.expert[piece], products.to(total.dtype))
    return total.to(left.dtype)


def _filled(rows: Tensor, tiles: Tiles, experts: int) -> Tensor:
    """(T, M, D): the rows in their tiles, with zeros between them."""
    size, width = tile_size(len(rows), experts), rows.shape[1]
    places = rows.new_zeros(len(tiles.expert) * size, width)
    return places.index_copy_(0, tiles.place, rows).view(-1, size, width)
