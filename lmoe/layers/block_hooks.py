"""Hooks around a block that a compiler finds alike in each layer."""

from collections.abc import Callable

from torch import nn


def attach_around(block: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> None:
    """Call one function before each forward of a block, and another after it, also after one that raises.

    NOTE torch counts hooks over all modules, and a compiler looks at the numbers: with the same ones in each block
    layers share their code.

    Args:
        before: gets the block, its arguments and its keywords.
        after: gets the block, its arguments and its output.
    """
    last = min([0, *block._forward_pre_hooks, *block._forward_hooks])
    handles = (
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(after, always_call=True),
    )
    for number, handle in enumerate(handles, last - len(handles)):
        for hooks in (
            block._forward_pre_hooks,
            block._forward_pre_hooks_with_kwargs,
            block._forward_hooks,
            block._forward_hooks_always_called,
        ):
            if handle.id in hooks:
                hooks[number] = hooks.pop(handle.id)  # type: ignore[assignment]
