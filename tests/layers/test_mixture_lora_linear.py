"""MixtureLoRALinear against the loop over tokens and experts, and its types."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lmoe.layers.context import RoutingContext
from lmoe.layers.lora_linear import LoRALinear
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear, MixtureSettings
from lmoe.layers.routers import RouterSettings, router_class
from lmoe.layers.routing import Routing
from lmoe.layers.trace import AuxiliaryLosses, RoutingTrace
from lmoe.rules.routers import ROUTERS
from lmoe.vocabulary import Backend, LoadBalanceType, MixtureScale, RouterKind
from tests.reference import dumb

SUM_TO_ONE, RAW = MixtureScale.sum_to_one, MixtureScale.raw


def mixture(
    *,
    experts: int = 3,
    top_k: int = 2,
    rank: int = 2,
    width: tuple[int, int] = (6, 5),
    kind: RouterKind = RouterKind.top_k,
    scale: MixtureScale = SUM_TO_ONE,
    temperature: float = 1.0,
    dropout: float = 0.0,
    scaling: float = 1.7,
    dtype: torch.dtype = torch.float32,
    router_dtype: torch.dtype | None = None,
    bias: bool = False,
) -> MixtureLoRALinear:
    """A site with random router and experts."""
    base = nn.Linear(*width, bias=bias)
    settings = RouterSettings(
        in_features=width[0],
        num_experts=experts,
        top_k=top_k,
        top_p=1.0,
        scale=scale,
        dtype=router_dtype or dtype,
        selection_bias=False,
        l1_start=0.0,
        fixed_k=ROUTERS[kind].fixed_k,
        device=torch.device("cpu"),
    )
    losses = AuxiliaryLosses(balance=LoadBalanceType.aux_loss, aux_loss_coef=0.01, router_z_loss_coef=0.001)
    context = RoutingContext(temperature=temperature)
    router = router_class(kind)(settings, site="site", trace=RoutingTrace(losses), context=context)
    made_from = MixtureSettings(
        num_experts=experts, lora_r=rank, scaling=scaling, dropout=dropout, lora_B_std=0.5, backend=Backend.stacked
    )
    site = MixtureLoRALinear(base, router, made_from)
    base.requires_grad_(False)
    nn.init.normal_(router.weight)
    return site.to(dtype)


def trace_of(site: MixtureLoRALinear) -> RoutingTrace:
    assert site.router is not None
    return site.router.trace


def routing_of(site: MixtureLoRALinear, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
    """Output of a forward and what the router decided in it."""
    with trace_of(site).recording(torch.ones(x.shape[:-1], dtype=torch.bool)):
        y = site(x)
    return y, trace_of(site).routing["site"]


@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(
    experts=st.integers(1, 5),
    data=st.data(),
    rank=st.integers(1, 3),
    lead=st.sampled_from([(4,), (2, 3), (1, 1)]),
    kind=st.sampled_from([RouterKind.top_k, RouterKind.soft]),
    scale=st.sampled_from([SUM_TO_ONE, RAW]),
    temperature=st.sampled_from([0.7, 1.0, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    masked=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_outputs_and_gradients_equal_the_loop_over_tokens_and_experts(
    experts, data, rank, lead, kind, scale, temperature, dtype, masked, bias, seed
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
        scale=scale,
        temperature=temperature,
        dtype=dtype,
        bias=bias,
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
        renormalise=scale is SUM_TO_ONE and not soft,
    ).view(*lead, 5)
    if bias:
        expected = expected + site.base_layer.bias
    z = torch.stack([torch.stack([row @ token for row in site.router.weight]) for token in flat])
    flags = valid.view(-1).tolist()
    # temperature divides the logits of the probabilities, not those of the z-loss
    expected_balance = dumb.load_balancing_loss(z / temperature, flags, top_k=top_k, soft=soft)
    expected_z = dumb.router_z_loss(z, flags)
    trace = trace_of(site)
    with trace.recording(valid):
        y = site(x)
    upstream = torch.randn_like(y)
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 1e-9, "rtol": 1e-9}
    torch.testing.assert_close(y, expected, **tolerance)
    ours = (y * upstream).sum() + trace.load_balancing_loss() + trace.router_z_loss()
    theirs = (expected * upstream).sum() + expected_balance + expected_z
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize(
    ("kind", "top_k", "scale"),
    [(RouterKind.soft, 3, SUM_TO_ONE), (RouterKind.top_k, 2, SUM_TO_ONE), (RouterKind.top_k, 3, RAW)],
)
def test_equal_experts_make_routing_irrelevant_where_weights_sum_to_one(kind, top_k, scale):
    torch.manual_seed(0)
    site = mixture(kind=kind, top_k=top_k, scale=scale, dtype=torch.float64)
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
    site = mixture(top_k=1, scale=RAW, dtype=torch.float64)
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
    x = torch.randn(3, 6)
    torch.manual_seed(5)
    y, training = routing_of(site.train(), x)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(y, site.base_layer(x) + 1.7 * dropped @ (site.lora_B[0] @ site.lora_A[0]).T)
    _, evaluation = routing_of(site.eval(), x)
    # Without dropout the site computes its logits in one matmul with lora_A, which may round otherwise.
    torch.testing.assert_close(training.router_logits, evaluation.router_logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(training.routing_weights, evaluation.routing_weights, atol=1e-6, rtol=1e-5)


def test_under_bfloat16_autocast_the_router_and_all_gradients_stay_float32():
    torch.manual_seed(0)
    site, x = mixture(), torch.randn(2, 3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = routing_of(site, x)
        auxiliary = trace_of(site).auxiliary_loss()
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
        site = LoRALinear(nn.Linear(6, 5), lora_r=2, scaling=1.0, dropout=0.0)
        nn.init.normal_(site.lora_B, std=0.5)
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
    x = torch.randn(4, 6)
    z, rounded = (routing_of(site, x)[1].router_logits for site in (full, half))
    assert rounded.dtype == torch.bfloat16
    assert not torch.equal(z, rounded.float())
    torch.testing.assert_close(z, rounded.float(), atol=0.05, rtol=0.05)


def test_inputs_are_never_edited_in_place():
    torch.manual_seed(0)
    site, x = mixture(dropout=0.3).train(), torch.randn(4, 6)
    before = x.clone()
    site(x)
    assert torch.equal(x, before)
