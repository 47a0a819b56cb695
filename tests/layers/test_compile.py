"""torch.compile traces a site without a break, and changes nothing."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lmoe.ops import expert_blocks
from lmoe.ops.expert_rows import grouped_linear, grouped_lora
from lmoe.ops.grouped import group_by_expert
from tests.layers import small_ffn
from tests.layers.loop_routing import GATES
from tests.layers.small_site import D, Site, router_of, trained
from tests.reference.no_grouped_kernel import no_grouped_kernel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def outputs_and_gradients(site, x, *, compiled: bool, traced: bool):
    leaf, valid = x.clone().requires_grad_(), torch.ones(x.shape[:-1], dtype=torch.bool)
    call = torch.compile(site, fullgraph=True, backend="aot_eager") if compiled else site
    trace = router_of(site).trace
    if traced:
        with trace.recording(valid):
            y = call(leaf)
        loss = y.square().mean() + trace.auxiliary_loss()
    else:
        y = call(leaf)
        loss = y.square().mean()
    return y.detach(), torch.autograd.grad(loss, [leaf, *trained(site).values()])


@pytest.mark.parametrize("router", GATES)
def test_a_compiled_site_gives_the_same_outputs_and_gradients(router):
    site, x = Site(router=router, shared_lora_r=2).make(), torch.randn(2, 3, D)
    plain, compiled = (outputs_and_gradients(site, x, compiled=way, traced=False) for way in (False, True))
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-4)


def test_a_compiled_site_traces_its_routing_and_its_losses():
    site, x = Site(shared_lora_r=2).make(), torch.randn(2, 3, D)
    plain, compiled = (outputs_and_gradients(site, x, compiled=way, traced=True) for way in (False, True))
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("special", ["factors", "svd"])
def test_every_kind_of_mixture_compiles(special):
    made = {
        "factors": Site(mixing="factors"),
        "svd": Site(svd=True, rank=2),
    }[special]
    site, x = made.make(), torch.randn(2, 3, D)
    plain, compiled = (outputs_and_gradients(site, x, compiled=way, traced=False) for way in (False, True))
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shared", [None, 2])
def test_the_grouped_backend_is_one_graph_in_a_type_whose_matmuls_no_compiler_knows(shared):
    site, x = Site(backend="grouped", rank=4, shared_lora_r=shared).make(), torch.randn(2, 3, D)
    plain, compiled = (outputs_and_gradients(site, x, compiled=way, traced=True) for way in (False, True))
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-4)


def test_rows_of_experts_compile_in_float32():
    """What moe_expert_lora and native experts compute with."""
    rows, groups = torch.randn(6, 8), group_by_expert(torch.tensor([[0, 1], [1, 2], [2, 0]]), 3)
    weight, lora_A, lora_B = torch.randn(3, 4, 8), torch.randn(3, 4, 8), torch.randn(3, 4, 4)

    def both(rows):
        return grouped_linear(rows, weight, groups) + grouped_lora(rows, lora_A, lora_B, 0.5, groups)

    torch.testing.assert_close(torch.compile(both, backend="aot_eager", fullgraph=True)(rows), both(rows))


def test_rows_of_experts_compile_whole_where_torch_has_no_grouped_kernel(monkeypatch):
    """In tiles, forward and backward, without a break."""
    no_grouped_kernel(monkeypatch)
    chosen = torch.tensor([[0, 1], [1, 2], [2, 0]])
    weight, lora_A, lora_B = torch.randn(3, 4, 8), torch.randn(3, 4, 8), torch.randn(3, 4, 4)

    def both(rows):
        groups = group_by_expert(chosen, 3)
        return grouped_linear(rows, weight, groups) + grouped_lora(rows, lora_A, lora_B, 0.5, groups)

    found = []
    for call in (both, torch.compile(both, backend="aot_eager", fullgraph=True)):
        rows = torch.linspace(-1, 1, 48).view(6, 8).requires_grad_()
        y = call(rows)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), rows)))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("kind", ["gated", "fused", "ungated"])
def test_expert_ffns_are_one_graph_that_gives_what_blocks_of_rows_do(kind, monkeypatch):
    monkeypatch.setattr(expert_blocks, "FEWEST_VALUES", 0)
    ffn, x = small_ffn.make(Site(rank=4), kind), torch.randn(2, 3, D)
    found = []
    for call in (ffn, torch.compile(ffn, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        found.append((y.detach(), *torch.autograd.grad(y.square().mean(), [leaf, *small_ffn.trained(ffn).values()])))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


def test_a_compiled_site_that_is_checkpointed_traces_the_same():
    """The trace is written inside the region that runs again, for which a compiler breaks its graph."""
    site, x = Site().make(), torch.randn(2, 3, D)

    class Checkpointed(torch.nn.Module):
        def forward(self, x):
            return checkpoint(site, x, use_reentrant=False)

    found = []
    for call in (Checkpointed(), torch.compile(Checkpointed(), backend="aot_eager")):
        leaf, trace = x.clone().requires_grad_(), router_of(site).trace
        with trace.recording(torch.ones(2, 3, dtype=torch.bool)):
            y = call(leaf)
            loss = y.square().mean() + trace.auxiliary_loss()
        found.append((y.detach(), torch.autograd.grad(loss, [leaf, *trained(site).values()])))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
