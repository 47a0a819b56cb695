"""One router's decision for all Linears of a block."""

from typing import Any

from torch import nn

from lmoe.errors import RoutingError
from lmoe.layers.routers import Router
from lmoe.layers.trace import Routing


class BlockRoute:
    """Asks the router with the block's input before the block runs, and hands the decision to the block's Linears.

    Args:
        router: the block's.
    """

    def __init__(self, router: Router) -> None:
        self.router = router
        self._decision: Routing | None = None

    def attach(self, block: nn.Module) -> None:
        """Decide before each forward of the block, and forget after it."""
        block.register_forward_pre_hook(self._decide, with_kwargs=True)
        block.register_forward_hook(self._forget, always_call=True)

    def decision(self) -> Routing:
        """
        Raises:
            RoutingError: outside a forward of the block.
        """
        if self._decision is None:
            raise RoutingError(f"{self.router.site}: a Linear of the block was called without the block")
        return self._decision

    def _decide(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._decision = self.router(args[0] if args else kwargs["hidden_states"])

    def _forget(self, block: nn.Module, args: Any, output: Any) -> None:
        self._decision = None
