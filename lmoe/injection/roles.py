"""Which role a parameter has: asked by phases, optimizer groups, checkpoints and tables."""

from torch import Tensor, nn

from lmoe.backbones.head import named_output_layer
from lmoe.backbones.weight_files import base_parameter_name
from lmoe.injection.build_site import ROUTER, router_path
from lmoe.injection.record import REWARD_HEAD, injected, routers, sites
from lmoe.layers.expert_ffn import COPIES
from lmoe.ops.linear_sizes import parameter_counts
from lmoe.vocabulary import Role

ADAPTER_ROLES = (Role.router, Role.lora, Role.attn_lora, Role.reward_head)


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter of an injected model, by name; each has exactly one."""
    record = injected(model)
    plan = record.plan
    owners = {f"{site.path}.": site.role for site in plan.sites}
    routers = {f"{router_path(name)}." for name in plan.routers}
    blocks = tuple(f"{path}." for path in plan.base_ffn)
    replaced = tuple(f"{site.path}.base_layer." for site in plan.sites if site.copied_parameters)
    native = tuple(f"{path}." for path in plan.native_routers)
    output = named_output_layer(model)
    heads = tuple(f"{path}." for path, module in model.named_modules() if module is output)

    def role(name: str) -> Role:
        above = [name[: i + 1] for i, letter in enumerate(name) if letter == "."]
        if any(prefix in routers for prefix in above):
            return Role.router
        if f".{COPIES}." in name:
            return Role.base_ffn
        owner = next((prefix for prefix in above if prefix in owners), None)
        if owner is not None and not name.startswith(f"{owner}base_layer."):
            return owners[owner]
        if record.reward_head and name.startswith(f"{REWARD_HEAD}."):
            return Role.reward_head
        if name.startswith(heads):
            return Role.head
        original = base_parameter_name(name)
        if name.startswith(replaced) or original.startswith(native):  # routers train as their copies, FFNs as theirs
            return Role.backbone
        return Role.base_ffn if original.startswith(blocks) else Role.backbone

    return {name: role(name) for name, _ in model.named_parameters()}


def parameter_layers(model: nn.Module) -> dict[str, int | None]:
    """Index of the decoder layer that each parameter of an injected model is in, by name; None: in none."""
    prefixes = {f"{path}.": index for index, path in enumerate(injected(model).plan.layers)}

    def layer(name: str) -> int | None:
        above = (name[: i + 1] for i, letter in enumerate(name) if letter == ".")
        return next((prefixes[prefix] for prefix in above if prefix in prefixes), None)

    return {name: layer(name) for name, _ in model.named_parameters()}


def role_table(model: nn.Module) -> list[tuple[Role, int, int]]:
    """(role, parameters, trainable parameters) of every role that the model has."""
    roles, numbers = parameter_roles(model), parameter_counts(model)
    counts: dict[Role, list[int]] = {}
    for name, parameter in model.named_parameters():
        entry = counts.setdefault(roles[name], [0, 0])
        entry[0] += numbers[name]
        entry[1] += numbers[name] if parameter.requires_grad else 0
    return [(role, counts[role][0], counts[role][1]) for role in Role if role in counts]


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is saved, by name, trainable or not: adapters, routers, a reward head, and what some phase trains of the
    backbone."""
    roles, saved = parameter_roles(model), {*ADAPTER_ROLES, *injected(model).trained_base}
    return {name: p for name, p in model.named_parameters() if roles[name] in saved}


def adapter_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Saved tensors of adapters and routers that no gradient changes: selection biases, L1 weights, SVD starts."""
    found = {}
    for path, module in [*sites(model), *((router_path(name), router) for name, router in routers(model))]:
        found |= {
            f"{path}.{name}": buffer
            for name, buffer in module.named_buffers()
            if not name.startswith(("base_layer.", f"{ROUTER}."))
        }
    return found
