"""Which role a parameter has: asked by phases, optimizer groups, checkpoints and tables."""

from torch import Tensor, nn

from lmoe.backbones.layout import FFN_NAMES
from lmoe.injection.apply import injected, routers, sites
from lmoe.injection.build_site import ROUTER
from lmoe.schema.phase import Role

ADAPTER_ROLES = (Role.router, Role.lora, Role.attn_lora)


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter of an injected model, by name; each has exactly one."""
    plan = injected(model).plan
    owners = {f"{site.path}.": site.role for site in plan.sites}
    routers = {f"{name}.{ROUTER}." for name in plan.routers}
    return {name: _role(name, owners, routers) for name, _ in model.named_parameters()}


def _role(name: str, owners: dict[str, Role], routers: set[str]) -> Role:
    above = [name[: i + 1] for i, letter in enumerate(name) if letter == "."]
    if any(prefix in routers for prefix in above):
        return Role.router
    owner = next((prefix for prefix in above if prefix in owners), None)
    if owner is not None and not name.startswith(f"{owner}base_layer."):
        return owners[owner]
    parts = name.split(".")
    if "lm_head" in parts:
        return Role.head
    return Role.base_ffn if any(part in FFN_NAMES for part in parts) else Role.backbone


def role_table(model: nn.Module) -> list[tuple[Role, int, int]]:
    """(role, parameters, trainable parameters) of every role that the model has."""
    roles = parameter_roles(model)
    counts: dict[Role, list[int]] = {}
    for name, parameter in model.named_parameters():
        entry = counts.setdefault(roles[name], [0, 0])
        entry[0] += parameter.numel()
        entry[1] += parameter.numel() if parameter.requires_grad else 0
    return [(role, counts[role][0], counts[role][1]) for role in Role if role in counts]


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Adapters and routers by name, trainable or not."""
    roles = parameter_roles(model)
    return {name: p for name, p in model.named_parameters() if roles[name] in ADAPTER_ROLES}


def adapter_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Saved tensors of adapters and routers that no gradient changes: selection biases, L1 weights, SVD starts."""
    found = {}
    for path, module in [*sites(model), *((f"{name}.{ROUTER}", router) for name, router in routers(model))]:
        found |= {
            f"{path}.{name}": buffer
            for name, buffer in module.named_buffers()
            if not name.startswith(("base_layer.", f"{ROUTER}."))
        }
    return found
