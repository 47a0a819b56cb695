"""Whether Triton can compute the experts here, and the kernels, which are imported when they are asked for alone."""

import importlib
import os
from importlib.util import find_spec
from types import ModuleType

import torch

from lmoe.errors import InjectionError, RoutingError

INTERPRETED = "TRITON_INTERPRET"
"""Variable of the environment with which Triton runs its kernels on the CPU, for tests."""


def require_triton() -> None:
    """Refuse what no kernel can compute.

    Raises:
        InjectionError: the package is not installed.
    """
    if find_spec("triton") is None:
        raise InjectionError(
            "moe.backend=triton needs the package triton, which is not installed: pip install 'lmoe[triton]' "
            "(Linux), or choose auto"
        )


def triton_experts(device: torch.device) -> ModuleType:
    """lmoe.ops.triton_experts, for tensors on a device.

    Raises:
        InjectionError: the package is not installed.
        RoutingError: the device is none that Triton compiles for.
    """
    require_triton()
    if device.type != "cuda" and os.environ.get(INTERPRETED) != "1":
        raise RoutingError(
            f"moe.backend=triton computes on a CUDA GPU, and these experts are on {device.type}; move the model there, "
            "or choose auto"
        )
    return importlib.import_module("lmoe.ops.triton_experts")
