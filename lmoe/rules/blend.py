"""What is wrong with the settings of a blend before its model is there, in the names that `lmoe.Blend` has for them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from lmoe.vocabulary import BlendRouter

OF_USER = (BlendRouter.weighted, BlendRouter.static)
"""Routers that take weights from the user; the others decide by themselves."""


def router_problems(
    router: str,
    *,
    top_k: int | None = None,
    temperature: float | None = None,
    head: str | Path | None = None,
    weights: bool = False,
) -> list[str]:
    """Settings that cannot be with who decides the weights, or cannot act on it.

    Args:
        router, top_k, temperature, head: as of `lmoe.Blend`.
        weights: whether some were given.
    """
    if router not in tuple(BlendRouter):
        return [f"`router={router}`: allowed: {', '.join(BlendRouter)}"]
    given = {name: value for name, value in (("top_k", top_k), ("temperature", temperature)) if value is not None}
    problems = []
    if head is not None:
        if router != BlendRouter.encoder:
            problems.append(f"`head={head}` has no effect with `router={router}`; leave it out, or use router=encoder")
        problems += [
            f"`{name}={value}` has no effect with `head`, which brings its own; leave it out"
            for name, value in given.items()
        ]
    elif router in OF_USER:
        problems += [
            f"`{name}={value}` has no effect with `router={router}`; leave it out, or use arrow or encoder"
            for name, value in given.items()
        ]
    else:
        problems += _number_problems(top_k, temperature)
    if weights and router not in OF_USER:
        problems.append(f"`weights` have no effect with `router={router}`, which decides by itself; leave them out")
    return problems


def _number_problems(top_k: int | None, temperature: float | None) -> list[str]:
    problems = []
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        problems.append(f"`top_k={top_k!r}` must be a whole number from 1 on")
    if temperature is not None and not (isinstance(temperature, int | float) and 0 < temperature < float("inf")):
        problems.append(f"`temperature={temperature!r}` must be a number above 0")
    return problems


def unknown_experts(names: Iterable[object], known: Sequence[str]) -> list[str]:
    """One problem for each name that no expert has."""
    return [f"no expert {name!r}; there are {', '.join(known) or 'none'}" for name in names if name not in known]
