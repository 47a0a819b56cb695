"""p values of several claims that are read together."""

from collections.abc import Mapping

import numpy as np


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p values of a family: some true claim of no difference falls below alpha in at most alpha of studies.

    Sorted p_(1) <= ... <= p_(n): adjusted p_(i) = min(1, max_{j <= i} (n - j + 1) p_(j)) (Holm 1979, Scandinavian
    Journal of Statistics 6). Holds however the claims depend on one another, as arms do that share a baseline.

    Args:
        p_values: of each claim, by name.

    Returns:
        In the order they were given.
    """
    names = list(p_values)
    values = np.array([p_values[name] for name in names], dtype=np.float64)
    order = np.argsort(values, kind="stable")
    factors = np.arange(len(names), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * values[order]), 1.0)
    return {name: float(p) for name, p in zip(names, adjusted, strict=True)}
