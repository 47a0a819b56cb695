"""Triton's kernels of experts equal the loop over rows and experts, in outputs and gradients, run by its interpreter.

`make test-triton` runs it where Triton is installed.
"""

import pytest
import torch
from torch import Tensor

from lmoe.errors import RoutingError
from lmoe.ops.grouped import add_grouped
from tests.reference import dumb_experts
from tests.reference.host_sync import NoHostSync
from tests.reference.triton_interpreter import WHY_NOT

if WHY_NOT:
    pytest.skip(WHY_NOT, allow_module_level=True)

from lmoe.ops import triton_experts
from lmoe.ops.triton_experts import add_by_triton, matmul_by_triton

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 0.03}
"""Of the largest number."""
LOADS = {
    "ragged": (3, 40, 0, 17, 1),
    "one expert": (0, 0, 50, 0, 0),
    "whole blocks": (16, 32, 16, 16, 16),
    "more than a block of 64": (200, 0, 300),
    "fewer rows than experts": (1, 0, 1, 0, 0),
    "a single expert": (33,),
}


def close(ours: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    size = float(right.detach().abs().max())
    torch.testing.assert_close(ours.float(), right.float(), atol=TOLERANCE[dtype] * size, rtol=TOLERANCE[dtype])


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rounded to the type, so that the loop in float32 is right."""
    return torch.randn(*shape).to(dtype).requires_grad_()


# --- rows times the matrices of their experts


@pytest.mark.parametrize("transposed", [False, True], ids=["(E, D, O)", "a view of (E, O, D)"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS)
def test_rows_times_matrices_and_both_gradients_equal_the_loop(loads, dtype, transposed):
    torch.manual_seed(0)
    D, O = 20, 36  # noqa: E741 - no multiples of a block
    rows, stored = (
        random(sum(loads), D, dtype=dtype),
        random(len(loads), *((O, D) if transposed else (D, O)), dtype=dtype),
    )
    matrices = stored.transpose(1, 2) if transposed else stored
    experts = [expert for expert, load in enumerate(loads) for _ in range(load)]
    ours = matmul_by_triton(rows, matrices, torch.tensor(loads).cumsum(0).to(torch.int32))
    loop = dumb_experts.rows_of_expert(rows, experts, lambda row, e: row.float() @ matrices[e].float())
    assert ours.dtype == dtype
    close(ours, loop, dtype)
    along = torch.randn(ours.shape)
    grads, loops = (torch.autograd.grad((y.float() * along).sum(), (rows, stored)) for y in (ours, loop))
    for mine, theirs in zip(grads, loops, strict=True):
        assert mine.dtype == dtype
        close(mine, theirs, dtype)
    assert [bool(grads[1][e].any()) for e in range(len(loads))] == [load > 0 for load in loads]


def test_no_rows_give_no_rows_and_no_gradient():
    rows, matrices = random(0, 8), random(3, 8, 4)
    y = matmul_by_triton(rows, matrices, torch.zeros(3, dtype=torch.int32))
    assert y.shape == (0, 4)
    assert not torch.autograd.grad(y.sum(), matrices)[0].any()


# --- a mixture beside a frozen layer


def loop(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
    """Token by token and expert by expert, from whole matrices."""
    rows = []
    for n, experts in enumerate(chosen.tolist()):
        row = y[n].float()
        for k, e in enumerate(experts):
            row = row + gates[n, k] * ((lora_B[e] @ lora_A[e]) @ x[n].float())
        rows.append(row)
    return torch.stack(rows)


def inputs(experts: int, top_k: int, rank: int, dtype: torch.dtype, *, tokens: int, wide=(40, 24)) -> list[Tensor]:
    """y, x, A, B, gates and choices; the last expert is chosen by nobody, and the first by most."""
    torch.manual_seed(rank)
    used = max(top_k, experts - 1)
    scores = torch.rand(tokens, used)
    scores[:, 0] += 0.5
    lora_A, lora_B = random(experts, rank, wide[0], dtype=dtype), random(experts, rank, wide[1], dtype=dtype)
    made = [random(tokens, wide[1], dtype=dtype), random(tokens, wide[0], dtype=dtype)]
    # NOTE as a mixture holds them: float32, and B as a view of (E, R, O).
    factors = [(lora_A.detach().float() / wide[0] ** 0.5), lora_B.detach().float()]
    factors[0] = factors[0].to(dtype).float()
    leaves = [factors[0].requires_grad_(), factors[1].transpose(1, 2).requires_grad_()]
    return [*made, *leaves, torch.rand(tokens, top_k).requires_grad_(), scores.topk(top_k, dim=1).indices]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rank", [4, 8, 17, 64])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_mixture_and_all_its_gradients_equal_the_loop(top_k, rank, dtype):
    y, x, lora_A, lora_B, gates, chosen = inputs(6, top_k, rank, dtype, tokens=37)
    ours = add_by_triton(y.clone(), x, lora_A, lora_B, gates, chosen)
    right = loop(y, x, lora_A, lora_B, gates, chosen)
    assert ours.dtype == dtype
    close(ours, right, dtype)
    along, leaves = torch.randn(ours.shape).to(dtype).float(), (y, x, lora_A, lora_B, gates)
    grads, loops = (torch.autograd.grad((out.float() * along).sum(), leaves) for out in (ours, right))
    for name, mine, theirs, leaf in zip(["y", "x", "A", "B", "gates"], grads, loops, leaves, strict=True):
        assert mine.dtype == leaf.dtype and mine.shape == leaf.shape, name
        close(mine, theirs, dtype)
    assert [bool(grads[2][e].any()) for e in range(6)] == [e in chosen for e in range(6)]
    assert grads[3].transpose(1, 2).is_contiguous()  # as memory holds B, so that an optimizer needs no copy


@pytest.mark.parametrize(
    ("experts", "top_k", "tokens", "wide"),
    [(64, 2, 150, (16, 16)), (3, 2, 300, (130, 150)), (1, 1, 5, (16, 16)), (4, 4, 3, (17, 33)), (8, 2, 1, (24, 8))],
    ids=["E=64", "wider than a block", "one expert", "all experts", "one token"],
)
def test_of_every_shape_it_computes_what_the_grouped_backend_does(experts, top_k, tokens, wide):
    wide = tuple(-(-size // 4) * 4 for size in wide)  # torch's own needs whole units
    y, x, lora_A, lora_B, gates, chosen = inputs(experts, top_k, 8, torch.float32, tokens=tokens, wide=wide)
    leaves, found = (y, x, lora_A, lora_B, gates), []
    for add in (add_by_triton, add_grouped):
        out = add(y.clone(), x, lora_A, lora_B, gates, chosen)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs, torch.float32)


def test_a_float32_output_takes_a_bfloat16_branch():
    y, x, *others = inputs(4, 2, 8, torch.bfloat16, tokens=9)
    wide = y.detach().float().requires_grad_()
    out = add_by_triton(wide.clone(), x, *others)
    assert out.dtype == torch.float32
    close(out, loop(wide, x, *others), torch.bfloat16)
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


def test_the_output_is_written_in_place_and_may_be_a_part_of_a_wider_one():
    y, x, *others = inputs(4, 2, 8, torch.float32, tokens=9)
    whole = torch.zeros(9, 30)
    part = whole[:, :24]
    part.copy_(y.detach())
    with torch.no_grad():
        assert add_by_triton(part, x, *others).data_ptr() == whole.data_ptr()
        torch.testing.assert_close(part, loop(y, x, *others), atol=1e-5, rtol=1e-5)
    assert not whole[:, 24:].any()


def test_no_tokens_change_nothing_and_give_zero_gradients():
    y, x, lora_A, lora_B, gates, chosen = inputs(4, 2, 8, torch.float32, tokens=0)
    out = add_by_triton(y.clone(), x, lora_A, lora_B, gates, chosen)
    assert out.shape == (0, 24)
    grads = torch.autograd.grad(out.sum(), (x, lora_A, lora_B, gates))
    assert [grad.shape for grad in grads] == [x.shape, lora_A.shape, lora_B.shape, gates.shape]
    assert not any(bool(grad.any()) for grad in grads)


def test_twice_the_same_gives_the_same_bits():
    y, x, *others = inputs(6, 4, 8, torch.float32, tokens=37)
    found = []
    for _ in range(2):
        out = add_by_triton(y.clone(), x, *others)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), (x, *others[:3]))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_type_that_the_kernels_do_not_know_is_refused_in_words():
    y, x, *others = inputs(4, 2, 8, torch.float32, tokens=9)
    with pytest.raises(RoutingError, match=r"cannot compute in torch\.float64; allowed: torch\.float32.*Choose auto"):
        add_by_triton(y.double(), x.double(), *others)
    with pytest.raises(RoutingError, match=r"torch\.int64"):
        matmul_by_triton(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(1, 2, 2), torch.tensor([2]))


def test_what_is_around_the_kernels_reads_nothing_back_from_the_device(monkeypatch):
    """The interpreter itself reads values of the kernels, which a card does not."""
    y, x, *others = inputs(6, 2, 8, torch.float32, tokens=37)
    for name in ("_rows_kernel", "_products_kernel"):
        monkeypatch.setattr(triton_experts, name, _Nothing())
    with NoHostSync():
        add_by_triton(y.clone(), x, *others).sum().backward()
        matmul_by_triton(x, others[0].transpose(1, 2), torch.full((6,), 37, dtype=torch.int32)).sum().backward()


class _Nothing:
    """A kernel that does nothing."""

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **given: None
