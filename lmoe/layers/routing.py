"""What a router decided for the tokens of a site.

Shapes: B sequences of T tokens, E experts, K chosen, S sites; `...` any leading token dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from lmoe.ops.gating import Gate, shares
from lmoe.ops.site_groups import stacked

Silenced = int | Tensor
"""Experts of a site whose weight is 0: one by its number, or a mask (B, T, E) of bool, where B and T may be 1."""


def silenced_of_tokens(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask of silenced experts as it fits routing weights.

    Args:
        mask: (B, T, E) bool, where B and T may be 1.
        shape: of the weights: (B, T, E), or (B * T, E) where a backbone has flattened its tokens.

    Returns:
        (B, T, E), or (B * T, E).
    """
    if len(shape) == 3:
        return mask
    rows, tokens, experts = mask.shape
    each = shape[0] // rows if tokens == 1 else tokens
    return mask.expand(max(rows, shape[0] // each), each, experts).reshape(-1, experts)


def less_silenced(weights: Tensor, silenced: Silenced) -> Tensor:
    """Routing weights (..., E) with those of silenced experts at 0."""
    if isinstance(silenced, Tensor):
        return weights.masked_fill(silenced_of_tokens(silenced.to(weights.device), weights.shape), 0)
    kept = torch.ones_like(weights)
    kept[..., silenced] = 0
    return weights * kept


@dataclass(slots=True, frozen=True)
class Routing:
    """One site's decision; leading dimensions are those of the tokens, E the experts of the site, K the chosen ones.

    Args:
        router_logits: (..., E), before noise and temperature; zeros where a router has none.
        probs: (..., E), sums to 1.
        routing_weights: (..., E), 0 for experts that were not chosen.
        assignment: (..., E), share of the token that each expert gets; no gradient.
        expert_indices: (..., K), or None where the number of chosen experts varies.
        acting: (...) bool, tokens on which the experts act; None: all.
    """

    router_logits: Tensor
    probs: Tensor
    routing_weights: Tensor
    assignment: Tensor
    expert_indices: Tensor | None = None
    acting: Tensor | None = None

    @classmethod
    def of(cls, router_logits: Tensor, gate: Gate) -> "Routing":
        """The logits and what a gate made of them."""
        return cls(router_logits, gate.probs, gate.weights, gate.assignment, gate.expert_indices)

    @property
    def acting_weights(self) -> Tensor:
        """(..., E) routing weights, 0 at tokens on which no expert acts."""
        weights = self.routing_weights
        return weights if self.acting is None else weights * self.acting.reshape(*weights.shape[:-1], 1)

    def to(self, device: torch.device) -> "Routing":
        """The same on a device; itself, where it lies there."""
        if self.routing_weights.device == device:
            return self
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    @classmethod
    def joined(cls, parts: Sequence["Routing"]) -> "Routing":
        """The routing of tokens one behind the other, each part of (1, tokens, E)."""
        given = [part.tensors() for part in parts]
        if any("acting" in tensors for tensors in given):
            given = [
                {"acting": torch.ones_like(tensors["probs"][..., 0], dtype=torch.bool), **tensors} for tensors in given
            ]
        everywhere = [name for name in given[0] if all(name in tensors for tensors in given)]
        return cls(**{name: torch.cat([tensors[name] for tensors in given], 1) for name in everywhere})

    def over(self, tokens: torch.Size) -> "Routing":
        """The same with the leading dimensions of as many tokens; itself, where it has them."""
        before = self.routing_weights.dim() - 1
        if self.routing_weights.shape[:before] == tokens:
            return self
        given = self.tensors().items()
        return replace(self, **{name: tensor.reshape(*tokens, *tensor.shape[before:]) for name, tensor in given})

    def tokens(self, first: int, last: int) -> "Routing":
        """The tokens from `first` to before `last` of each sequence, of a routing of (B, T) tokens."""
        return replace(self, **{name: tensor[:, first:last] for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Returns those that are there, by name."""
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in every.items() if tensor is not None}

    def without(self, silenced: Silenced) -> Self:
        """The same with the weights of silenced experts at 0; the others keep theirs."""
        return replace(self, routing_weights=less_silenced(self.routing_weights, silenced))


@dataclass(slots=True, frozen=True)
class Choice:
    """What the experts of a site need of a decision by `top_k_gate`, from which its Routing follows.

    Args:
        router_logits: (..., E), before noise and temperature.
        gate_logits: (..., E), those that the gate took; the same tensor where nothing was done to them.
        routing_weights: (..., E), 0 for experts that were not chosen.
        expert_indices: (..., K).
    """

    router_logits: Tensor
    gate_logits: Tensor
    routing_weights: Tensor
    expert_indices: Tensor

    def to(self, device: torch.device) -> "Choice":
        """The same on a device; itself, where it lies there."""
        if self.routing_weights.device == device:
            return self
        logits = self.router_logits.to(device)
        gate_logits = logits if self.gate_logits is self.router_logits else self.gate_logits.to(device)
        return Choice(logits, gate_logits, self.routing_weights.to(device), self.expert_indices.to(device))

    def over(self, tokens: torch.Size) -> "Choice":
        """The same with the leading dimensions of as many tokens; itself, where it has them."""
        if self.routing_weights.shape[:-1] == tokens:
            return self
        logits = self.router_logits.reshape(*tokens, -1)
        gate_logits = logits if self.gate_logits is self.router_logits else self.gate_logits.reshape(*tokens, -1)
        weights, indices = self.routing_weights.reshape(*tokens, -1), self.expert_indices.reshape(*tokens, -1)
        return Choice(logits, gate_logits, weights, indices)

    def without(self, silenced: Silenced) -> Self:
        """The same with the weights of silenced experts at 0; the others keep theirs."""
        return replace(self, routing_weights=less_silenced(self.routing_weights, silenced))


Decision = Routing | Choice
"""What a site gets of its router: the experts read `routing_weights` and `expert_indices`, which both have."""


def routings_of(choices: Sequence[Choice]) -> list[Routing]:
    """The routing of several sites with equal shapes, in a few operations for all of them.

    Args:
        choices: S of them, with (..., E) and (..., K) tensors.
    """
    logits = stacked([choice.router_logits for choice in choices])
    if all(choice.gate_logits is choice.router_logits for choice in choices):
        probs = torch.softmax(logits, dim=-1)
    else:
        probs = torch.softmax(stacked([choice.gate_logits for choice in choices]), dim=-1)
    assignment = shares(stacked([choice.expert_indices for choice in choices]), probs)
    of_sites = zip(choices, logits.unbind(), probs.unbind(), assignment.unbind(), strict=True)
    return [Routing(z, p, choice.routing_weights, a, choice.expert_indices) for choice, z, p, a in of_sites]
