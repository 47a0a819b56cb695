"""A mixture beside a whole block is the block plus the loop over low-rank experts, in a tuple too."""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import lmoe
from lmoe.injection.record import injected
from lmoe.injection.tracing import adapters_off
from lmoe.layers.mixture_lora_linear import MixtureBeside, MixtureSettings
from lmoe.vocabulary import Backend, Mixing
from tests.layers.loop_routing import ROUTERS, info_for_router, known, loop_choices, scales
from tests.layers.small_site import D, Site
from tests.reference import dumb_layer
from tests.tiny_models import randomise, tiny_model, tokens

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
SCALING, SHARED = 1.7, 0.8


class Block(nn.Module):
    """Reads and returns (..., D), and in a tuple two things more if asked."""

    def __init__(self, *, as_tuple: bool) -> None:
        super().__init__()
        self.inner, self.as_tuple = nn.Linear(D, D), as_tuple

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, str, Tensor]:
        y = torch.tanh(self.inner(x))
        return (y, "scores", x) if self.as_tuple else y


def make(made: Site, *, as_tuple: bool = False, shared: bool = True) -> MixtureBeside:
    router = made.make_router()
    settings = MixtureSettings(
        num_experts=made.experts,
        lora_r=made.rank,
        scaling=SCALING,
        shared_lora_r=2 if shared else None,
        shared_scaling=SHARED,
        mixing=Mixing(made.mixing),
        backend=Backend(made.backend),
    )
    site = MixtureBeside(Block(as_tuple=as_tuple).requires_grad_(False), router, settings, D)
    with torch.no_grad():
        for name, parameter in site.named_parameters():
            if name.rsplit(".", 1)[-1] in ("lora_A", "lora_B"):
                parameter.normal_(std=0.5)
    return site.eval()


def loop(site: MixtureBeside, x: Tensor, weights: list[list[Tensor]], mixing: str = "outputs") -> Tensor:
    """What stands beside the block, token by token."""
    rows, shared = [], site.shared_expert
    for token, w in zip(x.reshape(-1, x.shape[-1]), weights, strict=True):
        y = site.settings.scaling * dumb_layer.delta(token, site.lora_A, site.lora_B, w, mixing)
        if shared is not None:
            y = y + shared.scaling * (shared.lora_B @ (shared.lora_A @ token))
        rows.append(y)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_outputs_and_gradients_equal_the_block_plus_the_loop(router, as_tuple):
    made = Site(router=router, scale="raw" if "raw" in scales(router) else "sum_to_one")
    site, x = make(made, as_tuple=as_tuple), torch.randn(2, 3, D, requires_grad=True)
    facts = info_for_router(site.router, x, torch.ones(2, 3, dtype=torch.bool))
    with site.router.context.with_batch_info(**facts):
        output, own = site(x), site.base_layer(x)
    _, choices = loop_choices(made, site.router, x, facts)
    beside = loop(site, x, [choice.weights for choice in choices])
    if as_tuple:
        assert output[1:] == ("scores", x)
        output, own = output[0], own[0]
    torch.testing.assert_close(output, own + beside, **CLOSE)
    leaves = [x, *(p for p in site.parameters() if p.requires_grad)]
    assert len(leaves) >= 5
    grads, loops = (
        torch.autograd.grad(y.square().sum(), leaves, allow_unused=True, materialize_grads=True)
        for y in (output, own + beside)
    )
    torch.testing.assert_close(grads, loops, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("mixing", "backend"), [("factors", "stacked"), ("outputs", "grouped")])
def test_every_way_to_compute_it_equals_the_loop(mixing, backend):
    made = Site(mixing=mixing, backend=backend)
    site, x = make(made, shared=False), torch.randn(2, 3, D)
    _, choices = loop_choices(made, site.router, x, {})
    expected = site.base_layer(x) + loop(site, x, [choice.weights for choice in choices], mixing)
    with known(site.router, x, torch.ones(2, 3)):
        torch.testing.assert_close(site(x), expected, **CLOSE)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_the_blocks_own_output_is_not_written_into_and_switched_off_it_is_returned_as_it_is(as_tuple):
    site, x = make(Site(), as_tuple=as_tuple), torch.randn(2, 3, D)
    kept = []
    site.base_layer.register_forward_hook(lambda _m, _a, y: kept.append(y[0] if as_tuple else y))
    alone = kept_value(site.base_layer(x), as_tuple).clone()
    site(x)
    assert len(kept) == 2 and torch.equal(kept[1], alone)
    site.enabled = False
    assert torch.equal(kept_value(site(x), as_tuple), alone)


def kept_value(output: Tensor | tuple, as_tuple: bool) -> Tensor:
    return output[0] if as_tuple else output


@contextmanager
def seen(model: nn.Module):
    """Input and output of every mixture beside a block, by path."""
    found, hooks = {}, []
    for path, module in model.named_modules():
        if isinstance(module, MixtureBeside):
            hooks.append(module.register_forward_hook(lambda _m, a, y, path=path: found.update({path: (a[0], y)})))
    assert hooks
    yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral"])
def test_in_a_backbone_each_block_is_the_native_one_plus_the_loop(family):
    """gpt_oss returns the scores of its router beside the hidden states."""
    model, ids = tiny_model(family), tokens()
    with torch.no_grad():
        before = model(ids).logits
    lmoe.inject(model, {"strategy": "mixture_lora", "lora_r": 4, "shared_lora_r": 3, "attn_lora": {"enabled": False}})
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)  # lora_B is zero
        randomise(model, std=0.2)
        with lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace, seen(model) as found:
            model(ids)
            routing = dict(trace.routing)
        assert not torch.allclose(model(ids).logits, before, atol=1e-2)
        with adapters_off(model):
            assert torch.equal(model(ids).logits, before)
    kinds = {site.path for site in injected(model).plan.sites if site.kind.value == "beside"}
    assert found.keys() == kinds and len(kinds) == (1 if family == "deepseek_v3" else 2)
    for path, (x, output) in found.items():
        site = model.get_submodule(path)
        with torch.no_grad():
            own = site.base_layer(x)
        assert isinstance(output, tuple) is isinstance(own, tuple) is (family == "gpt_oss")
        if isinstance(output, tuple):
            assert len(output) == len(own) == 2 and torch.equal(output[1], own[1])
            output, own = output[0], own[0]
        weights = [list(row) for row in routing[path].routing_weights.flatten(0, 1)]
        torch.testing.assert_close(output, own + loop(site, x, weights), **CLOSE)
