"""Routers that are a Linear and one gate."""

from torch import Tensor

from lmoe.layers.routers.base import LinearRouter
from lmoe.ops.gating import Gate, sigmoid_gate, soft_gate, top_k_gate, top_p_gate


class TopKRouter(LinearRouter):
    """Softmax, then the K largest (`top_k_gate`)."""

    def gate(self, logits: Tensor) -> Gate:
        return top_k_gate(
            logits,
            top_k=self.settings.top_k,
            temperature=self.context.temperature,
            scale=self.settings.scale,
            selection_bias=self.selection_bias,
        )


class SoftRouter(LinearRouter):
    """Softmax over all experts (`soft_gate`)."""

    def gate(self, logits: Tensor) -> Gate:
        return soft_gate(logits, temperature=self.context.temperature, scale=self.settings.scale)


class TopPRouter(LinearRouter):
    """The fewest experts that reach top_p (`top_p_gate`)."""

    def gate(self, logits: Tensor) -> Gate:
        return top_p_gate(
            logits, top_p=self.settings.top_p, temperature=self.context.temperature, scale=self.settings.scale
        )


class SigmoidRouter(LinearRouter):
    """Independent scores, then the K largest (`sigmoid_gate`)."""

    def gate(self, logits: Tensor) -> Gate:
        return sigmoid_gate(
            logits,
            top_k=self.settings.top_k,
            temperature=self.context.temperature,
            scale=self.settings.scale,
            selection_bias=self.selection_bias,
        )
