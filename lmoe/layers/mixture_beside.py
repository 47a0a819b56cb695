"""A mixture of low-rank experts beside a whole block."""

from torch import Tensor, nn

from lmoe.layers.mixture_lora_linear import MixtureLoRALinear, MixtureSettings
from lmoe.layers.routers import Router


class MixtureBeside(MixtureLoRALinear):
    """y = block(x) + scaling * sum_e w_e(x) dropout(x) A_e^T B_e^T.

    Args:
        base_layer: a block that reads (..., D) and returns (..., D), alone or first in a tuple.
        router: one for the block.
        settings: what the mixture is made from.
        width: D.
    """

    def __init__(self, base_layer: nn.Module, router: Router, settings: MixtureSettings, width: int) -> None:
        super().__init__(base_layer, router, settings, (width, width))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        """(..., D) to what the block returns."""
        output = self.base_layer(x)
        if not self.enabled:
            return output
        if isinstance(output, tuple):
            return self.add_experts(output[0].clone(), x), *output[1:]
        return self.add_experts(output.clone(), x)
