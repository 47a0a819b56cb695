"""Frozen Linears, routers and branches on one input in one function equal all of them in plain operations."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from lmoe.ops.add_lora import add_lora
from lmoe.ops.frozen_linear import Beside, Down, frozen_and_down
from lmoe.ops.lora import lora_delta

FEW = settings(max_examples=40, derandomize=True, deadline=None, database=None)
D = 6
KINDS = {"branch": (2, 0), "router": (0, 3), "both": (4, 3)}
"""Of a site: H and E."""


def sites(kinds: Sequence[str], dtype: torch.dtype, router_dtype: torch.dtype, bias: bool) -> list[Beside]:
    """Random ones of these kinds, of different widths."""
    found = []
    for place, kind in enumerate(kinds):
        (width, experts), out = KINDS[kind], 5 + place
        found.append(
            Beside(
                torch.randn(out, D, dtype=dtype),
                torch.randn(out, dtype=dtype) if bias else None,
                torch.randn(width, D, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
                if width
                else None,
                torch.randn(out, width, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
                if width
                else None,
                torch.randn(experts, D, dtype=router_dtype, requires_grad=True) if experts else None,
            )
        )
    return found


def plain(x: Tensor, given: Sequence[Beside], dtype: torch.dtype) -> list[Down]:
    """Each by itself, as autograd has it."""
    return [
        Down(
            linear(x, site.weight.to(x.dtype), None if site.bias is None else site.bias.to(x.dtype)),
            x.new_empty(*x.shape[:-1], 0) if site.lora_A is None else linear(x, site.lora_A.to(x.dtype)),
            None if site.router is None else linear(x.to(site.router.dtype), site.router),
            None if site.lora_B is None else site.lora_B.to(dtype),
        )
        for site in given
    ]


def leaves(x: Tensor, given: Sequence[Beside]) -> list[Tensor]:
    """All that trains."""
    return [x, *(tensor for site in given for tensor in site[2:] if tensor is not None)]


def tensors(downs: Sequence[Down]) -> list[Tensor]:
    """All results in a row."""
    return [value for down in downs for value in down if value is not None]


def in_float64(leaf: Tensor | None) -> Tensor | None:
    return None if leaf is None else leaf.detach().double().requires_grad_(leaf.requires_grad)


def summed(downs: Sequence[Down], along: Sequence[Tensor]) -> Tensor:
    return torch.stack([(value.double() * way).sum() for value, way in zip(tensors(downs), along, strict=True)]).sum()


def directions(downs: Sequence[Down]) -> list[Tensor]:
    return [torch.randn_like(value, dtype=torch.float64) for value in tensors(downs)]


@FEW
@given(
    lead=st.sampled_from([(), (4,), (2, 3), (0,)]),
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_outputs_and_gradients_equal_the_plain_operations(lead, kinds, bias, dtype, seed):
    """In float32 the routers, in float64 the routers of float32 too, whose logits then are of that type."""
    torch.manual_seed(seed)
    router_dtype = torch.float32 if seed % 2 else dtype
    given, x = sites(kinds, dtype, router_dtype, bias), torch.randn(*lead, D, dtype=dtype, requires_grad=True)
    ours, theirs = frozen_and_down(x, given, dtype), plain(x, given, dtype)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(frozen_and_down(x, given, dtype), theirs, atol=1e-5, rtol=1e-5)
    along = directions(theirs)
    found = [torch.autograd.grad(summed(downs, along), leaves(x, given)) for downs in (ours, theirs)]
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kinds", [["branch"], ["both"], ["both", "both"], ["branch", "router", "both"]])
def test_gradcheck(kinds):
    torch.manual_seed(0)
    given, x = sites(kinds, torch.float64, torch.float64, True), torch.randn(2, 3, D, dtype=torch.float64)

    def computed(x: Tensor, *trained: Tensor) -> tuple[Tensor, ...]:
        own = iter(trained)
        filled = [
            site._replace(**{n: next(own) for n in site._fields[2:] if getattr(site, n) is not None}) for site in given
        ]
        return tuple(tensors(frozen_and_down(x, filled, torch.float64)))

    assert torch.autograd.gradcheck(computed, tuple(leaves(x.requires_grad_(), given)))


@pytest.mark.parametrize("names", [["lora_A"], ["lora_B"], ["router"], ["lora_A", "lora_B"], ["lora_B", "router"], []])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_gradient_is_the_same_whatever_else_trains(names, dtype):
    """Phases freeze routers or experts; without any, x alone has a gradient."""
    torch.manual_seed(0)
    given = sites(["both", "both"], dtype, torch.float32, False)
    x = torch.randn(4, D, dtype=dtype, requires_grad=True)
    every = frozen_and_down(x, given, dtype)
    along = directions(every)
    expected = dict(
        zip(map(id, leaves(x, given)), torch.autograd.grad(summed(every, along), leaves(x, given)), strict=True)
    )
    fewer = [
        site._replace(**{n: getattr(site, n).detach() for n in site._fields[2:] if n not in names}) for site in given
    ]
    trained = [x, *(getattr(site, name) for site in fewer for name in names)]
    some = torch.autograd.grad(summed(frozen_and_down(x, fewer, dtype), along), trained)
    for leaf, gradient in zip(trained, some, strict=True):
        torch.testing.assert_close(gradient, expected[id(leaf)])


def test_bfloat16_branches_give_float32_gradients_near_those_of_float64():
    torch.manual_seed(0)
    given = sites(["both", "branch"], torch.bfloat16, torch.float32, True)
    x = torch.randn(9, D).bfloat16().requires_grad_()
    exact = [
        Beside(*(None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in s)) for s in given
    ]
    exact_x = in_float64(x)
    assert exact_x is not None
    ours, theirs = frozen_and_down(x, given, torch.bfloat16), plain(exact_x, exact, torch.float64)
    assert [value.dtype for value in ours[0]] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16]
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(a.double(), b, atol=0.06, rtol=0.02)
    torch.testing.assert_close(ours[0].logits.double(), theirs[0].logits, atol=1e-5, rtol=1e-5)
    along = [way.bfloat16().double() for way in directions(theirs)]
    found = [
        torch.autograd.grad(summed(downs, along), own)
        for downs, own in ((ours, leaves(x, given)), (theirs, leaves(exact_x, exact)))
    ]
    assert [gradient.dtype for gradient in found[0]] == [torch.bfloat16] + [torch.float32] * 5
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b, atol=0.2, rtol=0.03)


@pytest.mark.parametrize("graph", [True, False])
def test_a_branch_is_added_in_place(graph):
    torch.manual_seed(0)
    y, hidden, lora_B = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 5), (2, 3, 2), (5, 2)))
    expected = y + 1.7 * hidden @ lora_B.T
    with torch.set_grad_enabled(graph):
        found = add_lora(y, hidden, lora_B, 1.7)
    assert found.data_ptr() == y.data_ptr()
    torch.testing.assert_close(found, expected)


def test_gradcheck_of_an_added_branch():
    torch.manual_seed(0)
    given = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5), (2, 2), (5, 2))]
    assert torch.autograd.gradcheck(lambda y, hidden, B: add_lora(y * 1, hidden, B, 0.5), given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_frozen_linear_and_an_added_branch_are_a_linear_and_its_lora(dtype):
    torch.manual_seed(0)
    (site,), x = sites(["branch"], dtype, dtype, True), torch.randn(3, D, dtype=dtype, requires_grad=True)
    (down,) = frozen_and_down(x, [site], dtype)
    y = add_lora(down.y, down.hidden, down.lora_B, 1.7)
    expected = linear(x, site.weight, site.bias) + lora_delta(x, site.lora_A, site.lora_B, 1.7)
    torch.testing.assert_close(y, expected)
    own = [x, site.lora_A, site.lora_B]
    torch.testing.assert_close(*(torch.autograd.grad(each.square().sum(), own) for each in (y, expected)))
