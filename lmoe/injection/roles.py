"""Which role a parameter has: asked by phases, optimizer groups, checkpoints and tables."""

from torch import nn

from lmoe.backbones.layout import FFN_NAMES
from lmoe.injection.apply import injected
from lmoe.schema.phase import Role

ADAPTER_ROLES = (Role.router, Role.lora, Role.attn_lora)


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter of an injected model, by name; each has exactly one."""
    wrappers = {site.path: site.role for site in injected(model).plan.sites}
    return {name: _role(name, wrappers) for name, _ in model.named_parameters()}


def _role(name: str, wrappers: dict[str, Role]) -> Role:
    owner, _, leaf = name.rpartition(".")
    if leaf in ("lora_A", "lora_B") and owner in wrappers:
        return wrappers[owner]
    if leaf == "weight" and owner.endswith(".router") and owner.removesuffix(".router") in wrappers:
        return Role.router
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
    """Adapters and routers by name, trainable or not: what checkpoints and adapters hold."""
    roles = parameter_roles(model)
    return {name: p for name, p in model.named_parameters() if roles[name] in ADAPTER_ROLES}
