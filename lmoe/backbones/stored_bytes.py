"""Bytes that the weights of a backbone are stored in, by its precision."""

from collections.abc import Sequence

from torch import nn

from lmoe.backbones.load import QUANTISED
from lmoe.ops.linear_sizes import is_linear
from lmoe.vocabulary import BackbonePrecision

QUANTISED_BYTES = {BackbonePrecision.int8: 1.0, BackbonePrecision.nf4: 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes a weight. nf4: one byte a block of 64 for its largest value, and a float32 for 256 of those (QLoRA, 2305.14314,
section 3)."""


def storage_bytes(precision: BackbonePrecision) -> int:
    """Bytes of a weight that is not quantised, and of the residual stream."""
    return 4 if precision is BackbonePrecision.float32 else 2


def stored_bytes(precision: BackbonePrecision, model: nn.Module, layers: Sequence[str]) -> dict[str, float]:
    """Bytes of each parameter, by name.

    Args:
        model: the bare backbone, on the meta device or not.
        layers: paths of its decoder layers, whose Linears are quantised.
    """
    inside, plain = tuple(f"{path}." for path in layers), float(storage_bytes(precision))
    quantised = set()
    if precision in QUANTISED:
        linears = (path for path, module in model.named_modules() if is_linear(module))
        quantised = {f"{path}.weight" for path in linears if path.startswith(inside)}
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.numel() * (QUANTISED_BYTES[precision] if name in quantised else plain)
        if precision is BackbonePrecision.int8 and name in quantised:
            found[name] += 4 * parameter.shape[0]  # the scale of each row
    return found
