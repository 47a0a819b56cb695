"""Which sites can be stacked: a few tensor operations for all of them, not for each."""

from collections.abc import Mapping

import torch
from torch import Tensor


def sites_of_one_shape(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of the sites, those with equal shapes in one list; in the order of the mapping.

    Args:
        tensors: one of any shape for each site, by site name.
    """
    groups: dict[torch.Size, list[str]] = {}
    for site, tensor in tensors.items():
        groups.setdefault(tensor.shape, []).append(site)
    return list(groups.values())
