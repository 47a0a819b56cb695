"""Decoder layers that train as compiled code: each is one graph, which layers of one kind share.

Shapes: B sequences of T tokens, P rows packed into one sequence.
"""

from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.utils.checkpoint import checkpoint

from lmoe.errors import BackboneError
from lmoe.layers.context import RoutingContext
from lmoe.layers.method_replacement import MethodReplacement
from lmoe.layers.trace import Gathered, RoutingTrace

BACKEND = "inductor"
"""What of torch.compile makes code of a graph."""
OPTIONS: dict[str, dict[str, Any]] = {"inductor": {"fallback_random": True}}
"""By backend. Dropout and noise are drawn as without a compiler, so that a run may go on in either way."""


class LayerCompiler:
    """Runs decoder layers as compiled code, and gives the trace what their routers decide.

    Layers share a graph where they are alike in all but their weights; the first, whose input has no gradient, has one
    of its own. It serves batches of all lengths. Inside it nothing is written that outlives it: decisions are among
    its outputs, and the trace gets them behind it, also where a layer runs again in the backward pass.

    Args:
        trace, context: of the model.
        recompute: whether each layer runs again in the backward pass, in place of keeping its activations.
    """

    def __init__(self, trace: RoutingTrace, context: RoutingContext, *, recompute: bool) -> None:
        self.trace, self.context, self.recompute = trace, context, recompute
        self.begin_phase()

    def begin_phase(self) -> None:
        """Forget what was compiled: other parameters train now, and the layers are compiled anew with them.

        NOTE torch keeps compiled code with the code object of a function, so each phase has one of its own.
        """
        own = FunctionType(_output_and_decisions.__code__.replace(), _output_and_decisions.__globals__)
        self._compiled = torch.compile(own, fullgraph=True, backend=BACKEND, options=OPTIONS.get(BACKEND))

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a layer.

        Raises:
            BackboneError: the layer cannot be compiled.
        """
        state = self.context.call_state

        def run(*inputs: Any) -> Any:
            with self.context.in_call(state):
                return self._run(layer, inputs, kwargs)

        return checkpoint(run, *args, use_reentrant=False) if self.recompute else run(*args)

    def _run(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _mark_lengths(args, kwargs, self.context)
        try:
            # NOTE DDP would cut the graph into its buckets; layer by layer gradients leave early enough without.
            with torch._dynamo.config.patch(optimize_ddp=False):
                output, gathered = self._compiled(layer, self.trace, args, kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            why = str(error).strip().split("\n", 1)[0]
            raise BackboneError(
                f"{type(layer).__name__} cannot be compiled: {why}. Set trainer.compile=false to train without"
            ) from error
        for recorder, decision in gathered:
            recorder.record(decision)
        return output


def _output_and_decisions(
    layer: nn.Module, trace: RoutingTrace, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Gathered]:
    """The output of a layer, and what its routers have decided: what is compiled."""
    trace.gathered = gathered = []
    output = type(layer).forward(layer, *args, **kwargs)
    trace.gathered = None
    return output, gathered


class CompiledForward(MethodReplacement):
    """A layer's forward, compiled where it trains: in training mode and with gradients. A copy of the layer has its own
    forward again.

    All else (validation, the reference of preferences, prompts that are read, generation) is too seldom, and changes
    too often, to be compiled; its numbers are those of a run without a compiler, to the last bit. Hooks on the layer
    run as ever, outside of compiled code.

    Args:
        layer: a decoder layer.
        compiler: of its model.
    """

    METHOD = "forward"

    def __init__(self, layer: nn.Module, compiler: LayerCompiler) -> None:
        super().__init__(layer)
        self.compiler = compiler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer's own forward returns."""
        layer = self.model
        if layer.training and torch.is_grad_enabled():
            return self.compiler(layer, args, kwargs)
        return self.original(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.model, self.METHOD)  # of a copy that has no attributes yet, and so its class's


def _mark_lengths(args: tuple[Any, ...], kwargs: dict[str, Any], context: RoutingContext) -> None:
    """Say of all that goes into a layer which dimensions change from batch to batch: T, and P."""
    hidden_BTD = args[0] if args else kwargs["hidden_states"]
    length = hidden_BTD.shape[1]
    for tensor in _tensors((args, kwargs)):
        if tensor.dim() > 3:  # a mask
            _mark(tensor, length, -2, -1)
        else:  # states and what is turned by the position have features behind their tokens
            _mark(tensor, length, -2 if tensor.is_floating_point() else -1)
    facts, forward = context.compiled_batch_info, context.compiled_forward
    if facts.expert_of_token is not None:
        _mark(facts.expert_of_token, length, -1)
    if facts.targets is not None:
        _mark(facts.targets.ids, length, -1)
    for rows in (facts.rows, None if forward is None else forward.rows):
        if rows is not None:
            _mark(rows.prompt, length, -1)
            _mark(rows.row_ids, length, -1)
            for of_rows in (rows.prompt, rows.hashes, rows.turn):
                if of_rows is not None:
                    _mark(of_rows, rows.prompt.shape[1], 1)
    if forward is not None and forward.of_model is not None:
        for tensor in forward.of_model.tensors().values():
            _mark(tensor, length, 1)


def _mark(tensor: Tensor, size: int, *dimensions: int) -> None:
    """Mark dimensions of a tensor as changing, if they are there and of a size; 1 is never one of them for torch."""
    for dimension in dimensions:
        place = dimension % tensor.dim() if -tensor.dim() <= dimension < tensor.dim() else None
        if place is not None and tensor.shape[place] == size > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, place)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in the inputs of a layer."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
