"""A router that the backbone brings along, made trainable, seen by the trace.

Shapes: N tokens of all sequences, which native routers have flattened, E experts, K chosen.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lmoe.layers.context import RoutingContext
from lmoe.layers.routing import Routing, Silenced, silenced_of_tokens
from lmoe.layers.trace import RoutingTrace
from lmoe.ops.gating import NativeScores, native_gate


class NativeRouter(nn.Module):
    """A float32 copy of a native router that trains in its stead; `base_layer` keeps what it was.

    Args:
        base_layer: the native router, which returns (logits or probabilities (N, E), weights (N, K), indices (N, K)).
        scores: what its first output is.
        site: name under which the trace keeps its routing.
        trace, context: those of the model.
    """

    def __init__(
        self, base_layer: nn.Module, *, scores: NativeScores, site: str, trace: RoutingTrace, context: RoutingContext
    ) -> None:
        super().__init__()
        self.base_layer, self.scores, self.site, self.enabled = base_layer, scores, site, True
        self.trace, self.context = trace, context
        self.router = copy.deepcopy(base_layer).float().requires_grad_()

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What the native router returns."""
        if not self.enabled:
            return self.base_layer(*args, **kwargs)
        # NOTE the copy computes in the types of the original: Transformers multiplies what it is given.
        types = {name: value.dtype for name, value in self.base_layer.named_parameters()}
        cast = {name: value.to(types[name]) for name, value in self.router.named_parameters()}
        output, weights, indices = functional_call(self.router, cast, args, kwargs)
        silenced = self.context.silenced.get(self.site) if self.context.silenced else None
        if silenced is not None:
            weights = weights.masked_fill(_chosen(silenced, indices, output.shape), 0)
        decision = output, weights, indices
        self.trace.take(self, decision)
        return decision

    def record(self, decision: tuple[Tensor, Tensor, Tensor]) -> None:
        """Write into the trace.

        Args:
            decision: what the native router has returned.
        """
        if self.trace.on or torch.is_grad_enabled():  # a checkpoint that is computed again must save the same tensors
            routing = Routing.of(*native_gate(*decision, self.scores))
            self.trace.record(self.site, routing, learning=self.training)


def _chosen(silenced: Silenced, indices: Tensor, shape: torch.Size) -> Tensor:
    """(N, K) bool: which of the chosen experts are silenced.

    Args:
        indices: (N, K).
        shape: (N, E).
    """
    if isinstance(silenced, Tensor):
        return silenced_of_tokens(silenced.to(indices.device), shape).gather(1, indices)
    return indices == silenced
