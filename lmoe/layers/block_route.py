"""One router's decision for all Linears of a block."""

from typing import Any

import torch
from torch import nn

from lmoe.errors import RoutingError
from lmoe.layers.block_hooks import attach_around
from lmoe.layers.per_call import PerCall
from lmoe.layers.routers import Router
from lmoe.layers.routing import Decision


class BlockRoute:
    """Asks the router with the block's input before the block runs, and hands the decision to the block's Linears.

    Args:
        router: the block's.
    """

    def __init__(self, router: Router) -> None:
        self.router = router
        self._decision: PerCall[Decision] = PerCall()
        self._compiled: Decision | None = None  # of compiled code, which serves one thread

    def attach(self, block: nn.Module) -> None:
        """Decide before each forward of the block, and forget after it."""
        attach_around(block, self._decide, self._forget)

    def decision(self) -> Decision:
        """What the block's router has decided for this forward.

        Raises:
            RoutingError: outside a forward of the block.
        """
        decision = self._compiled if torch.compiler.is_compiling() else self._decision.get()
        if decision is None:
            raise RoutingError(f"{self.router.site}: a Linear of the block was called without the block")
        return decision

    def _decide(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hold(self.router(args[0] if args else kwargs["hidden_states"]))

    def _forget(self, block: nn.Module, args: Any, output: Any) -> None:
        self._hold(None)

    def _hold(self, decision: Decision | None) -> None:
        if torch.compiler.is_compiling():
            self._compiled = decision
        else:
            self._decision.set(decision)
