"""Grouped matmuls over rows sorted by expert equal the loop over rows, whatever the rank and the layout."""

import pytest
import torch
from torch import Tensor

from lmoe.ops.expert_rows import grouped_linear, grouped_lora, sum_over_choices
from lmoe.ops.grouped import Groups, group_by_expert
from tests.reference import dumb_experts

N, K, E, D, O = 7, 2, 5, 8, 16  # noqa: E741 - the letters of the docstrings
UNUSED = 3
"""An expert that no token chooses."""
UNALIGNED = (1, 2, 3, 5)
"""Ranks that do not fill 16 bytes, in float32 or in bfloat16."""


def choices() -> Tensor:
    """(N, K) different experts of each token, never the unused one."""
    torch.manual_seed(0)
    others = torch.tensor([e for e in range(E) if e != UNUSED])
    return torch.stack([others[torch.randperm(E - 1)[:K]] for _ in range(N)])


@pytest.fixture
def groups() -> Groups:
    return group_by_expert(choices(), E)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def agree(ours: Tensor, loop: Tensor, leaves: list[Tensor], *, tolerance: float = 1e-5) -> None:
    """Values and gradients."""
    torch.testing.assert_close(ours, loop, atol=tolerance, rtol=tolerance, check_dtype=False)
    along = torch.randn(ours.shape)
    grads, loops = (torch.autograd.grad((y.float() * along).sum(), leaves) for y in (ours, loop))
    for mine, theirs, each in zip(grads, loops, leaves, strict=True):
        assert mine.dtype == each.dtype
        size = float(theirs.abs().max())
        torch.testing.assert_close(mine, theirs, atol=tolerance * size, rtol=tolerance)


# --- grouped_linear


@pytest.mark.parametrize("transposed", [False, True], ids=["(E, O, D)", "a view of (E, D, O)"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_a_grouped_linear_and_its_gradients_equal_the_loop_over_rows(groups, transposed, with_bias, dtype, tolerance):
    rows, stored = leaf(N * K, D, dtype=dtype), leaf(E, D, O, dtype=dtype) if transposed else leaf(E, O, D, dtype=dtype)
    bias = leaf(E, O, dtype=dtype) if with_bias else None
    weight = stored.transpose(1, 2) if transposed else stored
    ours = grouped_linear(rows, weight, groups, bias)

    def of(row: Tensor, e: int) -> Tensor:
        y = weight[e].float() @ row.float()
        return y if bias is None else y + bias[e].float()

    assert ours.dtype == dtype
    loop = dumb_experts.rows_of_expert(rows, groups.expert.tolist(), of)
    agree(ours, loop, [rows, stored, *([] if bias is None else [bias])], tolerance=tolerance)


def test_a_grouped_linear_computes_in_the_type_of_its_weight(groups):
    rows, weight = torch.randn(N * K, D), torch.randn(E, O, D).bfloat16()
    assert torch.equal(grouped_linear(rows, weight, groups), grouped_linear(rows.bfloat16(), weight, groups))
    assert grouped_linear(rows.bfloat16(), weight.float(), groups).dtype == torch.float32


# --- grouped_lora


def lora(rank: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Rows, A and B; the experts are float32 whatever the rows are."""
    return [leaf(N * K, D, dtype=dtype), leaf(E, rank, D), leaf(E, O, rank)]


@pytest.mark.parametrize("stored", ["as (E, O, R)", "as (E, R, O)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [*UNALIGNED, 8])
def test_grouped_branches_and_their_gradients_equal_the_loop_over_rows(groups, rank, dtype, stored):
    rows, lora_A, lora_B = lora(rank, dtype)
    kept = leaf(E, rank, O) if stored == "as (E, R, O)" else lora_B
    lora_B = kept.transpose(1, 2) if stored == "as (E, R, O)" else lora_B
    ours = grouped_lora(rows, lora_A, lora_B, 1.7, groups)
    loop = dumb_experts.rows_of_expert(
        rows, groups.expert.tolist(), lambda row, e: 1.7 * (lora_B[e] @ lora_A[e] @ row.float())
    )
    # bfloat16 rows: every matmul rounds to bfloat16, as torch's own under autocast
    agree(ours, loop, [rows, lora_A, kept], tolerance=1e-5 if dtype == torch.float32 else 0.06)


@pytest.mark.parametrize("rank", UNALIGNED)
def test_filling_up_the_rank_adds_nothing(groups, rank):
    """The same factors with rows of zeros give the same bits."""
    rows, lora_A, lora_B = (tensor.detach() for tensor in lora(rank))
    wide_A = torch.cat([lora_A, torch.zeros(E, 8 - rank, D)], 1)
    wide_B = torch.cat([lora_B, torch.zeros(E, O, 8 - rank)], 2)
    narrow, wide = (grouped_lora(rows, A, B, 0.5, groups) for A, B in ((lora_A, lora_B), (wide_A, wide_B)))
    torch.testing.assert_close(narrow, wide, atol=1e-6, rtol=0)


def test_zero_lora_B_adds_exactly_nothing_and_scaling_is_a_factor(groups):
    rows, lora_A, lora_B = lora(3)
    assert not grouped_lora(rows, lora_A, torch.zeros_like(lora_B), 1.0, groups).any()
    once, twice = (grouped_lora(rows, lora_A, lora_B, scaling, groups) for scaling in (1.0, 2.0))
    torch.testing.assert_close(twice, 2 * once)


def test_an_expert_without_tokens_gets_exactly_no_gradient_and_the_others_do(groups):
    assert UNUSED not in groups.expert
    rows, lora_A, lora_B = lora(2)
    weight, bias = leaf(E, O, D), leaf(E, O)
    y = grouped_linear(rows, weight, groups, bias) + grouped_lora(rows, lora_A, lora_B, 1.0, groups)
    y.square().sum().backward()
    for tensor in (weight, bias, lora_A, lora_B):
        assert tensor.grad is not None
        assert [bool(tensor.grad[e].any()) for e in range(E)] == [e != UNUSED for e in range(E)]


def test_no_tokens_give_no_rows():
    nobody = group_by_expert(torch.zeros(0, K, dtype=torch.long), E)
    assert grouped_linear(torch.randn(0, D), torch.randn(E, O, D), nobody, torch.randn(E, O)).shape == (0, O)
    assert grouped_lora(torch.randn(0, D), torch.randn(E, 3, D), torch.randn(E, O, 3), 1.0, nobody).shape == (0, O)
    assert sum_over_choices(torch.randn(0, O), torch.randn(0, K), nobody).shape == (0, O)


# --- sum_over_choices


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_the_sum_over_choices_and_its_gradients_equal_the_loop(groups, dtype, tolerance):
    rows, weights = leaf(N * K, O, dtype=dtype), leaf(N, K, dtype=dtype)
    ours = sum_over_choices(rows, weights, groups)
    assert ours.dtype == dtype
    loop = dumb_experts.summed_over_choices(rows.float(), groups.order.tolist(), weights.float())
    agree(ours, loop, [rows, weights], tolerance=tolerance)


def test_float32_weights_lift_bfloat16_rows(groups):
    rows, weights = torch.randn(N * K, O).bfloat16(), torch.randn(N, K)
    ours = sum_over_choices(rows, weights, groups)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, sum_over_choices(rows.float(), weights, groups))


def test_sorting_and_summing_with_one_choice_of_weight_one_gives_back_the_tokens():
    groups = group_by_expert(choices()[:, :1], E)
    x = torch.randn(N, O)
    assert torch.equal(sum_over_choices(x.index_select(0, groups.token), torch.ones(N, 1), groups), x)


def test_the_order_of_the_choices_changes_nothing_but_rounding():
    x, weights, weight = torch.randn(N, D), torch.rand(N, K), torch.randn(E, O, D)
    sums = []
    for order in ([0, 1], [1, 0]):
        groups = group_by_expert(choices()[:, order], E)
        rows = grouped_linear(x.index_select(0, groups.token), weight, groups)
        sums.append(sum_over_choices(rows, weights[:, order], groups))
    torch.testing.assert_close(sums[0], sums[1])
