"""Weights of a base that stay in their safetensors files until somebody needs them: all of one, some rows, a sample.

The parameters of such a model are on the meta device, and a record on the model says where their numbers lie.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

UNREAD = "lmoe_unread"
"""Attribute of a model whose weights are unread: its WeightFiles."""


def base_parameter_name(name: str) -> str:
    """A parameter's name before injection: wrappers keep the original under base_layer."""
    return name.replace(".base_layer.", ".")


@dataclass(slots=True, frozen=True, kw_only=True)
class WeightFiles:
    """Where the weights of a base lie.

    NOTE a file is opened for each weight anew: what safetensors gives is a view of the mapped file, whose pages would
    stay in the memory of the process as long as it is open.

    Args:
        places: the safetensors file of each weight, by its name in the bare backbone.
        tied: names that other weights go by too, each with that under which its file has it.
    """

    places: Mapping[str, Path]
    tied: Mapping[str, str]

    def whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """A weight in a type, on the CPU; in the type of the file a view of it, whose pages are read when used."""
        return self.view(name).to(dtype)

    def view(self, name: str) -> Tensor:
        """A weight as the file has it, mapped."""
        name = self.tied.get(name, name)
        with safe_open(self.places[name], framework="pt") as file:
            return file.get_tensor(name)

    def read_rows(self, name: str, rows: Tensor, first: int) -> None:
        """Fill a tensor, of whatever type and device, with as many rows of a weight as it has, from the first on."""
        name = self.tied.get(name, name)
        with torch.no_grad(), safe_open(self.places[name], framework="pt") as file:
            rows.copy_(file.get_slice(name)[first : first + len(rows)])


def unread(model: nn.Module) -> WeightFiles | None:
    """Where the weights of a model lie that has not read them; None: it has."""
    return getattr(model, UNREAD, None)


@contextmanager
def weights_at(model: nn.Module, path: str, *, read: bool = True) -> Iterator[None]:
    """Let a module have its weights on the CPU inside the block, where the model has not read them; any other model
    stays as it is.

    Args:
        model: bare or injected.
        path: of the module; what is below it gets its weights too.
        read: False: weights of the right shape and type without numbers, which take no memory.
    """
    files, held = unread(model), []
    if files is not None:
        for above, module in model.get_submodule(path).named_modules(prefix=path):
            held += [(module, above, name, p) for name, p in module._parameters.items() if p is not None and p.is_meta]
    for module, above, name, parameter in held:
        weight = base_parameter_name(f"{above}.{name}")
        empty = torch.empty((), dtype=parameter.dtype, device="cpu").expand(parameter.shape)
        numbers = files.whole(weight, parameter.dtype) if files is not None and read else empty
        module._parameters[name] = nn.Parameter(numbers, requires_grad=False)
    try:
        yield
    finally:
        for module, _, name, parameter in held:
            module._parameters[name] = parameter
