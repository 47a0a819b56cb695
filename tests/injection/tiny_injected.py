"""A tiny model with any router, away from its start, and one training step of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import lmoe
from lmoe.injection.record import injected, mixtures
from lmoe.layers.trace import RoutingTrace
from lmoe.ops.expert_similarity import diversity_penalty
from lmoe.rules import routers as rules
from lmoe.rules.routers import Need
from tests.tiny_models import tiny_model, tokens

ROUTERS = [kind.value for kind in rules.ROUTERS]
CAN_GROUP = [kind.value for kind, router in rules.ROUTERS.items() if router.fixed_k]
WITH_LOGITS = [kind.value for kind, router in rules.ROUTERS.items() if router.logits]
BY_DOMAIN = [kind.value for kind, router in rules.ROUTERS.items() if router.needs is Need.domain]
BY_PROMPT = [kind.value for kind, router in rules.ROUTERS.items() if router.needs is Need.prompt]
DOMAINS = ["maths", "prose"]


def tiny_injected(
    router: str = "top_k",
    *,
    injection: dict[str, Any] | None = None,
    moe: dict[str, Any] | None = None,
    std: float = 0.3,
    **base: Any,
) -> PreTrainedModel:
    """Every adapter, router and selection bias random; in evaluation mode.

    Args:
        base: settings of the backbone's config.
    """
    model = tiny_model(**base)
    own = {"domains": DOMAINS} if router in BY_DOMAIN else {}
    lmoe.inject(model, {"lora_r": 4, **(injection or {})}, {"router": router, **own, **(moe or {})})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, values in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
            leaf = name.rsplit(".", 1)[-1]
            if leaf in ("lora_A", "lora_B", "selection_bias") or (".router." in f".{name}" and "weight" in leaf):
                size = 0.05 if leaf == "selection_bias" else std
                values.copy_(torch.randn(values.shape, generator=generator) * size)
    return model


def randomly(model: PreTrainedModel, *, expert_dropout: float = 0.4, router_noise: float = 0.3) -> PreTrainedModel:
    """In training mode, with all that is random on, where the router has logits."""
    record = injected(model)
    if record.moe.router in WITH_LOGITS:
        record.context.expert_dropout, record.context.router_noise = expert_dropout, router_noise
    return model.train()


@contextmanager
def traced(model: PreTrainedModel, mask: Tensor) -> Iterator[RoutingTrace]:
    """With domains where the router needs them."""
    by_domain = rules.needs_domain(injected(model).moe)
    domains = [DOMAINS[row % 2] for row in range(mask.shape[0])] if by_domain else None
    with lmoe.trace(model, attention_mask=mask, domains=domains) as trace:
        yield trace


def gradients(model: PreTrainedModel, *, seed: int = 5, diversity: float = 0.0) -> dict[str, Tensor]:
    """Of loss and auxiliary loss of one step of two rows."""
    model.zero_grad()
    ids, labels = tokens(), tokens()
    labels[:, :3] = -100
    torch.manual_seed(seed)
    with traced(model, torch.ones_like(ids)) as trace:
        # NOTE no attention mask for the model, whose own code would read it back to the host.
        loss = model(input_ids=ids, labels=labels).loss + trace.auxiliary_loss()
        if diversity:
            loss = loss + diversity * sum(diversity_penalty(site.lora_A, site.lora_B) for _, site in mixtures(model))
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
