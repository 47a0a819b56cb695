"""MixtureLoRALinear against the loop over tokens and experts, and its types."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lmoe.layers.lora_linear import LoRALinear
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear
from lmoe.layers.router import Router
from lmoe.layers.trace import RoutingTrace
from lmoe.schema.moe import RouterKind
from tests.reference import dumb


def mixture(
    *,
    experts: int = 3,
    top_k: int = 2,
    rank: int = 2,
    width: tuple[int, int] = (6, 5),
    kind: RouterKind = RouterKind.top_k,
    renormalise: bool = True,
    temperature: float = 1.0,
    dropout: float = 0.0,
    scaling: float = 1.7,
    dtype: torch.dtype = torch.float32,
    router_dtype: torch.dtype | None = None,
) -> MixtureLoRALinear:
    """A site with random router and experts."""
    base = nn.Linear(*width, bias=False)
    router = Router(
        width[0],
        experts,
        kind=kind,
        top_k=top_k,
        temperature=temperature,
        renormalise=renormalise,
        dtype=router_dtype or dtype,
        device=torch.device("cpu"),
    )
    trace = RoutingTrace(0.01, 0.001)
    site = MixtureLoRALinear(
        base, router, lora_r=rank, scaling=scaling, dropout=dropout, lora_B_std=0.5, site="site", trace=trace
    )
    base.requires_grad_(False)
    nn.init.normal_(router.weight)
    return site.to(dtype)


@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(
    experts=st.integers(1, 5),
    data=st.data(),
    rank=st.integers(1, 3),
    lead=st.sampled_from([(4,), (2, 3), (1, 1)]),
    kind=st.sampled_from(RouterKind),
    renormalise=st.booleans(),
    temperature=st.sampled_from([0.7, 1.0, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_outputs_and_gradients_equal_the_loop_over_tokens_and_experts(
    experts, data, rank, lead, kind, renormalise, temperature, dtype, masked, seed
):
    """Gradients of x, the router, A and B, of the output and the balance loss together."""
    torch.manual_seed(seed)
    soft = kind is RouterKind.soft
    top_k = experts if soft else data.draw(st.integers(1, experts))
    site = mixture(
        experts=experts,
        top_k=top_k,
        rank=rank,
        kind=kind,
        renormalise=renormalise,
        temperature=temperature,
        dtype=dtype,
    )
    x = torch.randn(*lead, 6, dtype=dtype, requires_grad=True)
    valid = torch.ones(lead, dtype=torch.bool)
    if masked and valid.numel() > 1:
        valid.view(-1)[-1] = False
    leaves = [x, site.router.weight, site.lora_A, site.lora_B]
    flat = x.reshape(-1, 6)
    expected = dumb.mixture(
        flat,
        site.base_layer.weight,
        site.router.weight,
        site.lora_A,
        site.lora_B,
        scaling=1.7,
        top_k=top_k,
        temperature=temperature,
        renormalise=renormalise and not soft,
    ).view(*lead, 5)
    z = torch.stack([torch.stack([row @ token for row in site.router.weight]) for token in flat])
    flags = valid.view(-1).tolist()
    # temperature divides the logits of the probabilities, not those of the z-loss
    expected_balance = dumb.load_balancing_loss(z / temperature, flags, top_k=top_k, soft=soft)
    expected_z = dumb.router_z_loss(z, flags)
    with site.trace.recording(valid):
        y = site(x)
    upstream = torch.randn_like(y)
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 1e-9, "rtol": 1e-9}
    torch.testing.assert_close(y, expected, **tolerance)
    ours = (y * upstream).sum() + site.trace.load_balancing_loss() + site.trace.router_z_loss()
    theirs = (expected * upstream).sum() + expected_balance + expected_z
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize(
    ("kind", "top_k", "renormalise"),
    [(RouterKind.soft, 3, False), (RouterKind.top_k, 2, True), (RouterKind.top_k, 3, False)],
)
def test_equal_experts_make_routing_irrelevant_where_weights_sum_to_one(kind, top_k, renormalise):
    torch.manual_seed(0)
    site = mixture(kind=kind, top_k=top_k, renormalise=renormalise, dtype=torch.float64)
    with torch.no_grad():
        site.lora_A.copy_(site.lora_A[:1].expand_as(site.lora_A))
        site.lora_B.copy_(site.lora_B[:1].expand_as(site.lora_B))
    x = torch.randn(4, 6, dtype=torch.float64)
    single = site.base_layer(x) + 1.7 * x @ (site.lora_B[0] @ site.lora_A[0]).T
    torch.testing.assert_close(site(x), single)
    (gradient,) = torch.autograd.grad(site(x).sum(), site.router.weight)
    assert float(gradient.abs().max()) < 1e-12


def test_equal_experts_do_not_hide_routing_where_weights_do_not_sum_to_one():
    torch.manual_seed(0)
    site = mixture(top_k=1, renormalise=False, dtype=torch.float64)
    with torch.no_grad():
        site.lora_A.copy_(site.lora_A[:1].expand_as(site.lora_A))
        site.lora_B.copy_(site.lora_B[:1].expand_as(site.lora_B))
    (gradient,) = torch.autograd.grad(site(torch.randn(4, 6, dtype=torch.float64)).sum(), site.router.weight)
    assert float(gradient.abs().max()) > 1e-3


def test_with_zero_lora_B_the_router_gets_exactly_no_task_gradient_and_lora_B_does():
    """Why phases that train routers first need lora_B_std."""
    torch.manual_seed(0)
    site = mixture()
    nn.init.zeros_(site.lora_B)
    x = torch.randn(4, 6)
    assert torch.equal(site(x), site.base_layer(x))
    site(x).sum().backward()
    assert site.router.weight.grad is not None and not site.router.weight.grad.any()
    assert site.lora_A.grad is not None and not site.lora_A.grad.any()
    assert site.lora_B.grad is not None and site.lora_B.grad.any()


def test_dropout_is_drawn_once_for_all_experts_and_not_for_the_router():
    """Equal experts with soft weights: one mask gives w-independent output, and routing is that of evaluation."""
    torch.manual_seed(0)
    site = mixture(kind=RouterKind.soft, dropout=0.5)
    with torch.no_grad():
        site.lora_A.copy_(site.lora_A[:1].expand_as(site.lora_A))
        site.lora_B.copy_(site.lora_B[:1].expand_as(site.lora_B))
    x, valid = torch.randn(3, 6), torch.ones(3, dtype=torch.bool)
    torch.manual_seed(5)
    with site.trace.recording(valid):
        y = site.train()(x)
    training_logits = site.trace.routing["site"].router_logits
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(y, site.base_layer(x) + 1.7 * dropped @ (site.lora_B[0] @ site.lora_A[0]).T)
    with site.trace.recording(valid):
        site.eval()(x)
    assert torch.equal(training_logits, site.trace.routing["site"].router_logits)


def test_under_bfloat16_autocast_the_router_and_all_gradients_stay_float32():
    torch.manual_seed(0)
    site, x = mixture(), torch.randn(2, 3, 6)
    valid = torch.ones(2, 3, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with site.trace.recording(valid):
            y = site(x)
        auxiliary = site.trace.auxiliary_loss()
    routing = site.trace.routing["site"]
    assert y.dtype == torch.bfloat16
    assert auxiliary.dtype == torch.float32
    assert {routing.router_logits.dtype, routing.probs.dtype, routing.routing_weights.dtype} == {torch.float32}
    torch.testing.assert_close(routing.router_logits, x @ site.router.weight.T)
    (y.float().sum() + auxiliary).backward()
    for parameter in (site.lora_A, site.lora_B, site.router.weight):
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32 and parameter.grad.any()


@pytest.mark.parametrize("kind", ["mixture", "single"])
def test_a_bfloat16_base_without_autocast_gives_bfloat16_outputs_from_float32_adapters(kind):
    torch.manual_seed(0)
    if kind == "mixture":
        site = mixture()
    else:
        site = LoRALinear(nn.Linear(6, 5), lora_r=2, scaling=1.0, dropout=0.0, lora_B_std=0.5)
    site.base_layer.to(torch.bfloat16)
    x = torch.randn(4, 6).bfloat16().requires_grad_()
    y = site(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert site.lora_A.grad is not None and site.lora_A.grad.dtype == torch.float32
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert not torch.equal(y, site.base_layer(x))


def test_router_dtype_bfloat16_rounds_the_logits():
    torch.manual_seed(0)
    full = mixture()
    torch.manual_seed(0)
    half = mixture(router_dtype=torch.bfloat16)
    x, valid = torch.randn(4, 6), torch.ones(4, dtype=torch.bool)
    for site in (full, half):
        with site.trace.recording(valid):
            site(x)
    z, rounded = (site.trace.routing["site"].router_logits for site in (full, half))
    assert rounded.dtype == torch.bfloat16
    assert not torch.equal(z, rounded.float())
    torch.testing.assert_close(z, rounded.float(), atol=0.05, rtol=0.05)


def test_inputs_are_never_edited_in_place():
    torch.manual_seed(0)
    site, x = mixture(dropout=0.3).train(), torch.randn(4, 6)
    before = x.clone()
    site(x)
    assert torch.equal(x, before)
