"""torch.compile traces a site without a break, and changes nothing."""

from collections.abc import Iterator

import pytest
import torch

from tests.layers.small_site import D, Site, router_of, trained

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


@pytest.mark.parametrize("router", ["top_k", "soft", "sigmoid", "top_p", "relu"])
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
