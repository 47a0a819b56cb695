"""Layers that activation checkpointing runs again in the backward pass, each with what its own forward knew."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lmoe.layers.context import RoutingContext

CHECKPOINT = "_gradient_checkpointing_func"
"""Attribute of Transformers' layers: how they are checkpointed, which is set anew whenever that is switched on."""


class CheckpointInContext:
    """A function that checkpoints a layer, and lets the second run read the routing context as the first one found it.

    So several forwards may come before one backward pass.

    Args:
        checkpoint: torch's, or what stands in its place; gets the layer as a function, and its inputs.
        context: of the model's routers.
    """

    def __init__(self, checkpoint: Callable[..., Any], context: RoutingContext) -> None:
        self.checkpoint, self.context = checkpoint, context

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # what is known becomes part of the graph
            return self.checkpoint(layer, *args, **kwargs)
        if not (torch.is_grad_enabled() or kwargs):  # nothing will run again
            return layer(*args)
        state = self.context.call_state

        def layer_in_context(*inputs: Any, **named: Any) -> Any:
            with self.context.in_call(state):
                return layer(*inputs, **named)

        return self.checkpoint(layer_in_context, *args, **kwargs)


class ContextForCheckpoints:
    """Puts a CheckpointInContext in the place of the function with which each layer of a model is checkpointed.

    Args:
        context: of the model's routers.
    """

    def __init__(self, context: RoutingContext) -> None:
        self.context = context

    def attach(self, model: nn.Module) -> None:
        """Wrap before each forward of the whole model in training: checkpointing may be switched on at any time."""
        model.register_forward_pre_hook(self.wrap_layers)

    def wrap_layers(self, model: nn.Module, inputs: object) -> None:
        """Wrap the function of each layer that has one and is not wrapped; a forward pre-hook of the whole model."""
        if not model.training or torch.compiler.is_compiling():
            return
        for module in model.modules():
            function = getattr(module, CHECKPOINT, None)
            if isinstance(function, CheckpointInContext):
                function = None if function.context is self.context else function.checkpoint
            if function is not None:
                setattr(module, CHECKPOINT, CheckpointInContext(function, self.context))
