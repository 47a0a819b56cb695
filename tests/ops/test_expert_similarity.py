"""Angles between experts equal those of the dense deltas, in value and gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmoe.ops.expert_similarity import diversity_penalty, expert_cosine, expert_inner_products, mean_expert_cosine
from tests.reference import dumb_metrics as dumb

FEW = settings(max_examples=20, derandomize=True, deadline=None, database=None)


def factors(experts: int, rank: int, *, shared: bool = False, seed: int = 0, dtype=torch.float64):
    """lora_A (E or 1, R, 7) and lora_B (E, 5, R)."""
    generator = torch.Generator().manual_seed(seed)
    lora_A = torch.randn(1 if shared else experts, rank, 7, generator=generator, dtype=dtype)
    lora_B = torch.randn(experts, 5, rank, generator=generator, dtype=dtype)
    return lora_A.requires_grad_(), lora_B.requires_grad_()


@FEW
@given(experts=st.integers(1, 5), rank=st.integers(1, 4), shared=st.booleans(), seed=st.integers(0, 99))
def test_products_cosines_and_their_gradients_are_those_of_the_dense_deltas(experts, rank, shared, seed):
    lora_A, lora_B = factors(experts, rank, shared=shared, seed=seed)
    weights = torch.randn(experts, experts, dtype=torch.float64)
    for ours, theirs in (
        (expert_inner_products, dumb.dense_inner_products),
        (expert_cosine, dumb.dense_cosine),
    ):
        a, b = ours(lora_A, lora_B), theirs(lora_A, lora_B)
        torch.testing.assert_close(a, b)
        for one, other in zip(
            torch.autograd.grad((a * weights).sum(), (lora_A, lora_B)),
            torch.autograd.grad((b * weights).sum(), (lora_A, lora_B)),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("function", [expert_cosine, mean_expert_cosine, diversity_penalty])
def test_gradients_pass_gradcheck(function, shared):
    assert torch.autograd.gradcheck(function, factors(3, 2, shared=shared))


def test_copies_are_parallel_opposites_antiparallel_and_scale_does_not_matter():
    lora_A, lora_B = (t.detach()[:1] for t in factors(1, 2))
    cosine = expert_cosine(torch.cat([lora_A] * 3), torch.cat([lora_B, -3 * lora_B, 0.01 * lora_B]))
    expected = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(cosine, expected)


def test_the_same_delta_in_another_basis_of_the_rank_is_a_copy():
    lora_A, lora_B = (t.detach() for t in factors(1, 3))
    turn = torch.randn(3, 3, dtype=torch.float64)
    pair = torch.cat([lora_A, torch.linalg.inv(turn) @ lora_A]), torch.cat([lora_B, lora_B @ turn])
    torch.testing.assert_close(expert_cosine(*pair), torch.ones(2, 2, dtype=torch.float64))


def test_deltas_that_read_or_write_different_coordinates_are_orthogonal():
    lora_A, lora_B = (t.detach() for t in factors(2, 2))
    lora_A[0, :, :3], lora_A[1, :, 3:] = 0, 0
    torch.testing.assert_close(expert_cosine(lora_A, lora_B), torch.eye(2, dtype=torch.float64))
    assert float(diversity_penalty(lora_A, lora_B)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("zeros", [[1], [0, 1, 2]])
def test_an_expert_without_delta_has_cosine_zero_and_no_nan_in_value_or_gradient(zeros):
    lora_A, lora_B = factors(3, 2)
    with torch.no_grad():
        lora_B[zeros] = 0
    cosine = expert_cosine(lora_A, lora_B)
    assert not cosine[zeros].any() and not cosine[:, zeros].any()
    gradients = torch.autograd.grad(diversity_penalty(lora_A, lora_B), (lora_A, lora_B))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert not gradients[1][zeros].any()


def test_tiny_deltas_keep_their_angles_in_float32():
    lora_A, lora_B = (t.detach() for t in factors(3, 2, dtype=torch.float32))
    torch.testing.assert_close(expert_cosine(lora_A, lora_B * 1e-12), expert_cosine(lora_A, lora_B))


def test_the_penalty_is_the_mean_square_of_the_pairs_and_zero_for_one_expert():
    lora_A, lora_B = (t.detach() for t in factors(4, 2))
    cosine = dumb.dense_cosine(lora_A, lora_B)
    pairs = [float(cosine[i, j]) for i in range(4) for j in range(4) if i != j]
    assert float(diversity_penalty(lora_A, lora_B)) == pytest.approx(sum(c * c for c in pairs) / 12)
    assert float(mean_expert_cosine(lora_A, lora_B)) == pytest.approx(sum(pairs) / 12)
    single = factors(1, 2)
    penalty = diversity_penalty(*single)
    assert float(penalty.detach()) == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(penalty, single))


def test_following_the_penalty_makes_copies_diverse():
    lora_A, lora_B = factors(3, 2)
    with torch.no_grad():
        lora_B[:] = lora_B[:1] + 0.01 * lora_B
        lora_A[:] = lora_A[:1] + 0.01 * lora_A
    optimizer = torch.optim.Adam([lora_A, lora_B], lr=0.05)
    before = float(diversity_penalty(lora_A, lora_B).detach())
    for _ in range(100):
        optimizer.zero_grad()
        diversity_penalty(lora_A, lora_B).backward()
        optimizer.step()
    assert before > 0.9
    assert float(diversity_penalty(lora_A, lora_B).detach()) < 0.1


@FEW
@given(order=st.permutations(range(4)), seed=st.integers(0, 99))
def test_experts_in_another_order_have_the_same_angles_in_that_order(order, seed):
    lora_A, lora_B = factors(4, 2, seed=seed)
    permuted = expert_cosine(lora_A[order], lora_B[order])
    torch.testing.assert_close(permuted, expert_cosine(lora_A, lora_B)[order][:, order])


def test_autocast_does_not_blur_the_angles():
    lora_A, lora_B = (t.detach() for t in factors(3, 2, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = expert_cosine(lora_A, lora_B)
    assert torch.equal(inside, expert_cosine(lora_A, lora_B))
    assert expert_cosine(lora_A.bfloat16(), lora_B.bfloat16()).dtype == torch.float32


def test_shapes_that_do_not_belong_together_are_refused():
    lora_A, lora_B = factors(3, 2)
    with pytest.raises(ValueError, match=r"lora_A is \(2, 2, 7\) and lora_B \(3, 5, 2\)"):
        expert_cosine(lora_A[:2], lora_B)
    with pytest.raises(ValueError, match="same E and R"):
        expert_cosine(lora_A[:, :1], lora_B)
