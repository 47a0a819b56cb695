"""Routers that decide for each token: those that learn, and the baselines of a study, which do not."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lmoe.errors import RoutingError
from lmoe.layers.context import RoutingContext
from lmoe.layers.routers.base import LinearRouter, Router, RouterSettings
from lmoe.layers.routing import Choice, Decision, Routing
from lmoe.layers.trace import RoutingTrace
from lmoe.ops.gating import (
    Gate,
    at_temperature,
    noisy_logits,
    oracle_gate,
    relu_gate,
    sigmoid_gate,
    soft_gate,
    top_k_gate,
    top_p_gate,
    uniform_gate,
    weights_of_top_k,
)


class TopKRouter(LinearRouter):
    """Softmax, then the K largest (`top_k_gate`)."""

    def gate(self, logits: Tensor) -> Gate:
        return top_k_gate(
            logits,
            top_k=self.settings.top_k,
            temperature=self.context.temperature_now,
            scale=self.settings.scale,
            selection_bias=self.selection_bias,
        )

    def decided(self, logits: Tensor, x: Tensor) -> Decision:
        if self.dealing_targets() is not None:
            return super().decided(logits, x)
        z = at_temperature(self.perturbed(logits, x), self.context.temperature_now)
        settings = self.settings
        weights, indices = weights_of_top_k(
            z, top_k=settings.top_k, scale=settings.scale, selection_bias=self.selection_bias
        )
        return Choice(logits, z, weights, indices)


class SoftRouter(LinearRouter):
    """Softmax over all experts (`soft_gate`)."""

    def gate(self, logits: Tensor) -> Gate:
        return soft_gate(logits, temperature=self.context.temperature_now, scale=self.settings.scale)


class TopPRouter(LinearRouter):
    """The fewest experts that reach top_p (`top_p_gate`)."""

    def gate(self, logits: Tensor) -> Gate:
        return top_p_gate(
            logits, top_p=self.settings.top_p, temperature=self.context.temperature_now, scale=self.settings.scale
        )


class SigmoidRouter(LinearRouter):
    """Independent scores, then the K largest (`sigmoid_gate`)."""

    def gate(self, logits: Tensor) -> Gate:
        return sigmoid_gate(
            logits,
            top_k=self.settings.top_k,
            temperature=self.context.temperature_now,
            scale=self.settings.scale,
            selection_bias=self.selection_bias,
        )


class NoisyTopKRouter(TopKRouter):
    """top_k with noise whose size a second Linear learns (`noisy_logits`), in training only, where noise is on.

    `noise_weight` starts at zero, as in the paper: the noise then has standard deviation ln 2 everywhere.
    """

    noise_weight: nn.Parameter

    def __init__(self, settings: RouterSettings, *, site: str, trace: RoutingTrace, context: RoutingContext) -> None:
        super().__init__(settings, site=site, trace=trace, context=context)
        self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))

    def noisy(self, logits: Tensor, x: Tensor) -> Tensor:
        if self.training:
            dtype = self.settings.dtype
            size = linear(x.to(dtype), self.noise_weight.to(dtype))
            noise = torch.randn_like(logits) if self.context.noise else torch.zeros_like(logits)
            logits = noisy_logits(logits, size, noise)  # NOTE without noise too: DDP waits for the weight's gradient
        return super().noisy(logits, x)


class ReluRouter(LinearRouter):
    """Positive logits are weights (`relu_gate`); `l1_coef` is saved, and moved after each optimizer step."""

    l1_coef: Tensor

    def __init__(self, settings: RouterSettings, *, site: str, trace: RoutingTrace, context: RoutingContext) -> None:
        super().__init__(settings, site=site, trace=trace, context=context)
        self.register_buffer("l1_coef", torch.tensor(settings.l1_start, device=settings.device))

    def gate(self, logits: Tensor) -> Gate:
        return relu_gate(logits, scale=self.settings.scale)

    def record(self, decision: Decision) -> None:
        self.trace.record(self.site, decision, self.l1_coef, learning=self.learning())


class UniformRouter(Router):
    """Every expert alike (`uniform_gate`)."""

    def route(self, x: Tensor, router_logits: Tensor | None) -> Routing:
        like = x[..., 0].detach().to(self.settings.dtype)
        gate = uniform_gate(like, self.settings.num_experts, scale=self.settings.scale)
        return Routing.of(torch.zeros_like(gate.probs), gate)


class RandomRouter(TopKRouter):
    """top_k of a random Linear that is saved and never trains."""

    def __init__(self, settings: RouterSettings, *, site: str, trace: RoutingTrace, context: RoutingContext) -> None:
        super().__init__(settings, site=site, trace=trace, context=context)
        fixed = self.weight.data
        del self.weight
        self.register_buffer("weight", fixed)


class OracleRouter(Router):
    """The expert of the token's domain (`oracle_gate`)."""

    def route(self, x: Tensor, router_logits: Tensor | None) -> Routing:
        experts = self.experts(x.shape[:-1], x.device).clamp(min=0)
        gate = oracle_gate(experts, self.settings.num_experts, self.settings.dtype)
        return Routing.of(torch.zeros_like(gate.probs), gate)

    def experts(self, shape: torch.Size, device: torch.device) -> Tensor:
        """(...) int64: the expert of each token; NO_TARGET may be that of padding.

        Args:
            shape: (B, T), or (B * T,) where a backbone has flattened its tokens.

        Raises:
            RoutingError: nothing says the domains, or the expert of one is left out.
        """
        expert = self.context.expert_of_token(training=self.training)
        if expert is None:
            raise RoutingError(
                "moe.router=oracle does not know the domain of these tokens: name it with "
                "`lmoe.trace(model, attention_mask=…, domains=[…])`"
            )
        expert = self._closed_up(expert.to(device))
        if len(shape) == 1 and expert.dim() == 2:
            expert = expert.expand(-1, shape[0] // expert.shape[0]).reshape(-1)
        return expert.expand(shape)

    def _closed_up(self, expert: Tensor) -> Tensor:
        """The numbers that experts have while `masked_experts` leaves some out, whose place the ones behind them take.

        Raises:
            RoutingError: the expert of a token is left out.
        """
        if not self.context.masked:
            return expert
        masked = torch.tensor(sorted(self.context.masked), device=expert.device)
        if left_out := expert[torch.isin(expert, masked)].unique().tolist():
            raise RoutingError(
                f"moe.router=oracle has no expert for the domain of some of these tokens: masked_experts leaves out "
                f"expert {left_out[0]}; leave the rows of this domain out too, or keep the expert"
            )
        return expert - (expert.unsqueeze(-1) > masked).sum(-1)
