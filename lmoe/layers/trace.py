"""What the routers of one model decided in one forward."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmoe.ops.gating import Gate
from lmoe.ops.routing_losses import importance_cv_loss, load_balancing_loss, masked_mean, relu_l1, router_z_loss
from lmoe.ops.site_groups import sites_of_one_shape
from lmoe.schema.moe import LoadBalanceType


@dataclass(slots=True, frozen=True)
class Routing:
    """One site's decision; leading dimensions are those of the tokens, E the experts of the site, K the chosen ones.

    Args:
        router_logits: (..., E), before noise and temperature; zeros where a router has none.
        probs: (..., E), sums to 1.
        routing_weights: (..., E), 0 for experts that were not chosen.
        assignment: (..., E), share of the token that each expert gets; no gradient.
        expert_indices: (..., K), or None where the number of chosen experts varies.
    """

    router_logits: Tensor
    probs: Tensor
    routing_weights: Tensor
    assignment: Tensor
    expert_indices: Tensor | None = None

    @classmethod
    def of(cls, router_logits: Tensor, gate: Gate) -> "Routing":
        """The logits and what a gate made of them."""
        return cls(router_logits, gate.probs, gate.weights, gate.assignment, gate.expert_indices)

    def without(self, expert: int) -> "Routing":
        """The same with one expert's weight at 0; the others keep theirs."""
        kept = torch.ones_like(self.routing_weights)
        kept[..., expert] = 0
        return replace(self, routing_weights=self.routing_weights * kept)


@dataclass(slots=True, frozen=True, kw_only=True)
class AuxiliaryLosses:
    """Which auxiliary losses a model has, and how much they weigh.

    Args:
        balance: kind of load_balancing_loss.
        aux_loss_coef: its weight; 0 where the kind has no loss.
        router_z_loss_coef: weight of the router_z_loss.
        l1_top_k: relu only: the mean number of active experts that its L1 aims at.
    """

    balance: LoadBalanceType
    aux_loss_coef: float
    router_z_loss_coef: float
    l1_top_k: int | None = None


class RoutingTrace:
    """Routing of every site of one model, by site name.

    Sites write into it while it is on; a second forward (activation checkpointing runs each one twice) overwrites.

    Args:
        losses: kinds and weights of the auxiliary losses.
        has_routers: whether the model has any; without one there is nothing to record, and no auxiliary loss.
    """

    def __init__(self, losses: AuxiliaryLosses, *, has_routers: bool = True) -> None:
        self.losses, self.has_routers = losses, has_routers
        self.routing: dict[str, Routing] = {}
        self.l1_coefs: dict[str, Tensor] = {}
        self.valid: Tensor | None = None
        self.on = False

    @contextmanager
    def recording(self, valid: Tensor) -> Iterator["RoutingTrace"]:
        """Collect the forwards inside the block.

        Args:
            valid: (B, T) bool or 0/1, False for padding.
        """
        self.clear()
        self.valid, self.on = valid.bool(), True
        try:
            yield self
        finally:
            self.on = False

    def __deepcopy__(self, memo: dict) -> "RoutingTrace":
        """An empty trace with the same losses: what a forward left is not copied, and its graph cannot be."""
        copy = RoutingTrace(self.losses, has_routers=self.has_routers)
        memo[id(self)] = copy
        return copy

    def record(self, site: str, routing: Routing, l1_coef: Tensor | None = None) -> None:
        """Called by a router in its forward; does nothing while the trace is off.

        Args:
            site: the router's name.
            routing: what it decided.
            l1_coef: () weight of its L1, for relu.
        """
        if self.on:
            self.routing[site] = routing
            if l1_coef is not None:
                self.l1_coefs[site] = l1_coef

    def clear(self) -> None:
        """Let go of the tensors (and of the graph behind them)."""
        self.routing.clear()
        self.l1_coefs.clear()
        self.valid = None

    def loads(self) -> dict[str, Tensor]:
        """(E,) share of all assignments over valid tokens, of each site; without gradient."""
        return self._means(lambda assignment: assignment)

    def activity(self) -> dict[str, Tensor]:
        """(E,) share of the valid tokens that use each expert, of each site; without gradient."""
        return self._means(lambda assignment: (assignment > 0).float())

    def _means(self, of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        valid, result = self._valid(), {}
        for names, group in self._groups():
            assignment = torch.stack([r.assignment for r in group]).detach()
            result |= dict(zip(names, masked_mean(of(assignment), valid), strict=True))
        return result

    def load_balancing_loss(self, loads: Mapping[str, Tensor] | None = None) -> Tensor:
        """() mean over sites of each site's own loss: pooling sites would call opposite collapses balanced.

        Args:
            loads: (E,) share of each expert over more tokens than this forward's, by site; None: of this forward.
        """
        valid, parts = self._valid(), []
        for names, group in self._groups():
            if self.losses.balance is LoadBalanceType.importance_cv:
                parts.append(importance_cv_loss(torch.stack([r.routing_weights for r in group]), valid))
            else:
                load = None if loads is None else torch.stack([loads[name] for name in names])
                assignment, probs = torch.stack([r.assignment for r in group]), torch.stack([r.probs for r in group])
                parts.append(load_balancing_loss(assignment, probs, valid, load))
        return torch.cat(parts).mean()

    def router_z_loss(self) -> Tensor:
        """() mean over sites."""
        valid = self._valid()
        logits = [torch.stack([r.router_logits for r in group]) for _, group in self._groups()]
        return torch.cat([router_z_loss(stacked, valid) for stacked in logits]).mean()

    def relu_l1(self) -> Tensor:
        """() mean over sites of coefficient times L1; 0 for routers other than relu."""
        valid, parts = self._valid(), []
        if self.losses.l1_top_k is None:
            return torch.zeros((), device=valid.device)
        for names, group in self._groups():
            coefs = torch.stack([self.l1_coefs[name] for name in names])
            weights = torch.stack([r.routing_weights for r in group])
            assignment = torch.stack([r.assignment for r in group])
            parts.append(coefs * relu_l1(weights, assignment, valid, self.losses.l1_top_k))
        return torch.cat(parts).mean()

    def auxiliary_loss(self) -> Tensor:
        """() aux_loss_coef * load_balancing_loss + router_z_loss_coef * router_z_loss (relu: + its weighted L1).

        To be added to the task loss.
        """
        losses, total = self.losses, torch.zeros((), device=self._valid().device)
        if losses.aux_loss_coef:
            total = total + losses.aux_loss_coef * self.load_balancing_loss()
        if losses.router_z_loss_coef:
            total = total + losses.router_z_loss_coef * self.router_z_loss()
        return total if losses.l1_top_k is None else total + self.relu_l1()

    def _groups(self) -> Iterator[tuple[list[str], list[Routing]]]:
        """Sites with equally shaped routing: what is needed of them stacks to (S, ..., E)."""
        for names in sites_of_one_shape({name: routing.probs for name, routing in self.routing.items()}):
            yield names, [self.routing[name] for name in names]

    def _valid(self) -> Tensor:
        if self.valid is None or (self.has_routers and not self.routing):
            raise ValueError("the trace is empty: run a forward inside `with lmoe.trace(model, attention_mask=…)`")
        return self.valid
