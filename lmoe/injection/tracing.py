"""Look at the routing of a forward, tell it its domain, or switch the adapters off; each inside a `with`."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lmoe.config.moe import MoeConfig
from lmoe.errors import RoutingError
from lmoe.injection.balance import warn_of_missing_balance
from lmoe.injection.record import injected, sites
from lmoe.layers.context import PromptRows
from lmoe.layers.native_router import NativeRouter
from lmoe.layers.trace import RoutingTrace
from lmoe.rules.routers import Need, needs_domain, needs_prompt, routers_that_need

SWITCH = threading.Lock()
"""Held while adapters are switched, of whatever model."""


@contextmanager
def trace(
    model: nn.Module,
    *,
    attention_mask: Tensor,
    domains: Sequence[str] | None = None,
    prompt_mask: Tensor | None = None,
) -> Iterator[RoutingTrace]:
    """Routing of the forwards inside the block.

    Args:
        model: an injected model.
        attention_mask: (B, T) bool or 0/1; padding counts for no loss and no statistic.
        domains: B names, for moe.router=oracle.
        prompt_mask: (B, T) bool or 0/1, for a router that decides by the prompt: the tokens that the decision is made
            from; None: those that the attention mask keeps, up to the first label.

    Raises:
        RoutingError: a domain that no expert has, another number of names than rows, or facts that the router of this
            model does not use.
    """
    record = injected(model)
    warn_of_missing_balance(model)
    experts = None
    if prompt_mask is not None and not needs_prompt(record.moe):
        named = routers_that_need(Need.prompt)
        raise RoutingError(f"prompt_mask is for moe.router={named}; this model has moe.router={record.moe.router}")
    if domains is not None:
        if len(domains) != len(attention_mask):
            raise RoutingError(f"{len(domains)} domains for {len(attention_mask)} rows; give one name for each row")
        experts = torch.tensor([expert_of(record.moe, name) for name in domains], device=attention_mask.device)[:, None]
    rows = None if prompt_mask is None else PromptRows.single(prompt_mask.bool() & attention_mask.bool())
    with (
        record.context.with_batch_info(expert_of_token=experts, rows=rows),
        record.trace.recording(attention_mask) as recording,
    ):
        yield recording


@contextmanager
def domain(model: nn.Module, names: str | Sequence[str]) -> Iterator[None]:
    """What the tokens inside the block belong to: for generation with moe.router=oracle.

    Args:
        names: one domain of all tokens, or one of each row of the batches inside the block.

    Raises:
        RoutingError: no expert has this domain.
    """
    record = injected(model)
    if isinstance(names, str):
        experts = torch.tensor(expert_of(record.moe, names))
    else:
        experts = torch.tensor([expert_of(record.moe, name) for name in names])[:, None]
    with record.context.with_batch_info(expert_of_token=experts):
        yield


def expert_of(moe: MoeConfig, name: str) -> int:
    """Number of the oracle's expert for a domain.

    Raises:
        RoutingError: none.
    """
    if not needs_domain(moe):
        named = routers_that_need(Need.domain)
        raise RoutingError(f"domains are for moe.router={named}; this model has moe.router={moe.router}")
    if name not in (moe.domains or []):
        raise RoutingError(f"moe.router={moe.router} has no expert for the domain {name!r}; it has {moe.domains}")
    return (moe.domains or []).index(name)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The backbone's own function inside the block, for all threads."""
    context = injected(model).context
    native = [module for module in model.modules() if isinstance(module, NativeRouter)]
    switched = (*native, *(site for _, site in sites(model)))
    with SWITCH:
        context.off += 1
        for module in switched:
            module.enabled = False
    try:
        yield
    finally:
        with SWITCH:
            context.off -= 1
            if not context.off:
                for module in switched:
                    module.enabled = True
