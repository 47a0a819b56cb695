"""moe.router_bias: the logits shift by it, in the fused forward as in the plain one, and only where logits learn."""

import pytest
import torch

import lmoe
from lmoe.errors import ConfigError
from lmoe.injection.record import routers
from tests.layers.loop_routing import ROUTERS, WITH_LEARNT_LOGITS
from tests.tiny_models import randomise, tiny_model, tokens


@pytest.mark.parametrize("router", WITH_LEARNT_LOGITS)
@pytest.mark.parametrize("scope", ["linear", "block"])
def test_the_bias_is_added_to_the_logits_of_every_token(router, scope):
    ids, seen = tokens(), {}
    for bias in (False, True):
        model = tiny_model()
        lmoe.inject(model, {"lora_r": 4}, {"router": router, "router_bias": bias, "router_scope": scope})
        randomise(model)
        shift = torch.arange(4.0)
        for _, each in routers(model):
            if bias:
                each.bias.data.copy_(shift)
        with torch.no_grad(), lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace:
            model(ids)
            seen[bias] = trace.routing[next(iter(trace.routing))].router_logits.clone()
    torch.testing.assert_close(seen[True], seen[False] + shift, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("router", sorted({*ROUTERS} - {*WITH_LEARNT_LOGITS}))
def test_routers_without_learnt_logits_refuse_it(router):
    with pytest.raises(ConfigError, match=f"moe.router_bias has no effect with moe.router={router}"):
        lmoe.inject(tiny_model(), {}, {"router": router, "router_bias": True})
