"""How much tensor operations have to do: a number that a slow minute of the machine does not change."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


class _Written(TorchDispatchMode):
    """Counts the entries that operations make; views, which make none, count as well."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, torch.Tensor):
                self.entries += 1 if one.is_sparse else one.numel()
        return made


def counted_work(call: Callable[[], object]) -> int:
    """Operations of its matmuls, and entries that its operations make; a product with a sparse matrix counts as what it
    makes."""
    flops, written = FlopCounterMode(display=False), _Written()
    with flops, written:
        call()
    return flops.get_total_flops() + written.entries
