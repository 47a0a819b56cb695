"""What does not change in training although its neighbours do: the first experts of a model that grows."""

from torch import Tensor, nn

from lmoe.injection.build_site import router_path
from lmoe.injection.record import REWARD_HEAD, injected, mixtures, routers
from lmoe.injection.roles import adapter_buffers, adapter_parameters
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear
from lmoe.rules.routers import ROUTERS

EXTRA_WEIGHTS = tuple(dict.fromkeys(name for router in ROUTERS.values() for name in router.extra_weights))
STACKED = ("lora_A", "lora_B", "lora_A_start", "lora_B_start")
"""Tensors of a mixture whose first dimension is the expert."""
ROUTER_ROWS = ("weight", "bias", *EXTRA_WEIGHTS, "selection_bias")
"""Tensors of a router whose first dimension is the expert."""


def kept_rows(model: nn.Module) -> dict[str, int]:
    """How many of the first rows of each parameter and buffer of the adapters are kept, by name; {} where nothing is.

    Of what has a row for each expert, those of the kept experts; of all else (attention LoRA, a shared expert, a shared
    lora_A, relu's l1_coef), everything, because the kept experts rest on it; of a reward head, which rests on them,
    nothing.
    """
    kept = injected(model).kept_experts
    if not kept:
        return {}
    by_expert = set(expert_rows(model))
    tensors: dict[str, Tensor] = {**adapter_parameters(model), **adapter_buffers(model)}
    return {
        name: kept if name in by_expert else len(tensor) if tensor.ndim else 1
        for name, tensor in tensors.items()
        if name.partition(".")[0] != REWARD_HEAD
    }


def expert_rows(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that have a row for each expert."""
    names = []
    for path, module in mixtures(model):
        one_A = isinstance(module, MixtureLoRALinear) and module.settings.shared_lora_A
        names += [f"{path}.{name}" for name in STACKED if hasattr(module, name) and not (one_A and name == "lora_A")]
    for path, router in routers(model):
        found = [name for name in ROUTER_ROWS if getattr(router, name, None) is not None]
        names += [f"{router_path(path)}.{name}" for name in found]
    return names


def wholly_kept(model: nn.Module) -> set[str]:
    """Names of the adapters' parameters of which nothing may train."""
    parameters = adapter_parameters(model)
    return {name for name, rows in kept_rows(model).items() if name in parameters and rows >= len(parameters[name])}
