"""What a small router decides, from the loop over tokens; and what it must be told before it can decide."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lmoe.layers.context import Rows
from lmoe.layers.routers import Router
from lmoe.vocabulary import RouterKind
from tests.layers.small_site import D, Site
from tests.reference import dumb_gates, dumb_layer

ROUTERS = [kind.value for kind in RouterKind]
SCALES = {
    "soft": ["sum_to_one", "unit"],
    "uniform": ["sum_to_one", "unit"],
    "oracle": ["sum_to_one"],
    "relu": ["raw", "unit"],
}


def scales(router: str) -> list[str]:
    """What moe.scale can be."""
    return SCALES.get(router, ["sum_to_one", "unit", "raw"])


def told(router: Router, x: Tensor, valid: Tensor, *, seed: int = 0) -> dict[str, Any]:
    """What the router must be told of these tokens beside them: prompts, or domains."""
    generator = torch.Generator().manual_seed(seed)
    if kind_of(router) == "sequence":
        prompt = (torch.rand(x.shape[:2], generator=generator) < 0.6) & valid
        prompt[:, :1] = True  # without a prompt all logits are 0, and the choice is a tie
        return {"rows": Rows.single(prompt)}
    if kind_of(router) == "oracle":
        return {"expert_of_token": torch.randint(router.settings.num_experts, x.shape[:-1], generator=generator)}
    return {}


def known(router: Router, x: Tensor, valid: Tensor) -> AbstractContextManager[None]:
    """Forwards inside the block know it."""
    return router.context.about(**told(router, x, valid))


def kind_of(router: Router) -> str:
    """The config's word for a router."""
    name = type(router).__name__.removesuffix("Router")
    return {"TopK": "top_k", "TopP": "top_p", "NoisyTopK": "noisy_top_k"}.get(name, name.lower())


def loop_choices(
    made: Site, router: Router, x: Tensor, facts: dict[str, Any]
) -> tuple[Tensor | None, list[dumb_gates.Choice]]:
    """(N, E) logits and the choice of each token."""
    flat = x.reshape(-1, D)
    if made.router == "uniform":
        return None, [dumb_gates.uniform(x.new_zeros(()), made.experts, scale=made.scale)] * len(flat)
    if made.router == "oracle":
        wanted = facts["expert_of_token"].flatten().tolist()
        return None, [dumb_gates.oracle(x.new_zeros(()), expert, made.experts) for expert in wanted]
    weight, looked_at = router.weight, flat
    assert isinstance(weight, Tensor)
    if made.router == "sequence":
        prompt = facts["rows"].prompt
        means = [dumb_layer.pooled(x[b], prompt[b, 0].tolist()) for b in range(x.shape[0])]
        looked_at = torch.stack([means[b] for b in range(x.shape[0]) for _ in range(x.shape[1])])
    z = dumb_layer.logits(looked_at, weight)
    given = {"k": made.top_k, "p": made.top_p, "temperature": made.temperature, "scale": made.scale}
    return z, [dumb_gates.choose(made.router, row, **given, bias=router.selection_bias) for row in z]
