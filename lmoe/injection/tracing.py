"""Look at the routing of a forward, tell it its domain, or switch the adapters off; each inside a `with`."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lmoe.config.moe import MoeConfig
from lmoe.errors import RoutingError
from lmoe.injection.balance import warn_of_missing_balance
from lmoe.injection.record import Site, injected, sites
from lmoe.layers.context import PromptRows
from lmoe.layers.native_router import NativeRouter
from lmoe.layers.trace import RoutingTrace
from lmoe.ops.router_targets import NO_TARGET, RowTargets
from lmoe.rules.routers import Need, needs_domain, needs_prompt, routers_that_need, target_count
from lmoe.vocabulary import Decide, RouterTarget

SWITCH = threading.Lock()
"""Held while adapters are switched, of whatever model."""


@contextmanager
def trace(
    model: nn.Module,
    *,
    attention_mask: Tensor,
    domains: Sequence[str] | None = None,
    prompt_mask: Tensor | None = None,
    targets: Tensor | Sequence[int] | None = None,
) -> Iterator[RoutingTrace]:
    """Routing of the forwards inside the block.

    Args:
        model: an injected model.
        attention_mask: (B, T) bool or 0/1; padding counts for no loss and no statistic.
        domains: B names, for moe.router=oracle, or for moe.router_target=domain: what the routers are taught of each
            row, by moe.domains.
        prompt_mask: (B, T) bool or 0/1, for a router that decides by the prompt: the tokens that the decision is made
            from (with moe.decide=turn: the prompts of all turns); None: those that the attention mask keeps, up to the
            first label.
        targets: (B,) or (B, T) numbers of what the routers are taught, for moe.router_target, in place of names: from 0
            to C - 1, -1 for nothing. Without names or numbers there is no router_target_loss.

    Raises:
        RoutingError: a domain that no expert has or no target is, no list of names, another number of names or numbers
            than rows, or facts that the router of this model does not use.
    """
    record = injected(model)
    warn_of_missing_balance(model)
    experts = None
    rows = None if prompt_mask is None else prompt_rows(record.moe, prompt_mask.bool(), attention_mask.bool())
    if domains is not None:
        if isinstance(domains, str):
            raise RoutingError(f"`domains={domains!r}` must be a list with one name for each row")
        if len(domains) != len(attention_mask):
            raise RoutingError(f"{len(domains)} domains for {len(attention_mask)} rows; give one name for each row")
        if targets is not None:
            raise RoutingError("domains and targets both say what the routers are taught; give one of them")
        if record.moe.router_target is RouterTarget.domain:
            targets = [target_of(record.moe, name) for name in domains]
        else:
            experts = torch.tensor([expert_of(record.moe, name) for name in domains], device=attention_mask.device)
            experts = experts[:, None]
    taught = None if targets is None else _row_targets(record.moe, targets, attention_mask.bool())
    with (
        record.context.with_batch_info(expert_of_token=experts, rows=rows, targets=taught),
        record.trace.recording(attention_mask, taught) as recording,
    ):
        yield recording


def prompt_rows(moe: MoeConfig, prompt: Tensor, valid: Tensor) -> PromptRows:
    """Rows of conversations, or of their turns, by which a router decides.

    Args:
        prompt, valid: (B, T) bool, tokens of prompts and tokens that count.

    Raises:
        RoutingError: the router does not decide by the prompt.
    """
    if not needs_prompt(moe):
        named = routers_that_need(Need.prompt)
        raise RoutingError(f"prompt_mask is for moe.router={named}; this model has moe.router={moe.router}")
    if moe.decide is Decide.turn:
        return PromptRows.of_turns(~prompt, torch.zeros_like(prompt, dtype=torch.long), valid)
    return PromptRows.single(prompt & valid)


def _row_targets(moe: MoeConfig, targets: Tensor | Sequence[int], valid: Tensor) -> RowTargets:
    count, ids = target_count(moe), torch.as_tensor(targets)
    if not count:
        raise RoutingError("targets are for moe.router_target=domain or cluster; this model has none")
    if ids.shape not in (valid.shape[:1], valid.shape):
        raise RoutingError(
            f"targets are {tuple(ids.shape)}; give one number for each of {valid.shape[0]} rows, or for each of "
            f"{tuple(valid.shape)} tokens"
        )
    # NOTE the numbers of another device would have to be waited for.
    if ids.device.type == "cpu" and ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < count:
        raise RoutingError(
            f"targets are numbers from {int(ids.min())} to {int(ids.max())}; this model has targets 0 to {count - 1}: "
            f"{moe.domains}, and -1 is for none"
        )
    ids = ids.to(valid.device, torch.long).reshape(len(ids), -1).expand(valid.shape)
    return RowTargets(ids.masked_fill(~valid, NO_TARGET), count)


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
        raise RoutingError(
            f"domains are for moe.router={named}; this model has moe.router={moe.router}: leave the domain out, its "
            "router decides without"
        )
    if name not in (moe.domains or []):
        raise RoutingError(f"moe.router={moe.router} has no expert for the domain {name!r}; it has {moe.domains}")
    return (moe.domains or []).index(name)


def target_of(moe: MoeConfig, name: str) -> int:
    """Number of the target that a domain is.

    Raises:
        RoutingError: it is none.
    """
    if name not in (moe.domains or []):
        raise RoutingError(f"moe.router_target=domain has no target for the domain {name!r}; it has {moe.domains}")
    return (moe.domains or []).index(name)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The backbone's own function inside the block, for all threads."""
    context = injected(model).context
    switched = _switched(model)
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


@contextmanager
def adapters_on(model: nn.Module) -> Iterator[None]:
    """The whole model inside the block, also inside `adapters_off` and where an expert is silenced; for all threads."""
    context = injected(model).context
    switched = _switched(model)
    with SWITCH:
        off, context.off = context.off, 0
        for module in switched if off else ():
            module.enabled = True
    try:
        with context.silence({}):
            yield
    finally:
        with SWITCH:
            context.off += off
            for module in switched if off else ():
                module.enabled = False


def _switched(model: nn.Module) -> list[NativeRouter | Site]:
    """What computes without adapters where they are off."""
    native = [module for module in model.modules() if isinstance(module, NativeRouter)]
    return [*native, *(site for _, site in sites(model))]
