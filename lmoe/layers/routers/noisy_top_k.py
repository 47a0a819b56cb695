"""The noisy router of Shazeer."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lmoe.layers.context import RoutingContext
from lmoe.layers.routers.base import RouterSettings
from lmoe.layers.routers.linear import TopKRouter
from lmoe.layers.trace import RoutingTrace
from lmoe.ops.gating import noisy_logits


class NoisyTopKRouter(TopKRouter):
    """top_k with noise whose size a second Linear learns (`noisy_logits`), in training only.

    `noise_weight` starts at zero, as in the paper: the noise then has standard deviation ln 2 everywhere.
    """

    noise_weight: nn.Parameter

    def __init__(self, settings: RouterSettings, *, site: str, trace: RoutingTrace, context: RoutingContext) -> None:
        super().__init__(settings, site=site, trace=trace, context=context)
        self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))

    def perturbed(self, logits: Tensor, x: Tensor) -> Tensor:
        if self.training:
            dtype = self.settings.dtype
            size = linear(x.to(dtype), self.noise_weight.to(dtype))
            logits = noisy_logits(logits, size, torch.randn_like(logits))
        return super().perturbed(logits, x)
