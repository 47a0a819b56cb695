"""Sites of a block that read one input, and compute together what stands beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lmoe.layers.block_hooks import attach_around
from lmoe.layers.per_call import PerCall
from lmoe.ops.frozen_linear import Beside, Down, frozen_and_down


class Site(Protocol):
    """What reads an input with others.

    shared_input: the others; None: it reads its input alone.
    lora_A: what is multiplied by the input.
    """

    shared_input: "SharedInput | None"
    lora_A: nn.Parameter

    def beside(self, x: Tensor, dtype: torch.dtype) -> Beside | None:
        """What one function may compute of x with that of other sites; None: it may not.

        Args:
            x: (..., D).
            dtype: type that the branches compute in.
        """
        ...


def joined_by_a_cast(lora_A: Tensor, dtype: torch.dtype) -> bool:
    """Whether a cast joins the factors of several sites on its way, as that of autocast does. Else the copy that joins
    them takes the time of the matmul that it saves, and more for one token.

    Args:
        lora_A: of one of the sites.
        dtype: type that the branches compute in.
    """
    return lora_A.dtype != dtype


@dataclass(slots=True, eq=False)
class _Call:
    """What a forward of the block has computed for sites that it has not called yet.

    Args:
        x: of which; None: nothing yet.
        graph: whether with gradients.
        found: by the place of the site.
    """

    x: Tensor | None = None
    graph: bool = False
    found: dict[int, Down] = field(default_factory=dict)


class SharedInput:
    """The first of the sites that a forward of their block calls computes for those behind it, which take that if they
    get the very same tensor. Else, and outside of a forward of the block, each site computes alone.

    Args:
        sites: in the order in which the block calls them.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = tuple(sites)
        self._call: PerCall[_Call] = PerCall()

    def attach(self, block: nn.Module) -> None:
        """Share in each forward of the block, and forget after it."""
        for site in self.sites:
            site.shared_input = self
        attach_around(block, self._begin, self._forget)

    def down(self, site: Site, x: Tensor, dtype: torch.dtype) -> Down | None:
        """What `frozen_and_down` makes of a site, found by a site before it or made now; None: it may not."""
        call, place, graph = self._call.get(), self.sites.index(site), torch.is_grad_enabled()
        if call is not None and call.x is x and call.graph == graph and place in call.found:
            return call.found.pop(place)
        own = site.beside(x, dtype)
        if own is None:
            return None
        if call is None or call.x is not None or not joined_by_a_cast(site.lora_A, dtype):
            return frozen_and_down(x, [own], dtype)[0]
        others: dict[int, Beside] = {}
        for number in range(place + 1, len(self.sites)):
            if (beside := self.sites[number].beside(x, dtype)) is not None:
                others[number] = beside
        first, *found = frozen_and_down(x, [own, *others.values()], dtype)
        call.x, call.graph, call.found = x, graph, dict(zip(others, found, strict=True))
        return first

    def _begin(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            self._call.set(_Call())

    def _forget(self, block: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._call.set(None)


def down(site: Site, x: Tensor, dtype: torch.dtype) -> Down | None:
    """What `frozen_and_down` makes of a site, alone or with others that read x; None: it may not.

    Args:
        site: which is called with x.
        x: (..., D).
        dtype: type that the branches compute in.
    """
    if torch.compiler.is_compiling():  # it shares and fuses by itself
        return None
    if site.shared_input is not None:
        return site.shared_input.down(site, x, dtype)
    own = site.beside(x, dtype)
    return None if own is None else frozen_and_down(x, [own], dtype)[0]
