"""moe.backend=triton in every kind of site, run by Triton's interpreter: against the loops, and against the others.

`make test-triton` runs it where Triton is installed.
"""

from dataclasses import replace

import pytest
import torch

import lmoe
from tests.layers import small_ffn, small_native
from tests.layers.small_site import D, Site, trained
from tests.layers.test_expert_ffn import agree, batch
from tests.layers.test_expert_ffn import loop as ffn_loop
from tests.layers.test_native_experts import loop as native_loop
from tests.reference.triton_interpreter import WHY_NOT
from tests.tiny_models import tiny_model, tokens

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.mark.parametrize(
    "made",
    [
        Site(rank=3),
        Site(rank=4, experts=6, top_k=1, scale="raw"),
        Site(rank=2, svd=True),
        Site(rank=4, shared_lora_r=2),
        Site(router="sequence"),
    ],
    ids=["rank 3", "one of 6", "svd", "shared expert", "by prompt"],
)
def test_a_mixture_computes_what_the_stacked_backend_does(made):
    x, found = torch.randn(2, 7, D), []
    for backend in ("stacked", "triton"):
        site = replace(made, backend=backend).make()
        leaf = x.clone().requires_grad_()
        with small_prompts(site, x):
            y = site(leaf)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *trained(site).values()])])
    for ours, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def small_prompts(site, x):
    """What a router must know of the batch."""
    from tests.layers.loop_routing import known

    return known(site.router, x, torch.ones(x.shape[:2], dtype=torch.bool))


def test_under_autocast_a_mixture_is_close():
    site, x = Site(backend="triton", rank=8).make(), torch.randn(2, 7, D)
    exact = site(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = site(x)
    assert (rounded - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("share_base", [True, False])
@pytest.mark.parametrize(("router", "kind"), [("top_k", "gated with biases"), ("soft", "fused"), ("top_k", "Conv1D")])
def test_whole_experts_and_all_gradients_equal_the_loop(router, kind, share_base):
    made = Site(router=router, experts=3)
    ffn, (x, _) = small_ffn.make(made, kind, share_base=share_base), batch()
    ffn.settings = replace(ffn.settings, by_triton=True)
    x.requires_grad_()
    agree(ffn(x), ffn_loop(made, ffn, x, {}), {"x": x, **small_ffn.trained(ffn)})


@pytest.mark.parametrize("kind", small_native.KINDS)
def test_native_experts_and_all_gradients_equal_the_loop(kind):
    """Those of the fused weights too, where a phase trains base_ffn."""
    site = small_native.make(small_native.experts(kind).requires_grad_())
    site.settings = replace(site.settings, by_triton=True)
    x, indices, weights = small_native.routed()
    leaves = {"x": x.requires_grad_(), "weights": weights.requires_grad_(), **dict(site.named_parameters())}
    assert len(leaves) == 2 + 4 + (4 if kind == "gpt_oss" else 2)
    ours, expected = site(x, indices, weights), native_loop(site, x, indices, weights)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    along = torch.randn_like(ours)
    grads, loops = (torch.autograd.grad((y * along).sum(), list(leaves.values())) for y in (ours, expected))
    for name, mine, theirs in zip(leaves, grads, loops, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("family", "strategy"),
    [("llama", "mixture_lora"), ("llama", "moe_expert_lora"), ("qwen3_moe", "native_moe_expert_lora")],
)
def test_a_model_steps_as_with_auto(family, strategy):
    found, ids = [], tokens()
    for backend in ("auto", "triton"):
        torch.manual_seed(0)
        model = tiny_model(family)
        lmoe.inject(model, {"strategy": strategy, "lora_r": 4, "lora_B_std": 0.3}, {"backend": backend})
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) >= 6
    for name, grad in found[1].items():
        torch.testing.assert_close(grad, found[0][name], atol=1e-5, rtol=1e-3, msg=name)
