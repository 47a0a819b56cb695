"""The weights of the backbone under its own names, whatever was put around them."""

from collections.abc import Mapping

from torch import Tensor, nn

from lmoe.backbones.fingerprint import BaseFingerprint, fingerprint_of
from lmoe.backbones.weight_files import base_parameter_name
from lmoe.injection.build_site import router_path
from lmoe.injection.record import injected
from lmoe.injection.roles import ADAPTER_ROLES, adapter_buffers, parameter_roles
from lmoe.layers.expert_ffn import COPIES


def backbone_state(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """State dict of an injected model without adapters and routers, as the bare backbone would have it.

    Args:
        state: the whole state dict, where somebody has gathered it; None: that of the model.
    """
    roles, buffers = parameter_roles(model), adapter_buffers(model)
    routers = tuple(f"{router_path(name)}." for name in injected(model).plan.routers)
    return {
        base_parameter_name(name): tensor
        for name, tensor in (model.state_dict() if state is None else state).items()
        if roles.get(name) not in ADAPTER_ROLES
        and name not in buffers
        and f".{COPIES}." not in name
        and not name.startswith(routers)
    }


def backbone_fingerprint(model: nn.Module) -> BaseFingerprint:
    """Fingerprint that the backbone of an injected model would have by itself as it is now, trained parts and all."""
    roles = parameter_roles(model)
    return fingerprint_of(
        {
            base_parameter_name(name): parameter
            for name, parameter in model.named_parameters()
            if roles[name] not in ADAPTER_ROLES and f".{COPIES}." not in name
        }
    )
