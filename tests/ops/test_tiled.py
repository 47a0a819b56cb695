"""Grouped matmuls in tiles equal the loop over rows, however the rows fall on experts, and ask the device nothing."""

import pytest
import torch
from torch import Tensor

from lmoe.ops import tiled
from lmoe.ops.grouped import group_by_expert, grouped_matmul
from lmoe.ops.tiled import LARGEST, SMALLEST, tile_size, tiled_matmul, tiles_of
from tests.reference import dumb_experts
from tests.reference.host_sync import NoHostSync
from tests.reference.no_grouped_kernel import no_grouped_kernel

D, O = 6, 10  # noqa: E741 - the letters of the docstrings; no multiples of 16 bytes
LOADS = {
    "ragged": (3, 40, 0, 17, 1),
    "one expert": (0, 0, 50, 0, 0),
    "whole tiles": (16, 32, 16, 16, 16),
    "one row": (0, 1, 0, 0, 0),
    "fewer rows than experts": (1, 0, 1, 0, 0),
    "a single expert": (33,),
    "nobody": (0, 0, 0),
}
DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 0.03)]


def ends_of(loads: tuple[int, ...]) -> Tensor:
    return torch.tensor(loads).cumsum(0).to(torch.int32)


def experts_of(loads: tuple[int, ...]) -> list[int]:
    return [expert for expert, load in enumerate(loads) for _ in range(load)]


def leaves(loads: tuple[int, ...], dtype: torch.dtype, *, transposed: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(loads))
    rows = torch.randn(sum(loads), D, generator=generator).to(dtype).requires_grad_()
    shape = (len(loads), O, D) if transposed else (len(loads), D, O)
    return rows, torch.randn(shape, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("transposed", [False, True], ids=["(E, D, O)", "a view of (E, O, D)"])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS)
def test_rows_times_matrices_and_both_gradients_equal_the_loop(loads, dtype, tolerance, transposed):
    rows, stored = leaves(loads, dtype, transposed=transposed)
    matrices = stored.transpose(1, 2) if transposed else stored
    ours = tiled_matmul(rows, matrices, ends_of(loads))
    assert ours.shape == (sum(loads), O) and ours.dtype == dtype
    if not sum(loads):
        return
    loop = dumb_experts.rows_of_expert(rows, experts_of(loads), lambda row, e: row.float() @ matrices[e].float())
    torch.testing.assert_close(ours.float(), loop, atol=tolerance * float(loop.detach().abs().max()), rtol=tolerance)
    along = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(dtype).float()
    grads, loops = (torch.autograd.grad((y.float() * along).sum(), (rows, stored)) for y in (ours, loop))
    for mine, theirs in zip(grads, loops, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, atol=tolerance * float(theirs.abs().max()), rtol=tolerance)
    for expert, load in enumerate(loads):
        assert bool(grads[1][expert].any()) == (load > 0)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS)
def test_products_of_each_experts_columns_and_rows_equal_the_loop(loads, dtype, tolerance):
    rows, _ = leaves(loads, dtype)
    right = torch.randn(sum(loads), O).to(dtype)
    ours, experts = tiled_matmul(rows.detach().t(), right, ends_of(loads)), experts_of(loads)
    assert ours.shape == (len(loads), D, O) and ours.dtype == dtype
    for expert in range(len(loads)):
        own = [s for s, e in enumerate(experts) if e == expert]
        loop = sum((torch.outer(rows[s].float(), right[s].float()) for s in own), torch.zeros(D, O)).detach()
        torch.testing.assert_close(ours[expert].float(), loop, atol=10 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("copied_bytes", [1, 700])
def test_copying_the_matrices_piece_by_piece_changes_nothing(copied_bytes, monkeypatch):
    rows, matrices = leaves(LOADS["ragged"], torch.float32)
    ends, found = ends_of(LOADS["ragged"]), []
    for limit in (tiled.COPIED_BYTES, copied_bytes):
        monkeypatch.setattr(tiled, "COPIED_BYTES", limit)
        y = tiled_matmul(rows, matrices, ends)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), (rows, matrices))))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS)
def test_every_row_has_a_place_of_its_own_in_a_tile_of_its_expert(loads):
    found, size = tiles_of(ends_of(loads), sum(loads)), tile_size(sum(loads), len(loads))
    assert len(set(found.place.tolist())) == sum(loads)
    assert [int(found.expert[place // size]) for place in found.place.tolist()] == experts_of(loads)


def test_how_many_tiles_there_are_follows_from_shapes_alone():
    shapes = {tuple(map(len, tiles_of(ends_of(loads), 61))) for loads in ((61, 0, 0), (20, 20, 21), (1, 1, 59))}
    assert shapes == {(61 // tile_size(61, 3) + 3, 61)}


def test_tiles_grow_with_the_rows_of_an_expert_between_their_limits():
    assert [tile_size(rows, 8) for rows in (0, 8, 1024, 8192, 10**6)] == [SMALLEST, SMALLEST, 64, 512, LARGEST]


def test_tiles_read_nothing_back_from_the_device():
    rows, matrices = leaves(LOADS["ragged"], torch.float32)
    with NoHostSync():
        tiled_matmul(rows, matrices, ends_of(LOADS["ragged"])).sum().backward()
    assert rows.grad is not None and matrices.grad is not None


def test_autocast_leaves_the_type_of_the_rows_alone():
    rows, matrices = leaves(LOADS["ragged"], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = tiled_matmul(rows, matrices, ends_of(LOADS["ragged"]))
    assert torch.equal(inside, tiled_matmul(rows, matrices, ends_of(LOADS["ragged"])))


def test_without_a_kernel_groups_bring_their_tiles_and_grouped_matmuls_use_them(monkeypatch):
    indices = torch.tensor([[0, 2], [2, 1], [0, 2]])
    with_kernel = group_by_expert(indices, 3)
    rows, matrices = torch.randn(6, 8), torch.randn(3, 8, 4)
    expected = grouped_matmul(rows, matrices, with_kernel.ends)
    assert with_kernel.tiles is None
    no_grouped_kernel(monkeypatch)
    without = group_by_expert(indices, 3)
    assert without.tiles is not None
    torch.testing.assert_close(grouped_matmul(rows, matrices, without.ends, without.tiles), expected)
    torch.testing.assert_close(grouped_matmul(rows, matrices, without.ends), expected)
