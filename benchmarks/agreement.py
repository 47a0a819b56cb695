"""Whether contestants compute the same: equal weights in, equal outputs and gradients out, before anything is timed."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Read = Callable[[nn.Parameter], Tensor]
"""What of a parameter is looked at: its values or its gradient."""

Factors = dict[str, list[Tensor]]
"""Views by a name that all contestants share, one for each expert: A (R, D), B (O, R), and a router (E, D) alone."""

TOLERANCE = 1e-4
"""Largest difference that is let pass, over the largest entry of the same tensor, in float32."""


def values(parameter: nn.Parameter) -> Tensor:
    """Numbers of a parameter, which may be written to."""
    return parameter.data


def gradient(parameter: nn.Parameter) -> Tensor:
    """What the last backward left; zeros where it left nothing, as for an expert that no token chose."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def fill(factors: Factors) -> None:
    """Random numbers, the same for every contestant: unit variance over the square root of the row length.

    So B is far from 0, every expert matters, and every gradient is.
    """
    generator = torch.Generator().manual_seed(0)
    for name in sorted(factors):
        for view in factors[name]:
            view.copy_(torch.randn(view.shape, generator=generator) * view.shape[-1] ** -0.5)


def stacked(factors: Factors) -> dict[str, Tensor]:
    """One copy for each name, in float32."""
    return {name: torch.stack([view.detach().float() for view in views]) for name, views in factors.items()}


def differences(outcomes: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """How far each contestant is from the first one.

    Args:
        outcomes: by contestant: output and gradients by name.

    Returns:
        The largest difference over the largest entry of the same tensor, by contestant.

    Raises:
        AssertionError: one is beyond the tolerance, or has other tensors.
    """
    found: dict[str, float] = {}
    expected = next(iter(outcomes.values()), {})
    for contestant, outcome in outcomes.items():
        assert outcome.keys() == expected.keys(), f"{contestant} has {[*outcome]}, expected {[*expected]}"
        found[contestant] = 0.0
        for name, wanted in expected.items():
            off = ((outcome[name] - wanted).abs().max() / wanted.abs().max()).item()
            assert off <= TOLERANCE, f"{contestant} differs in {name} by {off:.1e} of its largest entry"
            found[contestant] = max(found[contestant], off)
    return found


def in_words(found: Mapping[str, float]) -> str:
    """The agreement as words for a report."""
    others = [f"{name} within {off:.0e}" for name, off in list(found.items())[1:]]
    return f"to {next(iter(found))}: {'; '.join(others)}" if others else "nobody to compare with"
