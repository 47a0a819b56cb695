"""Make a plan and carry it out: replace Linears in place, freeze the backbone, and keep the record."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from lmoe.backbones.fingerprint import base_fingerprint
from lmoe.backbones.layout import layouts
from lmoe.backbones.placement import refuse_offloaded
from lmoe.backbones.siblings import siblings
from lmoe.config.defaults import injection_section, moe_section
from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import MoeConfig, states_index
from lmoe.config.problems import raise_problems
from lmoe.errors import ConfigError, InjectionError
from lmoe.injection.build_site import SiteBuilder
from lmoe.injection.choose import chosen_layers
from lmoe.injection.plan import InjectionPlan, SiteKind
from lmoe.injection.record import BLEND, RECORD, Injected, mixtures
from lmoe.injection.reward_head import add_reward_head, check_place
from lmoe.injection.site_plans import SitePlanner, constant_balance
from lmoe.injection.strategies import planner_of
from lmoe.layers.checkpoint_in_context import ContextForCheckpoints
from lmoe.layers.context import RoutingContext
from lmoe.layers.lora_linear import LoRALinear
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear
from lmoe.layers.routers import PromptReader
from lmoe.layers.shared_input import SharedInput
from lmoe.layers.trace import AuxiliaryLosses, RoutingTrace
from lmoe.rules.phases import BASE_ROLES
from lmoe.rules.routers import ROUTERS, cluster_names, needs_domain, needs_prompt, needs_prompt_ids, trains_logits
from lmoe.rules.strategies import STRATEGIES
from lmoe.rules.validate import section_problems
from lmoe.vocabulary import LoadBalanceType, Role, RouterScope, RouterTarget


def plan(
    model: nn.Module,
    injection: InjectionConfig | Mapping[str, Any] | None = None,
    moe: MoeConfig | Mapping[str, Any] | None = None,
) -> InjectionPlan:
    """What `inject` would do; the model stays as it is, and may be on the meta device.

    Args:
        model: a Hugging Face causal language model.
        injection, moe: the sections of a config, as dataclasses or dicts; keys left out take the values of conf/.

    Returns:
        The plan; print it for a table.

    Raises:
        ConfigError: unknown keys or values that cannot be.
        InjectionError: the model has no place for it, or was injected before.
        BackboneError: no recognisable decoder layers.
    """
    return _plan(model, *_checked(model, injection, moe))


def _plan(model: nn.Module, injection: InjectionConfig, moe: MoeConfig) -> InjectionPlan:
    every_layer = layouts(model)
    planner = SitePlanner(model, chosen_layers(every_layer, injection), injection, moe)
    sites = planner_of(injection.strategy)(planner)
    if moe.diversity_coef and not any(site.num_experts and site.branches != {} for site in sites):
        raise InjectionError(
            "moe.diversity_coef has no effect where no experts carry low-rank branches; leave it out, or name the "
            "experts' weights in injection.target_keywords"
        )
    if not sites:
        raise InjectionError("nothing of the chosen layers is adapted; name other Linears or layers")
    blocks = [layer.ffn_block.path for layer in every_layer if layer.ffn_block is not None]
    native = [layer.native for layer in every_layer if layer.native is not None]
    return InjectionPlan(
        sites=tuple(sites),
        base_ffn=(*blocks, *(layout.block or layout.experts for layout in native)),
        native_routers=tuple(layout.router for layout in native),
        layers=tuple(layer.path for layer in every_layer),
        warnings=(*planner.warnings, *constant_balance(sites, injection, moe)),
    )


def _checked(
    model: nn.Module,
    injection: InjectionConfig | Mapping[str, Any] | None,
    moe: MoeConfig | Mapping[str, Any] | None,
) -> tuple[InjectionConfig, MoeConfig]:
    """Both sections, whole, for a model that carries nothing yet."""
    refuse_taken(model)
    injection, moe = _sections(injection, moe)
    raise_problems(section_problems(injection, moe))
    return injection, moe


def _with_targets(moe: MoeConfig, injection: InjectionConfig) -> MoeConfig:
    """The section with the names of what the routers are taught.

    Raises:
        ConfigError: they cannot be known.
    """
    if moe.router_target is RouterTarget.auto:
        raise ConfigError(
            "moe.router_target=auto is for the config of a run, which knows its rows; here use domain, with the names "
            "in moe.domains, or cluster"
        )
    if moe.router_target is RouterTarget.domain and len(moe.domains or []) < 2:
        raise ConfigError(
            f"moe.router_target=domain needs two names at least in moe.domains, which is {moe.domains}: the domains "
            "that the routers are taught, in the order of their experts"
        )
    if moe.router_target is RouterTarget.cluster and moe.domains is None:
        return replace(moe, domains=cluster_names(injection.fewest_experts))
    return moe


def _with_place(moe: MoeConfig, layers: int) -> MoeConfig:
    """The section with the layer that a router of a model of so many reads, which may be given as a share of them."""
    if moe.router_scope is not RouterScope.model:
        return moe
    return replace(moe, router_layer=str(states_index(moe.router_layer, layers)))


def refuse_taken(model: nn.Module) -> None:
    """Refuse a model that carries experts or a blend already.

    Raises:
        InjectionError: the model carries experts or a blend already.
    """
    if getattr(model, RECORD, None) is not None:
        raise InjectionError("this model already carries experts; load the backbone anew to inject again")
    if getattr(model, BLEND, None) is not None:
        raise InjectionError("this model blends experts; close() its blend to inject")


def inject(
    model: nn.Module,
    injection: InjectionConfig | Mapping[str, Any] | None = None,
    moe: MoeConfig | Mapping[str, Any] | None = None,
    *,
    trained_base: Iterable[str] = (),
    reward_head: bool = False,
) -> InjectionPlan:
    """Put LoRA experts and routers into a causal language model, in place: `lmoe.inject`, which says more, but for what
    saves the model.
    """
    injection, moe = _checked(model, injection, moe)
    moe = _with_targets(moe, injection)
    refuse_offloaded(model, "injecting experts")
    if injection.experts_from is not None:
        raise InjectionError(
            "injection.experts_from is for the config of a run; here leave it out, and call "
            "lmoe.import_experts(model, …) after lmoe.inject"
        )
    if isinstance(trained_base, str):
        raise ConfigError(f"`trained_base={trained_base!r}` must be a list of {' and '.join(BASE_ROLES)}")
    base_roles = list(trained_base)
    if wrong := [role for role in base_roles if role not in BASE_ROLES]:
        raise ConfigError(f"trained_base names {wrong[0]!r}; allowed: {', '.join(BASE_ROLES)}")
    if reward_head:
        check_place(model)
    plan = _plan(model, injection, moe)
    moe = _with_place(moe, len(plan.layers))
    found, context = base_fingerprint(model), routing_context(moe)
    trace = RoutingTrace(auxiliary_losses(injection, moe), has_routers=bool(plan.routers))
    build = SiteBuilder(model, layouts(model), injection, moe, trace, context)
    wrappers = {site.path: build.wrapper(site) for site in plan.sites}  # a refusal here leaves the model as it was
    together = siblings(model)
    model.requires_grad_(False)
    for site in plan.sites:
        base_layer = model.get_submodule(site.path)
        # A model in evaluation mode, as from_pretrained returns it, must not start to drop out.
        model.set_submodule(site.path, wrappers[site.path].train(base_layer.training))
        if site.kind is SiteKind.native_experts:
            model.set_submodule(site.router, build.native_router(site).train(base_layer.training))
    if needs_domain(moe) or needs_prompt(moe):
        ContextForCheckpoints(context).attach(model)  # first, because the next may run the model
    build.attach_shared_routers()
    share_inputs(model, wrappers, together)
    if needs_domain(moe):
        model.register_forward_pre_hook(context.forget_last_batch_info)
    if needs_prompt(moe) and moe.router_scope is not RouterScope.model:
        PromptReader(context, str(moe.router), by_ids=needs_prompt_ids(moe)).attach(model)
    record = Injected(
        plan=plan,
        injection=injection,
        moe=moe,
        trace=trace,
        context=context,
        base=found,
        trained_base=frozenset(Role(role) for role in base_roles),
        reward_head=reward_head,
    )
    if reward_head:
        add_reward_head(model)  # last, so that adapters and routers start as they would without it
    setattr(model, RECORD, record)
    trace.mixtures = [module for _, module in mixtures(model)]
    return plan


def share_inputs(model: nn.Module, wrappers: Mapping[str, nn.Module], together: Iterable[tuple[str, ...]]) -> None:
    """Let sites that read one input compute together what they can.

    Args:
        model: which the sites are in.
        wrappers: every site by its module path.
        together: paths of Linears that read one input, in the order in which they are called.
    """
    for paths in together:
        there = [wrappers[path] for path in paths if path in wrappers]
        sites = [site for site in there if isinstance(site, LoRALinear | MixtureLoRALinear)]
        if len(sites) > 1:
            SharedInput(sites).attach(model.get_submodule(paths[0].rpartition(".")[0]))


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
    traits = STRATEGIES[injection.strategy]
    with_loss = balance.type in (LoadBalanceType.aux_loss, LoadBalanceType.importance_cv) and traits.any_routers
    logits = trains_logits(moe) if traits.own_routers else traits.any_routers
    l1 = traits.own_routers and moe.router is not None and ROUTERS[moe.router].l1
    return AuxiliaryLosses(
        balance=balance.type,
        aux_loss_coef=float(balance.aux_loss_coef or 0) if with_loss else 0.0,
        router_z_loss_coef=float(moe.router_z_loss_coef or 0) if logits else 0.0,
        l1_top_k=injection.top_k if l1 else None,
        diversity_coef=float(moe.diversity_coef or 0),
        router_target_coef=0.0 if moe.router_target is RouterTarget.none else moe.router_target_coef,
    )


def _sections(
    injection: InjectionConfig | Mapping[str, Any] | None, moe: MoeConfig | Mapping[str, Any] | None
) -> tuple[InjectionConfig, MoeConfig]:
    """Both sections as dataclasses.

    Raises:
        ConfigError: with the problems of both.
    """
    problems: list[str] = []
    injection, moe = {} if injection is None else injection, {} if moe is None else moe
    try:
        injection = injection if isinstance(injection, InjectionConfig) else injection_section(injection)
    except ConfigError as error:
        problems += error.problems
    try:
        moe = moe if isinstance(moe, MoeConfig) else moe_section(moe)
    except ConfigError as error:
        problems += error.problems
    raise_problems(problems)
    assert isinstance(injection, InjectionConfig) and isinstance(moe, MoeConfig)
    return injection, moe


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Undo a change that raises inside the block: modules, hooks, attributes and requires_grad are those of before.

    Values of tensors are not kept: what writes into them must do so as its last step.
    """
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    contents = [{name: dict(v) for name, v in held.items() if isinstance(v, dict)} for held in attributes]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, held, content in zip(modules, attributes, contents, strict=True):
            vars(module).clear()
            vars(module).update(held)
            for name, before in content.items():  # NOTE the same dict object: handles of hooks refer to it
                held[name].clear()
                held[name].update(before)
        for parameter, wanted in trainable:
            parameter.requires_grad_(wanted)
        raise
