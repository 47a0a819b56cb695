"""Experts in blocks of rows equal the loop over tokens and experts, with all gradients, and keep little."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from lmoe.ops import expert_blocks as module
from lmoe.ops.expert_blocks import Factors, expert_blocks
from lmoe.ops.grouped import group_by_expert
from tests.reference import dumb_experts
from tests.reference.dumb_experts import Ffn, Weight

D, I, R, E = 6, 10, 3, 5  # noqa: E741 - the letters of the docstrings
SCALING = 1.7
UNUSED = 3
"""An expert that no token chooses, where not all are chosen."""
CASES = {
    "two of five": (9, 2),
    "one token": (1, 2),
    "all experts": (4, E),
    "one of five": (9, 1),
}
"""Tokens and chosen experts."""
TYPES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Type of everything but the weights and the factors, which are float32 at least; and how far off numbers may be."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    """Experts have several blocks, which are not all of one size."""
    monkeypatch.setattr(module, "MOST_ROWS", 2)


class Problem:
    """One FFN with experts: leaves by name, our value and that of the loop."""

    def __init__(
        self, tokens: int, chosen: int, *, dtype: torch.dtype = torch.float64, gated: bool = True, skip: str = ""
    ) -> None:
        torch.manual_seed(0)
        own = torch.promote_types(dtype, torch.float32)
        usable = range(E) if chosen == E else [e for e in range(E) if e != UNUSED]
        self.indices = torch.stack([torch.tensor(usable)[torch.randperm(len(usable))[:chosen]] for _ in range(tokens)])
        self.firsts = ("gate", "up") if gated else ("up",)
        self.frozen = {name: torch.randn(I, D).to(dtype) for name in self.firsts} | {
            "down": torch.randn(D, I).to(dtype)
        }
        self.leaves = {"x": torch.randn(tokens, D).to(dtype), "weights": torch.rand(tokens, chosen, dtype=own)}
        for name, weight in self.frozen.items():
            if name != skip:
                self.leaves[f"{name}.A"] = 0.5 * torch.randn(E, R, weight.shape[1], dtype=own)
                self.leaves[f"{name}.B"] = 0.5 * torch.randn(E, R, weight.shape[0], dtype=own)  # as memory holds it
        for leaf in self.leaves.values():
            leaf.requires_grad_()

    def inner(self, *values: Tensor) -> Tensor:
        return silu(values[0]) * values[1] if len(values) > 1 else silu(values[0])

    def factors(self, name: str) -> Factors | None:
        if f"{name}.A" not in self.leaves:
            return None
        return Factors(self.leaves[f"{name}.A"], self.leaves[f"{name}.B"].transpose(1, 2))

    def ours(self) -> Tensor:
        x = self.leaves["x"]
        products = [x @ self.frozen[name].t() for name in self.firsts]
        mixed, delta = expert_blocks(
            x,
            products,
            [self.factors(name) for name in self.firsts],
            self.factors("down"),
            self.leaves["weights"],
            group_by_expert(self.indices, E),
            self.inner,
            SCALING,
        )
        y = mixed @ self.frozen["down"].t()
        return y if delta is None else y + delta

    def loop(self) -> Tensor:
        def weight(name: str) -> Weight:
            base, pair = self.frozen[name], self.factors(name)
            wide = base.to(self.leaves["weights"].dtype)
            return Weight([wide] * E, [None] * E, *(pair or (None, None)), SCALING)

        ffn = Ffn([weight(name) for name in self.firsts], self.inner, weight("down"))
        weights = [
            [of_token[chosen.index(e)] if e in chosen else of_token[0] * 0 for e in range(E)]
            for of_token, chosen in zip(self.leaves["weights"], self.indices.tolist(), strict=True)
        ]
        return dumb_experts.mixture(self.leaves["x"].to(weights[0][0].dtype), ffn, self.indices.tolist(), weights)

    def gradients(self, y: Tensor) -> dict[str, Tensor]:
        along = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
        grads = torch.autograd.grad((y * along).sum(), list(self.leaves.values()))
        return dict(zip(self.leaves, grads, strict=True))


def agree(problem: Problem, tolerance: float) -> None:
    """Values and gradients, each within a part of its largest number."""
    ours, loop = problem.ours(), problem.loop()
    found, expected = problem.gradients(ours), problem.gradients(loop)
    for name, mine, theirs in [("y", ours, loop), *((name, found[name], expected[name]) for name in found)]:
        assert mine.dtype == (problem.leaves | {"y": problem.leaves["x"]})[name].dtype, name
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max(), name


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gated", [True, False])
def test_outputs_and_all_gradients_equal_the_loop_over_whole_experts(case, gated, dtype):
    agree(Problem(*CASES[case], dtype=dtype, gated=gated), TYPES[dtype])


@pytest.mark.parametrize("skip", ["gate", "up", "down"])
def test_a_linear_may_go_without_branches(skip):
    agree(Problem(9, 2, skip=skip), TYPES[torch.float64])


def test_gradients_are_those_of_finite_differences():
    problem = Problem(4, 2)

    def of(*leaves: Tensor) -> Tensor:
        problem.leaves = dict(zip(problem.leaves, leaves, strict=True))
        return problem.ours()

    assert torch.autograd.gradcheck(of, tuple(problem.leaves.values()))


def test_an_expert_without_tokens_gets_a_gradient_of_zeros_and_the_others_do_not():
    problem = Problem(9, 2)
    assert UNUSED not in problem.indices
    for name, grad in problem.gradients(problem.ours()).items():
        if name[-1] in "AB":
            assert [bool(grad[e].any()) for e in range(E)] == [e != UNUSED for e in range(E)], name


@pytest.mark.parametrize("rows", [1, 3, 256])
def test_the_size_of_blocks_changes_nothing_but_rounding(rows, monkeypatch):
    problem = Problem(9, 2)
    before = problem.gradients(problem.ours())
    monkeypatch.setattr(module, "MOST_ROWS", rows)
    torch.testing.assert_close(problem.gradients(problem.ours()), before, atol=1e-12, rtol=1e-10)


def test_blocks_cover_every_row_once_and_belong_to_one_expert():
    groups = group_by_expert(torch.tensor([[0, 1], [0, 2], [0, 1], [0, 4], [0, 1]]), E)
    blocks = list(module._blocks(groups.ends, groups.token))
    assert [(block.expert, block.rows.start, block.rows.stop) for block in blocks] == [
        (0, 0, 2),
        (0, 2, 4),
        (0, 4, 5),
        (1, 5, 7),
        (1, 7, 8),
        (2, 8, 9),
        (4, 9, 10),
    ]


def test_what_is_frozen_gets_no_gradient_and_changes_none_of_the_others():
    problem = Problem(9, 2)
    whole = problem.gradients(problem.ours())
    for frozen in ("x", "weights", "up.A", "up.B", "down.A"):
        problem.leaves[frozen].requires_grad_(False)
        y = problem.ours()
        trained = {name: leaf for name, leaf in problem.leaves.items() if leaf.requires_grad}
        along = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
        found = torch.autograd.grad((y * along).sum(), list(trained.values()))
        for name, grad in zip(trained, found, strict=True):
            torch.testing.assert_close(grad, whole[name], msg=lambda text, name=name: f"{name}: {text}")


def test_no_tokens_give_no_rows_and_gradients_of_zeros():
    problem = Problem(9, 2)
    problem.indices = torch.zeros(0, 2, dtype=torch.long)
    problem.leaves["x"] = torch.randn(0, D, dtype=torch.float64, requires_grad=True)
    problem.leaves["weights"] = torch.rand(0, 2, dtype=torch.float64, requires_grad=True)
    y = problem.ours()
    assert y.shape == (0, D)
    assert not any(grad.any() for grad in problem.gradients(y).values())


def test_what_is_kept_for_the_backward_does_not_grow_with_rows_times_inner_features():
    """Twice the chosen experts: what is kept grows by R numbers of a row and branch, and its order."""
    sizes = {}
    for chosen in (2, 4):
        problem, kept = Problem(64, chosen), {}
        ours = {leaf.untyped_storage().data_ptr() for leaf in problem.leaves.values()}

        def keep(tensor: Tensor, kept=kept, ours=ours) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in ours:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = problem.ours()
        sizes[chosen] = sum(kept.values())
        assert y.requires_grad
    more_rows = 2 * 64
    assert 0 < sizes[4] - sizes[2] <= more_rows * 8 * (3 * R + 4)
    assert sizes[4] - sizes[2] < more_rows * 8 * 2 * I
