"""A mixture decodes with a KV cache, in batches, padded on the left: the tokens of one forward a prompt and step."""

import pytest
import torch

import lmoe
from lmoe.injection.tracing import domain
from lmoe.rules.routers import ROUTERS
from tests.injection.pairs import EXAMPLES
from tests.injection.tiny_injected import DOMAINS, tiny_injected
from tests.tiny_models import randomise, tiny_model, tokens

STEPS = 6
SHORT, LONG = 5, 8


@torch.no_grad()
def step_by_step(model, ids):
    """(STEPS,) greedy tokens after one prompt, each by a forward of all before it, without cache and padding."""
    start = ids.shape[1]
    for _ in range(STEPS):
        logits = model(input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids[0, start:]


def decoded(model):
    """(2, STEPS) of generate with its cache, for a short and a long prompt in one batch, and of each prompt alone."""
    short, long = tokens(1, SHORT), tokens(1, LONG)
    batch = torch.cat([torch.nn.functional.pad(short, (LONG - SHORT, 0)), long])
    mask = torch.ones_like(batch)
    mask[0, : LONG - SHORT] = 0
    settings = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        found = model.generate(input_ids=batch, attention_mask=mask, **settings)[:, LONG:]
    return found, torch.stack([step_by_step(model, short), step_by_step(model, long)])


@pytest.mark.parametrize(
    ("router", "scope"),
    [
        (kind.value, scope)
        for kind, router in ROUTERS.items()
        for scope in (("linear", "block") if router.logits else ("linear",))
        if router.needs is None  # those that need something have tests of their own
    ],
)
def test_every_router_that_decides_by_token(router, scope):
    found, expected = decoded(tiny_injected(router, moe={"router_scope": scope}))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("strategy", EXAMPLES)
def test_every_strategy(strategy):
    model = tiny_model(EXAMPLES[strategy])
    lmoe.inject(model, {"strategy": strategy.value, "lora_r": 4})
    randomise(model, std=0.2)
    found, expected = decoded(model.eval())
    assert torch.equal(found, expected)


def test_the_oracle_is_told_once_for_the_whole_answer():
    model = tiny_injected("oracle")
    with domain(model, DOMAINS[1]):
        found, expected = decoded(model)
    with domain(model, DOMAINS[0]):
        other, _ = decoded(model)
    assert torch.equal(found, expected) and not torch.equal(found, other)
