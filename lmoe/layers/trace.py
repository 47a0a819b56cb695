"""What the routers of one model decided in one forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lmoe.ops.gating import Gate
from lmoe.ops.routing_losses import load_balancing_loss, router_z_loss


@dataclass(slots=True, frozen=True)
class Routing:
    """One site's decision; leading dimensions are those of the tokens, E the experts of the site.

    Args:
        router_logits: (..., E), before the temperature.
        probs: (..., E), sums to 1.
        routing_weights: (..., E), 0 for experts that were not chosen.
        assignment: (..., E), share of the token that each expert gets; no gradient.
    """

    router_logits: Tensor
    probs: Tensor
    routing_weights: Tensor
    assignment: Tensor

    @classmethod
    def of(cls, router_logits: Tensor, gate: Gate) -> "Routing":
        """The logits and what a gate made of them."""
        return cls(router_logits, gate.probs, gate.weights, gate.assignment)


class RoutingTrace:
    """Routing of every site of one model, by site name.

    Sites write into it while it is on; a second forward (activation checkpointing runs each one twice) overwrites.

    Args:
        aux_loss_coef: weight of the load_balancing_loss; 0 for load_balance.type = none.
        router_z_loss_coef: weight of the router_z_loss.
    """

    def __init__(self, aux_loss_coef: float, router_z_loss_coef: float) -> None:
        self.aux_loss_coef, self.router_z_loss_coef = aux_loss_coef, router_z_loss_coef
        self.routing: dict[str, Routing] = {}
        self.valid: Tensor | None = None
        self.on = False

    @contextmanager
    def recording(self, valid: Tensor) -> Iterator["RoutingTrace"]:
        """Collect the forwards inside the block.

        Args:
            valid: (B, T) bool or 0/1, False for padding.
        """
        self.routing.clear()
        self.valid, self.on = valid.bool(), True
        try:
            yield self
        finally:
            self.on = False

    def __deepcopy__(self, memo: dict) -> "RoutingTrace":
        """An empty trace with the same coefficients: what a forward left is not copied, and its graph cannot be."""
        copy = RoutingTrace(self.aux_loss_coef, self.router_z_loss_coef)
        memo[id(self)] = copy
        return copy

    def record(self, site: str, routing: Routing) -> None:
        """Called by a site in its forward; does nothing while the trace is off."""
        if self.on:
            self.routing[site] = routing

    def clear(self) -> None:
        """Let go of the tensors (and of the graph behind them)."""
        self.routing.clear()
        self.valid = None

    def load_balancing_loss(self) -> Tensor:
        """() mean over sites of each site's own loss: pooling sites would call opposite collapses balanced."""
        valid = self._valid()
        return torch.stack([load_balancing_loss(r.assignment, r.probs, valid) for r in self.routing.values()]).mean()

    def router_z_loss(self) -> Tensor:
        """() mean over sites."""
        valid = self._valid()
        return torch.stack([router_z_loss(r.router_logits, valid) for r in self.routing.values()]).mean()

    def auxiliary_loss(self) -> Tensor:
        """() aux_loss_coef * load_balancing_loss + router_z_loss_coef * router_z_loss, to be added to the task loss."""
        return self.aux_loss_coef * self.load_balancing_loss() + self.router_z_loss_coef * self.router_z_loss()

    def _valid(self) -> Tensor:
        if self.valid is None or not self.routing:
            raise ValueError("the trace is empty: run a forward inside `with lmoe.trace(model, attention_mask=…)`")
        return self.valid
