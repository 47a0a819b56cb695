"""Strategy dense_lora: a single LoRA on each chosen Linear of FFN and attention, without experts or routers."""

from lmoe.errors import InjectionError
from lmoe.injection.choose import nothing_found, refuse_shared, target_linears
from lmoe.injection.plan import SitePlan
from lmoe.injection.site_plans import SitePlanner
from lmoe.vocabulary import InjectionStrategy


def plan_dense_lora(planner: SitePlanner) -> list[SitePlan]:
    """Plan a single LoRA on each chosen Linear.

    Raises:
        InjectionError: a keyword that matches nothing, a Linear named twice, or nothing left to adapt.
    """
    layers, warnings = planner.layers, planner.warnings
    targets = target_linears(layers, planner.injection, lambda layer: {**layer.ffn, **layer.shared}, warnings)
    if not targets and planner.injection.target_keywords is None:
        native = next((layer.native.experts for layer in layers if layer.native), None)
        if native is None or not planner.attention:
            raise InjectionError(nothing_found(layers, "injection.target_keywords", "FFN Linear"))
        warnings.append(
            f"the FFN carries no LoRA: its experts are fused in {native}; "
            f"injection={InjectionStrategy.native_moe_expert_lora} adapts them"
        )
    planner.refuse_twice(targets)
    refuse_shared({**targets, **planner.attention})
    sites = []
    for where, layer in enumerate(layers):
        sites += planner.attention_sites(layer)
        own = {path: linear for path, linear in targets.items() if path.startswith(f"{layer.path}.")}
        sites += [planner.single(path, layer, linear, where) for path, linear in own.items()]
    return sites
