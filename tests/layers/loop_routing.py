"""What a small router decides, from the loop over tokens; and what it must be told before it can decide."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lmoe.layers.context import PromptRows
from lmoe.layers.routers import LinearRouter, Router, router_class
from lmoe.ops.gating import Gate
from lmoe.rules import routers as rules
from lmoe.rules.routers import Need
from lmoe.vocabulary import LoadBalanceType, MixtureScale, RouterKind
from tests.layers.small_site import D, Site
from tests.reference import dumb_gates, dumb_layer

ROUTERS = [kind.value for kind in rules.ROUTERS]
WITH_LOGITS = [kind.value for kind, router in rules.ROUTERS.items() if router.logits]
WITH_LEARNT_LOGITS = [kind.value for kind, router in rules.ROUTERS.items() if router.logits and router.trains]
WITH_TEMPERATURE = [kind.value for kind, router in rules.ROUTERS.items() if router.temperature]
CAN_GROUP = [kind.value for kind, router in rules.ROUTERS.items() if router.fixed_k]
CAN_BIAS = [k.value for k, router in rules.ROUTERS.items() if LoadBalanceType.aux_loss_free in router.balances]


def gates() -> list[str]:
    """The first router of each gate of logits."""
    first: dict[Callable[..., Gate], str] = {}
    for kind in rules.ROUTERS:
        cls = router_class(kind)
        if issubclass(cls, LinearRouter):
            first.setdefault(cls.gate, kind.value)
    return list(first.values())


GATES = gates()


def scales(router: str) -> list[str]:
    """What moe.scale can be."""
    return [scale.value for scale in rules.ROUTERS[RouterKind(router)].scales or (MixtureScale.sum_to_one,)]


def info_for_router(router: Router, x: Tensor, valid: Tensor, *, seed: int = 0) -> dict[str, Any]:
    """What the router must be told of these tokens beside them: prompts, or domains."""
    generator = torch.Generator().manual_seed(seed)
    needs = next(rules.ROUTERS[kind].needs for kind in rules.ROUTERS if type(router) is router_class(kind))
    if needs is Need.prompt:
        prompt = (torch.rand(x.shape[:2], generator=generator) < 0.6) & valid
        prompt[:, :1] = True  # without a prompt all logits are 0, and the choice is a tie
        ids = torch.randint(100, prompt.shape, generator=generator)
        return {"rows": PromptRows.single(prompt).with_hashes(ids)}
    if needs is Need.domain:
        return {"expert_of_token": torch.randint(router.settings.num_experts, x.shape[:-1], generator=generator)}
    return {}


def known(router: Router, x: Tensor, valid: Tensor) -> AbstractContextManager[None]:
    """Forwards inside the block know it."""
    return router.context.with_batch_info(**info_for_router(router, x, valid))


def loop_choices(
    made: Site, router: Router, x: Tensor, facts: dict[str, Any]
) -> tuple[Tensor | None, list[dumb_gates.Choice]]:
    """(N, E) logits, of routers that have any, and the choice of each token."""
    looked_at = x.reshape(-1, D)
    if "rows" in facts:
        prompt = facts["rows"].prompt
        means = [dumb_layer.pooled(x[b], prompt[b, 0].tolist()) for b in range(x.shape[0])]
        looked_at = torch.stack([means[b] for b in range(x.shape[0]) for _ in range(x.shape[1])])
    z, bias = None, None
    if made.declared.logits:
        assert isinstance(router.weight, Tensor)
        z, bias = dumb_layer.logits(looked_at, router.weight), router.selection_bias
    given = {"k": made.top_k, "p": made.top_p, "temperature": made.temperature, "scale": made.scale, "bias": bias}
    wanted = facts["expert_of_token"].flatten().tolist() if "expert_of_token" in facts else [None] * len(looked_at)
    if made.declared.prompt_ids:
        wanted = [hashed % made.experts for (hashed,) in facts["rows"].hashes.tolist() for _ in range(x.shape[1])]
    rows = x.new_zeros(len(looked_at), made.experts) if z is None else z
    return z, [
        dumb_gates.choose(made.router, row, **given, expert=expert) for row, expert in zip(rows, wanted, strict=True)
    ]
