"""Decoder layers through torch.compile, each in one graph, with what their routers decide handed out as tensors.

Shapes: B sequences of T tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmoe.errors import BackboneError
from lmoe.layers.checkpoint_in_context import CheckpointInContext
from lmoe.layers.context import RoutingContext
from lmoe.layers.method_replacement import MethodReplacement
from lmoe.layers.trace import Gathered, RoutingTrace

BACKEND = "inductor"
"""What makes code of the graphs."""


def _traced(
    layer: nn.Module, trace: RoutingTrace, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Gathered]:
    """The output of a layer, and what its routers have decided: the function that is compiled."""
    trace.gathered = gathered = []
    output = type(layer).forward(layer, *args, **kwargs)
    trace.gathered = None
    return output, gathered


class LayerCompiler:
    def __init__(self, trace: RoutingTrace, context: RoutingContext, *, recompute: bool, backend: str = "") -> None:
        self.trace, self.context, self.recompute, self.backend = trace, context, recompute, backend or BACKEND
        self.begin()

    def begin(self) -> None:
        own = FunctionType(_traced.__code__.replace(), _traced.__globals__, "layer_and_routing")
        self._function = torch.compile(own, fullgraph=True, backend=self.backend)

    def attach(self, layers) -> None:
        for layer in layers:
            CompiledForward(layer, self).attach()

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a layer in training."""
        state = self.context.call_state

        def run(*inputs: Any) -> Any:
            with self.context.in_call(state):
                return self._run(layer, inputs, kwargs)

        return checkpoint(run, *args, use_reentrant=False) if self.recompute else run(*args)

    def _run(self, layer, args, kwargs):
        mark_lengths(args, kwargs, self.context)
        with torch._dynamo.config.patch(optimize_ddp=False):
            output, gathered = self._function(layer, self.trace, args, kwargs)
        for router, decision in gathered:
            router.record(decision)
        return output


def mark_lengths(args, kwargs, context) -> None:
    tokens = _hidden(args, kwargs).shape[1]
    for tensor in _tensors((args, kwargs)):
        _mark(tensor, tokens)
    info, forward = context.compiled_batch_info, context.compiled_forward
    for found in (info.expert_of_token, None if info.targets is None else info.targets.ids):
        if found is not None:
            _mark(found, tokens)
    rows = [info.rows, None if forward is None else forward.rows]
    for found in rows:
        if found is not None:
            for t in (found.prompt, found.row_ids):
                _mark(t, tokens)
    if forward is not None and forward.of_model is not None:
        for t in forward.of_model._tensors().values():
            _mark(t, tokens)


def _hidden(args, kwargs):
    return args[0] if args else kwargs["hidden_states"]


def _mark(tensor, tokens):
    last = tensor.dim() - 1
    if tensor.dim() > 3:
        places = (last - 1, last)
    else:
        places = (last - 1,) if tensor.is_floating_point() else (last,)
    for place in places:
        if place >= 0 and tensor.shape[place] == tokens:
            torch._dynamo.maybe_mark_dynamic(tensor, place)


def _tensors(found):
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, Mapping):
        for part in found.values():
            yield from _tensors(part)
    elif isinstance(found, tuple | list):
        for part in found:
            yield from _tensors(part)


class CompiledForward(MethodReplacement):
    METHOD = "forward"

    def __init__(self, layer: nn.Module, compiler: LayerCompiler) -> None:
        super().__init__(layer)
        self.compiler = compiler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.model
        if not (layer.training and torch.is_grad_enabled()):
            return self.original(*args, **kwargs)
        return self.compiler(layer, args, kwargs)
