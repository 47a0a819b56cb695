"""Use a mixture as if some of its experts were not there."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from lmoe.errors import InjectionError
from lmoe.injection.kept import ROUTER_ROWS, STACKED
from lmoe.injection.record import injected, routers, sites
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear
from lmoe.layers.routers import Router
from lmoe.rules.strategies import STRATEGIES, with_adapter_experts


@contextmanager
def masked_experts(model: nn.Module, experts: Iterable[int]) -> Iterator[None]:
    """Forwards inside the block compute what the model without these experts computes, bit by bit.

    Routers and stacked factors are narrowed to the other experts before anything is computed (no -inf, no weight of 0):
    to views where the masked ones are the last, else to copies. The others' numbers close up, top_k is at most their
    number, and nothing trains. The oracle takes the expert of each domain by its new number, and refuses a domain whose
    expert is masked (RoutingError). Holds for all threads that use the model.

    Args:
        model: injected with mixture_lora.
        experts: numbers of those to leave out, at every site.

    Raises:
        InjectionError: another strategy, no list of numbers, an expert that some site does not have, or none left.
    """
    if isinstance(experts, int | str):
        raise InjectionError(f"`experts={experts!r}` must be a list of numbers of experts")
    record, masked = injected(model), set(experts)
    if not STRATEGIES[record.injection.strategy].adapter_experts:
        only = with_adapter_experts()
        raise InjectionError(f"masked_experts is for {only}; this model has {record.injection.strategy}")
    staying = {name: _staying(name, count, masked) for name, count in record.plan.routers.items()}
    router_of = {site.path: site.router for site in record.plan.sites}
    modules: list[tuple[MixtureLoRALinear | Router, list[int]]] = [
        (site, staying[router_of[path]]) for path, site in sites(model) if isinstance(site, MixtureLoRALinear)
    ]
    modules += [(router, staying[name]) for name, router in routers(model)]
    before = [(module, module.settings, _tensors(module)) for module, _ in modules]
    fades = [(module, module.fade) for module, _ in modules if isinstance(module, MixtureLoRALinear)]
    context = record.context
    if context.masked:
        raise InjectionError("experts of this model are masked already, here or in another thread: one block at a time")
    context.masked = frozenset(masked)
    try:
        for module, kept in modules:
            _narrow(module, kept)
        yield
    finally:
        for module, settings, tensors in before:
            module.settings = settings  # type: ignore[assignment]
            for name, tensor in tensors.items():
                setattr(module, name, tensor)
        for module, fade in fades:
            module.fade = fade
        context.masked = frozenset()


def _staying(site: str, count: int, masked: set[int]) -> list[int]:
    if wrong := sorted(expert for expert in masked if not 0 <= expert < count):
        raise InjectionError(f"{site} has no expert {wrong[0]}; it has 0 to {count - 1}")
    if len(masked) == count:
        raise InjectionError(f"{site} would have no expert left of its {count}")
    return [expert for expert in range(count) if expert not in masked]


def _tensors(module: MixtureLoRALinear | Router) -> dict[str, Tensor]:
    """What has a row for each expert."""
    names = STACKED if isinstance(module, MixtureLoRALinear) else ROUTER_ROWS
    found = {name: getattr(module, name, None) for name in names}
    if isinstance(module, MixtureLoRALinear) and module.settings.shared_lora_A:
        del found["lora_A"]
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _narrow(module: MixtureLoRALinear | Router, experts: list[int]) -> None:
    count = len(experts)
    for name, tensor in _tensors(module).items():
        rows = _rows(tensor.detach(), experts)
        setattr(module, name, nn.Parameter(rows, requires_grad=False) if isinstance(tensor, nn.Parameter) else rows)
    if isinstance(module, MixtureLoRALinear):
        module.settings = replace(module.settings, num_experts=count)
        if isinstance(module.fade, Tensor):
            module.fade = module.fade[experts]
    else:
        top_k = min(module.settings.top_k, count)
        module.settings = replace(module.settings, num_experts=count, top_k=top_k)


def _rows(tensor: Tensor, experts: list[int]) -> Tensor:
    """The rows of some experts, laid out in memory as all of them were."""
    if experts == list(range(len(experts))):
        return tensor[: len(experts)]
    chosen = torch.tensor(experts, device=tensor.device)
    if tensor.ndim == 3 and not tensor.is_contiguous():  # lora_B, which memory holds as (E, R, O)
        return tensor.transpose(1, 2).index_select(0, chosen).transpose(1, 2)
    return tensor.index_select(0, chosen)
