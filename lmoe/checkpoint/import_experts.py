"""Fill the experts of a freshly injected mixture with what was trained elsewhere."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from lmoe.checkpoint.grow import grow_from
from lmoe.schema.experts_from import experts_from_problems


def import_experts(model: nn.Module, experts_from: Mapping[str, str | Path] | str | Path) -> None:
    """Fill the first experts of a mixture with trained ones.

    """
    if not isinstance(experts_from, Mapping):
        grow_from(model, experts_from)
