"""How many kernels something launches: operators on any machine, the kernels themselves where there is a GPU."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

LAUNCH_NOTHING = frozenset(
    {
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "is_same_size",
        "_unsafe_view",  # a view whose declaration does not say so
    }
)
"""Operators that reserve memory or look at a shape; views are known by their declarations."""


@dataclass(slots=True)
class Launches:
    """Operators that would launch a kernel on a GPU, by name, of each half of a step.

    One operator counts once, though some launch several kernels (`topk`, `logsumexp`, a `scatter` that copies), and a
    `_to_copy` or `clone` counts like a matmul.
    """

    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Number of launches of both halves."""
        return self.forward.total() + self.backward.total()

    def beyond(self, less: "Launches") -> "Launches":
        """What these have more than `less`, which do a part of the same.

        Raises:
            ValueError: `less` has operators that these have not.
        """
        made = Launches(Counter(self.forward), Counter(self.backward))
        made.forward.subtract(less.forward)
        made.backward.subtract(less.backward)
        if any(count < 0 for half in (made.forward, made.backward) for count in half.values()):
            raise ValueError(f"not a part of the other: {made}")
        return Launches(+made.forward, +made.backward)


class _Counting(TorchDispatchMode):
    def __init__(self, into: Counter[str]) -> None:
        super().__init__()
        self.into = into

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if not (_is_view(func) or name in LAUNCH_NOTHING):
            self.into[name] += 1
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    """Whether what comes back is the memory of an argument, unchanged."""
    return any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)


@dataclass(slots=True, frozen=True)
class Pass:
    """One forward and backward.

    Args:
        loss: makes the () loss; autocast is its own affair.
        leaves: whose gradients are dropped before, so that none is added to.
    """

    loss: Callable[[], Tensor]
    leaves: Sequence[Tensor]

    def fresh(self) -> "Pass":
        """The same, without gradients."""
        for leaf in self.leaves:
            leaf.grad = None
        return self


def launches(once: Pass) -> Launches:
    """Operators of a forward and a backward, by declaration."""
    once.fresh().loss().backward()  # some operators run the first time alone
    once.fresh()
    found = Launches()
    with _Counting(found.forward):
        value = once.loss()
    with _Counting(found.backward):
        value.backward()
    return found


def kernels(once: Pass) -> int:
    """CUDA kernels of a forward and a backward by torch.profiler, without copies and fills of memory."""
    once.fresh().loss().backward()
    once.fresh()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        once.loss().backward()
        torch.cuda.synchronize()
    on_gpu = (event.name for event in profiled.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_gpu)
