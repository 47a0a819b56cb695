"""What all routers share: a site's name, the trace they write to, the context they read."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lmoe.layers.context import RoutingContext
from lmoe.layers.routing import Decision, Routing
from lmoe.layers.trace import RoutingTrace
from lmoe.ops.gating import Gate
from lmoe.ops.router_targets import RowTargets, experts_of_targets, restricted
from lmoe.vocabulary import MixtureScale

DecisionT = TypeVar("DecisionT", bound=Decision)


@dataclass(slots=True, frozen=True, kw_only=True)
class RouterSettings:
    """What a router is made from.

    Args:
        in_features: D.
        num_experts: E.
        top_k: K, where the router has one; else 1, the least that expert dropout leaves.
        top_p: probability to reach, for top_p.
        scale: what the weights add up to.
        dtype: type of the matmul and the gate, whatever autocast says.
        selection_bias: keep a bias that only chooses.
        l1_start: weight of the L1 at the start, for relu.
        fixed_k: every token gets exactly K experts.
        bias: add a learnt bias to the logits.
        device: where its tensors live.
    """

    in_features: int
    num_experts: int
    top_k: int
    top_p: float
    scale: MixtureScale
    dtype: torch.dtype
    selection_bias: bool
    l1_start: float
    fixed_k: bool
    device: torch.device
    bias: bool = False


class Router(nn.Module):
    """Decides the routing weights of one site and writes them into the trace.

    Args:
        settings: what it is made from.
        site: name under which the trace keeps its routing.
        trace, context: those of the model.
    """

    def __init__(self, settings: RouterSettings, *, site: str, trace: RoutingTrace, context: RoutingContext) -> None:
        super().__init__()
        self.settings, self.site, self.trace, self.context = settings, site, trace, context

    def forward(self, x: Tensor, router_logits: Tensor | None = None) -> Decision:
        """Route tokens, without autocast, and record the routing.

        Args:
            x: (..., D) hidden states.
            router_logits: (..., E), where the site has computed them together with its experts.

        Returns:
            The decision for (..., E) experts.
        """
        with torch.autocast(x.device.type, enabled=False):
            routing = self.route(x, router_logits)
        return self.seen(routing)

    def seen(self, decision: DecisionT) -> DecisionT:
        """A decision as the experts get it, less a silenced one; recorded."""
        silenced = self.context.silenced.get(self.site) if self.context.silenced else None
        if silenced is not None:
            decision = decision.without(silenced)
        self.trace.take(self, decision)
        return decision

    def record(self, decision: Decision) -> None:
        """Write into the trace."""
        self.trace.record(self.site, decision, learning=self.learning())

    def learning(self) -> bool:
        """Whether this router has weights and is in training mode."""
        return self.training and next(self.parameters(), None) is not None

    @abstractmethod
    def route(self, x: Tensor, router_logits: Tensor | None) -> Decision:
        """The decision, with autocast off."""


class LinearRouter(Router):
    """z = x W^T (+ b with router_bias), noise and expert dropout on z in training, then a gate.

    The logits that the trace gets are the clean ones.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    selection_bias: Tensor | None

    def __init__(self, settings: RouterSettings, *, site: str, trace: RoutingTrace, context: RoutingContext) -> None:
        super().__init__(settings, site=site, trace=trace, context=context)
        shape = (settings.num_experts, settings.in_features)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=settings.device))
        nn.init.normal_(self.weight, std=0.02)
        zeros = torch.zeros(settings.num_experts, device=settings.device)
        self.bias = nn.Parameter(zeros) if settings.bias else None
        self.register_buffer("selection_bias", zeros.clone() if settings.selection_bias else None)

    @abstractmethod
    def gate(self, logits: Tensor) -> Gate:
        """Weights from (..., E) logits."""

    def route(self, x: Tensor, router_logits: Tensor | None) -> Decision:
        logits = self.logits(x) if router_logits is None else self.biased(router_logits)
        return self.decided(logits, x)

    def decided(self, logits: Tensor, x: Tensor) -> Decision:
        """The decision by clean logits (..., E) of x (..., D)."""
        return Routing.of(logits, self.gated(logits, x))

    def gated(self, logits: Tensor, x: Tensor, targets: Tensor | None = None) -> Gate:
        """The gate of clean logits with what training adds to them; by target, among the experts of each alone.

        By target no expert is dropped: a target may have one alone.

        Args:
            logits: (..., E).
            x: what they were computed from.
            targets: (...) int64, in place of those of the batch's tokens.
        """
        known = self.dealing_targets()
        if known is None:
            return self.gate(self.perturbed(logits, x))
        ids = known.ids.reshape(logits.shape[:-1]) if targets is None else targets
        allowed = experts_of_targets(ids.to(logits.device), known.count, logits.shape[-1])
        return restricted(self.gate(self.noisy(logits, x).masked_fill(~allowed, -torch.inf)), allowed)

    def dealing_targets(self) -> RowTargets | None:
        """The targets of the tokens, where their experts alone may act; else None."""
        return self.context.targets(training=True) if self.training and self.context.by_target else None

    def reads_every_token(self) -> bool:
        """Whether z = x W^T token by token, so that a site may compute it in one matmul with its experts."""
        return True

    def logits(self, x: Tensor) -> Tensor:
        """(..., E) in the router's dtype."""
        return self.biased(linear(x.to(self.settings.dtype), self.weight.to(self.settings.dtype)))

    def biased(self, logits: Tensor) -> Tensor:
        """x W^T with the bias, where there is one."""
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)

    def perturbed(self, logits: Tensor, x: Tensor) -> Tensor:
        """The logits with what training adds to them."""
        logits = self.noisy(logits, x)
        if self.training and self.context.expert_dropout:
            logits = logits.masked_fill(self._left_out(logits), -torch.inf)
        return logits

    def noisy(self, logits: Tensor, x: Tensor) -> Tensor:
        """The logits with the noise of training."""
        noise = self.context.router_noise_now
        if self.training and (isinstance(noise, Tensor) or noise):
            logits = logits + noise * torch.randn_like(logits)
        return logits

    def _left_out(self, logits: Tensor) -> Tensor:
        """(B, 1, E) or (1, E) bool: experts that sit out, drawn for each row; at least K stay."""
        shape = (*logits.shape[:1], *(1 for _ in logits.shape[1:-1])) if logits.dim() > 2 else (1,) * (logits.dim() - 1)
        draw = torch.rand(*shape, logits.shape[-1], device=logits.device)
        staying = min(self.settings.top_k, logits.shape[-1])
        least = draw.topk(staying, dim=-1).values[..., -1:]
        return (draw < self.context.expert_dropout) & (draw < least)
