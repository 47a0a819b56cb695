"""How much there is to do: numbers that a slow minute of the machine does not change."""

import cProfile
import pstats
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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


class _Made(TorchDispatchMode):
    """Lists the bytes of each tensor that an operation makes in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        known = {one.untyped_storage().data_ptr() for one in given}
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in known:
                self.sizes.append(one.untyped_storage().nbytes())
        return made


def made_bytes(call: Callable[[], object]) -> list[int]:
    """Bytes of each tensor that its operations make, backward passes included; views and what is written in place are
    none."""
    with _Made() as made:
        call()
    return made.sizes


def counted_work(call: Callable[[], object]) -> int:
    """Operations of its matmuls, and entries that its operations make; a product with a sparse matrix counts as what it
    makes."""
    flops, written = FlopCounterMode(display=False), _Written()
    with flops, written:
        call()
    return flops.get_total_flops() + written.entries


def counted_calls(call: Callable[[], object]) -> int:
    """Functions that it calls, and they call, of Python and of C."""
    profile: Any = cProfile.Profile()
    profile.runcall(call)
    stats: Any = pstats.Stats(profile)
    return stats.total_calls
