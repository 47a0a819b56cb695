"""Strategy native_moe_expert_lora: LoRA on each expert that the backbone brings along, and its routers may train."""

from dataclasses import replace

from torch import nn

from lmoe.backbones.layout import LayerLayout
from lmoe.errors import InjectionError
from lmoe.injection.choose import every_linear, matching, refuse_shared
from lmoe.injection.plan import SiteKind, SitePlan
from lmoe.injection.site_plans import SitePlanner
from lmoe.layers.native_experts import fused_sizes, is_expert_parallel, whole_units
from lmoe.vocabulary import InjectionStrategy

KEY = "injection.target_keywords"


def plan_native_moe_expert_lora(planner: SitePlanner) -> list[SitePlan]:
    """Plan LoRA on the experts that the backbone has, and single LoRA on attention.

    Raises:
        InjectionError: a dense backbone, a keyword that matches nothing, a Linear named twice, or experts that are
            spread over devices.
    """
    layers, keywords = planner.layers, planner.injection.target_keywords
    native = [layer for layer in layers if layer.native is not None]
    if not native:
        raise InjectionError(
            f"{type(planner.model).__name__} is a dense backbone: none of the chosen layers has experts of its own. "
            f"Use injection={InjectionStrategy.mixture_lora} or injection={InjectionStrategy.moe_expert_lora}"
        )
    if other := [layer.native.experts for layer in native if layer.native and not _grouped(planner.model, layer)]:
        raise InjectionError(
            f"{other[0]} ({type(planner.model.get_submodule(other[0])).__name__}) has a forward of its own, that takes "
            f"other than tokens, indices and weights; use injection={InjectionStrategy.mixture_lora}, beside the block"
        )
    fused = {path: size for layer in native for path, size in _fused(planner.model, layer).items()}
    if keywords is None:
        targets: dict[str, nn.Module] = {}
        if len(native) < len(layers):
            dense = [layer.index for layer in layers if layer.native is None]
            planner.warnings.append(f"layers {dense} are dense and get no experts")
    else:
        found = matching(layers, keywords, KEY, planner.warnings, lambda layer: _nameable(planner.model, layer))
        targets = {path: module for path, module in found.items() if path not in fused}
        fused = {path: size for path, size in fused.items() if path in found}
    planner.refuse_twice(targets)
    paths = [layer.native.experts for layer in native if layer.native is not None]
    refuse_shared({**targets, **{path: planner.model.get_submodule(path) for path in paths}, **planner.attention})
    sites: list[SitePlan] = []
    for where, layer in enumerate(layers):
        sites += planner.attention_sites(layer)
        own = {path: linear for path, linear in targets.items() if path.startswith(f"{layer.path}.")}
        sites += [planner.single(path, layer, linear, where) for path, linear in own.items()]
        if layer.native is not None:
            sites.append(_site(planner, layer, where, fused))
    return sites


def _site(planner: SitePlanner, layer: LayerLayout, where: int, fused: dict[str, tuple[int, int]]) -> SitePlan:
    assert layer.native is not None
    path, router = layer.native.experts, layer.native.router
    experts, native_router = planner.model.get_submodule(path), planner.model.get_submodule(router)
    if is_expert_parallel(experts):
        raise InjectionError(f"{path} is spread over devices by expert; load the model without expert parallelism")
    if not whole_units(experts):
        raise InjectionError(f"{path}: rows of the fused weights must be multiples of 16 bytes for grouped matmuls")
    both = fused_sizes(experts)
    width = next(iter(both.values()))[0]
    site = planner.site(path, layer, (width, width), SiteKind.native_experts, planner.rank(where))
    return replace(
        site,
        branches={name: size for name, size in both.items() if f"{path}.{name}" in fused},
        num_experts=int(experts.num_experts),  # type: ignore[arg-type]
        active_experts=chosen_by(planner.model, layer),
        router=router,
        router_in_features=width,
        router_parameters=sum(p.numel() for p in native_router.parameters()),
    )


def _grouped(model: nn.Module, layer: LayerLayout) -> bool:
    """Whether the experts follow the interface of Transformers that grouped forwards share."""
    assert layer.native is not None
    experts = model.get_submodule(layer.native.experts)
    return all(hasattr(experts, name) for name in ("has_gate", "has_bias", "is_transposed"))


def chosen_by(model: nn.Module, layer: LayerLayout) -> int:
    """Experts that a native router chooses for each token."""
    assert layer.native is not None
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    own = getattr(model.get_submodule(layer.native.router), "top_k", None)
    return int(own or getattr(config, "num_experts_per_tok", None) or config.top_k_experts)


def _fused(model: nn.Module, layer: LayerLayout) -> dict[str, tuple[int, int]]:
    """(D, O) of the fused parameters of a layer by full path."""
    if layer.native is None:
        return {}
    experts = layer.native.experts
    return {f"{experts}.{name}": size for name, size in fused_sizes(model.get_submodule(experts)).items()}


def _nameable(model: nn.Module, layer: LayerLayout) -> dict[str, nn.Module]:
    """Linears of a layer, and its fused parameters by the module that holds them."""
    fused = {path: model.get_submodule(path.rpartition(".")[0]) for path in _fused(model, layer)}
    return {**fused, **every_linear(layer)}
