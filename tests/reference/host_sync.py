"""What would make the host wait for an accelerator, found out on the CPU."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS_A_VALUE = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2")


class NoHostSync(TorchDispatchMode):
    """Refuses operations whose result, or whose shape, depends on values of a tensor, in forward and backward."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        counted = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in READS_A_VALUE or by_mask or counted:
            self.found(name)
        return func(*args, **(kwargs or {}))

    def found(self, name: str) -> None:
        """Called for each such operation."""
        raise AssertionError(f"{name} reads a value back to the host")


class CountHostReads(NoHostSync):
    """Counts them in place of refusing them."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def found(self, name: str) -> None:
        self.reads.append(name)
