"""The engine for a speaker: a base with experts, a trained run, or a base alone."""

from lmoe.backbones.load import context_length
from lmoe.errors import ConfigError
from lmoe.generate.speaker import Speaker
from lmoe.injection.record import RECORD, injected, model_route
from lmoe.injection.tracing import expert_of
from lmoe.rules.routers import needs_domain, needs_prompt
from lmoe.serve.engine.engine import BatchEngine
from lmoe.serve.engine.mixing import BaseMixing, BlendMixing, Mixing, RunMixing
from lmoe.serve.engine.paged import PagedSettings
from lmoe.serve.settings import ServeSettings

CPU_CACHE_TOKENS = 8192
"""Tokens of the KV cache on a CPU, where nobody says another number."""


async def start_engine(speaker: Speaker, settings: ServeSettings) -> BatchEngine:
    """Start it on the running event loop.

    Raises:
        ConfigError: a model that cannot be served.
        RoutingError: a domain that its router does not know, or does not go by.
    """
    model, cache_tokens = speaker.model, settings.cache_tokens
    if cache_tokens is None and model.device.type == "cpu":
        cache_tokens = CPU_CACHE_TOKENS
    sizes = PagedSettings(
        max_requests=settings.max_requests, max_batch_tokens=settings.max_batch_tokens, cache_tokens=cache_tokens
    )
    mixing = mixing_of(speaker)
    return BatchEngine(model, mixing, sizes, max_waiting=settings.max_queue, context=context_length(model))


def mixing_of(speaker: Speaker) -> Mixing:
    """Who decides what requests weigh.

    Raises:
        ConfigError: routers that cannot decide for rows that lie one behind the other.
        RoutingError: a domain that the router does not know, or does not go by.
    """
    if speaker.blend is not None:
        return BlendMixing(speaker.model, speaker.blend)
    if getattr(speaker.model, RECORD, None) is None:
        return BaseMixing()
    moe = injected(speaker.model).moe
    if needs_prompt(moe) and model_route(speaker.model) is None:
        raise ConfigError(
            f"moe.router={moe.router} decides for each site by its own states of the prompt, which cannot be told in a "
            "batch of many requests; serve a mixture with moe.router_scope=model or one that routes tokens, or let "
            "this one answer a prompt at a time"
        )
    if needs_domain(moe) and speaker.domain is None:
        raise ConfigError(
            f"moe.router={moe.router} goes by the domain: name that of all requests, one of "
            f"{', '.join(moe.domains or [])}"
        )
    if speaker.domain is not None:
        expert_of(moe, speaker.domain)
    return RunMixing(speaker.model, speaker.domain)
