"""The dropout of a model, switched off without leaving training mode (which activation checkpointing needs)."""

from torch import nn

IN_NAMES = "drop"
"""What stands in the names of the probabilities that modules of Transformers hand to functions: attention_dropout,
activation_dropout, residual_dropout, resid_pdrop, layerdrop, …"""


class Dropouts:
    """All dropout of a model, of its backbone and of what was put into it.

    Args:
        model: its modules are looked for now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._given = [
            (module, name, value)
            for module in model.modules()
            for name, value in vars(module).items()
            if isinstance(value, float) and value and _is_dropout(module, name)
        ]

    def turn(self, on: bool) -> None:
        """Let dropout act, or not."""
        for module, name, value in self._given:
            setattr(module, name, value if on else 0.0)


def _is_dropout(module: nn.Module, name: str) -> bool:
    return IN_NAMES in name or (name == "p" and isinstance(module, nn.modules.dropout._DropoutNd))
