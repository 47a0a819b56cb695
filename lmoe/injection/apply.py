"""Carry out a plan: replace Linears in place, freeze the backbone, and keep the record."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmoe.errors import ConfigError, InjectionError, RoutingError
from lmoe.injection.build_site import ROUTER, SiteBuilder
from lmoe.injection.mixture_lora import plan_mixture_lora
from lmoe.injection.plan import InjectionPlan
from lmoe.layers.context import RoutingContext, Rows
from lmoe.layers.lora_linear import LoRALinear
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear
from lmoe.layers.routers import PromptReader, Router
from lmoe.layers.trace import AuxiliaryLosses, RoutingTrace
from lmoe.schema.defaults import injection_section, moe_section
from lmoe.schema.injection import InjectionConfig
from lmoe.schema.moe import LoadBalanceType, MoeConfig, RouterKind
from lmoe.schema.problems import raise_problems
from lmoe.schema.router_traits import trains_logits
from lmoe.schema.validate_injection import injection_problems
from lmoe.schema.validate_moe import moe_problems

RECORD = "lmoe_injected"


@dataclass(slots=True, frozen=True, kw_only=True)
class Injected:
    """What was put into a model; kept on the model under the attribute `lmoe_injected`."""

    plan: InjectionPlan
    injection: InjectionConfig
    moe: MoeConfig
    trace: RoutingTrace
    context: RoutingContext


def inject(
    model: nn.Module,
    injection: InjectionConfig | Mapping[str, Any] | None = None,
    moe: MoeConfig | Mapping[str, Any] | None = None,
) -> InjectionPlan:
    """Put LoRA experts and routers into a causal language model, in place.

    The backbone is frozen; adapters and routers are float32 and trainable.

    Args:
        model: a Hugging Face causal language model.
        injection, moe: the sections of a config, as dataclasses or dicts; keys left out take the values of conf/.

    Returns:
        The plan that was applied; print it for a table.

    Raises:
        ConfigError: unknown keys or values that cannot be.
        InjectionError: the model has no place for it, or was injected before.
        BackboneError: no recognisable decoder layers.
    """
    if getattr(model, RECORD, None) is not None:
        raise InjectionError("this model already carries experts; load the backbone anew to inject again")
    injection, moe = _sections(injection, moe)
    raise_problems(injection_problems(injection, moe) + moe_problems(moe))
    plan = plan_mixture_lora(model, injection, moe)
    trace, context = RoutingTrace(auxiliary_losses(injection, moe)), routing_context(moe)
    model.requires_grad_(False)
    build = SiteBuilder(model, injection, moe, trace, context)
    for site in plan.sites:
        base_layer = model.get_submodule(site.path)
        # A model in evaluation mode, as from_pretrained returns it, must not start to drop out.
        model.set_submodule(site.path, build.wrapper(site).train(base_layer.training))
    if moe.router is RouterKind.oracle:
        model.register_forward_pre_hook(context.forget_before)
    if moe.router is RouterKind.sequence:
        model.register_forward_pre_hook(PromptReader(context).read, with_kwargs=True)
    setattr(model, RECORD, Injected(plan=plan, injection=injection, moe=moe, trace=trace, context=context))
    return plan


def routing_context(moe: MoeConfig) -> RoutingContext:
    """Dials as a model is used with them, where no run turns them: the last temperature, and noise in training mode."""
    return RoutingContext(
        temperature=moe.temperature if moe.temperature_end is None else moe.temperature_end,
        router_noise=moe.router_noise,
        expert_dropout=moe.expert_dropout,
    )


def auxiliary_losses(injection: InjectionConfig, moe: MoeConfig) -> AuxiliaryLosses:
    """Kinds and weights of the auxiliary losses on routers."""
    balance = moe.load_balance
    assert balance.type is not None
    with_loss = balance.type in (LoadBalanceType.aux_loss, LoadBalanceType.importance_cv)
    return AuxiliaryLosses(
        balance=balance.type,
        aux_loss_coef=float(balance.aux_loss_coef or 0) if with_loss else 0.0,
        router_z_loss_coef=float(moe.router_z_loss_coef or 0) if trains_logits(moe) else 0.0,
        l1_top_k=injection.top_k if moe.router is RouterKind.relu else None,
    )


def _sections(
    injection: InjectionConfig | Mapping[str, Any] | None, moe: MoeConfig | Mapping[str, Any] | None
) -> tuple[InjectionConfig, MoeConfig]:
    """Both sections as dataclasses.

    Raises:
        ConfigError: with the problems of both.
    """
    problems: list[str] = []
    try:
        injection = injection if isinstance(injection, InjectionConfig) else injection_section(injection or {})
    except ConfigError as error:
        problems += error.problems
    try:
        moe = moe if isinstance(moe, MoeConfig) else moe_section(moe or {})
    except ConfigError as error:
        problems += error.problems
    raise_problems(problems)
    assert isinstance(injection, InjectionConfig) and isinstance(moe, MoeConfig)
    return injection, moe


def injected(model: nn.Module) -> Injected:
    """The record of what was put into a model.

    Raises:
        InjectionError: nothing was.
    """
    record = getattr(model, RECORD, None)
    if record is None:
        raise InjectionError("this model carries no experts; call lmoe.inject(model, …) or lmoe.load(…) first")
    return record


def sites(model: nn.Module) -> Iterator[tuple[str, LoRALinear | MixtureLoRALinear]]:
    """Every wrapper of an injected model with its path, in the order of the plan."""
    for site in injected(model).plan.sites:
        module = model.get_submodule(site.path)
        assert isinstance(module, LoRALinear | MixtureLoRALinear)
        yield site.path, module


def mixtures(model: nn.Module) -> Iterator[tuple[str, MixtureLoRALinear]]:
    """Every wrapper with experts of an injected model with its path, in the order of the plan."""
    for path, module in sites(model):
        if isinstance(module, MixtureLoRALinear):
            yield path, module


def routers(model: nn.Module) -> Iterator[tuple[str, Router]]:
    """Every router of an injected model by the name of its site, in the order of the plan."""
    for name in injected(model).plan.routers:
        router = model.get_submodule(f"{name}.{ROUTER}")
        assert isinstance(router, Router)
        yield name, router


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
        prompt_mask: (B, T) bool or 0/1, for moe.router=sequence: the tokens that the decision is made from; None: those
            that the attention mask keeps, up to the first label.

    Raises:
        RoutingError: a domain that no expert has, another number of names than rows, or facts that the router of this
            model does not use.
    """
    record = injected(model)
    experts = None
    if prompt_mask is not None and record.moe.router is not RouterKind.sequence:
        raise RoutingError(f"prompt_mask is for moe.router=sequence; this model has moe.router={record.moe.router}")
    if domains is not None:
        if len(domains) != len(attention_mask):
            raise RoutingError(f"{len(domains)} domains for {len(attention_mask)} rows; give one name for each row")
        experts = torch.tensor([expert_of(record.moe, name) for name in domains], device=attention_mask.device)[:, None]
    rows = None if prompt_mask is None else Rows.single(prompt_mask.bool() & attention_mask.bool())
    with record.context.about(expert_of_token=experts, rows=rows), record.trace.recording(attention_mask) as recording:
        yield recording


@contextmanager
def domain(model: nn.Module, name: str) -> Iterator[None]:
    """Every token inside the block belongs to one domain: for generation with moe.router=oracle.

    Raises:
        RoutingError: no expert has this domain.
    """
    record = injected(model)
    with record.context.about(expert_of_token=torch.tensor(expert_of(record.moe, name))):
        yield


def expert_of(moe: MoeConfig, name: str) -> int:
    """Number of the oracle's expert for a domain.

    Raises:
        RoutingError: none.
    """
    if moe.router is not RouterKind.oracle:
        raise RoutingError(f"domains are for moe.router=oracle; this model has moe.router={moe.router}")
    if name not in (moe.domains or []):
        raise RoutingError(f"moe.router=oracle has no expert for the domain {name!r}; it has {moe.domains}")
    return (moe.domains or []).index(name)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The backbone's own function inside the block."""
    before = [(module, module.enabled) for _, module in sites(model)]
    for module, _ in before:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in before:
            module.enabled = enabled
