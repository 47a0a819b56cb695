"""What a server is started with: what could answer no request is refused, and what limits its requests is named."""

import asyncio

import pytest

import lmoe
from lmoe.errors import ConfigError, RoutingError
from lmoe.generate.speaker import Speaker
from lmoe.serve.engine import start
from lmoe.serve.engine.mixing import RunMixing
from lmoe.serve.engine.start import mixing_of, start_engine
from lmoe.serve.request import RefusedError
from lmoe.serve.settings import ServeSettings
from tests.serve.engines import asked
from tests.tiny_models import tiny_model

DOMAINS = {"router": "oracle", "domains": ["code", "chat"], "load_balance": {"type": "none"}}


def speaker(moe, domain: str | None) -> Speaker:
    model = tiny_model()
    lmoe.inject(model, {"lora_r": 2, "num_experts": 2}, moe)
    return Speaker(model=model, tokenizer=None, template_place="", domain=domain)


@pytest.mark.parametrize(
    ("moe", "domain", "error", "said"),
    [
        ({"router": "top_k"}, "code", RoutingError, "domains are for moe.router=.*; this model has moe.router=top_k"),
        (DOMAINS, "maths", RoutingError, "has no expert for the domain 'maths'; it has .*code.*chat"),
        (DOMAINS, None, ConfigError, "name that of all requests, one of code, chat"),
    ],
)
def test_a_domain_that_no_router_goes_by_is_refused_before_anybody_asks(moe, domain, error, said):
    with pytest.raises(error, match=said):
        mixing_of(speaker(moe, domain))


@pytest.mark.parametrize(("moe", "domain"), [({"router": "top_k"}, None), (DOMAINS, "chat")])
def test_a_trained_mixture_is_served_with_the_domain_that_its_router_goes_by(moe, domain):
    found = mixing_of(speaker(moe, domain))
    assert isinstance(found, RunMixing) and found.domain == domain


@pytest.mark.parametrize(("cache_tokens", "holder"), [(64, "the KV cache of this server"), (None, "the model")])
def test_what_holds_no_longer_prompt_is_named(monkeypatch, cache_tokens, holder):
    monkeypatch.setattr(start, "CPU_CACHE_TOKENS", 512)
    base = tiny_model(max_position_embeddings=128)

    async def work() -> tuple[int, bool]:
        settings = ServeSettings(cache_tokens=cache_tokens)
        engine = await start_engine(Speaker(model=base, tokenizer=None, template_place=""), settings)
        try:
            with pytest.raises(RefusedError, match=f"; {holder} holds {engine.context} together"):
                await engine.submit(asked([1] * engine.context, 1))
            return engine.context, engine.limited_by_cache
        finally:
            await engine.stop(0)

    assert asyncio.run(work()) == (cache_tokens or 128, cache_tokens is not None)
