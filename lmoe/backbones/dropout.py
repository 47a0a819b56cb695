"""The dropout of a model, switched off without leaving training mode (which activation checkpointing needs)."""

from torch import nn

ATTENTION = "attention_dropout"
"""What modules of Transformers call the probability that they hand to their attention."""


class Dropouts:
    """All dropout of a model, of its backbone and of what was put into it.

    Args:
        model: its modules are looked for now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(m, m.p) for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p]
        self._attention = [(m, p) for m in model.modules() if isinstance(p := getattr(m, ATTENTION, None), float) and p]

    def turn(self, on: bool) -> None:
        """Let dropout act, or not."""
        for module, p in self._modules:
            module.p = p if on else 0.0
        for module, p in self._attention:
            setattr(module, ATTENTION, p if on else 0.0)
