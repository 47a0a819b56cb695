"""What the routers of one model decided in one forward."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lmoe.errors import RoutingError
from lmoe.layers.routing import Choice, Decision, Routing, routings_of
from lmoe.layers.step_means import StepMeans
from lmoe.ops.expert_similarity import diversity_penalty
from lmoe.ops.router_targets import RowTargets, router_target_loss
from lmoe.ops.routing_losses import importance_cv_loss, load_balancing_loss, masked_mean, relu_l1, router_z_loss
from lmoe.ops.site_groups import sites_together, stacked
from lmoe.vocabulary import LoadBalanceType


@dataclass(slots=True, frozen=True, kw_only=True)
class AuxiliaryLosses:
    """Which auxiliary losses a model has, and how much they weigh.

    Args:
        balance: kind of load_balancing_loss.
        aux_loss_coef: its weight; 0 where the kind has no loss.
        router_z_loss_coef: weight of the router_z_loss.
        l1_top_k: relu only: the mean number of active experts that its L1 aims at.
        diversity_coef: weight of the mean squared cosine between a site's experts; 0: there is no such loss.
        router_target_coef: weight of the cross-entropy of what the routers are taught; 0: there is no such loss.
    """

    balance: LoadBalanceType
    aux_loss_coef: float
    router_z_loss_coef: float
    l1_top_k: int | None = None
    diversity_coef: float = 0.0
    router_target_coef: float = 0.0

    @property
    def moves_after_step(self) -> bool:
        """Whether a selection bias or the coefficient of an L1 moves after each optimizer step."""
        return self.balance is LoadBalanceType.aux_loss_free or self.l1_top_k is not None

    @property
    def weights(self) -> "LossWeights":
        """Weights of the auxiliary losses with all of them on."""
        return LossWeights(
            load_balancing=self.aux_loss_coef,
            router_z=self.router_z_loss_coef,
            relu_l1=True,
            diversity=True,
            router_target=self.router_target_coef,
        )


@dataclass(slots=True, frozen=True, kw_only=True)
class LossWeights:
    """What counts in one forward.

    Args:
        load_balancing, router_z, router_target: weights; 0: the loss is left out of the sum.
        relu_l1, diversity: whether they count, with the weights that the model has for them.
        routers_rest: the losses of the routers' logits are left out, which may be of no states.
    """

    load_balancing: float
    router_z: float
    relu_l1: bool
    diversity: bool
    router_target: float = 0.0
    routers_rest: bool = False


@dataclass(slots=True, frozen=True, kw_only=True)
class ForwardLosses:
    """Auxiliary losses of one forward.

    Args:
        values: each loss before its weight, by name.
        total: what is added to the task loss, or None where nothing counts.
    """

    values: dict[str, Tensor]
    total: Tensor | None


class StackedExperts(Protocol):
    """What holds the stacked factors of several experts."""

    def factors(self) -> tuple[Tensor, Tensor]: ...


class Recorder(Protocol):
    """A router, which writes its decision into the trace."""

    def record(self, decision: Any) -> None: ...


Gathered = list[tuple[Recorder, Any]]
"""Routers with their decisions, in the order in which they decided."""


class RoutingTrace:
    """Routing of every site of one model, by site name.

    Sites write into it while it is on; a second forward (activation checkpointing runs each one twice) overwrites.

    Args:
        losses: kinds and weights of the auxiliary losses.
        has_routers: whether the model has any; without one there is nothing to record, and no auxiliary loss.

    Attributes:
        mixtures: whose experts the diversity penalty compares.
        targets: what the routers are taught of the tokens of the forward.
        gathered: in compiled code, where nothing outside may be written: decisions that are to be recorded behind it.
        step_activity: share of the tokens that use each expert, of the step that `lmoe.balance` will balance by.
        counted_from: version of the weights at the first forward of that step.
    """

    def __init__(self, losses: AuxiliaryLosses, *, has_routers: bool = True) -> None:
        self.losses, self.has_routers = losses, has_routers
        self._decisions: dict[str, Decision] = {}
        self._routing: dict[str, Routing] | None = None
        self._routing_has_graph = False
        self.l1_coefs: dict[str, Tensor] = {}
        self.valid: Tensor | None = None
        self.targets: RowTargets | None = None
        self.on = False
        self._thread = 0
        self.gathered: Gathered | None = None
        self.mixtures: Sequence[StackedExperts] = ()
        self.step_activity = StepMeans()
        self.counted_from = 0
        self._without_graph: set[str] = set()
        self._counted = False

    @contextmanager
    def recording(self, valid: Tensor, targets: RowTargets | None = None) -> Iterator["RoutingTrace"]:
        """Collect the forwards of this thread inside the block.

        Args:
            valid: (B, T) bool or 0/1, False for padding.
            targets: what the routers are taught of these tokens.

        Raises:
            RoutingError: another thread collects.
        """
        me = threading.get_ident()
        if self.on and self._thread != me:
            raise RoutingError(
                "another thread traces this model, which keeps the routing of one forward: let one trace at a time"
            )
        self.clear()
        self.valid, self.targets, self.on, self._thread = valid.bool(), targets, True, me
        try:
            yield self
        finally:
            self.on = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards inside the block are not recorded; what was recorded before stays."""
        on, self.on = self.on, False
        try:
            yield
        finally:
            self.on = on

    def __deepcopy__(self, memo: dict) -> "RoutingTrace":
        """An empty trace with the same losses: what a forward left is not copied, and its graph cannot be."""
        twin = RoutingTrace(self.losses, has_routers=self.has_routers)
        memo[id(self)] = twin
        twin.mixtures = copy.deepcopy(self.mixtures, memo)
        return twin

    @property
    def routing(self) -> dict[str, Routing]:
        """Routing of each site, by site name; what follows from a Choice is computed here, for many sites at once."""
        if self._routing is None or (torch.is_grad_enabled() and not self._routing_has_graph):
            self._routing, self._routing_has_graph = self._whole_routing(), torch.is_grad_enabled()
        return self._routing

    def _whole_routing(self) -> dict[str, Routing]:
        decisions = {site: self._with_the_tokens(decision) for site, decision in self._decisions.items()}
        choices = {site: choice for site, choice in decisions.items() if isinstance(choice, Choice)}
        whole = {site: routing for site, routing in decisions.items() if isinstance(routing, Routing)}
        for group in sites_together({site: choice.gate_logits for site, choice in choices.items()}):
            whole |= dict(zip(group, routings_of([choices[site] for site in group]), strict=True))
        return {site: whole[site] for site in decisions}

    def _with_the_tokens(self, decision: Decision) -> Decision:
        """A decision where the mask of valid tokens lies, and in its dimensions.

        The sites of a model that is spread over several devices lie apart, and some blocks, such as those of a backbone
        with experts of its own, hand theirs the tokens of all rows in one dimension.
        """
        if self.valid is None:
            return decision
        decision = decision.to(self.valid.device)
        flat = decision.routing_weights.dim() == 2 and len(decision.routing_weights) == self.valid.numel()
        return decision.over(self.valid.shape) if flat else decision

    def take(self, router: Recorder, decision: Any) -> None:
        """Called by a router with its decision: have it recorded, now or behind the code that is compiled.

        Args:
            router: whose `record` gets the decision.
        """
        if self.gathered is None:
            router.record(decision)
        else:
            self.gathered.append((router, decision))

    def record(self, site: str, decision: Decision, l1_coef: Tensor | None = None, *, learning: bool = False) -> None:
        """Called by a router in its forward; does nothing while the trace is off.

        Args:
            site: the router's name.
            decision: for its tokens.
            l1_coef: () weight of its L1, for relu.
            learning: whether the router has weights and is in training mode, so that a loss needs its graph.
        """
        if self.on and (torch.compiler.is_compiling() or self._thread == threading.get_ident()):
            self._decisions[site], self._routing = decision, None
            self._counted = False
            if learning and not torch.is_grad_enabled():
                self._without_graph.add(site)
            else:
                self._without_graph.discard(site)
            if l1_coef is not None:
                self.l1_coefs[site] = l1_coef

    def clear(self) -> None:
        """Let go of the tensors (and of the graph behind them)."""
        self._decisions.clear()
        self._routing = None
        self.l1_coefs.clear()
        self._without_graph.clear()
        self.valid, self.targets, self._counted = None, None, False

    def loads(self) -> dict[str, Tensor]:
        """(E,) share of all assignments over valid tokens, of each site; without gradient."""
        return self._means(lambda assignment: assignment)

    def activity(self) -> dict[str, Tensor]:
        """(E,) share of the valid tokens that use each expert, of each site; without gradient."""
        return self._means(lambda assignment: (assignment > 0).float())

    def _means(self, of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        valid, result = self._valid(), {}
        for names, group in self._groups():
            assignment = stacked([r.assignment for r in group]).detach()
            result |= dict(zip(names, masked_mean(of(assignment), valid), strict=True))
        return result

    def load_balancing_loss(self, loads: Mapping[str, Tensor] | None = None) -> Tensor:
        """() mean over sites of each site's own loss: pooling sites would call opposite collapses balanced.

        Args:
            loads: (E,) share of each expert over more tokens than this forward's, by site; None: of this forward.
        """
        valid, parts = self._valid(), []
        for names, group in self._differentiable_groups():
            if self.losses.balance is LoadBalanceType.importance_cv:
                parts.append(importance_cv_loss(stacked([r.routing_weights for r in group]), valid))
            else:
                load = None if loads is None else torch.stack([loads[name] for name in names])
                assignment, probs = stacked([r.assignment for r in group]), stacked([r.probs for r in group])
                parts.append(load_balancing_loss(assignment, probs, valid, load))
        return torch.cat(parts).mean()

    def router_z_loss(self) -> Tensor:
        """() mean over sites."""
        valid = self._valid()
        logits = [stacked([r.router_logits for r in group]) for _, group in self._differentiable_groups()]
        return torch.cat([router_z_loss(of_group, valid) for of_group in logits]).mean()

    def router_target_loss(self) -> Tensor:
        """() mean over sites; 0 where nothing says what the routers are taught."""
        valid, targets = self._valid(), self.targets
        if targets is None:
            return torch.zeros((), device=valid.device)
        logits = [stacked([r.router_logits for r in group]) for _, group in self._differentiable_groups()]
        return torch.cat([router_target_loss(of_group, targets, valid) for of_group in logits]).mean()

    def relu_l1(self) -> Tensor:
        """() mean over sites of coefficient times L1; 0 for routers other than relu."""
        valid, parts = self._valid(), []
        if self.losses.l1_top_k is None:
            return torch.zeros((), device=valid.device)
        for names, group in self._differentiable_groups():
            coefs = torch.stack([self.l1_coefs[name].to(valid.device) for name in names])
            weights = stacked([r.routing_weights for r in group])
            assignment = stacked([r.assignment for r in group])
            parts.append(coefs * relu_l1(weights, assignment, valid, self.losses.l1_top_k))
        return torch.cat(parts).mean()

    def diversity_penalty(self) -> Tensor:
        """() mean over sites of the mean squared cosine between their experts."""
        parts = [diversity_penalty(*module.factors()) for module in self.mixtures]
        at = parts[0].device if self.valid is None else self.valid.device
        return torch.stack([part.to(at) for part in parts]).mean()

    def auxiliary_loss(self) -> Tensor:
        """() aux_loss_coef * load_balancing_loss + router_z_loss_coef * router_z_loss, relu: + its weighted L1, and
        + diversity_coef * diversity_penalty and router_target_coef * router_target_loss where the model has them.

        To be added to the task loss. Where selection biases or an L1 coefficient balance the experts, this also counts
        which experts the tokens use, for `lmoe.balance(model)` after the optimizer step.

        Raises:
            RoutingError: gradients are on, and the forward was recorded without them.
        """
        found = self.forward_losses(self.losses.weights)
        if self.has_routers and self.losses.moves_after_step and torch.is_grad_enabled() and not self._counted:
            self.step_activity.add(self.activity(), self._valid().sum())
            self._counted = True
        return torch.zeros((), device=self._valid().device) if found.total is None else found.total

    def forward_losses(self, weights: LossWeights, loads: Mapping[str, Tensor] | None = None) -> ForwardLosses:
        """All auxiliary losses of the forward that was recorded, and their weighted sum: the one place of this sum.

        Args:
            weights: what counts.
            loads: as in load_balancing_loss.

        Raises:
            RoutingError: gradients are on, and the forward was recorded without them.
        """
        self._valid()
        if not self.has_routers:
            return ForwardLosses(values={}, total=None)
        values, terms = {"load_balancing_loss": (balance := self.load_balancing_loss(loads))}, []
        if weights.load_balancing:
            terms.append(weights.load_balancing * balance)
        if not weights.routers_rest:
            values["router_z_loss"] = z_loss = self.router_z_loss()
            terms += [weights.router_z * z_loss] if weights.router_z else []
        if self.losses.l1_top_k is not None:
            values["relu_l1"] = l1 = self.relu_l1()
            terms += [l1] if weights.relu_l1 else []
        if self.losses.diversity_coef:
            values["diversity_penalty"] = penalty = self.diversity_penalty()
            terms += [self.losses.diversity_coef * penalty] if weights.diversity else []
        if self.targets is not None and not weights.routers_rest:
            values["router_target_loss"] = taught = self.router_target_loss()
            terms += [weights.router_target * taught] if weights.router_target else []
        return ForwardLosses(values=values, total=torch.stack(terms).sum() if terms else None)

    def _differentiable_groups(self) -> Iterator[tuple[list[str], list[Routing]]]:
        """Groups of routings that a loss may be computed from.

        Raises:
            RoutingError: gradients are on, and the forward was recorded without them.
        """
        if self._without_graph and torch.is_grad_enabled():
            raise RoutingError(
                f"the routing of {min(self._without_graph)} was recorded without gradients, so this loss would train "
                "nothing: the forward ran under torch.no_grad(), or with reentrant activation checkpointing. Switch "
                'checkpointing on with {"use_reentrant": False}; to look at the loss only, use torch.no_grad()'
            )
        return self._groups()

    def _groups(self) -> Iterator[tuple[list[str], list[Routing]]]:
        """Sites with equally shaped routing (`sites_together`): what is needed of them stacks to (S, ..., E)."""
        for names in sites_together({name: routing.probs for name, routing in self.routing.items()}):
            yield names, [self.routing[name] for name in names]

    def _valid(self) -> Tensor:
        if self.valid is None or (self.has_routers and not self._decisions):
            raise ValueError("the trace is empty: run a forward inside `with lmoe.trace(model, attention_mask=…)`")
        return self.valid
