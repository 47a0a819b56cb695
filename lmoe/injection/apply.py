"""Carry out a plan: replace Linears in place, freeze the backbone, and keep the record."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmoe.errors import ConfigError, InjectionError
from lmoe.injection.mixture_lora import plan_mixture_lora
from lmoe.injection.plan import InjectionPlan, SitePlan
from lmoe.layers.lora_linear import LoRALinear
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear
from lmoe.layers.router import Router
from lmoe.layers.trace import RoutingTrace
from lmoe.schema.defaults import injection_section, moe_section
from lmoe.schema.injection import InjectionConfig
from lmoe.schema.moe import LoadBalanceType, MoeConfig
from lmoe.schema.validate import injection_problems, moe_problems, raise_problems

RECORD = "lmoe_injected"


@dataclass(slots=True, frozen=True, kw_only=True)
class Injected:
    """What was put into a model; kept on the model under the attribute `lmoe_injected`."""

    plan: InjectionPlan
    injection: InjectionConfig
    moe: MoeConfig
    trace: RoutingTrace


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
    balance = moe.load_balance
    trace = RoutingTrace(
        aux_loss_coef=float(balance.aux_loss_coef or 0) if balance.type is LoadBalanceType.aux_loss else 0.0,
        router_z_loss_coef=float(moe.router_z_loss_coef or 0),
    )
    model.requires_grad_(False)
    for site in plan.sites:
        base_layer = model.get_submodule(site.path)
        # A model in evaluation mode, as from_pretrained returns it, must not start to drop out.
        wrapper = _wrapped(site, base_layer, injection, moe, trace).train(base_layer.training)
        model.set_submodule(site.path, wrapper)
    setattr(model, RECORD, Injected(plan=plan, injection=injection, moe=moe, trace=trace))
    return plan


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


def _wrapped(
    site: SitePlan, base_layer: nn.Module, injection: InjectionConfig, moe: MoeConfig, trace: RoutingTrace
) -> nn.Module:
    assert isinstance(base_layer, nn.Linear)
    if not site.num_experts:
        return LoRALinear(
            base_layer, lora_r=site.lora_r, scaling=site.scaling, dropout=injection.lora_dropout, lora_B_std=0.0
        )
    assert moe.router is not None
    router = Router(
        site.in_features,
        site.num_experts,
        kind=moe.router,
        top_k=injection.top_k,
        temperature=moe.temperature,
        renormalise=injection.top_k >= 2 if moe.norm_topk_prob is None else moe.norm_topk_prob,
        dtype=getattr(torch, moe.router_dtype.value),
        device=base_layer.weight.device,
    )
    return MixtureLoRALinear(
        base_layer,
        router,
        lora_r=site.lora_r,
        scaling=site.scaling,
        dropout=injection.lora_dropout,
        lora_B_std=injection.lora_B_std or 0.0,
        site=site.path,
        trace=trace,
    )


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


@contextmanager
def trace(model: nn.Module, *, attention_mask: Tensor) -> Iterator[RoutingTrace]:
    """Routing of the forwards inside the block.

    Args:
        model: an injected model.
        attention_mask: (B, T) bool or 0/1; padding counts for no loss and no statistic.
    """
    with injected(model).trace.recording(attention_mask) as recording:
        yield recording


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
