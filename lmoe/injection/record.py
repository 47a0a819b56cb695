"""What was put into a model, kept on the model, and its modules in the order of the plan."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lmoe.backbones.fingerprint import BaseFingerprint
from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import MoeConfig
from lmoe.errors import InjectionError
from lmoe.injection.build_site import router_path
from lmoe.injection.plan import InjectionPlan
from lmoe.layers.context import RoutingContext
from lmoe.layers.expert_ffn import ExpertFFN
from lmoe.layers.lora_linear import LoRALinear, LowRank
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear
from lmoe.layers.model_route import ModelRoute
from lmoe.layers.native_experts import NativeExpertsLoRA
from lmoe.layers.routers import Router
from lmoe.layers.stacked_lora import StackedLoRA
from lmoe.layers.trace import RoutingTrace
from lmoe.vocabulary import Role

RECORD = "lmoe_injected"
REWARD_HEAD = "reward_head"
"""Where the head of a reward model lies on the model."""
BLEND = "lmoe_blend"
"""Attribute of a model whose Linears blend."""
Site = LoRALinear | MixtureLoRALinear | ExpertFFN | NativeExpertsLoRA
LowRankModule = LoRALinear | MixtureLoRALinear | StackedLoRA | LowRank


@dataclass(slots=True, frozen=True, kw_only=True)
class Injected:
    """What was put into a model; kept on the model under the attribute `lmoe_injected`.

    Args:
        plan: the sites.
        injection, moe: the sections that made it.
        trace, context: what the routers share.
        base: fingerprint of the backbone as it was found.
        trained_base: roles of the backbone's own parameters that are trained and saved with the adapters.
        reward_head: the model has one.
        expert_names: of the experts in their order, at every site; () where they have none.
        kept_experts: so many of the first experts, and all that they share, are not to change in training.
    """

    plan: InjectionPlan
    injection: InjectionConfig
    moe: MoeConfig
    trace: RoutingTrace
    context: RoutingContext
    base: BaseFingerprint
    trained_base: frozenset[Role]
    reward_head: bool = False
    expert_names: tuple[str, ...] = ()
    kept_experts: int = 0

    @property
    def fingerprint(self) -> str:
        """Digest of the backbone as it was found."""
        return self.base.digest


def injected(model: nn.Module) -> Injected:
    """The record of what was put into a model.

    Raises:
        InjectionError: nothing was.
    """
    record = getattr(model, RECORD, None)
    if record is None:
        raise InjectionError("this model carries no experts; call lmoe.inject(model, …) or lmoe.load(…) first")
    return record


def record_expert_names(model: nn.Module, names: Sequence[str], kept: int = 0) -> None:
    """Record where a model's experts come from: their names, and how many of the first are kept as they are."""
    setattr(model, RECORD, replace(injected(model), expert_names=tuple(names), kept_experts=kept))


def new_names(names: list[str] | tuple[str, ...], total: int) -> list[str]:
    """Names of experts that nobody named, `expert<e>`, beside those that have one."""
    every = list(names)
    for number in range(len(names), total):
        name = f"expert{number}"
        while name.casefold() in {other.casefold() for other in every}:
            name += "_new"
        every.append(name)
    return every[len(names) :]


def sites(model: nn.Module) -> Iterator[tuple[str, Site]]:
    """Every wrapper of an injected model with its path, in the order of the plan."""
    for site in injected(model).plan.sites:
        module = model.get_submodule(site.path)
        assert isinstance(module, Site)
        yield site.path, module


def mixtures(model: nn.Module) -> Iterator[tuple[str, MixtureLoRALinear | StackedLoRA]]:
    """What holds the stacked factors of several experts, with its path, in the order of the plan."""
    for path, site in sites(model):
        if isinstance(site, MixtureLoRALinear):
            yield path, site
        for name, child in site.named_children():
            if isinstance(child, StackedLoRA):
                yield f"{path}.{name}", child


def low_rank(model: nn.Module) -> Iterator[tuple[str, Role, LowRankModule]]:
    """What holds a lora_B, one or stacked, with its path and role, in the order of the plan."""
    roles = {site.path: site.role for site in injected(model).plan.sites}
    for path, site in sites(model):
        if isinstance(site, LoRALinear | MixtureLoRALinear):
            yield path, roles[path], site
        for name, child in site.named_children():
            if isinstance(child, StackedLoRA | LowRank):
                yield f"{path}.{name}", roles[path], child


def model_route(model: nn.Module) -> ModelRoute | None:
    """What decides once for all sites (moe.router_scope=model), or None."""
    found = (getattr(site, "model_route", None) for _, site in sites(model))
    return next((route for route in found if route is not None), None)


def routers(model: nn.Module) -> Iterator[tuple[str, Router]]:
    """Every router that lmoe made, by the name of its site, in the order of the plan; the backbone's own are not."""
    for name in injected(model).plan.routers:
        router = model.get_submodule(router_path(name))
        if isinstance(router, Router):
            yield name, router
