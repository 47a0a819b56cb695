"""The weights of the backbone under its own names, whatever was put around them."""

from torch import Tensor, nn

from lmoe.backbones.fingerprint import base_parameter_name
from lmoe.injection.build_site import ROUTER
from lmoe.injection.record import injected
from lmoe.injection.roles import ADAPTER_ROLES, adapter_buffers, parameter_roles
from lmoe.layers.expert_ffn import COPIES


def backbone_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict of an injected model without adapters and routers, as the bare backbone would have it."""
    roles, buffers = parameter_roles(model), adapter_buffers(model)
    routers = tuple(f"{name}.{ROUTER}." for name in injected(model).plan.routers)
    return {
        base_parameter_name(name): tensor
        for name, tensor in model.state_dict().items()
        if roles.get(name) not in ADAPTER_ROLES
        and name not in buffers
        and f".{COPIES}." not in name
        and not name.startswith(routers)
    }
